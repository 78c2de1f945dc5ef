"""The engine: one transformers Trainer subclass, its callbacks, and `fit`, which hands it a budget.

- batches from `LongTextBatchSampler`; an update's documents are the same however they are cut into micro-batches
- the loss is computed here from the logits, as a sum over the documents of an update divided by their number
- a loss that is not finite, or too many failed windows, ends the run before the update, and names the documents
- a moving average of the weights (`--ema_decay`) is what is evaluated and saved
- the best model goes to `models/saved/<run>/`, everything else to the run folder

`train` hands over epochs, `train_by_steps.train_by_steps` steps; nothing else differs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from config import DEFAULT_ENCODER, Settings
from data_utils.augmentation import Masking
from data_utils.dataset import LongTextBatchSampler, LongTextDataset, collate, load_tokenizer
from data_utils.readers import expand_paths
from evaluation_utils import classification_metrics, predict, probabilities, tune_thresholds
from models.checkpoint import is_checkpoint, load_checkpoint_tokenizer, save_checkpoint
from models.registry import build_model
from run_folder import RunFolder, open_run_folder
from utils import (
    ConfigError,
    DataError,
    StoppedError,
    StopSignals,
    TrainingError,
    clean_gpu_memory,
    error_handler,
    get_device,
    log_gpu_usage,
    logger,
    mixed_precision_type,
    validate_params,
)
from visualization_utils import save_run_curves

EMA_FILE = "ema.safetensors"
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
}


class Data(NamedTuple):
    """What a run trains and chooses its best model on."""

    train: LongTextDataset
    validation: LongTextDataset
    tokenizer: PreTrainedTokenizerBase


class Trained(NamedTuple):
    """Where a finished run lies."""

    best_model: Path
    run_folder: Path
    best_metric: float


class Objective:
    """Cross-entropy, or binary cross-entropy for several labels a document, as a sum divided by a count.

    Called as transformers' `compute_loss_func`: `num_items_in_batch` counts the labels of the whole update, over all
    micro-batches and processes.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def loss_sum(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """Sum over documents (single label, labels [B]) or over documents and classes (labels [B, C])."""
        logits_BC = logits_BC.float()
        weight = self.class_weights.to(logits_BC.device) if self.class_weights is not None else None
        if labels.dim() == 2:
            targets_BC = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
            return nn.functional.binary_cross_entropy_with_logits(
                logits_BC, targets_BC, pos_weight=weight, reduction="sum"
            )
        return nn.functional.cross_entropy(
            logits_BC, labels, weight=weight, label_smoothing=self.label_smoothing, reduction="sum"
        )

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        return self.loss_sum(outputs.logits, labels) / (
            labels.numel() if num_items_in_batch is None else num_items_in_batch
        )


class Watch:
    """Looks at each update before it is made: every logit finite, few enough failed windows.

    One look at the host per update. `budget` is the number of windows of an epoch that may fail.
    """

    def __init__(self, ids: Sequence[str], budget: float) -> None:
        self.ids, self.budget = ids, budget
        self.failed_windows = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, index_B: Tensor, outputs: Any, loss: Tensor) -> None:
        finite_B = outputs.logits.detach().isfinite().all(-1)
        finite_B &= loss.detach().isfinite() | ~finite_B.all()  # no logit to blame: the whole batch
        self._seen.append((index_B, finite_B, outputs.hidden_states.window_failures))

    def check(self, step: int) -> None:
        """Raises TrainingError, naming the step and the documents."""
        seen, self._seen = self._seen, []
        bad = [self.ids[i] for index_B, finite_B, _ in seen for i in index_B[~finite_B].tolist()]
        failures = [(int(index_B[row]), window) for index_B, _, f in seen for row, window in f.nonzero().tolist()]
        for document, window in failures:
            logger.warning("step %d: %s, window %d: its state is not finite", step, self.ids[document], window)
        self.failed_windows += len(failures)
        if bad:
            raise TrainingError(
                f"step {step}: the loss is not finite, so the update was not made; documents: {', '.join(bad)}. "
                "Try a lower --learning_rate, --mixed_precision_type bf16 or full precision"
            )
        if self.failed_windows > self.budget:
            raise TrainingError(
                f"step {step}: {self.failed_windows} windows of this epoch failed, over --max_window_failures of them"
            )


