"""Two processes under torchrun, on a CPU by gloo: what one process gives, once, and no hanging."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests import training
from tests.cli.conftest import ROOT, TORCHRUN
from tests.conftest import write_corpus

TWO = (
    "--config tiny.yaml --mode train --epochs 6 --eval_every 5 --batch_size 4 --dropout 0 --optimizer_type sgd "
    "--learning_rate 0.05 --probe_epochs 1"
)


@pytest.fixture(scope="module")
def start_two(start):
    """Start a script in two processes, in a folder."""

    def start_two(folder: Path, arguments: str, script: str = "main.py") -> subprocess.Popen:
        return start(folder, arguments, script, (*TORCHRUN, "--nproc-per-node", "2"))

    return start_two


@pytest.fixture(scope="module")
def run_two(start_two):
    """The same, and wait for its end: exit code and console."""

    def run(folder: Path, arguments: str) -> tuple[int, str]:
        process = start_two(folder, arguments)
        _, console = process.communicate(timeout=300)
        return process.returncode, console

    return run


@pytest.fixture(scope="module")
def two(project, run_two) -> Path:
    """The run folder of a training by two processes, 18 steps."""
    code, console = run_two(project, f"{TWO} --output_dir logs/two")
    assert code == 0, console
    return project / "logs" / "two"


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    training.assert_same(training.weights(first), training.weights(second), tolerance)


def trained_a_little(process: subprocess.Popen, run: Path) -> tuple[list[psutil.Process], psutil.Process]:
    """Wait for three rows of metrics; the processes that torchrun started, and the one of rank 1."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    [second] = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    return workers, second


