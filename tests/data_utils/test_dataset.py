"""Documents in, windows out: items, labels, coverage, samples, bad lines, batches."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from data_utils.dataset import LongTextDataset, collate, load_tokenizer
from data_utils.labels import label_order, stratified_sample
from tests.data_utils.conftest import WORDS, random_text, write_csv, write_jsonl
from utils import ConfigError, DataError, DataFormatError, DataLoadError


@pytest.fixture
def make(tokenizer, tmp_path):
    """Builds datasets with a cache of the test's own."""

    def build(paths, **options):
        settings = {"window_size": 16, "max_windows": None, "tokenizer": tokenizer, "cache_dir": tmp_path / "cache"}
        return LongTextDataset(paths, **{**settings, **options})

    return build


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def content(item, overlap=0):
    rows = zip(item["input_ids"].numpy(), item["attention_mask"].numpy().astype(bool), strict=True)
    return np.concatenate([row[mask][1:-1][overlap if place else 0 :] for place, (row, mask) in enumerate(rows)])


@pytest.mark.parametrize("overlap", [0, 5])
def test_windows_joined_are_the_document_token_for_token(make, corpus, tokenizer, overlap):
    documents = make(corpus, window_overlap=overlap)
    texts = texts_of(corpus)
    assert len(documents) == len(texts) == 40
    for index, text in enumerate(texts):
        item = documents[index]
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert content(item, overlap).tolist() == expected
        assert documents.token_counts[index] == documents.tokens_read[index] == len(expected)
        assert documents.window_counts[index] == len(item["input_ids"])
        twin = tokenizer(text, max_length=16, truncation=True, stride=overlap, return_overflowing_tokens=True)
        padded = tokenizer.pad({"input_ids": twin["input_ids"]}, padding="max_length", max_length=16)
        assert item["input_ids"].tolist() == padded["input_ids"]
        assert item["attention_mask"].tolist() == padded["attention_mask"]


def test_items(make, corpus):
    item = make(corpus)[4]
    assert list(item) == ["input_ids", "attention_mask", "index", "labels"]
    assert item["input_ids"].dtype == item["attention_mask"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].shape == item["attention_mask"].shape
    assert item["input_ids"].shape[1] == 16
    assert (item["labels"].item(), item["labels"].shape, item["index"]) == (1, (), 4)
    with pytest.raises(IndexError):
        make(corpus)[40]


def test_ids_and_labels(make, corpus):
    documents = make(corpus)
    assert documents.label_names == ["a", "b", "c"]
    assert documents.labels.tolist() == [number % 3 for number in range(40)]
    assert list(documents.ids) == [f"d{number}" for number in range(40)]
    assert (len(documents.ids), documents.ids[-1], documents.ids[1:3]) == (40, "d39", ["d1", "d2"])


def test_special_tokens_written_in_a_text_are_text(make, tmp_path, tokenizer):
    text = f"war {tokenizer.sep_token} and {tokenizer.pad_token} peace {tokenizer.cls_token}"
    item = make(write_jsonl(tmp_path / "x.jsonl", [{"text": text, "label": "a"}]), window_size=200)[0]
    assert item["input_ids"].shape == (1, 200)
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    counts = [int((item["input_ids"] == token).sum()) for token in special]
    assert counts == [1, 1, 200 - int(item["attention_mask"].sum())]


def test_max_len_and_max_windows_are_counted(make, corpus):
    whole = make(corpus)
    total = int(whole.token_counts.sum())
    assert whole.coverage() == {"tokens_total": total, "tokens_read": total, "share": 1.0, "documents_truncated": 0}
    for options, limit in (({"max_windows": 3, "window_overlap": 4}, 34), ({"max_len": 50}, 50)):
        documents = make(corpus, **options)
        assert documents.token_counts.tolist() == whole.token_counts.tolist()
        assert documents.tokens_read.tolist() == np.minimum(whole.token_counts, limit).tolist()
        assert documents.truncated == int((whole.token_counts > limit).sum()) > 10
        coverage = documents.coverage()
        assert coverage["documents_truncated"] == documents.truncated
        assert coverage["share"] == pytest.approx(int(documents.tokens_read.sum()) / total)
        assert content(documents[39], options.get("window_overlap", 0)).tolist() == content(whole[39])[:limit].tolist()


