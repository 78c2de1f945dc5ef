"""What options of training do to a run: each is shown to reach what it is about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration import fit_temperature
from data_utils.dataset import LongTextDataset, collate
from engine.trainer import ReBertaTrainer
from main import main
from models.checkpoint import load_model_and_config
from models.reberta import RecurrentRoBERTa
from tests.training import last_checkpoint, rows, weights


@pytest.mark.parametrize(("flags", "view"), [("", list), ("--use_augmentation", sorted), ("--sample_data 8", sorted)])
def test_another_seed_draws_another_order_other_masks_and_another_sample(run, monkeypatch, flags, view):
    forward, read = RecurrentRoBERTa.forward, []

    def watched(self, input_ids, attention_mask):
        if self.training:
            read.extend(ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(RecurrentRoBERTa, "forward", watched)
    seen = []
    for number, seed in enumerate((1, 1, 2)):
        read.clear()
        run(f"--epochs 1 --seed {seed} {flags}", f"run-{number}")
        seen.append(view(read))
    assert seen[0] == seen[1] != seen[2]


def test_another_seed_draws_other_weights(run):
    flags = "--learning_rate 1e-12 --epochs 1"
    states = [weights(last_checkpoint(run(f"{flags} --seed {s}", f"s{n}"))) for n, s in enumerate((1, 1, 2))]
    assert torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def read_whole(name: str, folder: Path) -> tuple[RecurrentRoBERTa, torch.Tensor, torch.Tensor]:
    """A saved model, what it makes of the documents of a file, and their labels."""
    data = LongTextDataset(name, model_name=folder, window_size=12, max_windows=6, cache_dir=Path("cache"))
    batch = collate([data[i] for i in range(len(data))])
    model = load_model_and_config(folder).model
    with torch.no_grad():
        return model, model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--label_smoothing 0.2", {"label_smoothing": 0.2}),
        ("--class_weights balanced", {"weight": torch.tensor([22 / 12, 22 / 32])}),
    ],
)
def test_the_loss_is_the_one_that_was_asked_for(run, flags, options):
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    for line in lines[:10:2]:
        line["label"] = "late"  # 6 and 16 are left
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = run(f"--epochs 4 --learning_rate 5e-3 --metric_for_best loss {flags}")
    _, logits, labels = read_whole("val.jsonl", trained.best_model)
    asked = nn.functional.cross_entropy(logits, labels, reduction="none", **options).mean()
    assert trained.best_metric == pytest.approx(float(asked), abs=1e-5)
    assert abs(float(asked - nn.functional.cross_entropy(logits, labels))) > 1e-3


def test_the_moving_average_has_the_temperature_that_was_fitted_to_it(run):
    trained = run("--epochs 4 --learning_rate 5e-3 --ema_decay 0.5")
    model, logits, labels = read_whole("val.jsonl", trained.best_model)
    temperature = model.config.calibration_temperature
    assert temperature == pytest.approx(fit_temperature(logits.numpy(), labels.numpy()), rel=1e-4)
    assert abs(temperature - 1) > 1e-3


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "loss", "log_loss"])
def test_which_way_is_better(run, monkeypatch, metric):
    values = iter([0.6, 0.5, 0.7, 0.65])
    evaluate = ReBertaTrainer.evaluate

    def changed(self, *given, **more):
        return {**evaluate(self, *given, **more), f"eval_{metric}": next(values)}

    monkeypatch.setattr(ReBertaTrainer, "evaluate", changed)
    assert run(f"--epochs 4 --metric_for_best {metric}").best_metric == (0.5 if "loss" in metric else 0.7)


def test_labels_of_another_name_get_a_fresh_classifier(run):
    first = run("--epochs 1", "first")
    for name in ("train", "val"):
        path = Path(f"{name}.jsonl")
        path.write_text(path.read_text().replace('"early"', '"dawn"'))
    second = run(f"--epochs 1 --learning_rate 1e-12 --model_path {first.best_model}", "second")
    before, after = weights(first.best_model), weights(second.best_model)
    torch.testing.assert_close(after["pooler.weight"], before["pooler.weight"], atol=1e-6, rtol=0)
    assert (after["classifier.weight"] - before["classifier.weight"]).abs().max() > 1e-3


def test_a_model_remembers_its_columns(run):
    for name in ("train", "val"):
        path = Path(f"{name}.jsonl")
        path.write_text(path.read_text().replace('"text"', '"body"').replace('"label"', '"era"'))
    trained = run("--epochs 1 --text_column body --label_column era")
    paths = f"--model_path {trained.best_model} --test_path val.jsonl --cache_dir other --device cpu"
    assert main(f"--mode evaluate {paths} --output_dir report".split()) == 0


def test_patience_is_remembered(run):
    flags = "--epochs 30 --learning_rate 1e-9 --early_stopping_patience 3 --save_total_limit 9"
    whole = run(flags)
    steps = [row["step"] for row in rows(whole) if "eval_loss" in row]
    assert steps == [6, 12, 18, 24]
    shutil.rmtree(last_checkpoint(whole))
    assert [row["step"] for row in rows(run(flags)) if "eval_loss" in row] == steps