class ReBertaTrainer(Trainer):
    """transformers' Trainer with our batches, our loss, our evaluation and our best model."""

    def __init__(self, settings: Settings, data: Data, run: RunFolder, objective: Objective, **options: Any) -> None:
        self.settings, self.data, self.run, self.objective = settings, data, run, objective
        self.ema: AveragedModel | None = None
        self.signals = StopSignals()
        self.watch = Watch(data.train.ids, settings.max_window_failures * float(data.train.window_counts.sum()))
        super().__init__(
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=partial(collate, pad_token_id=data.tokenizer.pad_token_id),
            compute_loss_func=objective,
            **options,
        )
        self.train_sampler = LongTextBatchSampler(
            data.train.window_counts,
            settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            max_windows_per_batch=settings.max_windows_per_batch,
            seed=settings.seed,
        )

    @property
    def evaluated_model(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Four groups: with or without weight decay, and the encoder's or fresh parameters."""
        model = model or self.model
        decayed = set(self.get_decay_parameter_names(model))
        optimizer, options = self.optimizer_cls_and_kwargs
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith("encoder."), name in decayed), []).append(parameter)
        self.optimizer: Any = optimizer(
            [
                {
                    "params": parameters,
                    "lr": options["lr"] * (1.0 if pretrained else self.settings.fresh_lr_factor),
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                }
                for (pretrained, decays), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        loader = self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_sampler=self.train_sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.device.type == "cuda",
                persistent_workers=self.args.dataloader_num_workers > 0,
                generator=torch.Generator(),  # or the loader would draw its seed from the one of the dropout
            )
        )
        if self.args.world_size > 1:  # our sampler deals to the processes itself; accelerate must not deal again
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def get_eval_dataloader(self, eval_dataset: LongTextDataset | None = None) -> DataLoader:
        dataset = eval_dataset or self.data.validation
        sampler = LongTextBatchSampler(
            dataset.window_counts,
            self.settings.batch_size,
            max_windows_per_batch=self.settings.max_windows_per_batch,
            shuffle=False,
        )
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=self.data_collator, generator=torch.Generator())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        index_B = inputs.pop("index")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.watch.add(index_B, outputs, loss)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the model (its moving average where there is one) on the validation set."""
        model: Any = self.evaluated_model
        with self.accelerator.autocast():
            prediction = predict(model, self.get_eval_dataloader(eval_dataset), self.args.device)
        dataset = eval_dataset or self.data.validation
        unreadable = ~np.isfinite(prediction.logits).all(-1)
        if unreadable.any():
            names = ", ".join(dataset.ids[i] for i in np.flatnonzero(unreadable)[:20])
            raise TrainingError(
                f"step {self.state.global_step}: validation gives logits that are not finite; documents: {names}"
            )
        assert prediction.labels is not None
        scores = probabilities(prediction.logits, self.settings.problem_type)
        if self.settings.problem_type == "multi_label":
            model.config.thresholds = tune_thresholds(scores, prediction.labels)
        report = classification_metrics(
            prediction.labels, scores, dataset.label_names, self.settings.problem_type, model.config.thresholds
        )
        labels = torch.from_numpy(prediction.labels)
        loss = self.objective.loss_sum(torch.from_numpy(prediction.logits), labels) / labels.numel()
        values = {"loss": float(loss), "accuracy": report["accuracy"], "f1_macro": report["f1_macro"]}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.should_save:
            model: Any = self.evaluated_model
            save_checkpoint(model, self.data.tokenizer, self.settings.model_dump(mode="json"), self.run.best_model)
        return is_best

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights and configuration only: the pickled TrainingArguments that Trainer adds are of no use here."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict)


class EngineCallback(TrainerCallback):
    """What a step needs around it: epoch, watch, moving average, signals."""

    def __init__(self, trainer: ReBertaTrainer, resume_from: str | None) -> None:
        self.trainer, self.resume_from = trainer, resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = self.trainer.settings.ema_decay
        if decay is None:
            return
        self.trainer.ema = AveragedModel(self.trainer.model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        if self.resume_from is not None:
            self.trainer.ema.load_state_dict(load_file(Path(self.resume_from) / EMA_FILE))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = math.floor(state.epoch or 0)
        self.trainer.train_sampler.set_epoch(epoch)
        self.trainer.data.train.set_epoch(epoch)
        self.trainer.watch.failed_windows = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.watch.check(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self.trainer.model)
        if self.trainer.signals.received:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.signals.received:  # it is saved, and an evaluation here is none that the whole run would have
            control.should_save = control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None and args.should_save:
            save_file(
                self.trainer.ema.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE
            )


class MetricsCallback(TrainerCallback):
    """metrics.jsonl, a line in the log, and the learning curves."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = [json.dumps(row) for row in state.log_history]
            self.run.metrics.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        row = state.log_history[-1]
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: value for name, value in row.items() if name not in ("step", "epoch", "total_flos")}
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        logger.info("step %d/%d, epoch %.2f: %s", row["step"], state.max_steps, row.get("epoch", 0), values)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_run_curves(state.log_history, self.run.folder / "learning_curves.png")


