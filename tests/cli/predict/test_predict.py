"""`--mode predict`: the figures of an evaluation, whole and in order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import predict
from main import main
from models.checkpoint import load_model_and_config, save_checkpoint
from tests.cli.predict.conftest import DOCUMENTS, files, objects_of, rows_of
from tests.conftest import word_tokenizer


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
    Path("corpus.jsonl").write_text("\n".join(lines) + "\n")
    Path("out.csv").unlink()
    assert run()[0] == 0
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json"}


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
    ids = ["=1+1", "@SUM(A1)", "-2-1", "+3+1", "\t=4", "-2", 'a"b,c\nd', "../../etc", "a\u2028b", "a\rb", "文"]
    Path("hostile.jsonl").write_text(
        "".join(json.dumps({"id": name, "text": f"w{10 + place}"}) + "\n" for place, name in enumerate(ids))
    )
    for output in ("out.csv", "out.jsonl"):
        assert run(inputs="hostile.jsonl", output=output)[0] == 0
    assert [row["id"] for row in rows_of("out.csv")] == [f"'{name}" for name in ids[:5]] + ids[5:]
    assert [row["id"] for row in objects_of("out.jsonl")] == ids


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
        ("--mode predict --shard 0/4", "--shard 0/4: must look like"),
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
