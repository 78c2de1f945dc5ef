"""A tiny encoder with random weights, and documents for it whose words are one token each; all by seed.

- `save_tiny_encoder`: two layers of width 32 and a word-level tokenizer, as `--model_path` takes it
- `write_corpus`: JSON Lines of given lengths, written one by one; every second word tells the label
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.data import save_encoder
from benchmarks.peers import Shape

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
WORDS = np.array([f"w{number}" for number in range(200)])
LABELS = ("early", "late")  # told by the first two words
SIGNAL = 2  # words to one that tells the label


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The words, each its own token, in RoBERTa's format."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def save_tiny_encoder(folder: Path, positions: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    # weights larger than the usual 0.02: so small a model learns sooner
    return save_encoder(word_tokenizer(), Shape(2, 32), folder, positions=positions, initializer_range=0.1)


def write_corpus(path: Path, lengths: Iterable[int], seed: int = 0) -> Path:
    """Documents of so many words, `<name of the file>-0` and on, their labels in turn."""
    draw = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            label = number % len(LABELS)
            words = draw.integers(len(LABELS), len(WORDS), length)
            words[draw.integers(length, size=-(-length // SIGNAL))] = label
            row = {"id": f"{path.stem}-{number}", "text": " ".join(WORDS[words]), "label": LABELS[label]}
            file.write(json.dumps(row) + "\n")
    return path
