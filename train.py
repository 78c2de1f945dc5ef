"""Training: from the settings to a run folder and a best model.

`fit` goes through the stages (load the data, build model and engine, train) with a budget: `--epochs`, or the optimizer
steps that `train_by_steps` hands it, and nothing else differs. The loop itself is in `engine.trainer`.
"""

from __future__ import annotations

import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from config import DEFAULT_ENCODER, FEW_DOCUMENTS, Settings
from contradictions import contradictions
from data_utils.augmentation import Masking
from data_utils.dataset import LongTextDataset, dataset_options, load_tokenizer
from data_utils.overlap import warn_of_overlap
from data_utils.paths import expand_paths
from engine.linear_probe import fit_head
from engine.memory_plan import plan_memory
from engine.objective import Objective
from engine.run_folder import RunFolder, open_run_folder
from engine.trainer import Data, EngineCallback, MetricsCallback, ReBertaTrainer
from files import writing_to
from models.checkpoint import Saved, is_checkpoint, load_all
from models.registry import LEARNED, build_model, built_with, check_encoder, learned_settings, refuse_other_architecture
from models.transformer import TransformerClassifier
from presets import with_preset
from processes import join_processes, said_once
from utils import (
    ConfigError,
    DataError,
    DataFormatError,
    ModelError,
    StoppedError,
    TrainingError,
    clean_gpu_memory,
    error_handler,
    get_device,
    is_main_process,
    log_gpu_usage,
    logger,
    mixed_precision_type,
    validate_params,
)

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


MOST_LABELS = 20
"""How many are told in the log."""


class Trained(NamedTuple):
    """Where a finished run lies."""

    best_model: Path
    run_folder: Path
    best_metric: float
    signal: int | None = None
    """SIGTERM or SIGINT, where one came too late to stop the run."""


def train(settings: Settings) -> Trained:
    """Train for `--epochs`."""
    return fit(settings)


@error_handler(error_type=TrainingError)
def fit(settings: Settings, steps: int | None = None) -> Trained:
    """Train for `--epochs`, or for so many optimizer steps, and keep the best model.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: as the stage that fails says it.
    """
    device = join_processes(get_device(settings.device))
    start = load_start(settings)
    settings = with_settings_of(start, settings)
    with open_run_folder(settings) as (run, resume_from):
        set_seed(settings.seed)
        with PartialState().main_process_first():  # it prepares the data, and what is wrong is said once
            data = load_data(settings, run, start)
            settings = with_probe(settings, len(data.train), start)
            model = build_model(settings, data.train.label_names, data.tokenizer, start and start.checkpoint.model)
            del start  # or a second model would lie in memory while this one is trained
            trainer = build_trainer(settings, data, run, model, device, resume_from, steps)
        if resume_from is not None and trainer.is_at_end(resume_from):
            logger.info("the run is at its end already: %s", resume_from)
            if not run.best_model.is_dir():
                raise ConfigError(
                    f"{resume_from}: its run is at its end, and {run.best_model} holds no model; put the best model "
                    "back, or give --resume an earlier checkpoint"
                )
        else:
            if settings.max_memory is not None:
                plan_memory(trainer)
            if trainer.args.eval_on_start:
                fit_head(trainer)
            run_training(trainer, resume_from)
    logger.info("best %s: %.4f", settings.metric_for_best, trainer.state.best_metric)
    logger.info("run folder: %s", run.folder)
    logger.info("best model: %s", run.best_model)
    return Trained(run.best_model, run.folder, trainer.state.best_metric, trainer.signals.received)


def load_start(settings: Settings) -> Saved | None:
    """The saved model that training starts from, or None where it starts from an encoder.

    Raises:
        ModelError: it cannot be loaded.
    """
    source = settings.model_path
    return load_all(source) if source is not None and is_checkpoint(source) else None


@error_handler(error_type=ModelError)
def with_settings_of(start: Saved | None, settings: Settings) -> Settings:
    """The settings, with those of the saved model that training starts from where no option says otherwise.

    Raises:
        ConfigError: options that contradict these.
    """
    said = set(settings.model_fields_set)
    before = contradictions(settings, said)
    faults: list[str] = []
    if start is not None:
        source, (model, written, _) = str(settings.model_path), start.checkpoint
        settings = settings.model_copy(update=learned_settings(written, settings, (*LEARNED, "model_type")))
        if isinstance(model, TransformerClassifier) == (settings.model_type == "transformer"):
            refuse_other_architecture(source, model, settings)
            settings = settings.model_copy(update=built_with(model))
        settings, faults = with_preset(settings)
        if "model_type" not in said:
            faults = [f"{fault} (as {source} is; --model_type reberta reads otherwise)" for fault in faults]
    faults += [fault for fault in contradictions(settings, said, model_is_read=True) if fault not in before]
    if faults:
        raise ConfigError("; ".join(faults))
    return settings


