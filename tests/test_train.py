"""The engine's promises, on a tiny encoder and a small corpus."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import set_seed

from command_line import parse_settings
from data_utils.dataset import LongTextBatchSampler, LongTextDataset, collate, load_tokenizer
from evaluate import evaluate
from models.checkpoint import load_model_and_config
from models.registry import build_model
from tests.conftest import FLAGS, MODEL_CODE, TRAINING, write_corpus
from tests.training import PLAIN_SGD, assert_same, last_checkpoint, rows, weights
from train import OPTIMIZERS, class_weights, optimizer_type
from utils import ConfigError, DataError


def test_a_run_leaves_these_files(run):
    trained = run("")
    assert {path.name for path in trained.run_folder.iterdir()} == {
        *("settings.json", "environment.json", "status.json", "train.log", "metrics.jsonl", "learning_curves.png"),
        *("checkpoint-6", "checkpoint-12", ".lock"),
    }
    assert {path.name for path in last_checkpoint(trained).iterdir()} == {
        *("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
        *("watch.json", "manifest.json"),
        *MODEL_CODE,
    }
    assert (trained.best_model / "model.pt").is_file()
    environment = json.loads((trained.run_folder / "environment.json").read_text())
    assert set(environment["data"]) == {"train.jsonl", "val.jsonl"}
    assert all(len(digest) == 64 for digest in environment["data"].values())
    assert environment["packages"]["torch"] == torch.__version__


def test_whoever_may_read_one_file_of_a_run_may_read_all(run):
    trained = run("--epochs 1 --ema_decay 0.9")
    files = [file for folder in (trained.best_model, last_checkpoint(trained)) for file in folder.iterdir()]
    assert {file.name for file in files} > {"model.safetensors", "training_texts.safetensors", "ema.safetensors"}
    assert {file.stat().st_mode for file in files} == {(trained.best_model / "model.pt").stat().st_mode}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--window_size 65", "window_size is 65; this encoder takes windows of 4 to 64 tokens"),
        ("--encoder_layers 3", "encoder_layers is 3; this encoder has 2 layers"),
        ("--freeze_except_last 3", "--freeze_except_last 3: the encoder has 2 layers"),
    ],
)
def test_what_the_encoder_cannot_do_is_told_before_the_corpus_is_cut(run, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(flags)
    assert not Path("cache").exists()


def test_a_bad_test_set_ends_the_run_before_it_trains(run, tmp_path):
    test = write_corpus(tmp_path / "test.jsonl", 3)
    test.write_text(test.read_text().replace('"late"', '"lat"'))
    with pytest.raises(DataError, match=r"test\.jsonl:2: unknown label 'lat'"):
        run("--mode train_and_evaluate --test_path test.jsonl")
    assert not list(tmp_path.glob("logs/run/checkpoint-*"))


def test_a_run_says_at_once_what_it_found_and_how_fast_it_is(run):
    """A wrong column of labels shows before training, and how long a step takes after the first of them."""
    trained = run("--epochs 1 --log_steps 9")
    assert "2 labels: early 11, late 11\n" in (trained.run_folder / "train.log").read_text()
    assert [row["step"] for row in rows(trained) if "loss" in row] == [1, 6]


def test_a_report_says_which_model_read_what(run, tmp_path):
    trained = run("--epochs 1")
    paths = f"--model_path {trained.best_model} --test_path val.jsonl --output_dir report --cache_dir cache"
    evaluate(parse_settings(f"--mode evaluate {paths} --device cpu --max_windows 3 --sample_data 9".split()))
    lines = (tmp_path / "report" / "evaluation_results.txt").read_text().splitlines()
    assert [line.split(maxsplit=1) for line in lines[:3]] == [
        ["model", str(trained.best_model)],
        ["test", "set           val.jsonl"],
        ["precision", "fp32"],
    ]
    assert lines[3].endswith("  window_size 12, window_overlap 0, max_windows 3, read first, sample_data 9")
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["about"]["model"] == str(trained.best_model)


def test_a_run_says_how_many_parameters_it_trains(run):
    trained = run("--freeze_except_last 1 --epochs 1")
    status = json.loads((trained.run_folder / "status.json").read_text())
    saved = weights(last_checkpoint(trained))
    frozen = ("encoder.embeddings.", "encoder.encoder.layer.0.")
    assert status["parameters"] == sum(value.numel() for value in saved.values())
    assert status["trained_parameters"] == sum(v.numel() for name, v in saved.items() if not name.startswith(frozen))
    assert f"of which {status['trained_parameters']:,} are trained" in (trained.run_folder / "train.log").read_text()


@pytest.mark.parametrize("more", ["", "--carry gru --window_loss 0.5"])
def test_accumulation_does_not_change_the_weights(run, more):
    """Documents of unequal length, a ragged last group."""
    flags = f"--optimizer_type sgd --learning_rate 0.05 {more}"
    whole = run(f"--batch_size 8 --gradient_accumulation_steps 1 {flags}", "whole")
    parts = run(f"--batch_size 2 --gradient_accumulation_steps 4 {flags}", "parts")
    assert_same(weights(last_checkpoint(whole)), weights(last_checkpoint(parts)), 1e-6)
    assert len([row for row in rows(whole) if "loss" in row]) == 2 * math.ceil(TRAINING / 8)


def test_epochs_and_steps_differ_only_in_the_budget(run):
    flags = "--dropout 0.1 --use_augmentation --gradient_accumulation_steps 2"
    epochs = run(flags, "epochs")
    steps = run(f"{flags} --total_steps {2 * math.ceil(TRAINING / 8)}", "steps")
    assert_same(weights(last_checkpoint(epochs)), weights(last_checkpoint(steps)))


def test_equals_a_plain_training_loop(run, encoder_folder, tmp_path):
    """The slow twin: the mean loss of each group's documents, one document at a time, and plain SGD."""
    trained = run(f"{PLAIN_SGD} --learning_rate 0.1 --gradient_accumulation_steps 2")
    argv = f"{FLAGS} --model_path {encoder_folder}".split()
    data = LongTextDataset(
        "train.jsonl", tokenizer=load_tokenizer(encoder_folder), window_size=12, max_windows=6, cache_dir=tmp_path / "c"
    )
    set_seed(42)
    model = build_model(parse_settings(argv), data.label_names, data.tokenizer).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    groups = LongTextBatchSampler(data.window_counts, 8)
    sizes = []
    for epoch in range(2):
        groups.set_epoch(epoch)
        for group in groups:
            optimizer.zero_grad()
            for document in group:
                batch = collate([data[document]])
                logits = model(batch["input_ids"], batch["attention_mask"]).logits
                (nn.functional.cross_entropy(logits, batch["labels"]) / len(group)).backward()
            optimizer.step()
            sizes.append(len(group))
    assert sizes == [8, 8, 6] * 2
    assert_same(weights(last_checkpoint(trained)), dict(model.state_dict()), 1e-5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--scheduler_type linear", {1: 0.0, 3: 1.0, 20: 1 / 18}),
        ("--scheduler_type linear --num_warmup_steps 0", {1: 1.0, 20: 1 / 20}),
        ("--scheduler_type linear --num_warmup_steps 10", {1: 0.0, 6: 0.5, 11: 1.0, 20: 0.1}),
        ("--scheduler_type cosine", {1: 0.0, 3: 1.0, 12: 0.5, 20: (1 + math.cos(math.pi * 17 / 18)) / 2}),
        ("--scheduler_type constant", {1: 1.0, 11: 1.0, 20: 1.0}),
        ("--scheduler_type constant_with_warmup --num_warmup_steps 4", {1: 0.0, 3: 0.5, 5: 1.0, 20: 1.0}),
    ],
)
def test_learning_rate_curves(run, flags, expected):
    """Relative to the peak, at the step that used it; warm-up is a tenth of the run unless said otherwise."""
    trained = run(f"--total_steps 20 --eval_every 20 {flags}")
    curve = {row["step"]: row["learning_rate"] / 1e-3 for row in rows(trained) if "learning_rate" in row}
    assert len(curve) == 20
    assert {step: curve[step] for step in expected} == pytest.approx(expected, abs=1e-6)