def train(settings: Settings) -> Trained:
    """Train for `--epochs`."""
    return fit(settings, epochs=settings.epochs)


def fit(settings: Settings, *, epochs: int | None = None, steps: int | None = None) -> Trained:
    """Train for so many epochs, or so many optimizer steps, and keep the best model.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: as the stage that fails says it.
    """
    device = get_device(settings.device)
    run, resume_from = open_run_folder(settings)
    set_seed(settings.seed)
    data = load_data(settings, run)
    model = build_model(settings, data.train.label_names, data.tokenizer)
    trainer = build_trainer(settings, data, run, model, device, resume_from, epochs=epochs, steps=steps)
    run_training(trainer, resume_from)
    logger.info("best %s: %.4f", settings.metric_for_best, trainer.state.best_metric)
    logger.info("run folder: %s", run.folder)
    logger.info("best model: %s", run.best_model)
    return Trained(run.best_model, run.folder, trainer.state.best_metric)


@error_handler(error_type=DataError)
def load_data(settings: Settings, run: RunFolder) -> Data:
    """Training and validation set, cut into windows. The labels are those of the training set."""
    source = settings.model_path or DEFAULT_ENCODER
    tokenizer = load_checkpoint_tokenizer(source) if is_checkpoint(source) else load_tokenizer(source)
    options = dataset_options(settings, tokenizer)
    train_set = LongTextDataset(
        settings.train_path,
        augmentation=masking(settings, tokenizer),
        quarantine_path=run.quarantine("train"),
        **options,
    )
    options |= {"label_names": train_set.label_names}
    validation_set = LongTextDataset(settings.val_path, quarantine_path=run.quarantine("validation"), **options)
    run.record_data(expand_paths([*settings.train_path, *settings.val_path]))
    return Data(train_set, validation_set, tokenizer)


