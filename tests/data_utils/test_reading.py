"""What is read of a document that is longer than its windows: first tokens, head and tail, or windows from all over."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import DataLoader

from data_utils.augmentation import Masking
from data_utils.cache import Preparation
from data_utils.dataset import LongTextDataset
from data_utils.records import Columns, Record
from data_utils.stream import DocumentPart
from data_utils.windows import Draw, Reading, read_positions, word_starts_at
from tests.data_utils.conftest import random_text, write_jsonl
from utils import ConfigError

TEXTS = [random_text(words, words) for words in (1, 5, 12, 40, 90, 200, 400)]


@pytest.fixture
def make(tokenizer, tmp_path):
    """Builds datasets of `TEXTS` in windows of 12 tokens, with a cache of the test's own."""
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text, "label": "a"} for text in TEXTS])

    def build(**options):
        settings = {"window_size": 12, "tokenizer": tokenizer, "cache_dir": tmp_path / "cache"}
        return LongTextDataset(path, **{**settings, **options})

    return build


def content(item) -> np.ndarray:
    """The content tokens of an item's windows, one after the other."""
    rows = zip(item["input_ids"].numpy(), item["attention_mask"].numpy().astype(bool), strict=True)
    return np.concatenate([row[mask][1:-1] for row, mask in rows])


def test_head_and_tail_by_hand():
    assert read_positions(1000, 510, "head_tail", 512).tolist() == [*range(128), *range(1000 - 382, 1000)]
    assert read_positions(511, 510, "head_tail", 512).tolist() == [*range(128), *range(129, 511)]
    for read in ("first", "head_tail", "random"):
        assert read_positions(510, 510, read, 512).tolist() == list(range(510))
        assert read_positions(1000, None, read, 512).tolist() == list(range(1000))


def test_windows_from_all_over_by_hand():
    """Two windows of 10 tokens: in the middle of the two halves of 60."""
    assert read_positions(60, 20, "random", 12).tolist() == [*range(10, 20), *range(40, 50)]
    assert read_positions(31, 10, "random", 12).tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    "draws",
    [[Draw((0, document), 1) for document in range(300)], [Draw((0, 1), epoch) for epoch in range(300)]],
    ids=["of documents", "of epochs"],
)
def test_drawn_windows_are_whole_ascending_and_reach_every_token(draws):
    for tokens in (21, 25, 30, 57, 60, 133):
        seen = np.zeros(tokens, dtype=int)
        for draw in draws:
            positions = read_positions(tokens, 20, "random", 12, draw)
            assert len(positions) == 20
            windows = positions.reshape(2, 10)
            assert (np.diff(windows, axis=1) == 1).all()
            assert windows[1, 0] - windows[0, 0] >= 10
            seen[positions] += 1
        assert seen.min() > 0
        evenly = read_positions(tokens, 20, "random", 12).reshape(2, 10)
        assert evenly[0, 0] >= 0
        assert evenly[1, 0] - evenly[0, 0] >= 10
        assert evenly[1, -1] < tokens


