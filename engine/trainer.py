"""The engine: one transformers Trainer subclass and its callbacks.

- batches from `LongTextBatchSampler`; an update's documents are the same however they are cut into micro-batches
- a loss or a gradient that is not finite, or too many failed windows, ends the run before the update, and names the
  documents where it is theirs
- a moving average of the weights (`--ema_decay`) is what is evaluated and saved
- the best model goes to `models/saved/<run>/`, everything else to the run folder
- SIGTERM and Ctrl-C save the step that is at work
- a checkpoint is written beside its place and moved there whole, with a manifest (see `run_checkpoints`)
- several processes agree, step by step, on what is wrong and on whether to stop
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from calibration import fit_temperature, log_losses, probabilities, tune_thresholds
from config import Settings
from data_utils.dataset import LongTextBatchSampler, LongTextDataset, collate, evaluation_loader
from engine.objective import Objective
from engine.piecewise import PiecewiseTrainer
from engine.run_checkpoints import STATE_FILE, keep, seal
from engine.run_folder import RunFolder
from engine.watch import Watch
from evaluation_utils import check_windows, classification_metrics, predict
from files import share_weights, write_text
from models.checkpoint import save_checkpoint
from processes import StopSignals, gather
from utils import logger
from visualization_utils import save_run_curves

EMA_FILE = "ema.safetensors"
PROBE_FILE = "probe.safetensors"
WATCH_FILE = "watch.json"
SECONDS_BETWEEN_CURVES = 20  # a figure takes half a second, which is much where evaluations are short


class Data(NamedTuple):
    """What a run trains and chooses its best model on."""

    train: LongTextDataset
    validation: LongTextDataset
    tokenizer: PreTrainedTokenizerBase
    training_texts: np.ndarray
    """Hashes of all texts that the model will have been trained on, int64."""


class ReBertaTrainer(PiecewiseTrainer):
    """transformers' Trainer with our batches, our loss, our evaluation and our best model."""

    def __init__(self, settings: Settings, data: Data, run: RunFolder, objective: Objective, **options: Any) -> None:
        self.settings, self.data, self.run, self.objective = settings, data, run, objective
        self.ema: AveragedModel | None = None
        self.probe_losses_n: Tensor | None = None
        self.beats_the_probe = True
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

    def document_name(self, index: int) -> str:
        return self.data.train.ids[index]

    def forget_update(self) -> None:
        self.watch.forget()

    @property
    def evaluated_model(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Four groups: with or without weight decay, and fresh weights or not; those of a fitted head are not."""
        model = model or self.model
        known = ("encoder.", "pooler.", "classifier.") if self.settings.probe_epochs else ("encoder.",)
        decayed = set(self.get_decay_parameter_names(model))
        optimizer, options = self.optimizer_cls_and_kwargs
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith(known), name in decayed), []).append(parameter)
        self.optimizer: Any = optimizer(
            [
                {
                    "params": parameters,
                    "lr": options["lr"] * (1.0 if is_known else self.settings.fresh_lr_factor),
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                }
                for (is_known, decays), parameters in groups.items()
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
        return evaluation_loader(
            eval_dataset or self.data.validation,
            self.settings.batch_size,
            max_windows_per_batch=self.settings.max_windows_per_batch,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        index_B = inputs.pop("index")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.watch.add(index_B, outputs, loss)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16:  # there a step that overflows is skipped
            self.watch.gradient_norm = norm
        return norm

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the model (its moving average where there is one) on the validation set, to which its temperature
        and thresholds are fitted: `loss`, of the logits as they are, `log_loss`, after the temperature, `accuracy` and
        `f1_macro`."""
        model: Any = self.evaluated_model
        with self.accelerator.autocast():
            prediction = predict(model, self.get_eval_dataloader(eval_dataset), self.args.device)
        dataset = eval_dataset or self.data.validation
        where = f"step {self.state.global_step}, validation: "
        check_windows(prediction, dataset.ids, self.settings.max_window_failures, where)
        assert prediction.labels is not None
        temperature = fit_temperature(prediction.logits, prediction.labels)
        scores = probabilities(prediction.logits, self.settings.problem_type, temperature)
        model.config.calibration_temperature = temperature
        if self.settings.problem_type == "multi_label":
            model.config.thresholds = tune_thresholds(scores, prediction.labels)
        report = classification_metrics(
            prediction.labels, scores, dataset.label_names, self.settings.problem_type, model.config.thresholds
        )
        labels = torch.from_numpy(prediction.labels)
        loss = self.objective.losses(torch.from_numpy(prediction.logits), labels).sum() / labels.numel()
        values = {"loss": float(loss), **{name: report[name] for name in ("log_loss", "accuracy", "f1_macro")}}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        losses_n = torch.from_numpy(log_losses(scores, prediction.labels))
        self.beats_the_probe = self.probe_losses_n is None or clearly_lower(losses_n, self.probe_losses_n)
        # early stopping is to count as a gain only what may become the best model
        seen = metrics if self.beats_the_probe else {**metrics, f"{metric_key_prefix}_log_loss": math.inf}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, seen)
        if self.state.global_step == 0:  # Trainer chooses among the evaluations that follow
            self._determine_best_metric(metrics, trial=None)
            if self.settings.metric_for_best == "log_loss":
                self.probe_losses_n = losses_n
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not self.beats_the_probe:
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.should_save:
            model: Any = self.evaluated_model
            settings = {**self.settings.model_dump(mode="json"), "output_dir": str(self.run.folder)}
            save_checkpoint(model, self.data.tokenizer, settings, self.run.best_model, self.data.training_texts)
        return is_best

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All that a resumed run needs, staged by Trainer and by every process, then sealed by process 0."""
        super()._save_checkpoint(model, trial)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            self._save_own_state(self.run.staging / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            share_weights(self.run.staging / name)
            seal(self.run.staging / name, self.run.folder / name)
            self.run.staging.rmdir()
            keep(self.run.folder, self.settings.save_total_limit, self.state.best_global_step)
            self.run.report(checkpoint=name)
        self.accelerator.wait_for_everyone()

    def _save_own_state(self, checkpoint: Path) -> None:
        """What Trainer knows nothing of."""
        self.watch.save(checkpoint / WATCH_FILE)
        if self.ema is not None:
            save_file(self.ema.state_dict(), checkpoint / EMA_FILE)
        if self.probe_losses_n is not None:
            save_file({"losses": self.probe_losses_n}, checkpoint / PROBE_FILE)

    def load_own_state(self, checkpoint: Path) -> None:
        """What `_save_own_state` wrote. The best metric so far is forgotten where its model is gone."""
        if (watch := checkpoint / WATCH_FILE).is_file():  # checkpoints of before it have none
            self.watch.load(watch)
        if self.ema is not None:
            self.ema.load_state_dict(load_file(checkpoint / EMA_FILE))
        if not self.run.best_model.is_dir():  # it lies elsewhere, if anywhere
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        elif (probe := checkpoint / PROBE_FILE).is_file():
            self.probe_losses_n = load_file(probe)["losses"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights and configuration only: the pickled TrainingArguments that Trainer adds are of no use here."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict)

    def should_stop(self) -> bool:
        """Whether a signal reached one of the processes. All must ask at the same time."""
        self.signals.received = max(gather(self.signals.received or 0)) or None
        return self.signals.received is not None

    def is_at_end(self, checkpoint: str) -> bool:
        """Whether the run of `checkpoint` is over, by its steps or by early stopping; its state is then this one's."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        patience = self.settings.early_stopping_patience
        waiting = state.stateful_callbacks.get("EarlyStoppingCallback")
        waited = waiting["attributes"]["early_stopping_patience_counter"] if waiting else 0
        if state.global_step < state.max_steps and (patience is None or waited < patience):
            return False
        self.state = state
        return True


