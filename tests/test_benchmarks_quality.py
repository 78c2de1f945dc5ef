"""benchmarks/quality.py: what is run in which order, restarts, failures, and a real cell."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks import common, quality, report, synthetic_suite
from benchmarks import quality_protocol as protocol
from benchmarks.corpora import SPLITS, Document, load_split, write_fold
from command_line import parse_settings
from data_utils.windows import SPECIALS
from tests.test_benchmarks_synthetic_suite import tokenizer_of
from utils import ConfigError, TrainingError

OPTIONS = {"epochs": 1, "window_size": 12, "max_windows": 4, "train_windows": 2, "batch_size": 8, "probe_epochs": 0}


def cell(corpus: str = "sotu-era", model: str = "reberta", **changes: Any) -> dict[str, Any]:
    named = {"table": "leaderboard", "corpus": corpus, "model": model, "variant": "", "fold": 0, "seed": 0}
    how = {"learning_rate": 1e-4, "encoder": "e", "options": "--epochs 8 --alpha 1"}
    return {**named, **how, **changes}


def row(right: str = "10", loss: float = 0.5, **changes: Any) -> dict[str, Any]:
    scores: dict[str, Any] = {
        "accuracy": right.count("1") / len(right),
        "f1_macro": 0.5,
        "accuracy_long": None,
        "log_loss": 0.7,
    }
    scores |= {
        "ece": 0.1,
        "ece_uncalibrated": 0.2,
        "right": right,
        "share_read": 0.5,
        "seconds": 90.0,
        "parameters": 1234567,
    }
    chosen = {"best_epoch": 3.0, "validation_loss": loss, "validation_accuracy": 0.6}
    return {**scores, **chosen, "session": "today", **cell(**changes)}


def test_every_study_has_options_that_the_command_line_takes():
    studies = [study for group in protocol.studies() for study in group]
    names = [study.name for study in studies]
    assert len(set(names)) == len(names)
    for study in studies:
        if study.model != protocol.LINEAR:
            parse_settings(["--mode", "train", *study.options.split()])


@pytest.mark.parametrize("name", protocol.VARIANTS)
def test_a_variant_reads_as_much_of_a_document(name):
    """As many tokens as without it, in windows of another size or overlap, too."""
    settings = parse_settings(["--mode", "train", *protocol.ablation_study(name).options.split()])
    stride = settings.window_size - SPECIALS - settings.window_overlap
    longest = 2 * max(synthetic_suite.DISTANCES) * (synthetic_suite.WINDOW_SIZE - SPECIALS)
    assert settings.window_overlap + settings.max_windows * stride >= longest


@pytest.fixture
def small(monkeypatch) -> None:
    """Two corpora, two models and the linear one, two rates; one variant, one synthetic task."""
    corpora = {
        "sotu-era": protocol.Corpus("sotu-era", ((0, 0), (1, 0)), OPTIONS),
        "news": protocol.Corpus("20news", ((0, 0), (0, 1)), OPTIONS, long_only=True),
    }
    models = {name: protocol.MODELS[name] for name in ("reberta", "head", "tfidf-svm")}
    models |= {name: models[name]._replace(grid=(3e-5, 1e-4)) for name in ("reberta", "head")}
    changes = {"CORPORA": corpora, "MODELS": models, "ABLATED": "order"}
    changes |= {"VARIANTS": {"num_repeats 2": {"num_repeats": 2}}}
    changes |= {"SYNTHETIC_MODELS": {("reberta", ""): protocol.Model({"model_type": "reberta"}, (1e-3,))}}
    for name, value in changes.items():
        monkeypatch.setattr(protocol, name, value)


@pytest.fixture
def fake(monkeypatch, small) -> list[dict[str, Any]]:
    """No corpora and no training; the cells that were asked for, in order. The best rate is 1e-4, for head 3e-4."""
    asked: list[dict[str, Any]] = []

    def measure(cell: dict[str, Any], workshop: quality.Workshop) -> dict[str, Any]:
        asked.append(cell)
        best = 3e-4 if cell["model"] == "head" else 1e-4
        made = row("1100" if cell["model"] == "head" else "1101", loss=abs((cell["learning_rate"] or 0) - best))
        extra: dict[str, Any] = {"C": 3}
        if cell["table"] != "leaderboard":
            extra["accuracy_by_distance"] = {"1": 0.75, "16": 0.5}
        if cell["model"] == "tfidf-svm":
            del made["validation_loss"]
        return {**made, **extra, **cell}

    def prepare(workshop: quality.Workshop, corpus: str, folds: set[int]) -> dict[str, Any]:
        tokens = {str(fold): "600 700 5000 20000" for fold in folds}
        return {"labels": 2, "documents": {"train": 8, "validation": 2, "test": 4}, "tokens": tokens}

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality.Workshop, "prepare", prepare)
    return asked


def brief(cells: list[dict[str, Any]]) -> list[str]:
    names = ("corpus", "model", "variant", "fold", "seed", "learning_rate")
    return [" ".join(str(cell[name]) for name in names if cell[name] != "") for cell in cells]


def test_rates_first_then_the_other_runs_with_the_chosen_one_in_turns(fake):
    """The best rate is the last of the grid: the search goes on until one is worse."""
    assert quality.main(["--jobs", "1", "--tables", "leaderboard", "--corpora", "sotu-era", "news"]) == 0
    sotu = [f"reberta 0 0 {rate}" for rate in (3e-5, 1e-4, 3e-4)]
    sotu += [*(f"head 0 0 {rate}" for rate in (3e-5, 1e-4, 3e-4, 1e-3)), "tfidf-svm 0 0 None"]
    later = ["reberta 1 0 0.0001", "head 1 0 0.0003", "tfidf-svm 1 0 None"]
    news = [*sotu, "reberta 0 1 0.0001", "head 0 1 0.0003"]  # the linear model has no seeds
    assert sorted(brief(fake)) == sorted([*(f"sotu-era {name}" for name in sotu + later), *(f"news {n}" for n in news)])
    assert brief(fake)[:2] == ["sotu-era reberta 0 0 3e-05", "sotu-era reberta 0 0 0.0001"]
    assert brief(fake).index("sotu-era head 0 0 0.001") < brief(fake).index("sotu-era head 1 0 0.0003")
    assert brief(fake).index("sotu-era reberta 1 0 0.0001") < brief(fake).index("sotu-era head 1 0 0.0003")
    assert brief(fake).index("sotu-era tfidf-svm 1 0 None") < brief(fake).index("news reberta 0 0 3e-05")


def test_ablations_bring_the_model_that_they_are_compared_with(fake):
    assert quality.main(["--jobs", "1", "--tables", "ablations"]) == 0
    assert brief(fake) == ["order reberta 0 0 0.001", "order reberta num_repeats 2 0 0 0.001"]
    fake.clear()
    assert quality.main(["--corpora", "order", "--models", "reberta"]) == 0
    assert len(fake) == len(set(brief(fake))) == 2


@pytest.mark.parametrize("names", [["--tables", "tables"], ["--corpora", "bbc"], ["--models", "reberta", "bert"]])
def test_names_that_stand_nowhere(fake, names, capsys):
    assert quality.main(names) == 2
    assert f"is called {names[-1]}, only " in capsys.readouterr().err
    assert fake == []


def test_a_restart_runs_only_what_is_missing(fake, tmp_path):
    output = tmp_path / "quality.json"
    arguments = ["--corpora", "sotu-era", "--output", str(output)]
    assert quality.main(arguments) == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    assert len(fake) == len(content["rows"]) == 11
    (session,) = content["sessions"]
    assert session["jobs"] == 2
    assert {found["session"] for found in content["rows"]} == {session["started"]}
    before = output.read_bytes()
    assert quality.main(arguments) == 0
    assert (len(fake), output.read_bytes()) == (11, before)

    content["rows"] = [found for found in content["rows"] if found["model"] != "head" or found["learning_rate"] < 3e-4]
    output.write_text(json.dumps(content))
    fake.clear()
    assert quality.main(arguments) == 0
    assert brief(fake) == [f"sotu-era head {run}" for run in ("0 0 0.0003", "0 0 0.001", "1 0 0.0003")]
    assert len(json.loads(output.read_text(encoding="utf-8"))["sessions"]) == 2


def test_rows_of_other_options_are_dropped_where_their_study_is_chosen(fake, tmp_path, monkeypatch, capsys):
    output = tmp_path / "quality.json"
    arguments = ["--corpora", "sotu-era", "--output", str(output)]
    quality.main(arguments)
    fake.clear()
    head = protocol.MODELS["head"]
    monkeypatch.setitem(protocol.MODELS, "head", head._replace(options={**head.options, "dropout": 0.2}))
    quality.main([*arguments, "--models", "reberta"])
    assert fake == []
    assert "dropped" not in capsys.readouterr().err
    quality.main(arguments)
    assert "5 rows were made with other options than the protocol now has: dropped" in capsys.readouterr().err
    runs = ("0 0 3e-05", "0 0 0.0001", "0 0 0.0003", "0 0 0.001", "1 0 0.0003")
    assert brief(fake) == [f"sotu-era head {run}" for run in runs]
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 11
    assert all("--dropout 0.2" in found["options"] for found in rows if found["model"] == "head")


def test_a_failure_ends_the_session_once_the_others_have_ended(fake, tmp_path, monkeypatch, capsys):
    measure = quality.measure

    def fails(cell: dict[str, Any], workshop: quality.Workshop) -> dict[str, Any]:
        if cell["learning_rate"] == 1e-4:
            raise TrainingError(f"{quality.name_of(cell)}: no")
        return measure(cell, workshop)

    monkeypatch.setattr(quality, "measure", fails)
    output = tmp_path / "quality.json"
    assert quality.main(["--corpora", "sotu-era", "--output", str(output)]) == 5
    assert "error: sotu-era reberta fold 0 seed 0 learning_rate 0.0001: no" in capsys.readouterr().err
    assert brief(json.loads(output.read_text(encoding="utf-8"))["rows"])[0] == "sotu-era reberta 0 0 3e-05"
    assert len(fake) <= 2


@pytest.fixture
def process(monkeypatch, tmp_path) -> Callable[[str], quality.Workshop]:
    """A workshop whose cells are done by a few lines of shell in place of Python."""

    def made(script: str) -> quality.Workshop:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        workshop = quality.Workshop(tmp_path, tmp_path)
        workshop._places["sotu-era"] = tmp_path
        return workshop

    return made


def test_a_cell_hands_over_its_figures_and_leaves_nothing(process, tmp_path):
    workshop = process(
        'mkdir -p models/saved/run && grep -q "fold-1" job.json && echo \'{"right": "01"}\' > figures.json'
    )
    assert workshop.measure(cell(fold=1)) == {"right": "01"}
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_a_cell_that_fails_is_named_with_the_end_of_its_log(process):
    with pytest.raises(TrainingError) as caught:
        process("seq 1 100; exit 3").measure(cell(variant="carry none"))
    said = str(caught.value).splitlines()
    assert said[0].startswith("sotu-era reberta carry none fold 0 seed 0 learning_rate 0.0001: ended with exit code 3")
    assert said[1:] == [str(n) for n in range(76, 101)]


def test_an_interrupt_ends_the_cells_and_keeps_those_that_had_ended(fake, process, tmp_path, monkeypatch, capsys):
    measure, workshop = quality.measure, process("exec sleep 600")
    waits = []

    def slow(cell: dict[str, Any], given: quality.Workshop) -> dict[str, Any]:
        return measure(cell, given) if cell["learning_rate"] == 3e-5 else workshop.measure(cell)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        waits.append(1)
        if len(waits) > 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = quality.wait
    monkeypatch.setattr(quality, "measure", slow)
    monkeypatch.setattr(quality, "wait", interrupted)
    monkeypatch.setattr(quality, "Workshop", lambda *_: workshop)
    output = tmp_path / "quality.json"
    assert quality.main(["--corpora", "sotu-era", "--models", "reberta", "--output", str(output)]) == 130
    assert brief(json.loads(output.read_text(encoding="utf-8"))["rows"]) == ["sotu-era reberta 0 0 3e-05"]
    assert [process.poll() for process in workshop._processes] == [-9]
    assert "stopped" in capsys.readouterr().err


def documents(part: str, first: int, number: int) -> list[Document]:
    """Every second one holds w5 and is of another label; every third one is long."""
    return [
        Document(
            id=f"{part}-{n}",
            text=" ".join([f"w{5 + n % 2}"] * 3 + [f"w{7 + first + n}"] * (10 + n)),
            label=("early", "late")[n % 2],
            tokens=600 if n % 3 == 0 else 15 + n,
        )
        for n in range(number)
    ]


def test_a_real_cell_of_a_tiny_model(small, encoder_folder, tmp_path, monkeypatch, capsys):
    fold = {"train": documents("a", 0, 16), "validation": documents("b", 20, 6), "test": documents("c", 30, 7)}
    (tmp_path / "corpora" / "sotu-era").mkdir(parents=True)
    write_fold(tmp_path / "corpora" / "sotu-era" / "fold-0", fold)
    monkeypatch.setattr(protocol, "ENCODER", str(encoder_folder))
    monkeypatch.setitem(protocol.CORPORA, "sotu-era", protocol.Corpus("sotu-era", ((0, 0),), OPTIONS))
    monkeypatch.setitem(protocol.MODELS, "reberta", protocol.MODELS["reberta"]._replace(grid=(1e-3,)))
    monkeypatch.setattr(quality.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    output = tmp_path / "quality.json"
    arguments = ["--tables", "leaderboard", "--corpora", "sotu-era", "--models", "reberta", "tfidf-svm"]
    code = quality.main([*arguments, "--corpora_dir", str(tmp_path / "corpora"), "--output", str(output)])
    assert code == 0, capsys.readouterr().err
    content = json.loads(output.read_text(encoding="utf-8"))
    linear, ours = sorted(content["rows"], key=lambda found: found["model"] == "reberta")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert content["corpora"]["sotu-era"] == {
        "tokens": {"0": "600 16 17 600 19 20 600"},
        "labels": 2,
        "documents": {"train": 16, "validation": 6, "test": 7},
    }
    for found in (linear, ours):
        hits = [int(hit) for hit in found["right"]]
        assert len(hits) == 7
        assert found["accuracy"] == pytest.approx(np.mean(hits))
        assert found["accuracy_long"] == pytest.approx(np.mean(hits[::3]))
    assert (linear["right"], linear["learning_rate"]) == ("1111111", None)
    assert (ours["learning_rate"], ours["best_epoch"]) == (1e-3, 1)
    assert 0 < ours["validation_loss"] < 1
    assert 0 < ours["share_read"] <= 1
    assert 10_000 < ours["parameters"] < 100_000
    assert "| reberta |" in capsys.readouterr().out


def test_of_20_newsgroups_the_long_documents_are_left(small, tmp_path):
    fold = {"train": documents("a", 0, 16), "validation": documents("b", 20, 6), "test": documents("c", 30, 8)}
    (tmp_path / "corpora" / "20news").mkdir(parents=True)
    write_fold(tmp_path / "corpora" / "20news" / "fold-0", fold)
    (tmp_path / "work").mkdir()
    workshop = quality.Workshop(tmp_path / "work", tmp_path / "corpora")
    facts = workshop.prepare("news", {0})
    assert facts == {"labels": 2, "documents": {"train": 6, "validation": 2, "test": 3}, "tokens": {"0": "600 600 600"}}
    left = {part: [d for d in fold[part] if d["tokens"] > 512] for part in fold}
    assert {part: load_split(workshop.data("news", 0), part) for part in fold} == left


def test_shuffled_documents_have_the_same_runs_of_words_in_another_order(process, tmp_path):
    texts = {part: " ".join(f"{part}{number}" for number in range(500)) for part in SPLITS}
    fold = {part: [Document(id=f"{part}-1", text=texts[part], label="a", tokens=900)] for part in SPLITS}
    write_fold(tmp_path / "fold-0", fold)
    workshop = process("grep -q '/shuffled\"' job.json && cp -r shuffled ../read && echo {} > figures.json")
    workshop.measure(cell(variant=protocol.SHUFFLED))
    for part, text in texts.items():
        assert load_split(workshop.data("sotu-era", 0), part) == fold[part]
        [document] = load_split(tmp_path / "read", part)
        assert document == {**fold[part][0], "text": document["text"]}
        assert document["text"] != text
        runs = [" ".join(text.split()[start : start + 36]) for start in range(0, 500, 36)]
        assert all(run in document["text"] for run in runs)
        assert sorted(document["text"].split()) == sorted(text.split())


def test_a_synthetic_task_is_scored_by_distance(small, process, tmp_path, monkeypatch):
    tokenizer_of("bert").save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(protocol, "SYNTHETIC_ENCODER", str(tmp_path / "encoder"))
    monkeypatch.setattr(protocol, "SYNTHETIC_SUITE", synthetic_suite.Options(documents=32, distances=(1, 16)))
    right = "1110100101101011"
    workshop = process(f'echo \'{{"right": "{right}"}}\' > figures.json')
    facts = workshop.prepare("order", {0})
    assert facts == {"labels": 2, "documents": {"train": 64, "validation": 16, "test": 16}, "tokens": {}}
    found = quality.measure(cell("order", table="synthetic"), workshop)
    distances = np.array([example["distance"] for example in load_split(workshop.data("order", 0), "test")])
    hits = np.array([*map(int, right)])
    assert found["accuracy_by_distance"] == {str(n): hits[distances == n].mean() for n in (1, 16)}
    assert "accuracy_long" not in found


def test_the_page_is_written_with_the_others(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    page = tmp_path / "docs" / "results.md"
    assert quality.main(["--output", str(tmp_path / "quality.json")]) == 0
    text = page.read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles[:3] == ["# Results", "## In short", "## Leaderboard"]
    assert titles[-4:] == ["## How it was done", "## Details", "## Learning rates", "## Options"]
    assert "| reberta less | sotu-era | news | mean | 95 % | p | documents |" in text
    assert "| head | +0.250 | +0.250 | +0.250 |" in text
    assert "| tfidf-svm | +0.000 | +0.000 | +0.000 | +0.000 to +0.000 | 1.00 | 12 |" in text
    content = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    page.unlink()
    report.main()
    assert page.read_text(encoding="utf-8") == text
    with pytest.raises(ConfigError, match="is of another run"):
        common.Results("quality", {**content["options"], "threads a cell": 2}, tmp_path / "quality.json")
