"""Training by optimizer steps: the engine of `train`, with a step budget."""

from __future__ import annotations

from config import Settings
from train import Trained, fit


def train_by_steps(settings: Settings) -> Trained:
    """Train for `--total_steps`."""
    return fit(settings, settings.total_steps)
