"""`--mode predict`: the figures of an evaluation, whole and in order, whatever stopped it or shared it out."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import predict
from config import Settings
from data_utils.parts import Parts
from main import main
from models.checkpoint import load_model_and_config, save_checkpoint
from models.reberta import RecurrentRoBERTa
from tests.cli.conftest import ROOT, TORCHRUN
from tests.conftest import CLS, LABELS, word_tokenizer, write_corpus

DOCUMENTS = 23  # in parts of 5: the last one has 3


def save_model(folder: Path, encoder: Path, labels: tuple[str, ...] = LABELS, seed: int = 0, **changes) -> Path:
    """An untrained model that reads 4 windows of 12 tokens."""
    torch.manual_seed(seed)
    reading: dict[str, Any] = {"window_size": 12, "max_windows": 4}
    problem = changes.pop("problem_type", "single_label")
    maps = {"id2label": dict(enumerate(labels)), "label2id": {name: place for place, name in enumerate(labels)}}
    options = {**reading, **maps, "calibration_temperature": 0.6, **changes, "cls_token_id": CLS}
    options["problem_type"] = f"{problem}_classification"
    settings = Settings(**reading, problem_type=problem).model_dump(mode="json")
    model = RecurrentRoBERTa(encoder=str(encoder), **options)
    torch.nn.init.normal_(model.classifier.weight)  # so that confidences differ
    return save_checkpoint(model, word_tokenizer(), settings, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory, encoder_folder) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "model", encoder_folder)
    save_model(folder / "other", encoder_folder, seed=1)
    several: dict[str, Any] = {"problem_type": "multi_label", "thresholds": [0.4, 0.5, 0.6]}
    save_model(folder / "several", encoder_folder, ("a", "b", "=c"), **several)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a corpus; parts of 5 documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "PART_DOCUMENTS", 5)
    write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS)
    return tmp_path


@pytest.fixture
def run(models, capsys):
    """The command in this process: its exit code and console."""

    def run(arguments: str = "", output: str = "out.csv", inputs: str = "corpus.jsonl", model: str = "model"):
        paths = f"--model_path {models / model} --input_path {inputs} --output_path {output}"
        code = main(f"--mode predict {paths} --device cpu {arguments}".split())
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The numbers of the parts that are written from here on."""
    numbers: list[int] = []
    write = Parts.write

    def spy(self, number, rows, counts):
        numbers.append(number)
        write(self, number, rows, counts)

    monkeypatch.setattr(Parts, "write", spy)
    return numbers


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def objects_of(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def part_names() -> list[str]:
    return sorted(path.name for path in Path("out.csv.parts").glob("part-*"))


@pytest.mark.parametrize(("flags", "size"), [("", 5), ("--mixed_precision", 1000), ("--int8", 5)])
def test_the_figures_of_an_evaluation(run, models, monkeypatch, flags, size):
    monkeypatch.setattr(predict, "PART_DOCUMENTS", size)
    paths = f"--model_path {models}/model --test_path corpus.jsonl --output_dir report --cache_dir cache"
    assert main(f"--mode evaluate {paths} --save_predictions --device cpu {flags}".split()) == 0
    code, console = run(flags)
    assert code == 0, console
    assert run(flags, "out.jsonl")[0] == 0
    expected, rows, objects = rows_of("report/predictions.csv"), rows_of("out.csv"), objects_of("out.jsonl")
    scores = ["confidence", "prob_early", "prob_late"]
    assert list(rows[0]) == ["id", "predicted", *scores, "tokens", "tokens_read"]
    assert list(objects[0]) == ["id", "predicted", "confidence", "probabilities", "tokens", "tokens_read"]
    assert len({row["confidence"] for row in rows}) > 10
    texts = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
    for row, said, wanted, text in zip(rows, objects, expected, texts, strict=True):
        assert row["id"] == said["id"] == wanted["id"]
        assert row["predicted"] == said["predicted"] == wanted["predicted"]
        for name in scores:
            assert abs(float(row[name]) - float(wanted[name])) < 1e-5
        assert [float(row[name]) for name in scores] == [said["confidence"], *said["probabilities"].values()]
        assert int(row["tokens"]) == said["tokens"] == len(text.split())
        assert int(row["tokens_read"]) == said["tokens_read"] == min(len(text.split()), 4 * 10)
    coverage = json.loads(Path("report/metrics.json").read_text())["coverage"]
    summary = json.loads(Path("out.csv.json").read_text())
    assert summary["documents"] == summary["rows"] == DOCUMENTS
    assert summary["tokens_read"] == coverage["tokens_read"] < summary["tokens"] == coverage["tokens_total"]
    assert 0 < summary["documents_cut"] == coverage["documents_truncated"]
    assert summary["failed_windows"] == summary["bad_lines"] == 0
    assert f"{DOCUMENTS} documents, {summary['windows']} windows" in console


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl"])
def test_shards_in_any_order_give_what_one_process_gives(run, made, output):
    assert run(output=f"one{output}")[0] == 0
    assert made == [0, 1, 2, 3, 4]
    for shard, numbers in (("3/3", [2]), ("1/3", [0, 3]), ("2/3", [1, 4])):
        assert not Path(output).exists()
        made.clear()
        code, console = run(f"--shard {shard}", output)
        assert code == 0, console
        assert made == numbers
    assert Path(output).read_bytes() == Path(f"one{output}").read_bytes()
    assert files() == {"corpus.jsonl", output, f"{output}.json", f"one{output}", f"one{output}.json"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_parts_that_are_done(run, made, monkeypatch, number, code):
    assert run(output="whole.csv")[0] == 0
    with monkeypatch.context() as patch:
        predict_part = predict.predict_part

        def stop(reader, part):
            if part.ids[0] == "corpus-10":
                os.kill(os.getpid(), number)
            return predict_part(reader, part)

        patch.setattr(predict, "predict_part", stop)
        got, console = run()
        assert got == code
        assert "Traceback" not in console
    assert part_names() == ["part-0000000", "part-0000001"]
    assert set(os.listdir("out.csv.parts")) - {"lock"} == {"fingerprint.json", *part_names()}
    made.clear()
    assert run()[0] == 0
    assert made == [2, 3, 4]
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_killed_and_started_again(folder, models, start, run, made, monkeypatch):
    monkeypatch.setattr(predict, "PART_DOCUMENTS", 1000)
    write_corpus(folder / "corpus.jsonl", 2300, words=(2, 15))
    paths = f"--model_path {models}/model --input_path corpus.jsonl --output_path out.csv"
    process = start(folder, f"--mode predict {paths} --device cpu")
    deadline = time.monotonic() + 120
    while not part_names() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    there = [int(name.removeprefix("part-")) for name in part_names()]
    assert there[0] == 0
    assert len(there) < 3
    assert run()[0] == 0
    assert made == [number for number in range(3) if number not in there]
    assert run(output="whole.csv")[0] == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(rows_of("out.csv")) == 2300


def test_a_part_is_checked_once_and_put_together_once(run, monkeypatch):
    reads: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    parts = [f"part-{number:07d}" for number in range(5)]
    assert run("--shard 1/2")[0] == 0
    assert [name for name in reads if name in parts] == []
    assert run()[0] == 0
    assert [name for name in reads if name in parts] == [*parts[::2], *parts]


def test_a_missing_and_a_damaged_part_are_made_again(run, made):
    assert run(output="whole.csv")[0] == 0
    assert run("--shard 1/2")[0] == run("--shard 1/2")[0] == 0
    assert part_names() == ["part-0000000", "part-0000002", "part-0000004"]
    parts = [Path("out.csv.parts") / name for name in part_names()]
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    parts[1].unlink()
    parts[2].write_bytes(b"")
    made.clear()
    code, console = run()
    assert code == 0
    assert made == [0, 1, 2, 3, 4]
    assert console.count("is damaged; it is made again") == 2
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.parametrize(
    ("flags", "model", "named"),
    [
        ("", "other", "the model was "),
        ("--max_windows 2", "model", "--max_windows was 4, is 2"),
        ("--mixed_precision", "model", "precision was fp32, is bf16"),
        ("", "model", "input 1 was corpus.jsonl, "),
    ],
)
@pytest.mark.parametrize("state", ["parts", "finished"])
def test_what_was_made_otherwise_is_refused(run, made, flags, model, named, state):
    assert run("--shard 1/2" if state == "parts" else "")[0] == 0
    if named.startswith("input"):
        with Path("corpus.jsonl").open("a") as file:
            file.write('{"text": "w7"}\n')
    before = {path: path.read_bytes() for path in Path().glob("out.csv*/part*" if state == "parts" else "out.csv*")}
    made.clear()
    code, console = run(flags, model=model)
    assert code == 2
    assert named in console
    assert console.count(" was ") - console.count("was made") == 1
    assert made == []
    assert before
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_output_stays_and_any_other_file_is_refused(run, made):
    Path("out.csv").write_text("mine")
    code, console = run()
    assert code == 2
    assert "--output_path out.csv: exists already" in console
    assert Path("out.csv").read_text() == "mine"
    Path("out.csv").unlink()
    assert run()[0] == 0
    before = Path("out.csv").stat().st_ino, Path("out.csv").stat().st_mtime_ns
    made.clear()
    code, console = run("--batch_size 3 --shard 2/2")
    assert code == 0
    assert "out.csv is finished" in console
    assert made == []
    assert (Path("out.csv").stat().st_ino, Path("out.csv").stat().st_mtime_ns) == before
    with Path("out.csv").open("a") as file:
        file.write("more")
    code, console = run()
    assert code == 2
    assert "was changed" in console
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json"}


def test_a_folder_that_is_not_ours_is_left_alone(run):
    Path("out.csv.parts").mkdir()
    Path("out.csv.parts/photo.jpg").write_bytes(b"1")
    code, console = run()
    assert code == 2
    assert "holds photo.jpg" in console
    assert Path("out.csv.parts/photo.jpg").read_bytes() == b"1"


def test_bad_lines(run, made):
    lines = Path("corpus.jsonl").read_text().splitlines()
    bad = ["{broken", '{"text": ""}', '{"text": "w7", "id": "corpus-1"}']
    Path("corpus.jsonl").write_text("\n".join([bad[0], *lines[:12], bad[1], *lines[12:], bad[2]]) + "\n")
    code, console = run(inputs="corpus.jsonl")
    assert code == 3
    assert "corpus.jsonl:1: malformed JSON" in console
    for shard in ("2/2", "1/2"):
        code, console = run(f"--on_bad_lines skip --shard {shard}")
        assert code == 0
    assert "3 bad lines were left out; they are in out.csv.quarantine.jsonl" in console
    quarantine = objects_of("out.csv.quarantine.jsonl")
    assert [row["source"] for row in quarantine] == ["corpus.jsonl:1", "corpus.jsonl:14", "corpus.jsonl:26"]
    assert [row["raw"].strip() for row in quarantine] == bad
    assert [row["id"] for row in rows_of("out.csv")] == [f"corpus-{number}" for number in range(DOCUMENTS)]
    summary = json.loads(Path("out.csv.json").read_text())
    assert (summary["rows"], summary["documents"], summary["bad_lines"]) == (DOCUMENTS + 3, DOCUMENTS, 3)
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json", "out.csv.quarantine.jsonl"}


def test_the_parts_before_a_bad_line_are_kept_for_skip(run, made):
    with Path("corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    assert run()[0] == 3
    assert made == [0, 1, 2, 3]
    assert run("--on_bad_lines skip")[0] == 0
    assert made == [0, 1, 2, 3, 4]
    assert len(rows_of("out.csv")) == DOCUMENTS


def test_labels_are_not_looked_at(run):
    garbage = [None, 7, 1.5, ["early", "early"], {"a": [1]}, "never", "\ud800", True, float("nan")]
    texts = [f"w{number} w9 w30" for number in range(10, 10 + len(garbage))]
    plain = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    labelled = [{**row, "label": label} for row, label in zip(plain, garbage, strict=True)]
    Path("garbage.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    assert run(inputs="plain.jsonl", output="plain.csv")[0] == 0
    code, console = run(inputs="garbage.jsonl", output="garbage.csv")
    assert code == 0, console
    assert Path("garbage.csv").read_bytes() == Path("plain.csv").read_bytes()
    assert len(rows_of("plain.csv")) == len(garbage)


def test_a_folder_of_jsonl_csv_and_parquet(run):
    Path("in").mkdir()
    table = pd.DataFrame([{"text": f"w{10 + number} w8 " * 30} for number in range(7)])
    table.to_csv("in/a.csv", index=False)
    table.to_json("in/b.jsonl", orient="records", lines=True)
    table.assign(label=b"\xff").to_parquet("in/c.parquet")
    code, console = run(inputs="in")
    assert code == 0, console
    rows = rows_of("out.csv")
    starts = [("a.csv:", 2), ("b.jsonl:", 1), ("c.parquet:row ", 1)]
    assert [row["id"] for row in rows] == [f"{name}{first + n}" for name, first in starts for n in range(7)]
    for number in range(7):
        a, b, c = (float(rows[number + shift]["prob_late"]) for shift in (0, 7, 14))
        assert abs(a - b) < 1e-6
        assert abs(a - c) < 1e-6
    assert len({row["prob_late"] for row in rows[:7]}) > 3


def test_several_labels_a_document(run, models):
    thresholds = [0.4, 0.5, 0.6]
    for output in ("out.csv", "out.jsonl"):
        code, console = run(output=output, model="several")
        assert code == 0, console
    rows, objects = rows_of("out.csv"), objects_of("out.jsonl")
    assert len(rows) == DOCUMENTS
    for row, said in zip(rows, objects, strict=True):
        scores = list(said["probabilities"].values())
        assert list(said["probabilities"]) == ["a", "b", "=c"]
        assert [float(row[f"prob_{name}"]) for name in ("a", "b", "=c")] == scores
        chosen = [score >= bound for score, bound in zip(scores, thresholds, strict=True)]
        names = [name for name, yes in zip(("a", "b", "=c"), chosen, strict=True) if yes]
        assert said["predicted"] == names
        cell = "|".join(names)
        assert row["predicted"] == (f"'{cell}" if cell.startswith("=") else cell)
        sure = torch.tensor([score if yes else 1 - score for score, yes in zip(scores, chosen, strict=True)])
        assert float(row["confidence"]) == pytest.approx(float(sure.prod()), abs=1e-6)
    assert len({row["predicted"] for row in rows}) > 1


def test_hostile_ids(run):
    ids = ["=1+1", "@SUM(A1)", "-2", "+3", "\t=4", 'a"b,c\nd', "../../etc", "a\u2028b", "a\rb", "文"]
    Path("hostile.jsonl").write_text(
        "".join(json.dumps({"id": name, "text": f"w{10 + place}"}) + "\n" for place, name in enumerate(ids))
    )
    for output in ("out.csv", "out.jsonl"):
        assert run(inputs="hostile.jsonl", output=output)[0] == 0
    assert [row["id"] for row in rows_of("out.csv")] == [f"'{name}" for name in ids[:5]] + ids[5:]
    assert [row["id"] for row in objects_of("out.jsonl")] == ids


def test_long_documents_make_smaller_parts(run, made, monkeypatch):
    assert run(output="whole.csv")[0] == 0
    made.clear()
    monkeypatch.setattr(predict, "PART_CHARACTERS", 150)
    assert run()[0] == 0
    assert len(made) > 10
    for row, whole in zip(rows_of("out.csv"), rows_of("whole.csv"), strict=True):
        assert row["id"] == whole["id"]
        assert abs(float(row["prob_late"]) - float(whole["prob_late"])) < 1e-5


def test_windows_that_fail(run, models, made, tmp_path):
    model, settings, _ = load_model_and_config(models / "model")
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[7] = torch.inf
    save_checkpoint(model, word_tokenizer(), settings, tmp_path / "failing")
    text = "w8 " * 10 + "w7 " * 5
    rows = [{"id": f"d{number}", "text": text if number == 6 else "w9 w10"} for number in range(8)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, console = run(inputs="in.jsonl", model=str(tmp_path / "failing"))
    assert code == 5
    assert "d6, window 1: its state is not finite" in console
    assert "1 of 9 windows failed, a share over --max_window_failures 0.01" in console
    assert not Path("out.csv").exists()
    assert made == [0, 1]
    assert run("--max_window_failures 0.2", inputs="in.jsonl", model=str(tmp_path / "failing"))[0] == 0
    assert made == [0, 1]
    assert json.loads(Path("out.csv.json").read_text())["failed_windows"] == 1
    rows[6]["text"] = "w7"
    Path("unreadable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, console = run(
        "--max_window_failures 1", inputs="unreadable.jsonl", output="new.csv", model=str(tmp_path / "failing")
    )
    assert code == 5
    assert "logits that are not finite in 1 of 3 documents: d6" in console


def test_an_input_that_changes_meanwhile(run, monkeypatch):
    predict_part = predict.predict_part

    def change(reader, part):
        if part.ids[0] == "corpus-5":
            os.utime("corpus.jsonl", ns=(1, 1))
        return predict_part(reader, part)

    monkeypatch.setattr(predict, "predict_part", change)
    code, console = run()
    assert code == 3
    assert "changed while it was read" in console
    assert part_names() == ["part-0000000"]


def test_another_process_finishes_first(run, monkeypatch):
    finish = predict.finish
    before = []

    def after_another(*arguments):
        monkeypatch.setattr(predict, "finish", finish)
        assert run()[0] == 0
        before.append(Path("out.csv").stat())
        assert not Path("out.csv.parts").exists()
        return finish(*arguments)

    monkeypatch.setattr(predict, "finish", after_another)
    code, console = run()
    assert code == 0, console
    assert [Path("out.csv").stat()] == before
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json"}


def test_a_full_disk(run, made, monkeypatch):
    with monkeypatch.context() as patch:
        predict_part = predict.predict_part

        def fill(reader, part):
            if part.ids[0] == "corpus-5":
                raise OSError(28, "No space left on device")
            return predict_part(reader, part)

        patch.setattr(predict, "predict_part", fill)
        code, console = run()
    assert code == 6
    assert "the disk is full" in console
    assert run()[0] == 0
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mode predict", "--mode predict needs --input_path"),
        ("--mode predict", "--mode predict needs --output_path"),
        ("--mode predict", "--mode predict needs --model_path"),
        ("--mode predict --output_path out.xlsx", "--output_path out.xlsx: must end in .csv or .jsonl"),
        ("--mode predict --shard 5/4", "--shard 5/4: I/N is the I-th of N"),
        ("--mode predict --shard 0/4", "--shard 0/4: string should match"),
        ("--mode predict --sample_data 5", "--sample_data does not go with --mode predict"),
        ("--mode predict --output_dir logs", "--output_dir does not go with --mode predict"),
        ("--mode evaluate --shard 1/4", "--shard belongs to --mode predict, not evaluate"),
        ("--mode train --input_path corpus.jsonl", "--input_path belongs to --mode predict, not train"),
        ("--mode analyze --output_path out.csv", "--output_path belongs to --mode predict, not analyze"),
    ],
)
def test_options_that_contradict(capsys, arguments, message):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_an_output_among_the_inputs(run):
    Path("in").mkdir()
    shutil.move("corpus.jsonl", "in")
    code, console = run(inputs="in", output="in/out.jsonl")
    assert code == 2
    assert "in/out.jsonl: lies in the input's folder" in console


def test_shard_and_torchrun_are_two_ways_to_share(run, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    code, console = run("--shard 1/2")
    assert code == 2
    assert "--shard does not go with torchrun" in console


def test_under_torchrun(folder, models, run, monkeypatch):
    monkeypatch.setattr(predict, "PART_DOCUMENTS", 1000)
    write_corpus(folder / "corpus.jsonl", 2300, words=(2, 15))
    torchrun = [*TORCHRUN, "--nproc-per-node", "2", str(ROOT / "main.py")]
    paths = f"--model_path {models}/model --input_path corpus.jsonl --output_path out.csv"
    done = subprocess.run(
        [*torchrun, *f"--mode predict {paths} --device cpu".split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(f"part {number}: 1000") for number in (1, 2)] == [1, 1]
    assert done.stderr.count("process 1: part 2: 1000 documents") == 1
    assert not Path("out.csv.parts").exists()
    assert run(output="whole.csv")[0] == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(rows_of("out.csv")) == 2300
