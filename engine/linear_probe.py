"""A head that fits the encoder as it is, before anything else is trained: `--probe_epochs`.

Linear probing, then fine-tuning (Kumar et al. 2022): a random head would first distort what the encoder knows. A fresh
model's document state is the mean of its windows' states, so a linear classifier of it is a model that can be used.

Shapes: n states, of documents, once for each epoch, and with `--window_loss` of their windows as well; D hidden size; C
classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from calibration import fit_temperature
from data_utils.dataset import LongTextDataset, evaluation_loader
from engine.objective import Objective, window_shares
from engine.trainer import ReBertaTrainer
from evaluation_utils import Prediction, check_windows, failed_places
from processes import gather
from utils import ConfigError, TrainingError, error_handler, logger

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # C, as scikit-learn's LogisticRegression counts it
FOLDS = 5
SPREAD = 0.5  # standard deviation of what goes into the pooler's tanh, which is nearly linear there
LEAST_DEVIATION = 0.1  # of a dimension, as a share of the mean over dimensions


class States(NamedTuple):
    """What a head is to tell the labels from."""

    values_nD: Tensor
    labels: Tensor
    """[n], or [n, C] 0/1."""
    weights_n: Tensor
    """1 for a document, `--window_loss` for all of its windows together."""
    documents_n: Tensor
    """Whose they are."""

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """All of them, in the order of their documents."""
        joined = cls(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return joined.where(joined.documents_n.argsort(stable=True))

    def to(self, device: torch.device | str) -> States:
        return States(*(field.to(device) for field in self))

    def where(self, chosen_n: Tensor) -> States:
        return States(*(field[chosen_n] for field in self))

    def by_document(self) -> States:
        """One for each document, the mean of its own."""
        documents_m, place_n, counts_m = self.documents_n.unique(return_inverse=True, return_counts=True)
        sums_mD = self.values_nD.new_zeros(len(documents_m), self.values_nD.shape[1])
        sums_mD.index_add_(0, place_n, self.values_nD)
        labels = self.labels.new_empty(len(documents_m), *self.labels.shape[1:])
        labels[place_n] = self.labels
        return States(sums_mD / counts_m[:, None], labels, torch.ones_like(sums_mD[:, 0]), documents_m)

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
    of regularisation is the one of the lowest log loss, after a temperature is fitted, of documents that were held out:
    those of the validation set, which are often too few, and those of the training set, in a cross-validation of FOLDS
    parts. The states are held in memory, 4 D bytes for a document and epoch, and for a window with `--window_loss`.
    Each process reads a share of the documents; what follows every one does with all states.

    Raises:
        ConfigError: there is one training document only.
        TrainingError: a document cannot be read, or more windows failed than `--max_window_failures` allows.
    """
    model: Any = trainer.model
    train, settings = trainer.data.train, trainer.settings
    if len(train) < 2:
        raise ConfigError("--probe_epochs: one training document tells no labels apart; give more, or leave it out")
    assert settings.probe_epochs is not None
    epochs = settings.probe_epochs if train.epochs_differ else 1
    document_parts, window_parts = [], []
    for epoch in range(epochs):
        train.set_epoch(epoch)
        documents, windows = _read(trainer, train, f"probe, epoch {epoch + 1} of {epochs}", settings.window_loss)
        document_parts.append(documents)
        window_parts.append(windows)
    documents, windows = States.joined(document_parts), States.joined(window_parts)
    held_out, _ = _read(trainer, trainer.data.validation, "probe, validation")
    states = States.joined([documents, windows])
    _standardise(model.pooler, states)
    pooled, read_whole, held_out = (_pooled(model.pooler, part) for part in (states, documents.by_document(), held_out))
    fit = partial(fit_classifiers, classes=model.config.num_labels, objective=trainer.objective)
    classifiers = fit(pooled)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    found = [
        (_logits(classifiers, held_out), held_out.labels),
        *_cross_validated(fit, pooled, read_whole, (order % FOLDS).to(states.documents_n.device)),
    ]
    logits_SmC, labels = torch.cat([logits for logits, _ in found], 1), torch.cat([labels for _, labels in found])
    temperatures = [fit_temperature(logits.cpu().numpy(), labels.cpu().numpy()) for logits in logits_SmC]
    losses = [
        float(trainer.objective.losses(logits / temperature, labels).mean())
        for logits, temperature in zip(logits_SmC, temperatures, strict=True)
    ]
    best = losses.index(min(losses))
    model.classifier.load_state_dict(classifiers[best].state_dict())
    logger.info(
        "linear probe of %d document states%s: C = %g, log loss %.4f of %d documents held out",
        len(documents.labels),
        f" and {len(windows.labels)} window states" if settings.window_loss else "",
        STRENGTHS[best],
        losses[best],
        len(labels),
    )


