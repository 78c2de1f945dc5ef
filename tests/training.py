"""What a training run left, and the plainest of runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

PLAIN_SGD = "--optimizer_type sgd --fresh_lr_factor 1 --scheduler_type constant --gradient_clip_val 0 --weight_decay 0"


def rows(trained) -> list[dict]:
    return [json.loads(line) for line in (trained.run_folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def last_checkpoint(trained) -> Path:
    return max(trained.run_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def assert_same(first: dict, second: dict, tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    assert len(first) > 40
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0, msg=name)
