"""Evaluate a checkpoint on a test set: `python main.py --mode evaluate`, or `python evaluate.py` with the same options.

The report folder holds `evaluation_results.txt`, `metrics.json`, `class_metrics.png`, `confusion_matrix.png`,
`reliability.png`, `evaluation.log` and, with `--save_predictions`, `predictions.csv`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from config import Settings
from data_utils.dataset import LongTextDataset, dataset_options, evaluation_loader
from data_utils.overlap import warn_of_overlap
from evaluation_utils import evaluate_model
from files import made_up_folder
from models.checkpoint import load_all
from models.quantization import quantize_int8
from models.reberta import RecurrentRoBERTa
from models.registry import LEARNED, READING, WITHOUT, learned_settings, refuse_other_architecture
from models.transformer import TransformerClassifier
from processes import join_processes
from utils import (
    ConfigError,
    DataError,
    ModelError,
    error_handler,
    get_device,
    is_main_process,
    logger,
    mixed_precision_type,
    setup_logging,
)

PREDICTIONS = "predictions.csv"


@error_handler()
def evaluate(settings: Settings) -> dict[str, Any]:
    """Report how well the checkpoint does; its labels and its way of reading rule, flags win over the latter.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: as the stage that fails says it.
    """
    folder = Path(settings.output_dir) if settings.output_dir else made_up_folder("evaluate")
    setup_logging(settings.log_level, folder / "evaluation.log")
    device = join_processes(get_device(settings.device))
    processes = PartialState()
    with processes.main_process_first():  # it prepares the data, and what is wrong is said once
        reader = load_reader(settings, device)
        dataset = load_test_set(reader, folder)
    settings = reader.settings
    loader = evaluation_loader(
        dataset,
        settings.batch_size,
        max_windows_per_batch=settings.max_windows_per_batch,
        num_replicas=processes.num_processes,
        rank=processes.process_index,
        num_workers=settings.num_workers,
        pin_memory=reader.device.type == "cuda",
    )
    if is_main_process() and not settings.save_predictions:
        (folder / PREDICTIONS).unlink(missing_ok=True)  # those of an earlier report into this folder
    texts = reader.training_texts
    overlap = None if texts is None else warn_of_overlap(dataset, "test", texts)
    with reader.autocast():
        metrics = evaluate_model(
            reader.model,
            loader,
            reader.device,
            dataset.label_names,
            folder,
            max_window_failures=settings.max_window_failures,
            predictions_path=folder / PREDICTIONS if settings.save_predictions else None,
            overlap_with_training=overlap,
            about=about(reader),
        )
    if is_main_process():
        scores = metrics["accuracy"], metrics["f1_macro"], len(dataset)
        logger.info("accuracy %.4f, macro F1 %.4f on %d documents", *scores)
        logger.info("report: %s", folder)
    return metrics


def about(reader: Reader) -> dict[str, str]:
    """Which model reads what and how, for the report."""
    settings = reader.settings
    reading = {name: getattr(settings, name) for name in (*READING, "sample_data")}
    return {
        "model": str(settings.model_path),
        "test set": ", ".join(settings.test_path or ()),
        "precision": reader.precision,
        "read with": ", ".join(f"{name} {value}" for name, value in reading.items() if value is not None),
    }


class Reader(NamedTuple):
    """A checkpoint that is ready to read documents."""

    model: RecurrentRoBERTa | TransformerClassifier
    """On `device`, in 8 bits with `--int8`."""
    tokenizer: PreTrainedTokenizerBase
    label_names: list[str]
    settings: Settings
    """With the checkpoint's labels and, where no flag says otherwise, its way of reading."""
    device: torch.device
    precision: str
    """`fp32`, `bf16`, `fp16` or `int8`."""
    training_texts: np.ndarray | None
    """The hashes of the texts that it was trained on."""

    def autocast(self) -> torch.autocast:
        """The context to compute in."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=half, enabled=self.settings.mixed_precision)


@error_handler(error_type=ModelError)
def load_reader(settings: Settings, device: torch.device) -> Reader:
    """The checkpoint of `--model_path` as the settings want it computed.

    Raises:
        ConfigError: 8 bits on a GPU, windows that its encoder cannot read, or options of another model.
        ModelError: it cannot be loaded.
    """
    assert settings.model_path is not None
    if settings.int8 and device.type != "cpu":
        raise ConfigError("--int8 computes on a CPU only; give --device cpu with it")
    checkpoint, tokenizer, training_texts = load_all(settings.model_path)
    refuse_other_architecture(settings.model_path, checkpoint.model, settings)
    written = {**WITHOUT, **checkpoint.settings}
    for name in ("model_type", "problem_type"):
        if name in settings.model_fields_set and written[name] != getattr(settings, name):
            raise ConfigError(f"{settings.model_path} was trained with --{name} {written[name]}; leave it out")
    learned = learned_settings(written, settings, LEARNED)
    if settings.int8:
        learned["batch_size"] = 1  # in 8 bits, batch mates would share their scale
        if "batch_size" in settings.model_fields_set:
            logger.warning("--int8 reads one document at a time; --batch_size is not used")
    settings = settings.model_copy(update=learned)
    model = checkpoint.model
    model.config.update({name: getattr(settings, name) for name in READING})
    model.check()
    model = model.to(device)
    precision = mixed_precision_type(settings.mixed_precision_type, device) if settings.mixed_precision else "fp32"
    if settings.int8:
        if not isinstance(model, RecurrentRoBERTa):
            raise ConfigError(f"{settings.model_path}: --int8 is for models with a pretrained encoder, not this one")
        model, precision = quantize_int8(model), "int8"
    id2label = checkpoint.label_maps["id2label"]
    label_names = [id2label[index] for index in range(len(id2label))]
    return Reader(model, tokenizer, label_names, settings, device, precision, training_texts)


@error_handler(error_type=DataError)
def load_test_set(reader: Reader, folder: Path) -> LongTextDataset:
    """The test set, with the checkpoint's labels."""
    assert reader.settings.test_path is not None
    return LongTextDataset(
        reader.settings.test_path,
        label_names=reader.label_names,
        quarantine_path=folder / "quarantine_test.jsonl" if is_main_process() else None,
        **dataset_options(reader.settings, reader.tokenizer),
    )


if __name__ == "__main__":
    from main import main

    sys.exit(main(description=__doc__, mode="evaluate"))