def clearly_lower(losses_n: Tensor, probe_losses_n: Tensor) -> bool:
    """Whether the mean is lower than the probe's by more than the standard error of the difference by documents."""
    gains_n = probe_losses_n - losses_n
    gain, error = float(gains_n.mean()), float(gains_n.std()) / math.sqrt(len(gains_n))
    if gain <= error:
        logger.info("not clearly better than the probe: log loss lower by %.4f, standard error %.4f", gain, error)
    return not gain <= error  # a single document has no error


class EngineCallback(TrainerCallback):
    """What a step needs around it: epoch, watch, moving average, signals."""

    def __init__(self, trainer: ReBertaTrainer, resume_from: str | None) -> None:
        self.trainer, self.resume_from = trainer, resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epochs = state.max_steps * args.gradient_accumulation_steps / len(self.trainer.train_sampler)
        self.trainer.watch.budget *= min(1.0, epochs)  # of a run that ends before its first epoch does
        if (decay := self.trainer.settings.ema_decay) is not None:
            self.trainer.ema = AveragedModel(self.trainer.model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        if self.resume_from is not None:
            self.trainer.load_own_state(Path(self.resume_from))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.epoch or 0
        epoch = math.floor(done)
        self.trainer.train_sampler.set_epoch(epoch)
        self.trainer.data.train.set_epoch(epoch)
        if done == epoch:  # or the run goes on in the middle of one
            self.trainer.watch.failed_windows = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.watch.check(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self.trainer.model)
        if self.trainer.should_stop():
            control.should_training_stop = True
            control.should_save |= not self._evaluation_follows(args, state)
        control.should_log |= control.should_save

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.trainer.should_stop()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.signals.received and not self._evaluation_follows(args, state):
            control.should_save = control.should_evaluate = False  # saved, and the whole run has no evaluation here
        control.should_log |= control.should_save

    @staticmethod
    def _evaluation_follows(args: Any, state: Any) -> bool:
        """Whether this step ends an epoch, or the run, and the evaluation and the checkpoint of the epoch come next."""
        return args.eval_strategy == "epoch" and (
            state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        )


class MetricsCallback(TrainerCallback):
    """metrics.jsonl, a line in the log, and the learning curves, drawn now and then and at the end."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.drawn = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(self.run.metrics, "".join(map(self._line, state.log_history)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        row = state.log_history[-1]
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(self._line(row))
        shown = {name: value for name, value in row.items() if name not in ("step", "epoch", "total_flos")}
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        logger.info("step %d/%d, epoch %.2f: %s", row["step"], state.max_steps, row.get("epoch", 0), values)
        progress = {"step": row["step"], "max_steps": state.max_steps, "epoch": row.get("epoch", 0)}
        self.run.report(**progress, best_metric=state.best_metric, best_step=state.best_global_step)

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        """JSON has no infinity, which the norm of gradients is where fp16 overflows: null."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        return json.dumps(finite, allow_nan=False) + "\n"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_CURVES:
            self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def _draw(self, state: Any) -> None:
        if state.is_world_process_zero:
            save_run_curves(state.log_history, self.run.folder / "learning_curves.png")
            self.drawn = time.monotonic()