def test_label_order():
    assert label_order(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert label_order(["10", "9", "x"]) == ["10", "9", "x"]


def test_given_label_names_rule(make, corpus):
    documents = make(corpus, label_names=["c", "b", "a", "none"])
    assert documents.label_names == ["c", "b", "a", "none"]
    assert documents.labels[:3].tolist() == [2, 1, 0]
    with pytest.raises(DataFormatError, match=rf"{corpus}:3: unknown label 'c'; the known ones are a, b; "):
        make(corpus, label_names=["a", "b"])


def test_unknown_labels_are_skipped_as_bad_lines(make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    rows = [{"text": "war", "label": "a"}, "rubbish", {"text": "war", "label": "b"}, {"text": "war", "label": "a"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    for start in range(2):
        quarantine = tmp_path / f"bad-{start}.jsonl"
        caplog.clear()
        documents = make(path, label_names=["a"], on_bad_lines="skip", quarantine_path=quarantine)
        assert list(documents.ids) == ["x.jsonl:1", "x.jsonl:4"]
        assert documents.skipped == 2
        bad = [json.loads(line) for line in quarantine.read_text().splitlines()]
        assert [row["source"] for row in bad] == [f"{path}:2", f"{path}:3"]
        assert bad[1]["reason"] == "unknown label 'b'; the known ones are a"
        assert json.loads(bad[1]["raw"]) == {"id": "x.jsonl:3", "labels": ["b"]}
        assert f"2 bad lines were left out; they are in {quarantine}" in caplog.messages
    with pytest.raises(DataFormatError, match="as in all documents, none is left"):
        make(path, label_names=["z"], on_bad_lines="skip")
    make(write_jsonl(tmp_path / "good.jsonl", rows[:1]), quarantine_path=quarantine)
    assert not quarantine.exists()  # what an earlier run left there is of other documents


def test_multi_label(make, tmp_path):
    rows = [{"text": "war", "label": ["b", "a"]}, {"text": "peace", "label": []}, {"text": "land", "label": ["c"]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    documents = make(path, problem_type="multi_label")
    assert documents.label_names == ["a", "b", "c"]
    assert documents.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    batch = collate([documents[index] for index in range(3)])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(DataFormatError, match=f"{path}:1: unknown label 'a'"):
        make(path, problem_type="multi_label", label_names=["b", "c"])


def test_without_labels(make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war"}, {"text": "peace"}])
    documents = make(path, require_labels=False)
    assert (documents.labels, documents.label_names) == (None, [])
    assert "labels" not in documents[0]
    assert "labels" not in collate([documents[0], documents[1]])
    with pytest.raises(DataFormatError, match=f"{path}:1: no label"):
        make(path)
    some = write_jsonl(tmp_path / "y.jsonl", [{"text": "war", "label": "a"}, {"text": "peace"}])
    assert make(some, require_labels=False).labels is None
    assert "1 of 2 documents have no known label; labels are not used" in caplog.messages
    all_known = write_jsonl(tmp_path / "z.jsonl", [{"text": "war", "label": "a"}])
    assert make(all_known, require_labels=False, label_names=["b", "a"]).labels.tolist() == [1]


def test_csv_and_parquet_give_the_same_as_jsonl(make, corpus, tmp_path):
    frame = pd.read_json(corpus, lines=True)
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.rename(columns={"text": "body", "label": "y"}).to_parquet(tmp_path / "x.parquet")
    first = make(corpus)
    others = make(tmp_path / "x.csv"), make(tmp_path / "x.parquet", text_column="body", label_column="y")
    for other in others:
        assert list(other.ids) == list(first.ids)
        assert other.labels.tolist() == first.labels.tolist()
        for index in (0, 17, 39):
            assert torch.equal(other[index]["input_ids"], first[index]["input_ids"])


def test_several_files_keep_their_order(make, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "war", "label": 10}, {"text": "peace", "label": 9}])
    write_csv(tmp_path / "a.csv", [["land", "10"]])
    documents = make([tmp_path / "b.jsonl", tmp_path / "a.csv"])
    assert list(documents.ids) == ["b.jsonl:1", "b.jsonl:2", "a.csv:2"]
    assert (documents.label_names, documents.labels.tolist()) == (["9", "10"], [1, 0, 1])


def test_sample_data_is_seeded_and_stratified(make, tmp_path):
    rows = [{"text": WORDS[n % 30], "label": "a" if n % 10 < 6 else "b" if n % 10 < 9 else "c"} for n in range(200)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    first = make(path, sample_data=50, seed=1)
    again = make(path, sample_data=50, seed=1, cache_dir=tmp_path / "another")
    other = make(path, sample_data=50, seed=2)
    assert Counter(first.labels.tolist()) == {0: 30, 1: 15, 2: 5}
    assert list(first.ids) == list(again.ids) != list(other.ids)
    assert len(first.window_counts) == len(first.token_counts) == len(first.tokens_read) == len(first) == 50
    everything = make(path)
    place = list(everything.ids).index(first.ids[7])
    assert torch.equal(first[7]["input_ids"], everything[place]["input_ids"])
    assert first[7]["labels"] == everything[place]["labels"]
    assert len(make(path, sample_data=1000)) == 200
    with pytest.raises(ConfigError, match="--sample_data 0"):
        make(path, sample_data=0)


def test_stratified_sample_rounds_by_the_largest_remainder():
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    for size in range(1, 11):
        chosen = stratified_sample(labels, 10, size, seed=size)
        assert len(set(chosen.tolist())) == size
        taken = np.bincount(labels[chosen], minlength=3)
        assert (np.abs(taken - np.array([5, 3, 2]) * size / 10) < 1).all()
    many = np.eye(4, dtype=np.int8)[np.arange(100) % 4]
    assert many[stratified_sample(many, 100, 20, seed=0)].sum(axis=0).tolist() == [5, 5, 5, 5]
    assert len(stratified_sample(None, 100, 20, seed=0)) == 20


def test_collate_pads_to_the_longest(make, tmp_path):
    texts = [" ".join(WORDS[:count]) for count in (1, 20, 3)]
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text, "label": "a"} for text in texts])
    documents = make(path)
    items = [documents[index] for index in (2, 1)]
    batch = collate(items, pad_token_id=7)
    windows = len(items[1]["input_ids"])
    assert list(batch) == ["input_ids", "attention_mask", "labels", "index"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, windows, 16)
    assert torch.equal(batch["input_ids"][1], items[1]["input_ids"])
    assert (batch["input_ids"][0, 1:] == 7).all()
    assert batch["attention_mask"][0, 1:].sum() == 0
    assert batch["index"].tolist() == [2, 1]
    alone = collate([documents[0]])
    length = int(documents[0]["attention_mask"].sum())
    assert alone["input_ids"].shape == (1, 1, length)
    assert (alone["attention_mask"] == 1).all()


def test_preprocess_single_text_is_what_the_dataset_holds(make, corpus, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    text = texts_of(corpus)[30]
    single = LongTextDataset.preprocess_single_text(tokenizer, text, window_size=16, max_windows=4, window_overlap=3)
    item = make(corpus, max_windows=4, window_overlap=3)[30]
    assert list(single) == ["input_ids", "attention_mask"]
    assert all(torch.equal(single[name], item[name]) and single[name].dtype == torch.int64 for name in single)
    default = LongTextDataset.preprocess_single_text(tokenizer, text)
    assert default["input_ids"].shape[1] == 512
    capped = LongTextDataset.preprocess_single_text(tokenizer, text, window_size=16, max_windows=None, max_len=15)
    assert capped["attention_mask"].sum(dim=1).tolist() == [16, 3]
    total = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert caplog.messages == [f"Of the text's {total} tokens the first {read} are read" for read in (47, 15)]
    with pytest.raises(DataFormatError, match="text is empty"):
        LongTextDataset.preprocess_single_text(tokenizer, " ")


def test_a_dataset_can_be_pickled(make, corpus):
    documents = make(corpus)
    packed = pickle.dumps(documents)
    assert len(packed) < 200_000
    again = pickle.loads(packed)
    assert torch.equal(again[20]["input_ids"], documents[20]["input_ids"])
    assert list(again.ids) == list(documents.ids)


def test_model_name_gives_the_tokenizer(corpus, tokenizer_folders, tmp_path):
    by_name = LongTextDataset(corpus, 512, tokenizer_folders["bert"], cache_dir=tmp_path)
    given = LongTextDataset(corpus, 512, tokenizer=load_tokenizer(tokenizer_folders["bert"]), cache_dir=tmp_path)
    assert torch.equal(by_name[3]["input_ids"], given[3]["input_ids"])


def test_options_that_cannot_be(make, corpus, tmp_path):
    for options, message in (
        ({"window_size": 2}, "--window_size"),
        ({"window_overlap": 14}, "--window_overlap"),
        ({"max_windows": 0}, "--max_windows"),
        ({"max_len": 0}, "--max_len"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(corpus, **options)
    with pytest.raises(DataLoadError, match="no such file"):
        make(tmp_path / "none.jsonl")


def test_a_document_of_ten_megabytes(make, tmp_path):
    text = f"{random_text(2_000, 5)} " * 800
    assert len(text) > 10_000_000
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text, "label": "a"}, {"text": "short", "label": "b"}])
    documents = make(path, window_size=512, max_windows=16)
    assert documents.window_counts.tolist() == [16, 1]
    assert documents.coverage()["share"] < 0.01


def test_a_bad_document_ends_with_a_data_error(make, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war", "label": "a"}, {"text": "", "label": "a"}])
    with pytest.raises(DataError, match=f"{path}:2: 'text' is empty"):
        make(path)
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
