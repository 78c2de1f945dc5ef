"""Masks: never on special tokens, whole words where asked, the same for any number of workers, new each epoch."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_utils.augmentation import Masking
from data_utils.dataset import LongTextBatchSampler, LongTextDataset, collate
from tests.data_utils.conftest import SAMPLE, write_jsonl
from utils import ConfigError


@pytest.fixture
def make(tokenizer, tmp_path):
    """Builds datasets that mask, with windows of 16 tokens of which neighbours share 3."""

    def build(paths, probability=0.3, max_tokens=None, whole_word=False, seed=42, **options):
        masking = Masking(probability, max_tokens, whole_word, tokenizer.mask_token_id, seed)
        settings = {"window_size": 16, "window_overlap": 3, "max_windows": None, "cache_dir": tmp_path / "cache"}
        return LongTextDataset(paths, tokenizer=tokenizer, augmentation=masking, **{**settings, **options})

    return build


def plain_and_masked(documents, index):
    """An item without and with masks, and where it is masked."""
    masked = documents[index]["input_ids"]
    masking, documents.augmentation = documents.augmentation, None
    plain = documents[index]["input_ids"]
    documents.augmentation = masking
    return plain, masked, plain != masked


def test_only_content_is_masked(make, corpus, tokenizer):
    documents = make(corpus, probability=1.0)
    for index in range(40):
        plain, masked, changed = plain_and_masked(documents, index)
        special = torch.isin(plain, torch.tensor(tokenizer.all_special_ids))
        assert torch.equal(masked[special], plain[special])
        assert (masked[~special] == tokenizer.mask_token_id).all()
        assert torch.equal(changed, ~special)
        assert torch.equal(documents[index]["attention_mask"].bool(), masked != tokenizer.pad_token_id)


def test_an_unknown_token_is_special(make, tmp_path, bert):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war ☃ peace", "label": "a"}])
    masking = Masking(1.0, None, True, bert.mask_token_id)
    documents = LongTextDataset(path, tokenizer=bert, augmentation=masking, cache_dir=tmp_path / "cache")
    ids = documents[0]["input_ids"][0].tolist()
    assert bert.unk_token_id in ids
    assert set(ids) == {bert.cls_token_id, bert.sep_token_id, bert.pad_token_id, bert.mask_token_id, bert.unk_token_id}


def test_the_share_masked_is_the_probability(make, corpus):
    documents = make(corpus, probability=0.2, window_overlap=0)
    masked = sum(int(plain_and_masked(documents, index)[2].sum()) for index in range(40))
    assert masked / documents.tokens_read.sum() == pytest.approx(0.2, abs=0.01)
    nothing = make(corpus, probability=0.0)
    assert not any(plain_and_masked(nothing, index)[2].any() for index in range(40))


def test_shared_tokens_are_masked_alike(make, corpus):
    documents = make(corpus, probability=0.5)
    shared = 0
    for index in range(40):
        _, masked, _ = plain_and_masked(documents, index)
        for left, right in itertools.pairwise(masked):
            assert left[12:15].tolist() == right[1:4].tolist()
            shared += 1
    assert shared > 300


def test_max_tokens_caps_a_document(make, corpus):
    for whole_word in (False, True):
        documents = make(corpus, probability=0.5, max_tokens=7, whole_word=whole_word, window_overlap=0)
        counts = [int(plain_and_masked(documents, index)[2].sum()) for index in range(40)]
        assert max(counts) == 7
        assert sum(count >= 5 for count in counts) > 30
        untouched = make(corpus, probability=0.5, max_tokens=0, whole_word=whole_word, window_overlap=0)
        assert not plain_and_masked(untouched, 39)[2].any()


def test_whole_words_are_masked_whole(make, corpus, tokenizer):
    documents = make(corpus, probability=0.4, whole_word=True, window_overlap=0)
    words = halves = 0
    for index, text in enumerate(corpus.read_text().splitlines()[:20]):
        plain, _, changed = plain_and_masked(documents, index)
        content = ~torch.isin(plain, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
        content &= documents[index]["attention_mask"].bool()
        encoding = tokenizer(json.loads(text)["text"], add_special_tokens=False)
        word_ids = np.array(encoding.word_ids())
        is_masked = changed[content].numpy()
        for word in set(word_ids.tolist()):
            pieces = is_masked[word_ids == word]
            assert pieces.all() or not pieces.any()
            words += 1
            halves += len(pieces) > 1
    assert words > 1000
    assert halves > 100


def test_chinese_words_are_masked_whole(make, tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": SAMPLE[1] * 20, "label": "a"}])
    documents = make(path, probability=0.5, whole_word=True, window_overlap=0, window_size=4096)
    plain, _, changed = plain_and_masked(documents, 0)
    encoding = tokenizer("今天天气", add_special_tokens=False)["input_ids"]
    flat, masked = plain.reshape(-1).tolist(), changed.reshape(-1).tolist()
    outcomes = [
        tuple(masked[place : place + len(encoding)])
        for place in range(len(flat))
        if flat[place : place + len(encoding)] == encoding
    ]
    assert len(outcomes) == 20
    assert set(outcomes) == {(True,) * len(encoding), (False,) * len(encoding)}


def test_masks_follow_seed_epoch_and_document(make, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war and peace " * 50, "label": "a"}] * 4)
    documents, again, other = make(path), make(path), make(path, seed=1)
    first = documents[2]["input_ids"]
    assert torch.equal(documents[2]["input_ids"], first)
    assert torch.equal(again[2]["input_ids"], first)
    assert not torch.equal(other[2]["input_ids"], first)
    assert not torch.equal(documents[1]["input_ids"], first)
    documents.set_epoch(1)
    assert not torch.equal(documents[2]["input_ids"], first)
    documents.set_epoch(0)
    assert torch.equal(documents[2]["input_ids"], first)


def test_a_sample_keeps_the_masks_of_its_documents(make, corpus):
    whole, sample = make(corpus), make(corpus, sample_data=10)
    ids = list(whole.ids)
    for index, identity in enumerate(sample.ids):
        assert torch.equal(sample[index]["input_ids"], whole[ids.index(identity)]["input_ids"])


def epochs_of(documents, tokenizer, **options):
    sampler = LongTextBatchSampler(documents.window_counts, 4)
    together = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    loader = DataLoader(documents, batch_sampler=sampler, collate_fn=together, **options)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        documents.set_epoch(epoch)
        epochs.append([(batch["index"].tolist(), batch["input_ids"]) for batch in loader])
    return epochs


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        assert [index for index, _ in left] == [index for index, _ in right]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(left, right, strict=True))


@pytest.mark.parametrize("persistent", [False, True])
def test_masks_are_the_same_with_workers(make, corpus, tokenizer, persistent):
    documents = make(corpus, whole_word=True)
    alone = epochs_of(documents, tokenizer)
    assert_same(alone, epochs_of(documents, tokenizer, num_workers=2, persistent_workers=persistent))
    by_index = [
        {index: ids for indices, batch in epoch for index, ids in zip(indices, batch, strict=True)} for epoch in alone
    ]
    assert sum(by_index[0][39].tolist() != by_index[epoch][39].tolist() for epoch in (1, 2)) == 2


def test_masks_are_the_same_with_a_spawned_worker(bert, corpus, tmp_path):
    masking = Masking(0.3, 20, False, bert.mask_token_id)
    documents = LongTextDataset(
        corpus, tokenizer=bert, augmentation=masking, window_size=16, cache_dir=tmp_path / "cache"
    )
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    assert_same(epochs_of(documents, bert), epochs_of(documents, bert, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((1.5, None, False, 4), "--random_mask_prob 1.5"),
        ((0.1, -1, False, 4), "--max_mask_tokens -1"),
        ((0.1, None, False, None), "has no mask token"),
        ((0.1, None, False, 4, -1), "--seed -1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Masking(*options)


def test_a_document_without_tokens():
    masking = Masking(1.0, 5, False, 4)
    nothing = np.array([], dtype=bool)
    assert masking.apply(np.array([[0, 2, 1]]), np.full((1, 3), -1), nothing, 0, 0).tolist() == [[0, 2, 1]]
