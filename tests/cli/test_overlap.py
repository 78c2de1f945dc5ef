"""The same text in training and in another set, through the real command line."""

from __future__ import annotations

import json
import re

import pytest
import torch

from main import main
from models.checkpoint import load_training_texts
from tests.conftest import write_corpus


@pytest.fixture
def run(project, monkeypatch, capsys):
    def run(arguments: str) -> str:
        monkeypatch.chdir(project)
        code = main(f"{arguments} --device cpu".split())
        console = capsys.readouterr().err
        assert code == 0, console
        return console

    return run


def mixed(project, name: str, own: int, foreign: int) -> str:
    """A file of so many documents of its own and so many of the training set, in capitals."""
    path = write_corpus(project / name, own, seed=99)
    lines = (project / "data" / "train" / "train.jsonl").read_text().splitlines()[:foreign]
    with path.open("a") as file:
        for line in lines:
            row = json.loads(line)
            file.write(json.dumps({**row, "text": f" {row['text'].upper()}\n"}) + "\n")
    return name


def told(project, folder: str) -> tuple[int, int]:
    """From the two places that tell it."""
    report = project / folder
    [line] = re.findall(r"^trained on too +(\d+)$", (report / "evaluation_results.txt").read_text(), re.MULTILINE)
    return json.loads((report / "metrics.json").read_text())["overlap_with_training"], int(line)


@pytest.mark.parametrize("form", ["", "model.pt"])
def test_evaluating_on_what_was_trained_on(project, trained, run, form):
    test = mixed(project, "mixed.jsonl", own=4, foreign=3)
    folder = f"overlap{form}"
    console = run(f"--mode evaluate --model_path {trained / form} --test_path {test} --output_dir {folder}")
    assert told(project, folder) == (3, 3)
    places = ", ".join(f"train-{n} (mixed.jsonl:{n + 5})" for n in range(3))
    assert (
        f"WARNING 3 of the 7 documents of the test set were trained on, which makes its scores too good: {places};"
        in console
    )


def test_no_overlap_is_reported_as_such(project, trained, run):
    assert told(project, "logs/first/evaluation") == (0, 0)
    assert "were trained on" not in (project / "logs" / "first" / "train.log").read_text()


def test_training_warns_of_the_validation_set(project, run):
    val = mixed(project, "leaky.jsonl", own=6, foreign=2)
    console = run(f"--config tiny.yaml --mode train --epochs 1 --val_path {val} --output_dir logs/leaky")
    assert console.count("2 of the 8 documents of the validation set were trained on") == 1


def test_a_model_remembers_what_the_one_it_started_from_was_trained_on(project, trained, run):
    write_corpus(project / "more.jsonl", 8, seed=7)
    run(
        "--config tiny.yaml --mode train --epochs 1 --output_dir logs/more "
        f"--train_path more.jsonl --model_path {trained}"
    )
    texts = [load_training_texts(path) for path in (trained, project / "models" / "saved" / "more")]
    assert [len(hashes) for hashes in texts] == [24, 32]
    assert set(texts[0]) < set(texts[1])


def test_a_model_that_was_saved_without_them_is_evaluated_without(project, trained, run, tmp_path):
    for name in ("model.pt", "training_texts.safetensors"):
        assert (trained / name).is_file()
    content = torch.load(trained / "model.pt", weights_only=True)
    del content["training_texts"]
    torch.save(content, tmp_path / "old.pt")
    assert load_training_texts(tmp_path / "old.pt") is None
    run(f"--mode evaluate --model_path {tmp_path}/old.pt --test_path data/validation --output_dir {tmp_path}/old")
    assert "overlap_with_training" not in json.loads((tmp_path / "old" / "metrics.json").read_text())
    assert "trained on" not in (tmp_path / "old" / "evaluation_results.txt").read_text()
