"""Evaluate a checkpoint on a test set: `python main.py --mode evaluate`, or `python evaluate.py` with the same options.

The report folder holds `evaluation_results.txt`, `metrics.json`, `class_metrics.png`, `confusion_matrix.png`,
`evaluation.log` and, with `--save_predictions`, `predictions.csv`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from config import Settings
from data_utils.dataset import LongTextDataset, dataset_options, evaluation_loader
from evaluation_utils import evaluate_model
from models.checkpoint import Checkpoint, load_checkpoint_tokenizer, load_model_and_config
from models.quantization import quantize_int8
from models.registry import READING
from utils import (
    ConfigError,
    DataError,
    ModelError,
    error_handler,
    get_device,
    logger,
    made_up_folder,
    mixed_precision_type,
    setup_logging,
    validate_params,
)


def evaluate(settings: Settings) -> dict[str, Any]:
    """Report how well the checkpoint does; its labels and its way of reading rule, flags win over the latter.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: as the stage that fails says it.
    """
    assert settings.model_path is not None
    folder = Path(settings.output_dir) if settings.output_dir else made_up_folder("evaluate")
    setup_logging(settings.log_level, folder / "evaluation.log")
    device = get_device(settings.device)
    if settings.int8 and device.type != "cpu":
        raise ConfigError("--int8 computes on a CPU only; give --device cpu with it")
    checkpoint, tokenizer = load_model(settings.model_path)
    learned = {
        name: checkpoint.settings[name]
        for name in (*READING, "text_column", "label_column")
        if name not in settings.model_fields_set
    }
    settings = settings.model_copy(update={**learned, "problem_type": checkpoint.settings["problem_type"]})
    checkpoint.model.config.update({name: getattr(settings, name) for name in READING})
    checkpoint.model.config.check(checkpoint.model.encoder)
    dataset = load_test_set(settings, checkpoint, tokenizer, folder)
    loader = evaluation_loader(
        dataset,
        1 if settings.int8 else settings.batch_size,  # in 8 bits, batch mates would share their scale
        max_windows_per_batch=settings.max_windows_per_batch,
        num_workers=settings.num_workers,
        pin_memory=device.type == "cuda",
    )
    model = checkpoint.model.to(device)
    if settings.int8:
        quantize_int8(model)
    precision = mixed_precision_type(settings.mixed_precision_type, device) if settings.mixed_precision else "fp32"
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=half, enabled=settings.mixed_precision):
        metrics = evaluate_model(
            model,
            loader,
            device,
            dataset.label_names,
            folder,
            problem_type=settings.problem_type,
            thresholds=model.config.thresholds,
            max_window_failures=settings.max_window_failures,
            predictions_path=folder / "predictions.csv" if settings.save_predictions else None,
        )
    logger.info("accuracy %.4f, macro F1 %.4f on %d documents", metrics["accuracy"], metrics["f1_macro"], len(dataset))
    logger.info("report: %s", folder)
    return metrics


@error_handler(error_type=ModelError)
@validate_params(path=str)
def load_model(path: str) -> tuple[Checkpoint, PreTrainedTokenizerBase]:
    """The checkpoint and its tokenizer."""
    return load_model_and_config(path), load_checkpoint_tokenizer(path)


@error_handler(error_type=DataError)
def load_test_set(
    settings: Settings, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> LongTextDataset:
    """The test set, with the checkpoint's labels."""
    assert settings.test_path is not None
    id2label = checkpoint.label_maps["id2label"]
    return LongTextDataset(
        settings.test_path,
        label_names=[id2label[index] for index in range(len(id2label))],
        quarantine_path=folder / "quarantine_test.jsonl",
        **dataset_options(settings, tokenizer),
    )


if __name__ == "__main__":
    from main import main

    sys.exit(main(mode="evaluate"))
