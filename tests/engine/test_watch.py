"""Windows that fail, and losses and gradients that are not finite: what ends a run, and what it says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from models.registry import build_model
from utils import TrainingError


def with_a_poisoned_word(encoder_folder: Path, target: Path, value: float) -> Path:
    shutil.copytree(encoder_folder, target)
    state = load_file(target / "model.safetensors")
    state["embeddings.word_embeddings.weight"][50] = value
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


SECOND_WINDOW_FAILS = "w51 " * 15 + "w50 " + "w51 " * 10  # of three


def poison(name: str, text: str, documents: slice) -> None:
    """Put `text` in these documents of NAME.jsonl, and leave the poisoned word out of all others."""
    for path in (Path("train.jsonl"), Path("val.jsonl")):
        path.write_text(path.read_text().replace("w50", "w51"))
    path = Path(f"{name}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[documents]:
        line["text"] = text
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_loss_that_is_not_finite_raises_before_the_update(run, encoder_folder, tmp_path):
    encoder = with_a_poisoned_word(encoder_folder, tmp_path / "poisoned", math.nan)
    poison("train", "w50 " * 30, slice(3, 4))
    with pytest.raises(TrainingError, match=r"step \d+: the loss is not finite.*documents: train-3\."):
        run(f"--model_path {encoder}")
    assert not list(Path("logs/run").glob("checkpoint-*"))


def test_a_gradient_that_is_not_finite_raises_before_the_update(run, monkeypatch):
    def build(*arguments):
        model = build_model(*arguments)
        model.pooler.weight.register_hook(lambda gradient: gradient * math.nan)
        return model

    monkeypatch.setattr("train.build_model", build)
    with pytest.raises(TrainingError, match="step 1: the loss is finite but its gradient is not"):
        run("--gradient_clip_val 0")
    with pytest.raises(TrainingError, match="step 1: the loss is finite but its gradient is not"):
        run("--gradient_clip_val 1", "clipped")


def test_too_many_failed_windows_end_the_run_and_a_few_are_named(run, encoder_folder, tmp_path):
    encoder = with_a_poisoned_word(encoder_folder, tmp_path / "poisoned", math.inf)
    poison("train", SECOND_WINDOW_FAILS, slice(3, 4))
    trained = run(f"--model_path {encoder} --max_window_failures 0.02", "few")  # one window of each epoch
    warnings = [line for line in (trained.run_folder / "train.log").read_text().splitlines() if " WARNING " in line]
    assert len(warnings) == 2
    assert all("train-3, window 1: its state is not finite" in warning for warning in warnings)
    state = load_file(trained.best_model / "model.safetensors")
    assert all(value.isfinite().all() or "word_embeddings" in name for name, value in state.items())
    with pytest.raises(TrainingError, match="1 windows of this epoch failed, over --max_window_failures"):
        run(f"--model_path {encoder} --max_window_failures 0.001 --epochs 1", "many")


def test_windows_that_fail_in_validation_count(run, encoder_folder, tmp_path):
    encoder = with_a_poisoned_word(encoder_folder, tmp_path / "poisoned", math.inf)
    poison("val", SECOND_WINDOW_FAILS, slice(3, 4))
    few = run(f"--model_path {encoder} --max_window_failures 0.2 --epochs 1", "few")
    assert "step 6, validation: val-3, window 1: its state is not finite" in (few.run_folder / "train.log").read_text()
    with pytest.raises(TrainingError, match=r"1 of \d+ windows failed, a share over .* 0.001: val-3, window 1"):
        run(f"--model_path {encoder} --max_window_failures 0.001 --epochs 1", "many")
    with pytest.raises(TrainingError, match=r"probe, validation: 1 of \d+ windows failed"):
        run(f"--model_path {encoder} --max_window_failures 0.001 --epochs 1 --probe_epochs 1", "probe")


def test_a_run_that_goes_on_knows_of_the_failures_of_its_epoch(run, encoder_folder, tmp_path):
    encoder = with_a_poisoned_word(encoder_folder, tmp_path / "poisoned", math.inf)
    poison("train", SECOND_WINDOW_FAILS, slice(None))
    for _ in "whole", "from step 3":
        with pytest.raises(TrainingError, match="step 5: 20 windows of this epoch failed"):
            run(f"--model_path {encoder} --max_window_failures 0.3 --eval_every 3")
        assert {path.name for path in Path("logs/run").glob("checkpoint-*")} == {"checkpoint-3"}


def test_the_failures_of_a_run_shorter_than_an_epoch_are_a_share_of_what_it_reads(run, encoder_folder, tmp_path):
    encoder = with_a_poisoned_word(encoder_folder, tmp_path / "poisoned", math.inf)
    poison("train", SECOND_WINDOW_FAILS, slice(None))
    with pytest.raises(TrainingError, match="step 1: 2 windows of this epoch failed, over --max_window_failures"):
        run(f"--model_path {encoder} --max_window_failures 0.3 --total_steps 1 --batch_size 2", "short")
    few = f"--model_path {encoder} --max_window_failures 0.4 --total_steps 1 --batch_size 1"
    assert run(f"{few} --gradient_accumulation_steps 2", "few").run_folder.is_dir()


def test_a_learning_rate_that_explodes_is_an_error(run):
    with pytest.raises(TrainingError, match="not finite"):
        run("--learning_rate 1e30 --gradient_clip_val 0 --num_warmup_steps 0 --optimizer_type sgd")
