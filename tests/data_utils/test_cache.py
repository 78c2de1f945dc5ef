"""Prepared once: counted, not timed; stale when anything changes; never half done; never all in memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from data_utils import cache, tokenization
from data_utils.augmentation import Masking
from data_utils.cache import DOCUMENTS, MANIFEST, QUARANTINE
from data_utils.dataset import LongTextDataset, load_tokenizer
from data_utils.overlap import text_hash
from data_utils.windows import cut_windows, word_starts_at
from tests.conftest import write_corpus
from tests.data_utils.conftest import write_jsonl
from utils import DataLoadError, ResourceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def builds(monkeypatch):
    """The files of each time that texts were read."""
    read = []
    reader = cache.checked_records
    monkeypatch.setattr(cache, "checked_records", lambda files, *rest: read.append(files) or reader(files, *rest))
    return read


@pytest.fixture
def make(bert, tmp_path):
    def build(paths, **options):
        settings = {"window_size": 16, "tokenizer": bert, "cache_dir": tmp_path / "cache"}
        return LongTextDataset(paths, **{**settings, **options})

    return build


def test_a_second_start_reads_no_text(make, corpus, builds):
    first, second = make(corpus), make(corpus)
    assert len(builds) == 1
    for index in (0, 39):
        assert torch.equal(first[index]["input_ids"], second[index]["input_ids"])
    assert second.window_counts.tolist() == first.window_counts.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"max_windows": None},
        {"max_windows": 3, "window_overlap": 4},
        {"max_len": 50, "augmentation": Masking(0.1, None, True, 4)},
        {"max_windows": 3, "read": "head_tail", "augmentation": Masking(0.1, None, True, 4)},
    ],
)
def test_the_file_holds_what_each_document_gives_by_itself(make, corpus, tmp_path, monkeypatch, options):
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 3_000)
    monkeypatch.setattr(cache, "_FLUSH_TOKENS", 1_000)
    documents = make(corpus, **options)
    preparation = documents.preparation
    with pa.memory_map(str(tmp_path / "cache" / preparation.key() / DOCUMENTS)) as file:
        table = pa.ipc.open_stream(file).read_all()
    assert table.schema == cache.SCHEMA
    assert table["windows"].num_chunks > 5
    special = [getattr(documents.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")]
    expected = []
    for number, line in enumerate(corpus.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        _, tokens = next(tokenization.tokenize(documents.tokenizer, [(0, row["text"])], preparation.words))
        places = preparation.reading.positions(len(tokens.ids))
        read = tokens.ids[places]
        ids, mask = cut_windows(read, 16, *special, preparation.reading.window_overlap)
        expected.append(
            {
                "windows": ids[mask.astype(bool)].tolist(),
                "tokens": len(tokens.ids),
                "tokens_read": len(read),
                "labels": [row["label"]],
                "id": row["id"],
                "source": f"{corpus}:{number}",
                "text_hash": text_hash(row["text"]),
                "word_starts": word_starts_at(tokens.word_starts, places).tolist() if preparation.words else None,
            }
        )
    assert table.to_pylist() == expected
    assert any(row["tokens_read"] < row["tokens"] for row in expected) == (options != {"max_windows": None})


def test_what_is_applied_on_load_does_not_prepare_again(make, corpus, builds):
    make(corpus)
    make(corpus, label_names=["c", "b", "a"])
    make(corpus, sample_data=5)
    make(corpus, augmentation=Masking(0.1, None, False, 4))
    assert len(builds) == 1


def test_any_setting_that_matters_prepares_again(make, corpus, builds, roberta):
    make(corpus)
    for number, options in enumerate(
        [
            {"window_size": 32},
            {"window_overlap": 2},
            {"max_windows": 2},
            {"max_len": 20},
            {"require_labels": False},
            {"on_bad_lines": "skip"},
            {"tokenizer": roberta},
            {"augmentation": Masking(0.1, None, True, 4)},
        ],
        2,
    ):
        make(corpus, **options)
        make(corpus, **options)
        assert len(builds) == number


def test_the_tokenizer_counts_by_content(make, corpus, builds, bert):
    make(corpus)
    bert("war", truncation=True, max_length=5, padding="max_length")
    make(corpus)
    assert len(builds) == 1
    bert.add_tokens(["congress!"])
    make(corpus)
    assert len(builds) == 2


def test_ids_and_places_are_as_the_path_is_written(make, tmp_path, monkeypatch):
    (tmp_path / "texts" / "war").mkdir(parents=True)
    (tmp_path / "texts" / "war" / "0.txt").write_text("the war of the union")
    monkeypatch.chdir(tmp_path)
    whole, relative = make(tmp_path / "texts"), make("texts")
    assert (whole.ids[0], relative.ids[0]) == (f"{tmp_path}/texts/war/0.txt", "texts/war/0.txt")
    assert relative.sources[0] == "texts/war/0.txt:1"


def test_a_changed_file_makes_it_stale(make, corpus, builds):
    make(corpus)
    content = corpus.read_text()
    corpus.write_text(content.replace('"label": "c"', '"label": "x"'))
    os.utime(corpus, ns=(1, 1))
    assert make(corpus).label_names == ["a", "b", "x"]
    corpus.write_text(content + json.dumps({"text": "war", "label": "a"}) + "\n")
    os.utime(corpus, ns=(1, 1))
    assert len(make(corpus)) == 41
    assert len(builds) == 3


def test_a_failed_build_leaves_nothing(make, corpus, tmp_path, monkeypatch, builds):
    def fail(*_, **__):
        assert gc.get_freeze_count() > 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "flat_windows", fail)
        with pytest.raises(KeyboardInterrupt):
            make(corpus)
    assert gc.get_freeze_count() == 0
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    assert len(make(corpus)) == 40
    assert len(builds) == 2
    assert gc.get_freeze_count() == 0


def test_what_a_killed_build_left_is_removed(make, corpus, tmp_path):
    key = make(corpus).preparation.key()
    leftover = tmp_path / "cache" / f".{key}.12345"
    (tmp_path / "cache" / key).rename(leftover)
    (leftover / MANIFEST).unlink()
    assert len(make(corpus)) == 40
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == sorted([key, f"{key}.lock"])


@pytest.mark.parametrize(
    ("name", "damage"),
    [(DOCUMENTS, "cut"), (MANIFEST, "cut"), *((n, "gone") for n in (DOCUMENTS, MANIFEST, QUARANTINE))],
)
def test_a_damaged_cache_is_built_again(make, corpus, tmp_path, builds, name, damage):
    documents = make(corpus)
    file = tmp_path / "cache" / documents.preparation.key() / name
    del documents
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.unlink()
    assert len(make(corpus)) == 40
    assert len(builds) == 2


def test_a_file_that_changes_while_it_is_read(make, corpus, monkeypatch, tmp_path):
    cut = cache.flat_windows

    def touch(*arguments, **options):
        os.utime(corpus, ns=(1, 1))
        return cut(*arguments, **options)

    monkeypatch.setattr(cache, "flat_windows", touch)
    with pytest.raises(DataLoadError, match="was changed while it was read"):
        make(corpus)
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []


def test_a_cache_that_cannot_be_written(make, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/cache: the cache cannot be written"):
        make(corpus, cache_dir=tmp_path / "file" / "cache")


def test_of_several_builders_one_builds(make, corpus, builds, tokenizer_folders):
    def start():
        return make(corpus, tokenizer=load_tokenizer(tokenizer_folders["bert"]))

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(start) for _ in range(4)]]
    assert len(builds) == 1
    assert len({int(documents[39]["input_ids"].sum()) for documents in found}) == 1


MEASURE = """
import resource, sys
from data_utils.dataset import LongTextDataset, LongTextBatchSampler, collate

