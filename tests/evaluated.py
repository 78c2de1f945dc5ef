"""A model that knows its logits by heart, documents for it, and what is written of them."""

from __future__ import annotations

import csv
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

NAMES = ["economy", "外交与国防", "=sport, and\ta rather long name for a class of documents, or not"]
FILES = ["class_metrics.png", "confusion_matrix.png", "evaluation_results.txt", "metrics.json", "reliability.png"]


class Hidden(NamedTuple):
    window_failures: torch.Tensor


class Output(NamedTuple):
    logits: torch.Tensor
    hidden_states: Hidden


class Table(nn.Module):
    """Logits and failures by the number of the document, which is its first token."""

    def __init__(self, logits, failures=()):
        super().__init__()
        self.logits = torch.as_tensor(logits).bfloat16()
        self.failures = set(failures)
        self.modes = set()

    def forward(self, input_ids, attention_mask):
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        documents = input_ids[:, 0, 0]
        failed = torch.zeros(input_ids.shape[:2], dtype=torch.bool)
        for row, document in enumerate(documents.tolist()):
            for window in range(input_ids.shape[1]):
                failed[row, window] = (document, window) in self.failures
        return Output(self.logits[documents], Hidden(failed))


class Documents(Dataset):
    """`windows[i]` windows of four tokens for document i."""

    def __init__(self, labels, windows=None, with_index=True):
        self.labels, self.with_index = labels, with_index
        self.windows = windows if windows is not None else [1 + (5 * i) % 4 for i in range(len(labels))]
        self.ids = [f"doc-{i}" for i in range(len(self.windows))]
        self.token_counts = np.array([400 * n for n in self.windows])

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        item = {
            "input_ids": torch.full((self.windows[i], 4), i),
            "attention_mask": torch.ones(self.windows[i], 4).long(),
        }
        if self.labels is not None:
            item["labels"] = torch.as_tensor(self.labels[i])
        return item | ({"index": i} if self.with_index else {})

    def coverage(self):
        total = int(self.token_counts.sum())
        return {"tokens_total": total, "tokens_read": total // 4, "share": total // 4 / total, "documents_truncated": 7}


def collate(items):
    def padded(key):
        return nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)

    batch = {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask")}
    for key in ("labels", "index"):
        if key in items[0]:
            batch[key] = (
                torch.as_tensor([item[key] for item in items])
                if key == "index"
                else torch.stack([item[key] for item in items])
            )
    return batch


def loader(dataset, batch_size=4, order=None):
    order = np.argsort(dataset.windows, kind="stable")[::-1].tolist() if order is None else order
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


def sample(documents=30, classes=3, seed=0):
    """Labels, and bfloat16 logits that are right in most cases."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, documents)
    logits = rng.normal(size=(documents, classes)) + 2 * np.eye(classes)[labels]
    return labels, logits.astype(np.float32)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
