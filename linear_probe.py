"""A head that fits the encoder as it is, before anything else is trained: `--probe_epochs`.

Linear probing, then fine-tuning (Kumar et al. 2022): a random head would first distort what the encoder knows. A fresh
model's document state is the mean of its windows' states, so a linear classifier of it is a model that can be used.

Shapes: n states, of documents, once for each epoch, and with `--window_loss` of their windows as well; D hidden size; C
classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from calibration import fit_temperature
from data_utils.dataset import LongTextDataset, evaluation_loader
from engine import Objective, ReBertaTrainer, window_shares
from utils import TrainingError, error_handler, logger

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # C, as scikit-learn's LogisticRegression counts it
SPREAD = 0.5  # standard deviation of what goes into the pooler's tanh, which is nearly linear there
LEAST_DEVIATION = 0.1  # of a dimension, as a share of the mean over dimensions


class States(NamedTuple):
    """What a head is to tell the labels from."""

    values_nD: Tensor
    labels: Tensor
    """[n], or [n, C] 0/1."""
    weights_n: Tensor
    """1 for a document, `--window_loss` for all of its windows together."""

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Weighted mean and standard deviation of the values, [D] each."""
        shares_n = self.weights_n / self.weights_n.sum()
        mean_D = shares_n @ self.values_nD
        return mean_D, (shares_n @ (self.values_nD - mean_D).square()).sqrt()


@error_handler(error_type=TrainingError)
def fit_head(trainer: ReBertaTrainer) -> None:
    """Make the pooler a standardisation of the states, the classifier a logistic regression of what it gives.

    The regression has the objective of training. The training set is read `--probe_epochs` times as training reads it,
    but without gradients and dropout; once, where neither drawn windows nor masks make its epochs differ. The strength
    of regularisation is the one of lowest validation loss at the temperature that suits it. The states are held in
    memory, 4 D bytes for a document and epoch, and for a window with `--window_loss`. Every process does the same.

    Raises:
        TrainingError: no document of the training or validation set can be read.
    """
    model: Any = trainer.model
    train, settings = trainer.data.train, trainer.settings
    epochs = settings.probe_epochs if train.epochs_differ else 1
    parts = []
    for epoch in range(epochs):
        train.set_epoch(epoch)
        parts.append(_read(trainer, train, f"probe, epoch {epoch + 1} of {epochs}", settings.window_loss))
    states = States.joined(parts)
    held_out = _read(trainer, trainer.data.validation, "probe, validation")
    with torch.no_grad():
        mean_D, deviation_D = states.mean_and_deviation()
        # some dimensions of an encoder are all but constant; drawn out, any change of them would drown the others
        scale_D = SPREAD / deviation_D.clamp(min=LEAST_DEVIATION * deviation_D.mean())
        model.pooler.weight.copy_(scale_D.diag())
        model.pooler.bias.copy_(-scale_D * mean_D)
        pooled, held_out_pooled = (s._replace(values_nD=model.pooler(s.values_nD).tanh()) for s in (states, held_out))
    documents = round(float(states.weights_n.sum()) / (1 + settings.window_loss))
    lowest = torch.inf
    for strength in STRENGTHS:
        # a document that is read again is not one more
        classifier = fit_classifier(pooled, model.config.num_labels, trainer.objective, strength * documents / epochs)
        with torch.no_grad():
            logits = classifier(held_out_pooled.values_nD)
        temperature = fit_temperature(logits.cpu().numpy(), held_out.labels.cpu().numpy())
        loss = float(trainer.objective.losses(logits / temperature, held_out.labels).mean())
        if loss < lowest:
            lowest, best = loss, strength
            model.classifier.load_state_dict(classifier.state_dict())
    windows = f" and {len(states.labels) - documents} window states" if settings.window_loss else ""
    logger.info("linear probe of %d document states%s: C = %g, validation loss %.4f", documents, windows, best, lowest)


def fit_classifier(states: States, classes: int, objective: Objective, documents: float) -> nn.Linear:
    """The linear classifier of least weighted mean loss + |weights of the classifier|^2 / (2 documents)."""
    values_nD, labels, weights_n = states
    classifier = nn.Linear(values_nD.shape[1], classes, device=values_nD.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        optimizer.zero_grad()
        losses = objective.losses(classifier(values_nD), labels)
        loss = weights_n @ losses.view(len(labels), -1).mean(1) / weights_n.sum()
        loss = loss + classifier.weight.square().sum() / (2 * documents)
        loss.backward()
        return loss

    optimizer.step(cost)
    return classifier


def _read(trainer: ReBertaTrainer, dataset: LongTextDataset, what: str, window_loss: float = 0.0) -> States:
    """The states of a dataset's documents and, with a loss of windows, of their windows; in fp32."""
    model, device, settings = trainer.model, trainer.args.device, trainer.settings
    loader = evaluation_loader(dataset, settings.batch_size, max_windows_per_batch=settings.max_windows_per_batch)
    model.eval()
    found: list[States] = []
    for batch in tqdm(loader, desc=what, unit="batch", leave=False, disable=None):
        with torch.no_grad(), trainer.accelerator.autocast():
            output = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        readable_B = output.logits.isfinite().all(-1)
        labels = batch["labels"].to(device)[readable_B]
        states_BD = output.hidden_states.document_state.float()[readable_B]
        found.append(States(states_BD, labels, torch.ones(len(labels), device=device)))
        if window_loss:
            states_BND = output.hidden_states.window_states.float()[readable_B]
            documents, windows, shares = window_shares(states_BND)
            found.append(States(states_BND[documents, windows], labels[documents], window_loss * shares))
    states = States.joined(found)
    if not len(states.labels):
        raise TrainingError(f"{what}: no document could be read; the encoder gives states that are not finite")
    return states
