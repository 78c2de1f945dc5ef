"""A head that fits the encoder as it is, before anything else is trained: `--probe_epochs`.

Linear probing, then fine-tuning (Kumar et al. 2022): a random head would first distort what the encoder knows. A fresh
model's document state is the mean of its windows' states, so a linear classifier of it is a model that can be used.

Shapes: n documents, once for each epoch; D hidden size; C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_utils.dataset import LongTextDataset, evaluation_loader
from utils import TrainingError, error_handler, logger

if TYPE_CHECKING:
    from engine import Objective, ReBertaTrainer

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # C, as scikit-learn's LogisticRegression counts it
SPREAD = 0.5  # standard deviation of what goes into the pooler's tanh, which is nearly linear there
LEAST_DEVIATION = 0.1  # of a dimension, as a share of the mean over dimensions


@error_handler(error_type=TrainingError)
def fit_head(trainer: ReBertaTrainer) -> None:
    """Make the pooler a standardisation of the document states, the classifier a logistic regression of what it gives.

    The training set is read `--probe_epochs` times as training reads it, but without gradients and dropout; once, where
    neither `--read random` nor masking makes its epochs differ. The strength of regularisation is the one of lowest
    validation loss. The states are held in memory, 4 D bytes for a document and epoch. Every process does the same.

    Raises:
        TrainingError: no document of the training or validation set can be read.
    """
    model: Any = trainer.model
    train, settings = trainer.data.train, trainer.settings
    epochs = settings.probe_epochs if settings.read == "random" or settings.use_augmentation else 1
    parts = []
    for epoch in range(epochs):
        train.set_epoch(epoch)
        parts.append(_read(trainer, train, f"probe, epoch {epoch + 1} of {epochs}"))
    states_nD, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    held_out_states_nD, held_out_labels = _read(trainer, trainer.data.validation, "probe, validation")
    with torch.no_grad():
        deviation_D = states_nD.std(0)
        # some dimensions of an encoder are all but constant; drawn out, any change of them would drown the others
        scale_D = SPREAD / deviation_D.clamp(min=LEAST_DEVIATION * deviation_D.mean())
        model.pooler.weight.copy_(scale_D.diag())
        model.pooler.bias.copy_(-scale_D * states_nD.mean(0))
        pooled_nD, held_out_nD = (model.pooler(states).tanh() for states in (states_nD, held_out_states_nD))
    lowest = torch.inf
    for strength in STRENGTHS:
        # a document that is read again is not one more
        documents = strength * len(labels) / epochs
        classifier = fit_classifier(pooled_nD, labels, model.config.num_labels, trainer.objective, documents)
        with torch.no_grad():
            loss = float(trainer.objective.losses(classifier(held_out_nD), held_out_labels).mean())
        if loss < lowest:
            lowest, best = loss, strength
            model.classifier.load_state_dict(classifier.state_dict())
    logger.info("linear probe of %d document states: C = %g, validation loss %.4f", len(labels), best, lowest)


def fit_classifier(
    values_nD: Tensor, labels: Tensor, classes: int, objective: Objective, documents: float
) -> nn.Linear:
    """The linear classifier of least mean loss + |weights|^2 / (2 documents); `labels` [n], or [n, C] 0/1."""
    classifier = nn.Linear(values_nD.shape[1], classes, device=values_nD.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        optimizer.zero_grad()
        loss = objective.losses(classifier(values_nD), labels).mean()
        loss = loss + classifier.weight.square().sum() / (2 * documents)
        loss.backward()
        return loss

    optimizer.step(cost)
    return classifier


def _read(trainer: ReBertaTrainer, dataset: LongTextDataset, what: str) -> tuple[Tensor, Tensor]:
    """The document states [n, D] of a dataset, in fp32, and their labels."""
    model, device, settings = trainer.model, trainer.args.device, trainer.settings
    loader = evaluation_loader(dataset, settings.batch_size, max_windows_per_batch=settings.max_windows_per_batch)
    model.eval()
    states, labels = [], []
    for batch in tqdm(loader, desc=what, unit="batch", leave=False, disable=None):
        with torch.no_grad(), trainer.accelerator.autocast():
            output = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        readable = output.logits.isfinite().all(-1)
        states.append(output.hidden_states.document_state.float()[readable])
        labels.append(batch["labels"].to(device)[readable])
    if not sum(map(len, labels)):
        raise TrainingError(f"{what}: no document could be read; the encoder gives states that are not finite")
    return torch.cat(states), torch.cat(labels)
