"""Each mode and each script through the real command line: exit code, exact files, figures that agree."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from tests.cli.conftest import ROOT
from tests.conftest import MODEL_CODE

REPORT = {
    *("evaluation_results.txt", "metrics.json", "class_metrics.png", "confusion_matrix.png", "reliability.png"),
    "evaluation.log",
}
MODEL = {
    *("config.json", "model.safetensors", "model.pt", "settings.json", "tokenizer.json", "tokenizer_config.json"),
    "training_texts.safetensors",
    *MODEL_CODE,
}
RUN = {"settings.json", "environment.json", "status.json", "train.log", "metrics.jsonl", "learning_curves.png", ".lock"}


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def accuracies(report) -> list[float]:
    """From the three places that tell it."""
    from_json = json.loads((report / "metrics.json").read_text())["accuracy"]
    text = (report / "evaluation_results.txt").read_text()
    [told] = re.findall(r"^accuracy\D*([\d.]+)", text, re.IGNORECASE | re.MULTILINE)
    with (report / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [from_json, float(told), sum(row["label"] == row["predicted"] for row in rows) / len(rows)]


def test_train_and_evaluate(project, trained):
    run = project / "logs" / "first"
    assert names(trained) == MODEL
    assert names(run) == RUN | {"checkpoint-3", "checkpoint-6", "evaluation"}
    assert (run / "learning_curves.png").stat().st_size > 20_000
    assert names(run / "evaluation") == REPORT | {"predictions.csv"}
    from_json, from_text, recomputed = accuracies(run / "evaluation")
    assert from_json == recomputed
    assert abs(from_text - recomputed) < 5.1e-5
    with (run / "evaluation" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"validation-{number}" for number in range(13)]
    assert list(rows[0]) == ["id", "label", "predicted", "confidence", "prob_early", "prob_late"]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert 0 < metrics["coverage"]["tokens_read"] <= metrics["coverage"]["tokens_total"]


def test_evaluate_the_file_and_the_folder(project, trained, command):
    first = project / "logs" / "first" / "evaluation"
    for form, folder in ((trained / "model.pt", "by_file"), (trained, "by_folder")):
        paths = f"--model_path {form} --test_path data/validation --output_dir {folder}"
        done = command(project, f"--mode evaluate {paths} --device cpu")
        assert done.returncode == 0, done.stderr
        assert names(project / folder) == REPORT
        assert "Traceback" not in done.stderr
        for name in ("accuracy", "f1_macro", "log_loss"):
            ours = json.loads((project / folder / "metrics.json").read_text())[name]
            assert abs(ours - json.loads((first / "metrics.json").read_text())[name]) < 1e-6


def test_evaluate_in_int8(project, trained, command):
    paths = f"--model_path {trained} --test_path data/validation --output_dir in8bits"
    done = command(project, f"--mode evaluate {paths} --int8 --device cpu --batch_size 4")
    assert done.returncode == 0, done.stderr
    assert "--int8 reads one document at a time; --batch_size is not used" in done.stderr
    loss = json.loads((project / "in8bits" / "metrics.json").read_text())["log_loss"]
    first = json.loads((project / "logs" / "first" / "evaluation" / "metrics.json").read_text())["log_loss"]
    assert 0 < abs(loss - first) < 0.1


def test_evaluate_script(project, trained, command):
    flags = "--save_predictions --mixed_precision --device cpu"
    paths = f"--model_path {trained}/model.pt --test_path data/validation"
    before = {*(project / "logs").glob("evaluate-*")}
    done = command(project, f"{paths} {flags}", script="evaluate.py")
    assert done.returncode == 0, done.stderr
    [folder] = {*(project / "logs").glob("evaluate-*")} - before
    assert names(folder) == REPORT | {"predictions.csv"}


def test_train_by_epochs(project, command):
    done = command(project, "--config tiny.yaml --mode train --epochs 1 --output_dir logs/epochs")
    assert done.returncode == 0, done.stderr
    assert names(project / "logs" / "epochs") == RUN | {"checkpoint-3"}
    assert names(project / "models" / "saved" / "epochs") == MODEL


def test_on_a_terminal_each_figure_is_said_once_on_a_line_of_its_own(project):
    terminal, console = pty.openpty()
    arguments = "--mode train --config tiny.yaml --epochs 1 --output_dir logs/terminal"
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *arguments.split()],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
        stdout=console,
        stderr=console,
    )
    os.close(console)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the process has ended
        while part := os.read(terminal, 65536):
            said += part
    os.close(terminal)
    assert process.wait() == 0
    text = said.decode()
    assert "3/3" in text  # the bar
    assert "'grad_norm'" not in text
    lines = re.split(r"[\r\n]+", text)
    logged = [line for line in lines if " INFO " in line]
    assert sum("step 3/3, epoch 1.00: loss " in line for line in logged) == 1
    assert all(re.match(r"(\x1b\[A)*\d{4}-\d\d-\d\d ", line) for line in logged), logged


def test_train_steps(project, command):
    budget = "--mode train_steps --total_steps 4 --eval_every 2"
    done = command(project, f"--config tiny.yaml {budget} --output_dir logs/steps")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (project / "logs" / "steps" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 4]


def test_run_epoch_script(project, command):
    whole_run = "mode: train_and_evaluate\nepochs: 9\neval_every: 500\nnum_warmup_steps: 100\noutput_dir: logs/whole\n"
    (project / "whole.yaml").write_text((project / "tiny.yaml").read_text() + whole_run)
    before = set((project / "logs").glob("reberta-*"))
    done = command(project, "--config whole.yaml --sample_data 8", script="run_epoch.py")
    assert done.returncode == 0, done.stderr
    [folder] = set((project / "logs").glob("reberta-*")) - before
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]


def test_run_epoch_script_by_steps(project, command):
    done = command(project, "--config tiny.yaml --mode train_steps --total_steps 2", script="run_epoch.py")
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr


def test_folders_of_texts(project, command, tmp_path):
    """Analysed, trained on, evaluated and predicted, as IMDB's folders are."""
    for split, documents in (("train", 6), ("val", 3)):
        for number in range(2 * documents):
            text = tmp_path / split / ("neg" if number % 2 else "pos") / f"{number}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"w{10 + number} w{20 + number % 2} " * 9)
    config = f"--config {project}/tiny.yaml"
    for arguments in (
        f"{config} --mode analyze --train_path train --val_path val --output_dir analysis",
        f"{config} --mode train_and_evaluate --epochs 1 --train_path train --val_path val --test_path val "
        "--output_dir logs/texts",
        f"{config} --mode predict --model_path models/saved/texts --input_path val --output_path out.csv",
    ):
        done = command(tmp_path, arguments)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text())["splits"]["train"]["labels"] == {
        "neg": 6,
        "pos": 6,
    }
    assert json.loads((tmp_path / "logs" / "texts" / "evaluation" / "metrics.json").read_text())["documents"] == 6
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 6


