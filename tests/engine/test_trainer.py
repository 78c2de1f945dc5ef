"""What the trainer does beside the steps: evaluates, keeps the best, stops, resumes, averages, clips, casts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data_utils.dataset import LongTextDataset, collate
from engine.trainer import MetricsCallback
from models.checkpoint import load_model_and_config
from models.reberta import RecurrentRoBERTa
from tests.conftest import TRAINING
from tests.training import PLAIN_SGD, assert_same, last_checkpoint, rows, weights


def test_ema_weights_are_what_is_evaluated_and_saved(run):
    trained = run("--ema_decay 0.9 --epochs 1 --optimizer_type sgd --learning_rate 0.1")
    checkpoint = last_checkpoint(trained)
    averaged = {
        name.removeprefix("module."): value
        for name, value in load_file(checkpoint / "ema.safetensors").items()
        if name.startswith("module.")
    }
    assert_same(weights(trained.best_model), averaged)
    difference = max((averaged[name] - value).abs().max() for name, value in weights(checkpoint).items())
    assert difference > 1e-3
    evaluated = next(row["eval_loss"] for row in rows(trained) if "eval_loss" in row)
    assert evaluated == pytest.approx(_validation_loss(trained.best_model), abs=1e-6)


def _validation_loss(folder: Path, calibrated: bool = False) -> float:
    model = load_model_and_config(folder).model
    data = LongTextDataset("val.jsonl", model_name=folder, window_size=12, max_windows=6, cache_dir=Path("cache"))
    batch = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
    temperature = model.config.calibration_temperature if calibrated else 1.0
    return float(nn.functional.cross_entropy(logits / temperature, batch["labels"]))


def test_ema_is_the_moving_average_of_the_weights(run):
    """Step by step checkpoints give the average that the last one holds."""
    trained = run("--ema_decay 0.8 --total_steps 4 --eval_every 1 --save_total_limit 9")
    average = None
    for step in range(1, 5):
        now = weights(trained.run_folder / f"checkpoint-{step}")
        average = now if average is None else {n: 0.8 * average[n] + 0.2 * now[n] for n in now}
    saved = load_file(trained.run_folder / "checkpoint-4" / "ema.safetensors")
    assert_same({f"module.{n}": v for n, v in average.items()}, {n: saved[n] for n in saved if n != "n_averaged"}, 1e-6)


def test_training_takes_some_windows_and_validation_all(run, monkeypatch):
    forward, seen, trained_on = RecurrentRoBERTa.forward, {True: 0, False: 0}, set()

    def watched(self, input_ids, attention_mask):
        seen[self.training] = max(seen[self.training], input_ids.shape[1])
        if self.training:
            trained_on.update(
                tuple(window[mask == 1].tolist()) for window, mask in zip(input_ids, attention_mask, strict=True)
            )
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(RecurrentRoBERTa, "forward", watched)
    trained = run("--epochs 2 --train_windows 1")
    assert seen == {True: 1, False: 6}
    assert len(trained_on) > TRAINING + 10  # the second epoch draws others
    assert load_model_and_config(trained.best_model).model.config.max_windows == 6


@pytest.mark.parametrize("metric", ["loss", "log_loss"])
def test_the_best_model_is_kept_whatever_comes_after(run, metric):
    more = "--train_windows 2" if metric == "log_loss" else ""
    trained = run(f"--epochs 6 --learning_rate 5e-3 --save_total_limit 1 --metric_for_best {metric} {more}")
    losses = {row["step"]: row[f"eval_{metric}"] for row in rows(trained) if "eval_loss" in row}
    assert len(losses) == 6
    best = min(losses, key=losses.get)
    assert trained.best_metric == pytest.approx(losses[best])
    loss = _validation_loss(trained.best_model, calibrated=metric == "log_loss")
    assert loss == pytest.approx(losses[best], abs=1e-5)
    assert {path.name for path in trained.run_folder.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-36"}


def test_early_stopping(run):
    trained = run("--epochs 30 --learning_rate 1e-9 --early_stopping_patience 2 --metric_for_best accuracy")
    evaluations = [row for row in rows(trained) if "eval_accuracy" in row]
    assert len(evaluations) == 3


def test_early_stopping_counts_no_gain_that_leaves_the_probe_the_best(run, monkeypatch):
    monkeypatch.setattr("engine.trainer.clearly_lower", lambda losses_n, probe_losses_n: False)
    trained = run("--epochs 30 --early_stopping_patience 2 --metric_for_best log_loss --probe_epochs 1")
    evaluations = [row["eval_log_loss"] for row in rows(trained) if "eval_log_loss" in row]
    assert len(evaluations) == 3
    assert min(evaluations[1:]) < evaluations[0] == trained.best_metric


def test_eval_every_counts_optimizer_steps(run):
    trained = run("--eval_every 5 --save_total_limit 9 --gradient_accumulation_steps 1")
    assert [row["step"] for row in rows(trained) if "eval_loss" in row] == [5, 10, 12]
    assert {path.name for path in trained.run_folder.glob("checkpoint-*")} == {
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-12",
    }


@pytest.mark.parametrize(
    "flags", ["", "--dropout 0.1 --use_augmentation --ema_decay 0.9 --gradient_accumulation_steps 2"]
)
@pytest.mark.parametrize("eval_every", [6, 4])
def test_resume_gives_the_same_weights(run, flags, eval_every):
    """From the end of an epoch (6 of 6 steps, or 3 of 3) and from its middle."""
    flags = f"{flags} --epochs 4 --eval_every {eval_every} --save_total_limit 99"
    whole = run(flags)
    final = last_checkpoint(whole)
    expected, history = weights(final), rows(whole)
    best = weights(whole.best_model)
    average = load_file(final / "ema.safetensors") if "--ema_decay" in flags else None
    kept = whole.run_folder / f"checkpoint-{eval_every}"
    for checkpoint in whole.run_folder.glob("checkpoint-*"):
        if checkpoint != kept:
            shutil.rmtree(checkpoint)
    resumed = run(flags)
    assert_same(weights(last_checkpoint(resumed)), expected)
    assert_same(weights(resumed.best_model), best)
    if average is not None:
        assert_same(load_file(last_checkpoint(resumed) / "ema.safetensors"), average)
    timeless = [
        [
            {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
            for row in table
            if "train_runtime" not in row
        ]
        for table in (rows(resumed), history)
    ]
    assert timeless[0] == timeless[1]


def test_clipping_bounds_the_update(run):
    """Plain SGD moves by at most rate x norm; the row shows the norm before clipping."""
    flags = f"{PLAIN_SGD.replace('--gradient_clip_val 0', '--gradient_clip_val 0.01')} --total_steps 1"
    trained = run(f"{flags} --learning_rate 1")
    assert next(row["grad_norm"] for row in rows(trained) if "grad_norm" in row) > 0.01
    unmoved = run(f"{flags} --learning_rate 1e-12", "unmoved")
    before, after = (weights(last_checkpoint(t)) for t in (unmoved, trained))
    moved = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_bf16(run):
    exact, half = run("--epochs 1", "fp32"), run("--epochs 1 --mixed_precision", "bf16")
    losses = [[row["loss"] for row in rows(trained) if "loss" in row] for trained in (exact, half)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]
    assert {value.dtype for value in weights(half.best_model).values()} == {torch.float32}


class CountCasts(TorchDispatchMode):
    """Counts the casts to bf16 of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.ops.aten._to_copy.default and options.get("dtype") is torch.bfloat16:
            self.count += tuple(arguments[0].shape) == self.shape
        return function(*arguments, **options)


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_weights_are_cast_once_a_step_however_often_a_window_is_computed(run, level):
    with CountCasts((64, 32)) as casts:  # what one feed-forward weight of each of the two layers has
        run(f"--mixed_precision --memory_level {level} --total_steps 3 --eval_every 3")
    assert casts.count == 2 * 3  # three steps; the evaluation casts them in inference mode, unseen here


def test_metrics_are_json_whatever_the_numbers(tmp_path):
    run = SimpleNamespace(metrics=tmp_path / "metrics.jsonl", report=lambda **facts: None)
    history = [{"step": 1, "loss": 0.5, "grad_norm": math.inf}, {"step": 2, "loss": math.nan}]
    state = SimpleNamespace(
        is_world_process_zero=True, log_history=history, max_steps=2, best_metric=None, best_global_step=None
    )
    MetricsCallback(run).on_log(None, state, None)
    MetricsCallback(run).on_train_begin(None, state, None)
    assert run.metrics.read_text() == ('{"step": 1, "loss": 0.5, "grad_norm": null}\n{"step": 2, "loss": null}\n')