def anonymous_megabytes():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) / 1024

small, large, folder, tokenizer = sys.argv[1:]
used = []
for path in (small, large):
    documents = LongTextDataset(path, None, tokenizer, window_size=64, cache_dir=folder)
    sampler = LongTextBatchSampler(documents.window_counts, 64)
    tokens = sum(int(collate([documents[i] for i in batch])["attention_mask"].sum()) for batch in sampler)
    used.append(anonymous_megabytes())
print(len(documents), int(documents.tokens_read.sum()), tokens, used[1] - used[0])
"""


def test_fifty_thousand_documents_do_not_stay_in_memory(tmp_path, tokenizer_folders):
    row = {"text": "the union of states and people shall have war or peace " * 20, "label": "a"}
    small = write_jsonl(tmp_path / "small.jsonl", [row] * 2_000)
    large = write_jsonl(tmp_path / "large.jsonl", [row] * 50_000)
    arguments = [small, large, tmp_path / "cache", tokenizer_folders["bert"]]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    documents, read, batched, grown = run.stdout.split()
    assert int(documents) == 50_000
    assert int(batched) - 2 * 50_000 * -(-int(read) // 50_000 // 62) == int(read)
    assert large.stat().st_size - small.stat().st_size > 52e6
    assert max(file.stat().st_size for file in (tmp_path / "cache").rglob(DOCUMENTS)) > 43e6
    assert float(grown) < 30  # counts, labels and the order of the batches: about 0.2 kB a document; texts would be 52


@pytest.mark.parametrize(
    "options",
    [
        {"max_windows": 2, "read": "head_tail"},
        {"max_windows": 2, "read": "random"},
        {"text_column": "id"},
        {"label_column": "id"},
    ],
)
def test_other_reading_or_columns_prepare_again(encoder_folder, tmp_path, monkeypatch, options):
    read, reader = [], cache.checked_records
    monkeypatch.setattr(cache, "checked_records", lambda files, *rest: read.append(files) or reader(files, *rest))
    path = write_corpus(tmp_path / "x.jsonl", 6)
    for more in ({}, {"max_windows": 2}, options, options):
        LongTextDataset(path, model_name=encoder_folder, window_size=12, cache_dir=tmp_path / "cache", **more)
    assert len(read) == 3