def test_two_processes_train_as_one(project, two, command):
    """The same updates of eight documents; what is written and said once comes from process 0."""
    done = command(project, f"{TWO} --output_dir logs/one".replace("--batch_size 4", "--batch_size 8"))
    assert done.returncode == 0, done.stderr
    one = project / "logs" / "one"
    assert_same(two / "checkpoint-18", one / "checkpoint-18", 1e-5)
    assert_same(project / "models" / "saved" / "two", project / "models" / "saved" / "one", 1e-5)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (two, one)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    losses = [[row[name] for row in table for name in ("loss", "eval_loss") if name in row] for table in rows]
    assert len(losses[0]) == 18 + 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (two / "train.log").read_text().count("step 3/18") == 1
    assert {path.name for path in (two / "checkpoint-18").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    status = json.loads((two / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"], status["exit_code"]) == ("finished", 18, 18, 0)


def test_the_end_leaves_no_thread_of_the_group(project, start_two):
    """One that releases a tensor while the interpreter ends would abort the process, now and then."""
    script = project / "then_threads.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "import torch.distributed, main\n"
        "destroy = torch.distributed.destroy_process_group\n"
        "gloo = lambda: sum('gloo' in f.read_text() for f in Path('/proc/self/task').glob('*/comm'))\n"
        "torch.distributed.destroy_process_group = lambda: (print('threads before:', gloo()), destroy())\n"
        "code = main.main()\n"
        "print('threads after:', gloo(), flush=True)\n"
        "sys.exit(code)\n"
    )
    arguments = f"{TWO} --epochs 1 --output_dir logs/threads"
    process = start_two(project, arguments, str(script))
    said, console = process.communicate(timeout=300)
    assert process.returncode == 0, console
    assert len(re.findall("threads before: [1-9]", said)) == 2
    assert said.count("threads after: 0") == 2


def test_two_processes_evaluate_as_one(project, two, command, run_two):
    options = "--mode evaluate --model_path models/saved/two/model.pt --test_path data/validation --save_predictions"
    code, console = run_two(project, f"{options} --device cpu --output_dir logs/by-two")
    assert code == 0, console
    done = command(project, f"{options} --device cpu --output_dir logs/by-one")
    assert done.returncode == 0, done.stderr
    reports = [json.loads((project / "logs" / name / "metrics.json").read_text()) for name in ("by-two", "by-one")]
    assert reports[0]["documents"] == 13
    assert reports[0]["log_loss"] == pytest.approx(reports[1].pop("log_loss"), abs=1e-6)
    assert reports[0]["by_length"] == reports[1]["by_length"]
    tables = [list(csv.reader((project / "logs" / name / "predictions.csv").open())) for name in ("by-two", "by-one")]
    assert [row[:3] for row in tables[0]] == [row[:3] for row in tables[1]]
    assert len(tables[0]) == 14
    assert console.count("accuracy") == 1


def test_a_signal_to_one_process_stops_both_and_they_go_on(project, two, start_two, run_two, command):
    """The weights, and the rows, of the run that nothing stopped. Another number of processes is refused."""
    arguments = f"{TWO} --output_dir logs/two-stopped"
    process = start_two(project, arguments)
    _, second = trained_a_little(process, project / "logs" / "two-stopped")
    second.send_signal(signal.SIGTERM)
    _, console = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"stopped at step (\d+) of 18, which is saved; the same command", console), console
    assert console.count(" ERROR ") == 1
    status = json.loads((project / "logs" / "two-stopped" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    done = command(project, arguments)
    assert done.returncode == 2
    assert "it had 2 processes, now 1" in done.stderr
    code, console = run_two(project, arguments)
    assert code == 0, console
    assert "going on from logs/two-stopped/checkpoint-" in console
    assert_same(project / "logs" / "two-stopped" / "checkpoint-18", two / "checkpoint-18")


def test_a_document_that_fails_in_one_process_ends_both_with_one_message(project, run_two, encoder_folder):
    encoder = project / "poisoned"
    shutil.copytree(encoder_folder, encoder)
    state = load_file(encoder / "model.safetensors")
    state["embeddings.word_embeddings.weight"][50] = float("nan")
    save_file(state, encoder / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in (project / "data" / "train" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"].replace("w50", "w51")
    rows[5]["text"] = "w50 " * 9
    (project / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for probe, message in (
        (0, r"step \d+: the loss is not finite, .* documents: train-5\."),
        (1, "logits that are not finite in 1 of 24 documents: train-5;"),
    ):
        flags = f"--model_path {encoder} --train_path bad.jsonl --output_dir logs/bad --probe_epochs {probe}"
        code, console = run_two(project, f"{TWO} {flags}")
        assert code != 0
        assert console.count(" ERROR ") == 1
        assert re.search(message, console), console
    assert json.loads((project / "logs" / "bad" / "status.json").read_text())["state"] == "failed"


def test_wrong_input_is_reported_once_and_before_training(project, run_two):
    write_corpus(project / "one.jsonl", 1)
    for arguments, message in (
        ("--epochs 0", "--epochs 0: input should be greater"),
        ("--val_path one.jsonl --output_dir logs/single", "one.jsonl: 1 documents cannot be shared by 2 processes"),
        (
            "--mode train_and_evaluate --test_path one.jsonl --output_dir logs/single-test",
            "one.jsonl: 1 documents cannot be shared by 2 processes",
        ),
        ("--train_path nowhere.jsonl --output_dir logs/nowhere", "nowhere.jsonl"),
    ):
        code, console = run_two(project, f"--config tiny.yaml {arguments}")
        assert code != 0
        assert console.count(" ERROR ") == 1, console
        assert message in console
        assert "INFO step" not in console


def test_a_process_that_is_killed_ends_the_other(project, start_two):
    """The SIGTERM that torchrun then sends to the other finds it on its way out, and adds nothing."""
    script = project / "slow_to_leave.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import time, main, processes\n"
        "leave = processes.StopSignals.__exit__\n"
        "processes.StopSignals.__exit__ = lambda *arguments: (leave(*arguments), time.sleep(1))[0]\n"
        "sys.exit(main.main())\n"
    )
    arguments = f"{TWO} --epochs 400 --output_dir logs/two-killed".replace("--epochs 6 ", "")
    process = start_two(project, arguments, str(script))
    workers, second = trained_a_little(process, project / "logs" / "two-killed")
    second.kill()
    _, console = process.communicate(timeout=120)
    assert process.returncode != 0
    assert console.count(" ERROR ") == 0, console  # torchrun tells of the one that was killed
    assert "another process has ended" in console
    assert psutil.wait_procs(workers, timeout=10)[1] == []
