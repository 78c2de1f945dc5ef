"""The command, and a tokenizer as a package brings it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import download_models
from download_models import main

SAVED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokenizer.json carries truncation and padding, as the real package's does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "war", "and", "peace"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **download_models.SPECIAL_TOKENS)


def run_main(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])