def test_each_window_is_read_once_before_any_is_read_again():
    """Two of seven windows in an epoch: all after three and a half, each twice after seven."""
    drawn = [read_positions(70, 20, "random", 12, Draw((0, 5), epoch)) for epoch in range(7)]
    read = np.array([positions[::10] // 10 for positions in drawn])
    assert sorted(read.reshape(-1)[:6]) == sorted(set(read.reshape(-1)[:6]))
    assert np.bincount(read.reshape(-1)).tolist() == [2] * 7


def test_a_word_without_its_start_is_a_word_of_its_own():
    starts = np.array([1, 0, 0, 1, 0, 0, 1, 0], dtype=bool)
    assert word_starts_at(starts, np.array([0, 1, 4, 5, 6])).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("max_len", [None, 57])
@pytest.mark.parametrize("read", ["first", "head_tail", "random"])
def test_the_same_windows_wherever_a_text_is_cut(make, tokenizer, read, max_len, caplog):
    """Prepared, streamed and alone; as `read_positions` says; counted as what they are."""
    options = {"read": read, "max_windows": 3, "max_len": max_len}
    documents = make(**options)
    settings = {"reading": Reading(12, **options), "columns": Columns("text", "label", True), "words": False}
    settings |= {"problem_type": "single_label", "skip_bad_lines": False, "files": ()}
    records = [Record(text, "a", f"d{i}", f"f:{i}") for i, text in enumerate(TEXTS)]
    part = DocumentPart(records, Preparation(tokenizer=tokenizer, **settings))
    for index, text in enumerate(TEXTS):
        item, streamed = documents[index], part[index]
        alone = LongTextDataset.preprocess_single_text(tokenizer, text, 12, 3, max_len=max_len, read=read)
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        expected = ids[read_positions(len(ids[:max_len]), 30, read, 12)]
        assert content(item).tolist() == expected.tolist()
        for name in ("input_ids", "attention_mask"):
            assert item[name].equal(streamed[name])
            assert item[name].equal(alone[name])
        counts = (len(ids), len(expected), len(item["input_ids"]))
        for source in (documents, part):
            assert (source.token_counts[index], source.tokens_read[index], source.window_counts[index]) == counts
    assert documents.tokens_read.max() == 30
    said = "the first 30 are read" if read == "first" else "tokens 30 are read"
    assert said in caplog.text


def test_head_and_tail_over_several_windows_that_overlap(make, tokenizer):
    documents = make(read="head_tail", max_windows=2, window_overlap=4)
    ids = tokenizer(TEXTS[-1], add_special_tokens=False)["input_ids"]
    first, second = documents[len(TEXTS) - 1]["input_ids"].tolist()
    assert first[1:-1] + second[5:-1] == ids[:4] + ids[-12:]  # 16 tokens; 4 is a quarter of them and of [CLS], [SEP]


def test_windows_are_drawn_from_seed_epoch_and_document_alone(make):
    drawn = make(read="random", max_windows=3, draw_windows=True)
    long = range(4, len(TEXTS))
    epochs = []
    for epoch in (0, 1):
        drawn.set_epoch(epoch)
        epochs.append({index: drawn[index]["input_ids"].tolist() for index in range(len(TEXTS))})
    assert all(epochs[0][index] != epochs[1][index] for index in long)
    assert epochs[0][0] == epochs[1][0]
    again = make(read="random", max_windows=3, draw_windows=True)
    again.set_epoch(1)
    loader = DataLoader(again, batch_size=None, sampler=range(len(TEXTS)), num_workers=2)
    assert {item["index"]: item["input_ids"].tolist() for item in loader} == epochs[1]
    other = make(read="random", max_windows=3, draw_windows=True, seed=1)
    assert any(other[index]["input_ids"].tolist() != epochs[0][index] for index in long)
    some = make(read="random", max_windows=3, draw_windows=True, sample_data=len(TEXTS) - 2)
    for index, name in enumerate(some.ids):
        assert some[index]["input_ids"].tolist() == epochs[0][list(drawn.ids).index(name)]


@pytest.mark.parametrize("read", ["first", "head_tail"])
def test_training_takes_some_of_the_windows_that_are_read(make, read):
    """Each once in three epochs, the windows in their order; a shorter document whole."""
    whole = make(read=read, max_windows=6)
    drawn = make(read=read, max_windows=6, train_windows=2)
    assert drawn.epochs_differ
    assert not whole.epochs_differ
    assert drawn.tokens_read.tolist() == whole.tokens_read.tolist()
    assert drawn.window_counts.tolist() == np.minimum(whole.window_counts, 2).tolist()
    for index, count in enumerate(whole.window_counts.tolist()):
        windows, masks = whole[index]["input_ids"].tolist(), whole[index]["attention_mask"].tolist()
        seen = []
        for epoch in range(3):
            drawn.set_epoch(epoch)
            item = drawn[index]
            places = [windows.index(window) for window in item["input_ids"].tolist()]
            assert places == sorted(places)
            assert len(places) == min(count, 2)
            assert item["attention_mask"].tolist() == [masks[place] for place in places]
            seen += places
        if count == 6:
            assert sorted(seen) == list(range(6))
    assert max(whole.window_counts) == 6


def test_masks_are_set_on_what_is_read(make, tokenizer):
    """All words masked, then half of them: a word of the document is masked whole or not at all."""
    all_of_them = make(
        read="random",
        max_windows=3,
        draw_windows=True,
        augmentation=Masking(1.0, None, True, tokenizer.mask_token_id),
    )
    assert (content(all_of_them[len(TEXTS) - 1]) == tokenizer.mask_token_id).all()
    options = {"read": "random", "max_windows": 3, "draw_windows": True}
    masked = make(augmentation=Masking(0.5, None, True, tokenizer.mask_token_id), **options)
    plain = make(**options)
    last = len(TEXTS) - 1
    before, after = content(plain[last]), content(masked[last])
    changed = before != after
    assert (after[changed] == tokenizer.mask_token_id).all()
    assert 0 < changed.sum() < 30


def test_windows_drawn_at_random_share_no_tokens(make):
    with pytest.raises(ConfigError, match="--window_overlap 2 does not go with --read random"):
        make(read="random", window_overlap=2)