def dataset_options(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of `LongTextDataset` that the settings decide, the same for every set."""
    reading = ("max_len", "window_size", "max_windows", "window_overlap", "text_column", "label_column", "problem_type")
    options = {name: getattr(settings, name) for name in (*reading, "on_bad_lines", "sample_data", "seed")}
    return {**options, "tokenizer": tokenizer, "cache_dir": Path(settings.cache_dir).expanduser()}


def masking(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Masking | None:
    if not settings.use_augmentation:
        return None
    if tokenizer.mask_token_id is None:
        raise ConfigError("--use_augmentation: the encoder's tokenizer has no mask token")
    return Masking(
        probability=settings.random_mask_prob,
        max_tokens=settings.max_mask_tokens,
        whole_word=settings.whole_word_mask,
        mask_token_id=tokenizer.mask_token_id,
        seed=settings.seed,
    )


@validate_params(epochs=(int, type(None)), steps=(int, type(None)))
def build_trainer(
    settings: Settings,
    data: Data,
    run: RunFolder,
    model: nn.Module,
    device: torch.device,
    resume_from: str | None,
    *,
    epochs: int | None,
    steps: int | None,
) -> ReBertaTrainer:
    """The engine, ready to train."""
    if settings.report_to != "none" and find_spec(settings.report_to) is None:
        raise ConfigError(f"--report_to {settings.report_to}: is not installed; pip install {settings.report_to}")
    optimizer, optimizer_options = OPTIMIZERS[settings.optimizer_type]
    trainer = ReBertaTrainer(
        settings,
        data,
        run,
        Objective(settings.label_smoothing, class_weights(settings, data.train)),
        model=model,
        args=_training_arguments(settings, run, device, epochs, steps),
        optimizer_cls_and_kwargs=(optimizer, {"lr": settings.learning_rate, **optimizer_options}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(EngineCallback(trainer, resume_from))
    trainer.add_callback(MetricsCallback(run))
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    updates = math.ceil(len(trainer.train_sampler) / settings.gradient_accumulation_steps)
    budget = steps or updates * (epochs or 1)
    if (settings.num_warmup_steps or 0) > budget:
        raise ConfigError(
            f"--num_warmup_steps {settings.num_warmup_steps} is more than the {budget} steps of this run: "
            "the learning rate would never reach its peak"
        )
    logger.info(
        "%d optimizer steps of up to %d documents; %.1f%% of the windows of a batch are padding",
        budget,
        settings.batch_size * settings.gradient_accumulation_steps * trainer.args.world_size,
        100 * trainer.train_sampler.padding_waste(),
    )
    return trainer


def _training_arguments(
    settings: Settings, run: RunFolder, device: torch.device, epochs: int | None, steps: int | None
) -> TrainingArguments:
    precision = mixed_precision_type(settings.mixed_precision_type, device) if settings.mixed_precision else None
    when = "steps" if settings.eval_every else "epoch"
    warmup = 0.1 if settings.num_warmup_steps is None else settings.num_warmup_steps
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        num_train_epochs=epochs or 1,
        max_steps=steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip_val,
        lr_scheduler_type=settings.scheduler_type,
        warmup_steps=0 if settings.scheduler_type == "constant" else warmup,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,  # it would log a loss that is not a number as 0.0 and go on
        eval_strategy=when,
        eval_steps=settings.eval_every,
        save_strategy=when,
        save_steps=settings.eval_every or 1,
        save_total_limit=settings.save_total_limit + 1,  # the best one besides the last
        metric_for_best_model=settings.metric_for_best,
        greater_is_better=settings.metric_for_best != "loss",
        load_best_model_at_end=True,
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
        positives = labels.sum(0).clip(min=1)
        return torch.from_numpy((len(labels) - positives) / positives).float()
    classes = np.arange(len(dataset.label_names))
    return torch.from_numpy(compute_class_weight("balanced", classes=classes, y=labels)).float()


@error_handler(error_type=TrainingError)
def run_training(trainer: ReBertaTrainer, resume_from: str | None) -> None:
    """Train, from a checkpoint where one is given.

    Raises:
        StoppedError: after SIGTERM or Ctrl-C, once the step that was at work is saved.
    """
    with trainer.signals:
        trainer.train(resume_from_checkpoint=resume_from)
    log_gpu_usage()
    clean_gpu_memory()
    if trainer.signals.received and trainer.state.global_step < trainer.state.max_steps:
        raise StoppedError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved; "
            f"the same command with --output_dir {trainer.run.folder} goes on from there",
            trainer.signals.received,
        )
