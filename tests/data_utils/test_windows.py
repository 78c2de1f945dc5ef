"""Windows joined give back the document, and are those that transformers cuts."""

from __future__ import annotations

import numpy as np
import pytest

from data_utils.tokenization import tokenize
from data_utils.windows import (
    Reading,
    capacity,
    check_window_options,
    content_positions,
    cut_windows,
    flat_windows,
    window_counts,
)
from tests.data_utils.conftest import SAMPLE, random_text
from utils import ConfigError

CLS, SEP, PAD = 101, 102, 1


def joined(input_ids, attention_mask, overlap):
    """The content tokens of windows, those shared with the window before left out."""
    contents = [row[mask.astype(bool)][1:-1] for row, mask in zip(input_ids, attention_mask, strict=True)]
    return np.concatenate([content[overlap if place else 0 :] for place, content in enumerate(contents)])


def test_a_window_by_hand():
    input_ids, attention_mask = cut_windows(np.array([11, 12, 13, 14, 15]), 5, CLS, SEP, PAD, overlap=1)
    assert input_ids.tolist() == [[CLS, 11, 12, 13, SEP], [CLS, 13, 14, 15, SEP]]
    assert attention_mask.tolist() == [[1] * 5, [1] * 5]
    input_ids, attention_mask = cut_windows(np.array([11, 12, 13, 14]), 5, CLS, SEP, PAD)
    assert input_ids.tolist() == [[CLS, 11, 12, 13, SEP], [CLS, 14, SEP, PAD, PAD]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_no_content_gives_one_empty_window():
    input_ids, attention_mask = cut_windows(np.array([], dtype=np.int32), 4, CLS, SEP, PAD)
    assert input_ids.tolist() == [[CLS, SEP, PAD, PAD]]
    assert attention_mask.tolist() == [[1, 1, 0, 0]]


def test_the_mask_follows_lengths_not_the_pad_id():
    _, attention_mask = cut_windows(np.array([PAD, PAD]), 4, CLS, SEP, PAD)
    assert attention_mask.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
def test_joined_windows_are_the_document_for_every_length(overlap):
    for length in range(60):
        tokens = np.arange(1000, 1000 + length, dtype=np.int32)
        input_ids, attention_mask = cut_windows(tokens, 8, CLS, SEP, PAD, overlap)
        assert input_ids.shape == attention_mask.shape == (window_counts(length, 8, overlap), 8)
        assert input_ids.dtype == attention_mask.dtype == np.int32
        assert joined(input_ids, attention_mask, overlap).tolist() == tokens.tolist()
        assert (input_ids[:, 0] == CLS).all()
        assert (input_ids[np.arange(len(input_ids)), attention_mask.sum(1) - 1] == SEP).all()
        assert (input_ids[attention_mask == 0] == PAD).all()
        positions = content_positions(length, 8, overlap)
        assert (input_ids[positions >= 0] == tokens[positions[positions >= 0]]).all()


@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
def test_flat_windows_are_those_of_each_document_by_itself(overlap):
    for lengths in (range(60), [59, 0, 6, 7], [0, 0], [12]):
        documents = [1000 * number + np.arange(length, dtype=np.int32) for number, length in enumerate(lengths, 1)]
        flat, slots = flat_windows(np.concatenate(documents), np.array(lengths), 8, CLS, SEP, overlap)
        alone = [cut_windows(tokens, 8, CLS, SEP, PAD, overlap) for tokens in documents]
        assert flat.dtype == np.int32
        assert flat.tolist() == np.concatenate([ids[mask.astype(bool)] for ids, mask in alone]).tolist()
        assert slots.tolist() == [int(mask.sum()) for _, mask in alone]


@pytest.mark.parametrize("overlap", [0, 2, 9])
@pytest.mark.parametrize("words", [1, 9, 10, 60])
def test_windows_are_those_of_transformers(tokenizer, overlap, words):
    text = random_text(words, words)
    twin = tokenizer(text, max_length=16, truncation=True, stride=overlap, return_overflowing_tokens=True)
    _, tokens = next(tokenize(tokenizer, [(0, text)]))
    special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    input_ids, attention_mask = cut_windows(tokens.ids, 16, *special, overlap)
    cut = [row[mask.astype(bool)].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    assert cut == twin["input_ids"]


def test_max_windows_keeps_the_beginning():
    read = Reading(8, window_overlap=2, max_windows=3).positions(100)
    input_ids, attention_mask = cut_windows(read, 8, CLS, SEP, PAD, overlap=2)
    assert len(input_ids) == window_counts(14, 8, 2) == 3
    assert joined(input_ids, attention_mask, 2).tolist() == list(range(capacity(3, 8, 2))) == list(range(14))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((2,), "--window_size 2"),
        ((8, 6), "--window_overlap 6"),
        ((8, -1), "--window_overlap -1"),
        ((8, 0, 0), "--max_windows 0"),
        ((8, 0, None, 0), "--max_len 0"),
        ((8, 2, 1, 1, "random"), "--window_overlap 2"),
    ],
)
def test_windows_that_cannot_be_cut(options, message):
    with pytest.raises(ConfigError, match=message):
        check_window_options(*options)


def test_sample_texts_survive(tokenizer):
    for text in SAMPLE:
        _, tokens = next(tokenize(tokenizer, [(0, text)]))
        special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        input_ids, attention_mask = cut_windows(tokens.ids, 8, *special, overlap=2)
        assert joined(input_ids, attention_mask, 2).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
