"""A document of 10 MB takes a small multiple of its size in memory, and a Parquet file less than its size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_utils.conftest import random_text, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 10
MEASURE = """
import json, sys
from pathlib import Path
from data_utils.dataset import LongTextDataset, load_tokenizer

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

how, small, large, cache, tokenizer = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)
peaks = []
for path in (small, large):
    if how == "dataset":
        documents = LongTextDataset(path, tokenizer=tokenizer, cache_dir=Path(cache))
        windows = [len(documents[i]["input_ids"]) for i in range(len(documents))]
    else:
        text = json.loads(Path(path).read_text().splitlines()[0])["text"]
        windows = [len(LongTextDataset.preprocess_single_text(tokenizer, text, 256, 16)["input_ids"])]
    peaks.append(peak())
print(windows[0], peaks[1] - peaks[0])
"""


@pytest.mark.parametrize("how", ["dataset", "single text"])
def test_ten_megabytes(tmp_path, tokenizer_folders, how):
    text = f"{random_text(2_000, 5)} " * 20
    small, large = (
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text * times, "label": "a"}, {"text": "war", "label": "b"}])
        for name, times in (("small", 1), ("large", MEGABYTES * 10**6 // len(text) + 1))
    )
    arguments = [how, small, large, tmp_path / "cache", tokenizer_folders["bert"]]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    windows, grown = run.stdout.split()
    assert int(windows) == 16
    assert large.stat().st_size > MEGABYTES * 10**6
    assert float(grown) < 15 * MEGABYTES  # seen: 6.6


MEASURE_PARQUET = """
import sys, pyarrow as pa
from data_utils.readers import read_records
print(sum(1 for _ in read_records(sys.argv[1])), pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_parquet_is_read_as_it_comes(tmp_path, use_dictionary):
    """Though all of it is one row group, as pyarrow and pandas write it."""
    text = random_text(300, 5)
    texts = [f"{number} {text}" for number in range(40_000)]
    table = pa.table({"text": texts, "label": ["a"] * len(texts)})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=use_dictionary)
    command = [sys.executable, "-c", MEASURE_PARQUET, str(tmp_path / "t.parquet")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    documents, peak = map(int, run.stdout.split())
    assert documents == len(texts)
    assert peak < sum(map(len, texts)) / 4  # seen: a tenth
