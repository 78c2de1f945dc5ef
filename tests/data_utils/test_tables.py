"""Bad rows of CSV and Parquet: the same faults as in JSON Lines, and those that only a table can have."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils.dataset import LongTextDataset
from data_utils.readers import read_records
from tests.data_utils.conftest import write_jsonl
from utils import DataFormatError


def fault(path):
    with pytest.raises(DataFormatError) as error:
        list(read_records(path))
    return str(error.value)


def _table(path, rows):
    """Rows of bytes as Parquet, whatever bytes these are."""
    columns = {"text": [row[0] for row in rows], "label": [row[1] for row in rows], "id": [row[2] for row in rows]}
    arrays = [pa.array(cells, pa.binary()) for cells in columns.values()]
    strings = [pa.Array.from_buffers(pa.string(), len(rows), array.buffers()) for array in arrays]
    pq.write_table(pa.Table.from_arrays(strings, names=list(columns)), path)
    return path


def _csv_bytes(path, rows):
    path.write_bytes(b"text,label,id\n" + b"".join(b",".join(cell or b"" for cell in row) + b"\n" for row in rows))
    return path


BYTE_FAULTS = [
    ((b"", b"a", b"n2"), "'text' is empty"),
    ((b" \t ", b"a", b"n2"), "'text' is empty"),
    ((b"war", None, b"n2"), "no label in 'label'"),
    ((b"war", b" ", b"n2"), "label is empty"),
    ((b"war", b"a", b"n1"), "duplicate id 'n1'"),
    ((b"wa\0r", b"a", b"n2"), "NUL"),
    ((b"war", b"a\0", b"n2"), "NUL"),
    ((b"caf\xe9", b"a", b"n2"), "is not UTF-8"),
    ((b"war", b"\xff", b"n2"), "is not UTF-8"),
    ((b"\xed\xa0\x80", b"a", b"n2"), "is not UTF-8"),  # a lone surrogate, in bytes
    ((b"\xf0\x9f\x98", b"a", b"n2"), "is not UTF-8"),  # a character that is cut off
]


@pytest.mark.parametrize(("write", "place"), [(_csv_bytes, "3"), (_table, "row 2")], ids=["csv", "parquet"])
@pytest.mark.parametrize(("row", "message"), BYTE_FAULTS, ids=lambda value: str(value)[:40])
def test_the_same_faults_in_csv_and_parquet(tmp_path, write, place, row, message):
    path = write(
        tmp_path / f"x.{'csv' if write is _csv_bytes else 'parquet'}", [(b"war", b"a", b"n1"), row, (b"x", b"b", b"n3")]
    )
    assert fault(path).startswith(f"{path}:{place}: ")
    assert message in fault(path)
    assert [record.id for record in read_records(path, on_bad_lines="skip")] == ["n1", "n3"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": [], "label": []}, "the file is empty"),
        ({"text": ["war"], "label": [None]}, "row 1: no label in 'label'"),
        ({"text": ["war"], "label": [float("nan")]}, "row 1: label is NaN"),
        ({"text": [1], "label": ["a"]}, "row 1: 'text' is an integer"),
        ({"text": [{"a": 1}], "label": ["a"]}, "row 1: 'text' is an object"),
        ({"text": [b"war"], "label": ["a"]}, "row 1: 'text' is bytes"),
        ({"text": ["war"], "label": [{"a": 1}]}, "row 1: label is an object"),
    ],
)
def test_parquet_of_other_types(tmp_path, table, message):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(table), path)
    assert message in fault(path)


def test_a_parquet_column_that_is_there_twice(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "label", "text"]), path)
    assert f"{path}: a column is named twice (text, label, text); rename one" in fault(path)


def test_labels_of_two_types_in_two_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "war", "label": "a"}])
    pq.write_table(pa.table({"text": ["war"], "label": [1]}), tmp_path / "b.parquet")
    assert f"b.parquet:row 1: label 1 is an integer, but a string at {tmp_path}/a.jsonl:1" in fault(tmp_path)


@pytest.mark.parametrize(("write", "place"), [(_csv_bytes, "3"), (_table, "row 2")], ids=["csv", "parquet"])
def test_labels_that_the_training_set_does_not_have(tmp_path, bert, write, place):
    path = write(
        tmp_path / f"x.{'csv' if write is _csv_bytes else 'parquet'}", [(b"war", b"a", None), (b"x", b"b", None)]
    )
    options = {"tokenizer": bert, "cache_dir": tmp_path / "cache", "label_names": ["a"]}
    with pytest.raises(DataFormatError, match=f"{path}:{place}: unknown label 'b'; the known ones are a"):
        LongTextDataset(path, **options)
    assert list(LongTextDataset(path, on_bad_lines="skip", **options).labels) == [0]
