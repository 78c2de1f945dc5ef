"""Every document once an epoch; the order follows from (seed, epoch); groups do not depend on the split."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from data_utils.dataset import LongTextBatchSampler, LongTextDataset, evaluation_loader
from tests.conftest import write_corpus
from utils import ConfigError


def counts_of(documents, seed=0):
    """Log-normal window counts, as real corpora have them."""
    draw = np.random.default_rng(seed)
    return np.clip(np.ceil(np.exp(draw.normal(2, 0.8, documents))), 1, 64).astype(np.int64)


def batches_of(counts, batch_size, epoch=0, **options):
    sampler = LongTextBatchSampler(counts, batch_size, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


def replicas_of(counts, batch_size, replicas, **options):
    return [batches_of(counts, batch_size, num_replicas=replicas, rank=rank, **options) for rank in range(replicas)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def updates(batches, size):
    return [sorted(flat(batches[start : start + size])) for start in range(0, len(batches), size)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("cap", [None, 20])
@pytest.mark.parametrize("documents", [1, 7, 64, 1003])
def test_every_document_once_an_epoch(documents, cap, shuffle):
    sampler = LongTextBatchSampler(counts_of(documents), 4, max_windows_per_batch=cap, shuffle=shuffle)
    lengths = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(flat(batches)) == list(range(documents))
        assert len(batches) == len(sampler)
        assert max(map(len, batches)) <= 4
        lengths.add(len(sampler))
    assert len(lengths) == 1


def test_the_order_follows_from_seed_and_epoch():
    counts = counts_of(500)
    assert batches_of(counts, 4, epoch=3) == batches_of(counts, 4, epoch=3)
    assert batches_of(counts, 4, epoch=3) != batches_of(counts, 4, epoch=4)
    assert batches_of(counts, 4, epoch=3) != batches_of(counts, 4, epoch=3, seed=1)
    sampler = LongTextBatchSampler(counts, 4)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second


def test_groups_are_made_anew_each_epoch():
    counts = counts_of(200)
    groups = [{frozenset(batch) for batch in batches_of(counts, 8, epoch=epoch)} for epoch in range(2)]
    assert len(groups[0] & groups[1]) <= 2


def test_no_batch_holds_the_longest_with_the_shortest():
    """Not even that of few documents, whose order is rolled."""
    counts = np.arange(1, 151)
    spreads = [np.ptp(counts[batch]) for epoch in range(5) for batch in batches_of(counts, 4, epoch=epoch)]
    assert max(spreads) < 50


def test_any_document_may_be_in_the_smaller_last_group():
    last = [batches_of(np.arange(1, 11), 4, epoch=epoch)[-1] for epoch in range(50)]
    assert set(map(len, last)) == {2}
    assert set(flat(last)) == set(range(10))


@pytest.mark.parametrize("cap", [None, 1600])
def test_long_and_short_groups_come_in_any_order(cap):
    """Neighbours of 400 different lengths differ by a third of the range, as drawn numbers do, not by a group."""
    counts = np.arange(1, 401)
    means = [counts[batch].mean() for batch in batches_of(counts, 4, max_windows_per_batch=cap)]
    assert len(means) == 100
    assert np.abs(np.diff(means)).mean() == pytest.approx(400 / 3, rel=0.2)


@pytest.mark.parametrize("documents", [5, 64, 1003])
def test_micro_batches_do_not_change_the_groups(documents):
    counts = counts_of(documents)
    whole = updates(batches_of(counts, 8), 1)
    assert updates(batches_of(counts, 2, accumulation=4), 4) == whole
    assert updates(batches_of(counts, 4, accumulation=2), 2) == whole
    assert len(whole[-1]) == documents % 8 or documents % 8 == 0


@pytest.mark.parametrize("documents", [3, 5, 26, 64, 99, 1003])
@pytest.mark.parametrize(("replicas", "batch_size", "accumulation"), [(2, 4, 1), (2, 2, 2), (3, 1, 2), (3, 2, 2)])
def test_replicas_share_each_group(documents, replicas, batch_size, accumulation):
    counts = counts_of(documents)
    shares = replicas_of(counts, batch_size, replicas, accumulation=accumulation)
    assert sorted(flat(flat(shares))) == list(range(documents))
    assert len({len(share) for share in shares}) == 1
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(batch for share in shares for batch in share)
    full = documents // (batch_size * accumulation * replicas) * accumulation
    batch_sizes = [len(batch) for share in shares for batch in share[: full - accumulation]]
    assert set(batch_sizes) <= {batch_size}
    assert max(len(batch) for share in shares for batch in share) <= batch_size + 1


def test_replicas_see_the_documents_of_one_process():
    counts = counts_of(160)
    whole = updates(batches_of(counts, 8), 1)
    shares = replicas_of(counts, 2, 2, accumulation=2)
    halves = [updates(share, 2) for share in shares]
    assert [sorted(one + other) for one, other in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize(("accumulation", "shuffle"), [(1, True), (3, True), (1, False)])
@pytest.mark.parametrize("documents", [3, 50, 301])
@pytest.mark.parametrize("cap", [1, 12, 40, 200])
def test_a_cap_on_windows(documents, accumulation, shuffle, replicas, cap):
    counts = counts_of(documents)
    options = {"accumulation": accumulation, "max_windows_per_batch": cap, "shuffle": shuffle}
    shares = replicas_of(counts, 8, replicas, **options)
    assert sorted(flat(flat(shares))) == list(range(documents))
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    over = [batch for batch in batches if len(batch) > 1 and len(batch) * counts[batch].max() > cap]
    assert all(batches)
    assert len(over) < replicas
    assert not over or len(batches) + len(over) == documents


def test_a_document_above_the_cap_makes_a_batch_of_its_own():
    batches = batches_of(np.array([1, 30, 1, 2]), 4, max_windows_per_batch=8, shuffle=False)
    assert batches == [[1], [3, 0, 2]]


@pytest.mark.parametrize("replicas", [1, 2])
def test_with_a_cap_an_update_takes_the_next_by_length_and_the_smaller_one_is_the_last(replicas):
    counts = np.arange(1, 413)  # 103 batches, or 104 of which two are halves
    for epoch in range(5):
        options = {"accumulation": 3, "max_windows_per_batch": 10_000, "epoch": epoch}
        shares = replicas_of(counts, 4, replicas, **options)
        groups = [sorted(flat(group)) for group in zip(*(updates(share, 3) for share in shares), strict=True)]
        assert len(groups) == -(-103 // (3 * replicas))
        for group in groups:
            assert group == list(range(group[0], group[-1] + 1))
        assert len(groups[-1]) < 12 * replicas
        for share in shares:
            windows = [len(batch) * int(counts[batch].max()) for batch in share]
            assert windows[:3] == sorted(windows[:3], reverse=True)


def test_of_batches_that_do_not_divide_evenly_the_largest_is_split():
    shares = replicas_of(np.array([30, 3, 3, 3, 3]), 8, 2, max_windows_per_batch=9, shuffle=False)
    assert sorted(sorted(batch) for batch in flat(shares)) == [[0], [1, 2], [3], [4]]


def test_documents_that_cannot_be_split_evenly_are_joined():
    shares = replicas_of(np.array([5, 5, 5, 4, 3]), 8, 2, max_windows_per_batch=5, shuffle=False)
    assert sorted(sorted(batch) for batch in flat(shares)) == [[0], [1], [2], [3, 4]]


def test_a_batch_holds_documents_of_like_length():
    counts = counts_of(2000)
    computed = sum(len(batch) * counts[batch].max() for batch in LongTextBatchSampler(counts, 8))
    assert 1 - counts.sum() / computed < 0.07
    drawn = np.random.default_rng(0).permutation(2000).reshape(-1, 8)
    assert 1 - counts.sum() / (counts[drawn].max(1).sum() * 8) > 0.3


def test_without_shuffling_the_longest_come_first():
    counts = np.array([1, 4, 2, 4, 3])
    assert batches_of(counts, 2, shuffle=False) == [[1, 3], [4, 2], [0]]


def test_a_restart_skips_what_was_done():
    class Numbers(Dataset):
        def __getitem__(self, index):
            return index

    counts = counts_of(300)
    sampler = LongTextBatchSampler(counts, 4, accumulation=2)
    sampler.set_epoch(5)
    uninterrupted = [batch.tolist() for batch in DataLoader(Numbers(), batch_sampler=sampler)]
    again = LongTextBatchSampler(counts, 4, accumulation=2)
    again.set_epoch(5)
    resumed = iter(again)
    for _ in range(31):
        next(resumed)
    assert list(resumed) == uninterrupted[31:]


@pytest.mark.parametrize("cap", [None, 4])
def test_ties_are_drawn(cap):
    counts, options = np.ones(40, dtype=int), {"max_windows_per_batch": cap}
    first = Counter(batch[0] for epoch in range(30) for batch in batches_of(counts, 4, epoch=epoch, **options))
    assert len(first) == 40


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        LongTextBatchSampler(np.ones(2), 0, accumulation=0, num_replicas=3, rank=3, max_windows_per_batch=0)
    for fault in (
        "batch_size 0",
        "accumulation 0",
        "max_windows_per_batch 0",
        "rank 3",
        "2 documents cannot be shared",
    ):
        assert fault in str(error.value)


def test_a_cap_holds_in_evaluation(encoder_folder, tmp_path):
    documents = LongTextDataset(
        write_corpus(tmp_path / "x.jsonl", 30), model_name=encoder_folder, window_size=12, cache_dir=tmp_path / "cache"
    )
    sizes = [batch["input_ids"].shape[:2] for batch in evaluation_loader(documents, 8, max_windows_per_batch=12)]
    assert sum(b for b, _ in sizes) == 30
    assert max(b * n for b, n in sizes) <= 12
