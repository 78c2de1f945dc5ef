"""Options that do not go together."""

from __future__ import annotations

from pathlib import Path

from config import Settings


def contradictions(settings: Settings, said: set[str], *, model_is_read: bool = False) -> list[str]:
    """What is wrong with a set of options, of which the user has `said` some.

    Until the model is read, which may bring its own values of those that were left out, only what was said contradicts.
    """
    known = set(Settings.model_fields) if model_is_read or settings.model_path is None else said
    trains = settings.mode.startswith("train")
    rules = [
        (
            trains and "max_windows" in known and (settings.train_windows or 0) > settings.max_windows,
            "--train_windows is more than --max_windows: no document has so many to draw from",
        ),
        (
            settings.text_column == settings.label_column
            and settings.mode != "predict"
            and (settings.mode != "evaluate" or {"text_column", "label_column"} <= said),
            "--text_column and --label_column name one column",
        ),
        (
            settings.mode == "evaluate" and settings.model_path is None,
            "--mode evaluate needs --model_path: the checkpoint to evaluate, a .pt file or a folder",
        ),
        (settings.mode == "evaluate" and settings.test_path is None, "--mode evaluate needs --test_path: the test set"),
        (
            settings.mode == "export" and settings.model_path is None,
            "--mode export needs --model_path: the checkpoint to export, a .pt file or a folder",
        ),
        (
            settings.output_path is not None and Path(settings.output_path).suffix not in (".csv", ".jsonl"),
            f"--output_path {settings.output_path}: must end in .csv or .jsonl",
        ),
        (
            settings.shard is not None and int(settings.shard.split("/")[0]) > int(settings.shard.split("/")[1]),
            f"--shard {settings.shard}: I/N is the I-th of N, so I is N at most",
        ),
        (settings.mode == "train_steps" and settings.total_steps is None, "--mode train_steps needs --total_steps"),
        (settings.mode == "train_steps" and "epochs" in said, "--epochs does not go with --mode train_steps"),
        (
            settings.mode == "train" and settings.total_steps is not None,
            "--total_steps does not go with --mode train; use --mode train_steps",
        ),
        (
            settings.mode == "train_and_evaluate" and settings.total_steps is not None and "epochs" in said,
            "--epochs and --total_steps are two budgets; give one",
        ),
        (
            settings.total_steps is not None and (settings.num_warmup_steps or 0) > settings.total_steps,
            "--num_warmup_steps is more than --total_steps: the learning rate would never reach its peak",
        ),
        (
            settings.scheduler_type == "constant" and bool(settings.num_warmup_steps),
            "--scheduler_type constant has no warm-up; use constant_with_warmup, or leave --num_warmup_steps out",
        ),
        (
            settings.gradient_checkpointing and settings.memory_level in ("0", "1"),
            "--gradient_checkpointing is --memory_level 2 and does not go with another level",
        ),
        (
            "mixed_precision_type" in said and not settings.mixed_precision,
            "--mixed_precision_type needs --mixed_precision",
        ),
        (
            settings.int8 and settings.mode not in ("evaluate", "predict"),
            f"--int8 belongs to --mode evaluate and predict, not {settings.mode}: 8 bits are for inference",
        ),
        (settings.int8 and settings.mixed_precision, "--int8 and --mixed_precision are two precisions; give one"),
        (settings.int8 and settings.device == "cuda", "--int8 does not go with --device cuda"),
        (
            "alpha" in said and "carry" in known and settings.carry != "residual",
            f"--alpha belongs to --carry residual, not {settings.carry}",
        ),
        (
            "gate_bias" in said and settings.carry == "none",
            "--gate_bias does not go with --carry none, which has no gates",
        ),
        (
            settings.num_repeats > 1 and settings.carry == "none",
            "--num_repeats does not go with --carry none: nothing is carried into a second reading",
        ),
        (
            settings.global_alpha is not None and "aggregation" in known and settings.aggregation != "encoder",
            f"--global_alpha belongs to --aggregation encoder, not {settings.aggregation}",
        ),
        (
            "window_weights" in said and "aggregation" in known and settings.aggregation == "max",
            "--window_weights does not go with --aggregation max, which takes no mean",
        ),
        (
            settings.read == "random" and settings.window_overlap > 0,
            "--window_overlap does not go with --read random, whose windows share no tokens",
        ),
        (
            "window_size" in known and settings.window_overlap >= settings.window_size - 2,
            "--window_overlap must be less than --window_size minus its [CLS] and [SEP]",
        ),
        (
            settings.gpu_memory_fraction is not None and settings.device == "cpu",
            "--gpu_memory_fraction does not go with --device cpu",
        ),
    ]
    rules += [
        (name in said and not settings.use_augmentation, f"--{name} needs --use_augmentation")
        for name in ("random_mask_prob", "max_mask_tokens", "whole_word_mask")
    ]
    predicting = settings.mode == "predict"
    rules += [
        (predicting and getattr(settings, name) is None, f"--mode predict needs --{name}: {what}")
        for name, what in (
            ("model_path", "the checkpoint, a .pt file or a folder"),
            ("input_path", "files or folders of documents"),
            ("output_path", "the .csv or .jsonl file to write"),
        )
    ]
    rules += [
        (name in said and not predicting, f"--{name} belongs to --mode predict, not {settings.mode}")
        for name in ("input_path", "output_path", "shard")
    ]
    rules += [
        (name in said and predicting, f"--{name} does not go with --mode predict{instead}")
        for name, instead in (("output_dir", "; --output_path names its file"), ("sample_data", ""))
    ]
    rules += [
        (name in said and settings.mode == "analyze", f"--{name} does not go with --mode analyze, which counts it all")
        for name in ("sample_data", "max_len")
    ]
    return [message for broken, message in rules if broken]