@error_handler(error_type=DataError)
def load_data(settings: Settings, run: RunFolder, start: Saved | None = None) -> Data:
    """Training and validation set, cut into windows. The labels are those of the training set.

    The tokenizer is that of `start`, the saved model that training starts from, or of the encoder.
    """
    paths = {"train": settings.train_path, "validation": settings.val_path}
    if settings.mode == "train_and_evaluate":  # what is wrong with the test set is better known before training
        paths["test"] = settings.test_files
    options_of = {"train": "train_path", "validation": "val_path", "test": "test_path"}
    left_out = [split for split in paths if options_of[split] not in settings.model_fields_set]
    for split in left_out if len(left_out) < len(paths) else []:
        default = ", ".join(paths[split])
        logger.warning("--%s is not given: %s documents are those of %s", options_of[split], split, default)
    # looked for first: the tokenizer may have to be fetched
    files = {split: expand_paths(given) for split, given in paths.items()}
    train_files = ", ".join(map(str, files["train"]))
    tokenizer = start.tokenizer if start else load_tokenizer(settings.model_path or DEFAULT_ENCODER)
    check_encoder(settings, start and start.checkpoint.model)
    options = dataset_options(settings, tokenizer)
    train_set = LongTextDataset(
        settings.train_path,
        augmentation=masking(settings, tokenizer),
        draw_windows=True,
        train_windows=settings.train_windows,
        quarantine_path=run.quarantine("train"),
        **options,
    )
    if settings.problem_type == "single_label" and len(train_set.label_names) < 2:
        raise DataFormatError(
            f"{train_files}: all {len(train_set)} documents have the label "
            f"{train_set.label_names[0]!r}; two labels at least are needed; is --label_column {settings.label_column} "
            "the right one?"
        )
    if not train_set.label_names:
        raise DataFormatError(f"{train_files}: no document has a label; one at least is needed")
    logger.info("%d labels: %s", len(train_set.label_names), label_counts(train_set))
    options |= {"label_names": train_set.label_names}
    _, *held_out = paths
    sets = {
        split: LongTextDataset(paths[split], quarantine_path=run.quarantine(split), **options) for split in held_out
    }
    validation_set = sets["validation"]
    processes = PartialState().num_processes
    for split, dataset in {"train": train_set, **sets}.items():
        if len(dataset) < processes:  # else an evaluation would find it out when an epoch is trained
            what = f"{len(dataset)} documents cannot be shared by {processes} processes"
            raise ConfigError(f"{', '.join(map(str, files[split]))}: {what}; start fewer")
    if is_main_process():
        run.record_data([*files["train"], *files["validation"]])
    warn_of_overlap(validation_set, "validation", train_set.text_hashes)
    training_texts = train_set.text_hashes
    if start is not None and start.training_texts is not None:
        training_texts = np.union1d(start.training_texts, training_texts)
    return Data(train_set, validation_set, tokenizer, training_texts)


def with_probe(settings: Settings, documents: int, start: Saved | None) -> Settings:
    """The settings, with one reading for a probe where nothing is said of it, and training starts from an encoder and
    with few documents."""
    if settings.probe_epochs is not None:
        return settings
    return settings.model_copy(update={"probe_epochs": int(start is None and 1 < documents <= FEW_DOCUMENTS)})


def label_counts(dataset: LongTextDataset) -> str:
    """How many documents have each label; where there are many, the first of them."""
    labels, names = dataset.labels, dataset.label_names
    assert labels is not None
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    shown = [f"{name} {count:,}" for name, count in zip(names[:MOST_LABELS], counts, strict=False)]
    return ", ".join(shown) + (", ..." if len(names) > MOST_LABELS else "")