@torch.no_grad()
def _standardise(pooler: nn.Linear, states: States) -> None:
    """Give what comes out of the pooler, before its tanh, mean 0 and standard deviation SPREAD in each dimension."""
    mean_D, deviation_D = states.mean_and_deviation()
    # some dimensions of an encoder are all but constant; scaled up to SPREAD, they would drown the others
    scale_D = SPREAD / deviation_D.clamp(min=LEAST_DEVIATION * deviation_D.mean())
    pooler.weight.copy_(scale_D.diag())
    pooler.bias.copy_(-scale_D * mean_D)


@torch.no_grad()
def _pooled(pooler: nn.Linear, states: States) -> States:
    return states._replace(values_nD=pooler(states.values_nD).tanh())


def _cross_validated(
    fit: Callable[[States], list[nn.Linear]], pooled: States, documents: States, fold_of: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """By fold: logits [classifiers, m, C] of its documents, by classifiers fitted to the others, and their labels."""
    for fold in tqdm(range(FOLDS), desc="probe, cross-validation", leave=False, disable=None):
        left_out = documents.where(fold_of[documents.documents_n] == fold)
        yield _logits(fit(pooled.where(fold_of[pooled.documents_n] != fold)), left_out), left_out.labels


def fit_classifiers(states: States, classes: int, objective: Objective) -> list[nn.Linear]:
    """For each of STRENGTHS the linear classifier of least weighted mean loss + |its weights|^2 / (2 C documents)."""
    documents = len(states.documents_n.unique())
    classifier = nn.Linear(states.values_nD.shape[1], classes, device=states.values_nD.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    found = []
    for strength in STRENGTHS:
        _minimise(classifier, states, objective, 1 / (2 * strength * documents))
        found.append(copy.deepcopy(classifier))  # where the next begins
    return found


def _minimise(classifier: nn.Linear, states: States, objective: Objective, penalty: float) -> None:
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    shares_n = states.weights_n / states.weights_n.sum()

    def cost() -> Tensor:
        optimizer.zero_grad()
        losses = objective.losses(classifier(states.values_nD), states.labels)
        loss = shares_n @ losses.view(len(losses), -1).mean(1) + penalty * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(cost)


@torch.no_grad()
def _logits(classifiers: Sequence[nn.Linear], states: States) -> Tensor:
    """[classifiers, n, C]."""
    return torch.stack([classifier(states.values_nD) for classifier in classifiers])


def _read(
    trainer: ReBertaTrainer, dataset: LongTextDataset, what: str, window_loss: float = 0.0
) -> tuple[States, States]:
    """The states of a dataset's documents and, with a loss of windows, those of their windows; in fp32."""
    model, device, settings = trainer.model, trainer.args.device, trainer.settings
    loader = evaluation_loader(
        dataset,
        settings.batch_size,
        max_windows_per_batch=settings.max_windows_per_batch,
        num_replicas=trainer.args.world_size,
        rank=trainer.args.process_index,
    )
    model.eval()
    documents, windows, logits, failures = [], [], [], []
    read = 0
    for batch in tqdm(loader, desc=what, unit="batch", leave=False, disable=None):
        with torch.no_grad(), trainer.accelerator.autocast():
            output = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        labels, index_B = (batch[name].to(device) for name in ("labels", "index"))
        logits.append(output.logits.float())
        failures.append(output.hidden_states.window_failures)
        read += int(batch["attention_mask"].any(-1).sum())
        states_BD = output.hidden_states.document_state.float()
        documents.append(States(states_BD, labels, torch.ones(len(labels), device=device), index_B))
        states_BND, weights_BN = output.hidden_states.window_states.float(), output.hidden_states.window_weights
        rows, places, shares = window_shares(weights_BN if window_loss else weights_BN[:, :0])
        windows.append(States(states_BND[rows, places], labels[rows], window_loss * shares, index_B[rows]))
    index = [part.documents_n for part in documents]
    logits_and_index = torch.cat(logits).cpu(), torch.cat(index).cpu()
    states = States.joined(documents).to("cpu"), States.joined(windows).to("cpu")
    everyones = zip(*gather((*logits_and_index, failed_places(index, failures), read, *states)), strict=True)
    all_logits, all_index, all_failed, all_read, all_documents, all_windows = everyones
    prediction = Prediction(
        logits=torch.cat(all_logits).numpy(),
        labels=None,
        index=torch.cat(all_index).numpy(),
        windows=sum(all_read),
        failures=sorted(chain(*all_failed)),
    )
    check_windows(prediction, dataset.ids, settings.max_window_failures, f"{what}: ")
    return States.joined(all_documents).to(device), States.joined(all_windows).to(device)
