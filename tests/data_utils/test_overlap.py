"""The same text in two sets: what counts as the same, and the warning."""

from __future__ import annotations

import hashlib
import logging
import unicodedata

import numpy as np
import pytest

from data_utils.dataset import LongTextDataset
from data_utils.overlap import text_hash, warn_of_overlap
from tests.data_utils.conftest import write_csv, write_jsonl

SAME = ["War and Peace", "war  and\npeace\r\n", "ＷＡＲ\u3000and\u00a0peace", "\twar and peace"]


@pytest.fixture
def make(bert, tmp_path):
    return lambda path, **options: LongTextDataset(path, tokenizer=bert, cache_dir=tmp_path / "cache", **options)


def test_the_hash():
    assert len({text_hash(text) for text in SAME}) == 1
    assert len({text_hash(text) for text in (SAME[0], "war and peace.", "peace and war", "naïve", "naive")}) == 5
    assert text_hash("war") == 25207206183409791  # checkpoints keep them: a change needs another format
    assert all(-(2**63) <= text_hash(str(number)) < 2**63 for number in range(100))


def test_the_hash_is_that_of_its_definition():
    for text in [
        *map(chr, range(0xD800)),
        "".join(map(chr, range(128))) * 3,
        *SAME,
        "STRASSE straße ﬁ",
        "War 中国 ＷＡＲ",
    ]:
        plain = unicodedata.normalize("NFKC", text).casefold().translate(dict.fromkeys(map(ord, " \t\n\r\v\f")))
        digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
        assert text_hash(text) == int.from_bytes(digest, "big", signed=True)


def test_hashes_follow_the_items(make, tmp_path):
    rows = [{"text": f"war {number}", "label": "ab"[number % 2]} for number in range(20)]
    documents = make(write_jsonl(tmp_path / "x.jsonl", rows), sample_data=6)
    chosen = [int(source.rsplit(":", 1)[1]) - 1 for source in documents.sources]
    assert len(chosen) == 6
    assert documents.text_hashes.tolist() == [text_hash(rows[number]["text"]) for number in chosen]
    assert documents.text_hashes.dtype == np.int64


def test_the_warning_counts_and_names_the_first(make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    train = make(write_jsonl(tmp_path / "train.jsonl", [{"text": f"War {n}", "label": "a"} for n in range(20)]))
    path = write_csv(tmp_path / "test.csv", [["peace", "a"], *([f"war  {number}", "a"] for number in range(7))])
    caplog.clear()
    assert warn_of_overlap(make(path), "test", train.text_hashes) == 7
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    shown = ", ".join(f"test.csv:{line} ({path}:{line})" for line in range(3, 8))
    assert message.startswith(
        f"7 of the 8 documents of the test set were trained on, which makes its scores too good: {shown}"
    )
    assert ", ...;" in message


def test_no_overlap_no_warning(make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    documents = make(write_jsonl(tmp_path / "x.jsonl", [{"text": "war", "label": "a"}]))
    assert warn_of_overlap(documents, "test", np.array([text_hash("peace")])) == 0
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