def test_analyze(project, command):
    done = command(project, "--config tiny.yaml --mode analyze --output_dir analysis")
    assert done.returncode == 0, done.stderr
    assert names(project / "analysis") == {"analysis.json", "analysis.txt", "token_lengths.png", "analysis.log"}
    report = json.loads((project / "analysis" / "analysis.json").read_text())
    assert {name: split["documents"] for name, split in report["splits"].items()} == {
        "train": 24,
        "validation": 10,
        "test": 13,
    }


def test_a_corpus_is_analyzed_as_a_saved_model_cuts_it(project, command, trained):
    done = command(project, f"--mode analyze --model_path {trained / 'model.pt'} --output_dir analysis-of-model")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "analysis-of-model" / "analysis.json").read_text())
    assert report["window_size"] == json.loads((trained / "settings.json").read_text())["window_size"] == 12


def test_help(project, command):
    done = command(project, "--help")
    assert done.returncode == 0
    assert "--window_size" in done.stdout
    assert "Exit codes" in done.stdout


def test_a_signal_saves_and_the_same_command_goes_on(project, command, start):
    """Stopped by SIGTERM, then by Ctrl-C, then run to its end: the weights of a run that nothing stopped."""
    flags = "--config tiny.yaml --mode train --epochs 15 --dropout 0.1 --ema_decay 0.9 --output_dir logs"
    metrics = project / "logs" / "stopped" / "metrics.jsonl"
    for number, code, after in ((signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 25)):
        process = start(project, f"{flags}/stopped")
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") > after) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, console = process.communicate(timeout=120)
        assert process.returncode == code, console
        assert "which is saved; the same command" in console
        assert "Traceback" not in console
    for name in ("stopped", "whole"):
        done = command(project, f"{flags}/{name}")
        assert done.returncode == 0, done.stderr
    assert (project / "logs" / "stopped" / "train.log").read_text().count("going on from") == 2
    ends = [project / "logs" / name / "checkpoint-45" / "ema.safetensors" for name in ("stopped", "whole")]
    stopped, whole = map(load_file, ends)
    assert len(whole) > 40
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