def masking(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Masking | None:
    if not settings.use_augmentation:
        return None
    return Masking(
        probability=settings.random_mask_prob,
        max_tokens=settings.max_mask_tokens,
        whole_word=settings.whole_word_mask,
        mask_token_id=tokenizer.mask_token_id,
        seed=settings.seed,
    )


def optimizer_type(settings: Settings, *, fp16: bool) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Its class and options: fused, except under fp16, where a step whose gradients overflow must be skipped.

    A fused optimizer skips it by itself: accelerate does not notice, so that the schedule goes on, and the momentum of
    SGD stays uninitialised if that step is the first.
    """
    kind, options = OPTIMIZERS[settings.optimizer_type]
    return kind, {"lr": settings.learning_rate, "fused": not fp16, **options}


@validate_params(steps=int)
def build_trainer(
    settings: Settings,
    data: Data,
    run: RunFolder,
    model: PreTrainedModel,
    device: torch.device,
    resume_from: str | None,
    steps: int | None = None,
) -> ReBertaTrainer:
    """The engine, ready to train for `--epochs`, or for so many optimizer steps."""
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if str_to_bool(os.environ.get(variable, "false")):
            raise ConfigError(f"{variable} is set: FSDP and DeepSpeed are not supported; start with torchrun (DDP)")
    if settings.report_to != "none" and find_spec(settings.report_to) is None:
        raise ConfigError(f"--report_to {settings.report_to}: is not installed; pip install {settings.report_to}")
    args = _training_arguments(settings, run, device, resume_from, steps)
    trainer = ReBertaTrainer(
        settings,
        data,
        run,
        Objective(settings.label_smoothing, class_weights(settings, data.train), settings.window_loss),
        model=model,
        args=args,
        optimizer_cls_and_kwargs=optimizer_type(settings, fp16=args.fp16),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress)
    trainer.add_callback(EngineCallback(trainer, resume_from))
    trainer.add_callback(MetricsCallback(run))
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    updates = math.ceil(len(trainer.train_sampler) / settings.gradient_accumulation_steps)
    budget = steps or updates * settings.epochs
    if (settings.num_warmup_steps or 0) > budget:
        raise ConfigError(
            f"--num_warmup_steps {settings.num_warmup_steps} is more than the {budget} steps of this run: "
            "the learning rate would never reach its peak"
        )
    parameters, trained_parameters = model.num_parameters(), model.num_parameters(only_trainable=True)
    run.report(parameters=parameters, trained_parameters=trained_parameters)
    logger.info("%s parameters, of which %s are trained", f"{parameters:,}", f"{trained_parameters:,}")
    logger.info(
        "%d optimizer steps of up to %d documents",
        budget,
        settings.batch_size * settings.gradient_accumulation_steps * trainer.args.world_size,
    )
    return trainer


class _Progress(ProgressCallback):
    """The bars alone: what is logged, the log says."""

    def on_log(self, *arguments: Any, **options: Any) -> None:
        pass


def _training_arguments(
    settings: Settings, run: RunFolder, device: torch.device, resume_from: str | None, steps: int | None
) -> TrainingArguments:
    precision = mixed_precision_type(settings.mixed_precision_type, device) if settings.mixed_precision else None
    when = "steps" if settings.eval_every else "epoch"
    warmup = 0.1 if settings.num_warmup_steps is None else settings.num_warmup_steps
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        num_train_epochs=settings.epochs,
        max_steps=steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip_val,
        lr_scheduler_type=settings.scheduler_type,
        warmup_steps=0 if settings.scheduler_type == "constant" else warmup,
        logging_steps=settings.log_steps,
        logging_first_step=True,  # how long a step takes is what is asked first
        logging_nan_inf_filter=False,  # it would log a loss that is not a number as 0.0 and go on
        eval_strategy=when,
        eval_steps=settings.eval_every,
        eval_on_start=bool(settings.probe_epochs) and resume_from is None,  # of the head that the probe fitted
        save_strategy=when,
        save_steps=settings.eval_every or 1,
        metric_for_best_model=settings.metric_for_best,
        greater_is_better=settings.metric_for_best not in ("loss", "log_loss"),
        restore_callback_states_from_checkpoint=True,  # or early stopping would forget its patience
        seed=settings.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        dataloader_num_workers=settings.num_workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch of one-window documents does not use the gates
        report_to=settings.report_to,
        disable_tqdm=not sys.stderr.isatty(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs go through torchrun; DataParallel is not supported
    return arguments


def class_weights(settings: Settings, dataset: LongTextDataset) -> Tensor | None:
    """Inverse class frequencies: of mean 1 over documents, or negatives per positive for several labels a document."""
    if settings.class_weights == "none":
        return None
    labels = dataset.labels
    assert labels is not None
    if labels.ndim == 2:
        positives = labels.sum(0)
        negatives = len(labels) - positives
        return torch.from_numpy(np.where(negatives > 0, negatives / positives.clip(min=1), 1.0)).float()
    weights, present = torch.ones(len(dataset.label_names)), np.unique(labels)  # --sample_data may leave a class out
    weights[present] = torch.from_numpy(compute_class_weight("balanced", classes=present, y=labels)).float()
    return weights


@error_handler(error_type=TrainingError)
def run_training(trainer: ReBertaTrainer, resume_from: str | None) -> None:
    """Train, from a checkpoint where one is given.

    Raises:
        StoppedError: after SIGTERM or Ctrl-C, once the step that was at work is saved.
    """
    if trainer.args.process_index:
        set_seed(trainer.args.seed + trainer.args.process_index)  # or all processes would drop out the same values
    with writing_to(trainer.run.folder), trainer.signals:
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.should_stop()  # a signal that came since it was last asked is known to all processes
    log_gpu_usage()
    clean_gpu_memory()
    if trainer.signals.received and trainer.state.global_step < trainer.state.max_steps:
        message = (
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved; "
            f"the same command with --output_dir {trainer.run.folder} goes on from there"
        )
        raise said_once(StoppedError(message, trainer.signals.received))