def test_warm_up_longer_than_the_run_is_refused(run):
    with pytest.raises(ConfigError, match="--num_warmup_steps 13 is more than the 12 steps"):
        run("--num_warmup_steps 13")


def test_a_run_is_never_overwritten(run):
    run("")
    with pytest.raises(ConfigError, match="--resume auto to continue"):
        run("--resume never")
    with pytest.raises(ConfigError, match=r"--learning_rate was 0\.001, is 0\.5"):
        run("--learning_rate 0.5")
    Path("logs/other").mkdir()
    Path("logs/other/mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run("", "other")
    assert Path("logs/other/mine.txt").read_text() == "precious"


def test_starting_from_a_checkpoint(run):
    first = run("", "first")
    second = run(f"--model_path {first.best_model}/model.pt --learning_rate 1e-12 --epochs 1", "second")
    assert_same(weights(second.best_model), weights(first.best_model), 1e-6)
    with pytest.raises(ConfigError, match="was built with --carry gru"):
        run(f"--model_path {first.best_model} --carry residual", "third")


@pytest.mark.parametrize("options", ["--carry residual --alpha 0.5", "--global_alpha 0.8", "--gate_bias 0.5"])
def test_starting_from_a_checkpoint_keeps_its_fixed_weights(run, options):
    first = run(f"{options} --epochs 1", "first")
    second = run(f"--model_path {first.best_model} --learning_rate 1e-12 --epochs 1", "second")
    models = [load_model_and_config(trained.best_model).model.eval() for trained in (first, second)]
    input_ids = torch.randint(5, 100, (2, 4, 12))
    logits = [model(input_ids, torch.ones_like(input_ids)).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"was built with --(alpha|global_alpha|gate_bias) 0\.[58]; leave"):
        run(f"--model_path {first.best_model} {options[:-3]}0.3", "third")


def test_two_workers_see_the_same_masks(run):
    flags = "--use_augmentation --random_mask_prob 0.3 --epochs 2"
    alone = run(flags, "alone")
    helped = run(f"{flags} --num_workers 2", "helped")
    assert_same(weights(last_checkpoint(alone)), weights(last_checkpoint(helped)))
    unmasked = run("--epochs 2", "unmasked")
    assert any((v != weights(last_checkpoint(alone))[n]).any() for n, v in weights(last_checkpoint(unmasked)).items())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_optimizers(run, optimizer):
    trained = run(f"--optimizer_type {optimizer} --epochs 1")
    state = torch.load(last_checkpoint(trained) / "optimizer.pt", weights_only=True)
    keys = {"sgd": {"momentum_buffer"}}.get(optimizer, {"step", "exp_avg", "exp_avg_sq"})
    assert set(state["state"][0]) == keys
    groups = sorted((group["initial_lr"], group["weight_decay"]) for group in state["param_groups"])
    assert groups == [(1e-3, 0.0), (1e-3, 0.01), (1e-2, 0.0), (1e-2, 0.01)]


def test_multi_label(run, tmp_path):
    for name, seed in (("train", 0), ("val", 1)):
        path = write_corpus(tmp_path / f"{name}.jsonl", 24, seed)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, line in enumerate(lines):
            line["label"] = [line["label"]] + (["rare"] if i % 4 == 0 else [])
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = run("--problem_type multi_label --class_weights balanced --label_smoothing 0.1 --epochs 3")
    model, settings, maps = load_model_and_config(trained.best_model)
    assert maps["label2id"] == {"early": 0, "late": 1, "rare": 2}
    assert settings["problem_type"] == "multi_label"
    assert model.config.problem_type == "multi_label_classification"
    assert len(model.config.thresholds) == 3
    assert all(0 < threshold < 1 for threshold in model.config.thresholds)
    losses = {name: row[name] for row in rows(trained) for name in ("loss", "eval_loss") if name in row}
    assert losses["eval_loss"] == pytest.approx(losses["loss"], rel=0.5)  # both are means over documents and labels
    further = run(f"--model_path {trained.best_model} --epochs 1", "further")  # problem type and columns are learned
    assert load_model_and_config(further.best_model).settings["problem_type"] == "multi_label"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_of_fp16_leaves_no_trace(name):
    settings = parse_settings(
        f"--mode train --train_path a --val_path b --optimizer_type {name} --learning_rate 0.1".split()
    )
    kind, options = optimizer_type(settings, fp16=True)
    weight, twin = (nn.Parameter(torch.ones(512)) for _ in range(2))
    plain = kind([twin], **options)
    Accelerator(cpu=True)  # whose state the optimizer asks for
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(kind([weight], **options), scaler=scaler)
    for factor in (math.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(weight.square().sum() * factor).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (factor == math.inf)
        if factor == 1:
            plain.zero_grad()
            twin.square().sum().backward()
            plain.step()
        torch.testing.assert_close(weight, twin)
    assert scaler.get_scale() == 2.0**15


class Imbalanced:
    """What `class_weights` looks at, of 11 and 6 documents."""

    label_names = ("early", "late")

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels


def test_balanced_class_weights():
    settings = parse_settings(["--class_weights", "balanced"])
    single = np.array([0] * 11 + [1] * 6)
    torch.testing.assert_close(class_weights(settings, Imbalanced(single)), torch.tensor([17 / 22, 17 / 12]))
    torch.testing.assert_close(class_weights(settings, Imbalanced(np.eye(2)[single])), torch.tensor([6 / 11, 11 / 6]))
    torch.testing.assert_close(class_weights(settings, Imbalanced(np.ones((4, 1)))), torch.tensor([1.0]))
    assert class_weights(parse_settings([]), Imbalanced(single)) is None
    without_early = class_weights(settings, Imbalanced(np.ones(5, dtype=int)))  # as --sample_data may leave them
    torch.testing.assert_close(without_early, torch.ones(2))


def test_tensorboard_and_what_is_not_installed(run):
    trained = run("--epochs 1 --report_to tensorboard")
    assert len(list(trained.run_folder.rglob("events.out.tfevents.*"))) == 1
    with pytest.raises(ConfigError, match="pip install wandb"):
        run("--epochs 1 --report_to wandb", "wandb")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num_repeats 2", {"num_repeats": 2}),
        ("--carry residual --alpha 0.6 --gate_bias -2", {"carry": "residual", "alpha": 0.6, "gate_bias": -2.0}),
        ("--carry gru --window_loss 0.5", {"carry": "gru", "window_loss": 0.5}),
        ("--aggregation attention --pooling mean", {"aggregation": "attention", "pooling": "mean"}),
        ("--global_alpha 0.5 --window_weights equal", {"global_alpha": 0.5, "window_weights": "equal"}),
        ("--position_encoding rope --encoder_layers 1", {"position_encoding": "rope", "encoder_layers": 1}),
        ("--memory_level 1", {"memory_level": 1}),
        ("--gradient_checkpointing", {"memory_level": 2}),
        ("--window_overlap 3 --max_len 25", {"window_overlap": 3, "max_len": 25}),
    ],
)
def test_model_options_reach_the_model_and_are_saved(run, flags, expected):
    model = load_model_and_config(run(f"--epochs 1 {flags}").best_model).model
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert model.config.dropout == 0


def test_data_options(run, caplog):
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    rows_of_csv = ["name,body,era", *(f"{line['id']},{line['text']},{line['label']}" for line in lines)]
    Path("other.csv").write_text("\n".join(rows_of_csv) + "\n")
    lines = [json.loads(line) for line in Path("val.jsonl").read_text().splitlines()]
    renamed = [json.dumps({"body": line["text"], "era": line["label"]}) for line in lines]
    Path("other.jsonl").write_text("\n".join(renamed) + "\n")
    trained = run(
        "--train_path other.csv --val_path other.jsonl --text_column body --label_column era --sample_data 8 "
        "--max_len 15 --max_windows_per_batch 4 --epochs 1"
    )
    log = (trained.run_folder / "train.log").read_text()
    assert "other.csv: 8 documents, 15 windows; 40.4 % of 285 tokens are read" in log
    assert "other.jsonl: 8 documents" in log
    steps = [row["step"] for row in rows(trained) if "loss" in row]
    assert steps == [1, 2, 3, 4]
