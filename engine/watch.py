"""What is looked at before each update: every logit and gradient finite, few enough failed windows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation_utils import failed_places
from files import write_text
from processes import gather, said_once
from utils import TrainingError, logger


class Watch:
    """Looks at an update in all processes, once its gradients are computed and before it is made; a GPU is waited for.

    `ids` are the names of the training documents, `budget` is the number of windows of an epoch, or of a shorter run,
    that may fail.
    """

    gradient_norm: float | Tensor = 0.0
    """Of the update that is at work; not looked at where a GradScaler sees to it."""

    def __init__(self, ids: Sequence[str], budget: float) -> None:
        self.ids, self.budget = ids, budget
        self.failed_windows = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, index_B: Tensor, outputs: Any, loss: Tensor) -> None:
        """Note what the model made of the documents `index_B` of a micro-batch."""
        finite_B = outputs.logits.detach().isfinite().all(-1)
        finite_B &= loss.detach().isfinite() | ~finite_B.all()  # no logit to blame: the whole batch
        self._seen.append((index_B, finite_B, outputs.hidden_states.window_failures))

    def forget(self) -> None:
        """Drop the update that is at work."""
        self._seen = []

    def save(self, path: Path) -> None:
        """What a run must know that goes on in mid-epoch."""
        write_text(path, json.dumps({"failed_windows": self.failed_windows}))

    def load(self, path: Path) -> None:
        self.failed_windows = json.loads(path.read_text(encoding="utf-8"))["failed_windows"]

    def check(self, step: int) -> None:
        """Raises TrainingError, naming the step and the documents of all processes."""
        seen, self._seen = self._seen, []
        bad = [self.ids[i] for index_B, finite_B, _ in seen for i in index_B[~finite_B].tolist()]
        places = failed_places([index_B for index_B, _, _ in seen], [failed_BN for _, _, failed_BN in seen])
        failures = [(self.ids[i], window) for i, window in places]
        bad, failures = (list(chain(*lists)) for lists in zip(*gather((bad, failures)), strict=True))
        for document, window in failures:
            logger.warning("step %d: %s, window %d: its state is not finite", step, document, window)
        self.failed_windows += len(failures)
        if bad:
            message = (
                f"step {step}: the loss is not finite, so the update was not made; documents: {', '.join(bad)}. "
                "Try a lower --learning_rate, --mixed_precision_type bf16 or full precision"
            )
            raise said_once(TrainingError(message))
        if not math.isfinite(self.gradient_norm):
            message = (
                f"step {step}: the loss is finite but its gradient is not, so the update was not made. "
                "Try full precision, a lower --learning_rate or another encoder"
            )
            raise said_once(TrainingError(message))
        if self.failed_windows > self.budget:
            message = f"step {step}: {self.failed_windows} windows of this epoch failed, over --max_window_failures"
            raise said_once(TrainingError(f"{message} of them"))
