"""Every kind of file, and every kind of bad line with its file and line."""

from __future__ import annotations

import json
import logging

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils import records
from data_utils.paths import expand_paths
from data_utils.readers import read_records
from data_utils.records import Record, check_text
from tests.data_utils.conftest import write_csv, write_jsonl
from utils import DataFormatError, DataLoadError

GOOD = {"text": "war and peace", "label": "a"}


def read(path, **options):
    return list(read_records(path, **options))


def fault(path, **options):
    with pytest.raises(DataFormatError) as error:
        read(path, **options)
    return str(error.value)


def test_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": "n1", **GOOD}, "", {"text": "Ü", "label": 3, "id": 7, "more": {}}])
    path.write_text(path.read_text().replace('"label": 3', '"label": "3"'), encoding="utf-8")
    assert read(path) == [
        Record("war and peace", "a", "n1", f"{path}:1"),
        Record("Ü", "3", "7", f"{path}:3"),
    ]


def test_bom_crlf_and_no_last_newline(tmp_path):
    line = json.dumps(GOOD).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    assert [record.source for record in read(path)] == [f"{path}:1", f"{path}:2"]
    table = tmp_path / "x.csv"
    table.write_bytes(b"\xef\xbb\xbftext,label\r\nwar,a\r\npeace,b")
    assert [(record.text, record.label) for record in read(table)] == [("war", "a"), ("peace", "b")]


def test_csv_lines_are_physical(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'text,label\r\n"two\r\nlines, ""quoted""",a\r\n\r\nlast,b\r\n')
    assert read(path) == [
        Record('two\r\nlines, "quoted"', "a", "x.csv:2", f"{path}:2"),
        Record("last", "b", "x.csv:5", f"{path}:5"),
    ]


def test_csv_with_a_field_of_ten_megabytes(tmp_path):
    path = write_csv(tmp_path / "x.csv", [["word " * 2_000_000, "a"], ["short", "b"]])
    assert [len(record.text) for record in read(path)] == [10_000_000, 5]


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    frame = pd.DataFrame({"body": [f"text {n}" for n in range(200)], "y": pd.Categorical(["a", "b"] * 100), "z": 1.5})
    frame.to_parquet(path)
    found = read(path, text_column="body", label_column="y")
    assert len(found) == 200
    assert found[199] == Record("text 199", "b", "x.parquet:row 200", f"{path}:row 200")


def test_labels_become_strings(tmp_path):
    for number, (labels, names) in enumerate({(3, 1): ["3", "1"], (True, False): ["True", "False"]}.items()):
        path = write_jsonl(tmp_path / f"{number}.jsonl", [{"text": "war", "label": label} for label in labels])
        assert [record.label for record in read(path)] == names


def test_multi_label(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war", "label": ["b", "a"]}, {"text": "war", "label": []}])
    assert [record.label for record in read(path, problem_type="multi_label")] == [["b", "a"], []]
    table = write_csv(tmp_path / "x.csv", [["war", "b|a"], ["war", '["b", "a"]'], ["war", "[]"], ["war", "b"]])
    assert [record.label for record in read(table, problem_type="multi_label")] == [["b", "a"], ["b", "a"], [], ["b"]]
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["war", "war"], "label": [["b", "a"], []]}), parquet)
    assert [record.label for record in read(parquet, problem_type="multi_label")] == [["b", "a"], []]


def test_labels_that_are_not_needed(tmp_path):
    rows = [GOOD, {"text": "war"}, {"text": "war", "label": None}, {"text": "war", "label": 1.5}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert [record.label for record in read(path, require_labels=False)] == ["a", None, None, None]
    table = write_csv(tmp_path / "x.csv", [["war"]], header=["text"])
    assert [record.label for record in read(table, require_labels=False)] == [None]


def test_folders_and_several_files(tmp_path):
    for name in ("b.jsonl", "a.JSONL", ".hidden.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, [GOOD])
    write_csv(tmp_path / "d.csv", [["war", "a"]])
    (tmp_path / "notes.txt").write_text("no data")
    assert [path.name for path in expand_paths(tmp_path)] == ["a.JSONL", "b.jsonl", "c.jsonl", "d.csv"]
    assert [path.name for path in expand_paths([tmp_path / "c.jsonl", str(tmp_path / "d.csv")])] == ["c.jsonl", "d.csv"]
    assert [record.id for record in read(tmp_path)] == ["a.JSONL:1", "b.jsonl:1", "c.jsonl:1", "d.csv:2"]


def test_files_of_one_name_in_two_folders_make_distinct_ids(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", [GOOD])
    paths = [tmp_path / "one", tmp_path / "two"]
    assert [record.id for record in read(paths)] == [f"{path}/x.jsonl:1" for path in paths]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.jsonl", "no such file; check the path"),
        (lambda folder: (folder / "part.parquet").mkdir() or folder, r"part\.parquet: is a folder beside data files"),
        (lambda folder: (folder / "x.jsonl").symlink_to("none") or folder, r"x\.jsonl: no such file; check the path"),
        (lambda folder: [], "no data file was given"),
        (lambda folder: folder, r"holds no \*\.jsonl, \*\.csv, \*\.parquet file"),
        (lambda folder: write_jsonl(folder / "x.txt", [GOOD]), "unknown ending '.txt'; data files end in .jsonl"),
        (lambda folder: [write_jsonl(folder / "x.jsonl", [GOOD])] * 2, "given twice"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path, make, message):
    with pytest.raises(DataLoadError, match=message):
        expand_paths(make(tmp_path))


JSON_FAULTS = {
    '{"text": "war", "label": "a"': "malformed JSON",
    '{"text": "war", "label": NaN}': "label is NaN",
    '{"text": "war", "label": null}': "no label in 'label'",
    '{"text": "war"}': "no label in 'label'; give one, or set --label_column",
    '{"text": "war", "label": ""}': "no label in 'label'",
    '{"text": "war", "label": " "}': "label is empty",
    '{"text": "war", "label": 1.5}': "label is a floating-point number, 1.5; classes are told apart, not amounts",
    '{"text": "war", "label": {}}': "label is an object",
    '{"text": "war", "label": ["a"]}': "label is a list; for several labels a document set --problem_type multi_label",
    '{"text": "war", "label": 1}': "label 1 is an integer, but a string at ",
    '{"text": "war", "label": true}': "label True is a boolean, but a string at ",
    '{"label": "a"}': "no 'text' (the line has: 'label'); set --text_column",
    '{"text": "", "label": "a"}': "'text' is empty",
    '{"text": " \\n", "label": "a"}': "'text' is empty",
    '{"text": " \\u200b\\ufeff", "label": "a"}': "'text' shows nothing: it holds only characters such as U+200B",
    '{"text": "\\ufffd \\ufffd", "label": "a"}': "'text' shows nothing",
    '{"text": null, "label": "a"}': "'text' is null",
    '{"text": 5, "label": "a"}': "'text' is an integer",
    '{"text": "a\\u0000b", "label": "a"}': "NUL character at position 2",
    '{"text": "war \\ud83d!", "label": "a"}': "lone surrogate, U+D83D, at position 5",
    '{"text": "war", "label": "\\udc00"}': "label holds a lone surrogate",
    '{"text": "war", "label": "a", "label": "b"}': "duplicate key 'label'",
    '{"text": "war", "label": "a", "id": "n1"}': "duplicate id 'n1'",
    '{"text": "war", "label": "a", "id": 1.5}': "id is a floating-point number",
    '{"text": "war", "label": "a", "id": true}': "id is a boolean",
    '["war", "a"]': "the line is a list; it must be a JSON object",
    "5": "the line is an integer",
    "null": "the line is null",
    "war": "malformed JSON",
    "[" * 100_000: "malformed JSON",
    '{"n": ' + "1" * 5000 + "}": "malformed JSON",
}


@pytest.mark.parametrize("line", JSON_FAULTS, ids=lambda line: line[:50])
def test_bad_json_lines(tmp_path, line):
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": "n1", **GOOD}, line, {"id": "n3", **GOOD}])
    message = fault(path)
    assert message.startswith(f"{path}:2: ")
    assert JSON_FAULTS[line] in message
    assert message.endswith("--on_bad_lines skip")
    assert [record.id for record in read(path, on_bad_lines="skip")] == ["n1", "n3"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "caf\xe9", "label": "a"}', "byte 0xe9 at position 14 is not UTF-8"),
        (b'{"text": "a\x00b", "label": "a"}', "NUL byte at position 12"),
        (b'{"text": "\xed\xa0\x80", "label": "a"}', "is not UTF-8"),
    ],
)
def test_bad_bytes(tmp_path, raw, message):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(good + b"\n" + raw + b"\n" + good + b"\n")
    assert fault(path).startswith(f"{path}:2: ")
    assert message in fault(path)
    assert len(read(path, on_bad_lines="skip")) == 2


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", json.dumps(GOOD)), ("x.csv", "text,label\r\nwar,a\r\n")])
def test_utf16_is_refused_as_such(tmp_path, name, text):
    """As PowerShell and Excel write it: neither NUL nor the line ends that csv makes out are what is wrong."""
    path = tmp_path / name
    path.write_bytes(text.encode("utf-16"))
    assert fault(path).startswith(f"{path}:1: byte 0xff at position 1 is not UTF-8; save the file as UTF-8")


def test_a_cut_off_tail(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"text": "war", "la')
    assert f"{path}:2: malformed JSON" in fault(path)
    assert "the file ends in this line: it may be cut off" in fault(path)
    table = tmp_path / "x.csv"
    table.write_text('text,label\nwar,a\n"peace and')
    assert f"{table}:3: malformed CSV (unexpected end of data)" in fault(table)
    table.write_text('text,label\nwar,a\n"peace and\nwar,b\n')
    assert "lines 3 to 4 are one row so" in fault(table)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("war", "the row has 1 cells, the header 2"),
        ("war,a,b", "the row has 3 cells, the header 2"),
        (",a", "'text' is empty"),
        ("war,", "no label in 'label'"),
        ('"war"x,a', "malformed CSV"),
        ('"war\nand \x00 peace",a', "NUL byte at position 5 (line 4)"),
    ],
)
def test_bad_csv_lines(tmp_path, line, message):
    path = tmp_path / "x.csv"
    path.write_text(f"text,label\nwar,a\n{line}\npeace,b\n")
    assert fault(path).startswith(f"{path}:3: ")
    assert message in fault(path)
    assert [record.text for record in read(path, on_bad_lines="skip")] == ["war", "peace"]


def test_a_bad_byte_within_a_quoted_csv_field(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'text,label\n"one\ntw\xff, o\nthree",a\npeace,b\n')
    assert f"{path}:2: byte 0xff at position 3 is not UTF-8; save the file as UTF-8 (line 3)" in fault(path)
    assert [record.source for record in read(path, on_bad_lines="skip")] == [f"{path}:5"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("body,label", ":1: no column 'text' (it has: 'body', 'label'); set --text_column"),
        ("text, label", ":1: no column 'label' (it has: 'text', ' label'); set --label_column"),
        ("text,y", ":1: no column 'label' (it has: 'text', 'y'); set --label_column"),
        ("text,label,text", ":1: a column is named twice"),
    ],
)
def test_bad_csv_headers_are_errors_in_any_case(tmp_path, header, message):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\nwar,a,x\n")
    for on_bad_lines in ("error", "skip"):
        assert message in fault(path, on_bad_lines=on_bad_lines)


def test_bad_parquet_rows(tmp_path):
    path = tmp_path / "x.parquet"
    texts = pa.array([b"war", b"caf\xe9", b"peace", b"land", None]).view(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 5, texts.buffers())
    pq.write_table(pa.table({"text": texts, "label": [1.0, 2.0, float("nan"), None, 3.0]}), path)
    assert f"{path}:row 1: label is a floating-point number" in fault(path)
    pq.write_table(pa.table({"text": texts, "label": ["a", "a", "b", None, "a"]}), path)
    assert f"{path}:row 2: byte 0xe9 is not UTF-8" in fault(path)
    kept = read(path, on_bad_lines="skip", quarantine_path=tmp_path / "bad.jsonl")
    assert [record.source for record in kept] == [f"{path}:row 1", f"{path}:row 3"]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [reason.split(";")[0] for reason in reasons] == [
        "byte 0xe9 is not UTF-8",
        "no label in 'label'",
        "'text' is null",
    ]


def test_parquet_without_the_columns_or_not_parquet_at_all(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["war"], "label": ["a"]}), path)
    assert f"{path}: no column 'text' (it has: 'body', 'label'); set --text_column" in fault(path)
    whole = path.read_bytes()
    for damaged in (b"", b"rubbish", whole[: len(whole) // 2], whole.replace(b"body", b"\xf2ody")):
        path.write_bytes(damaged)
        with pytest.raises(DataLoadError, match=f"{path}: cannot be read"):
            read(path)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_empty_jsonl(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    assert fault(path) == f"{path}: the file is empty; it must hold at least one document"


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_empty_csv(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_text(content)
    assert "the file is empty" in fault(path)


def test_an_empty_file_among_others(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [GOOD])
    write_jsonl(tmp_path / "b.jsonl", [])
    assert fault(tmp_path).startswith(f"{tmp_path / 'b.jsonl'}: the file is empty")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("a", "label is a string; --problem_type multi_label needs a list"),
        (["a", "a"], "names one twice"),
        (["a", 1], "label 1 is an integer"),
        (["a", None], "label is null"),
        ([["a"]], "label is a list"),
        (None, "write [] for a document without any"),
    ],
)
def test_bad_lists_of_labels(tmp_path, label, message):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war", "label": label}])
    assert message in fault(path, problem_type="multi_label")


def test_a_refused_line_says_nothing_of_the_type_of_labels(tmp_path):
    rows = [{"text": "war", "label": [1, "a"]}, {"text": "war", "label": ["a"]}, {"text": "war", "label": ["b"]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    kept = read_records(path, problem_type="multi_label", on_bad_lines="skip")
    assert [record.label for record in kept] == [["a"], ["b"]]


def test_blanks_around_a_list_of_labels_in_csv(tmp_path):
    path = write_csv(tmp_path / "x.csv", [["war", ' ["a", "b"] '], ["war", " a | b "]])
    assert [record.label for record in read_records(path, problem_type="multi_label")] == [["a", "b"], ["a", "b"]]


def test_bad_lists_of_labels_in_csv(tmp_path):
    path = write_csv(tmp_path / "x.csv", [["war", "[a]"]])
    assert "label is a malformed JSON list" in fault(path, problem_type="multi_label")


def test_duplicate_ids_across_files_and_in_great_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_ID_BUFFER", 16)
    rows = [{"id": f"n{number}", **GOOD} for number in range(500)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    again = write_jsonl(tmp_path / "b.jsonl", [{"id": "n500", **GOOD}, rows[3]])
    assert fault(tmp_path).startswith(f"{again}:2: duplicate id 'n3'")
    assert len(read(tmp_path, on_bad_lines="skip")) == 501


def test_skipped_lines_are_counted_and_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, "rubbish é", {"text": "", "label": "a"}, GOOD])
    quarantine = tmp_path / "out" / "bad.jsonl"
    assert len(read(path, on_bad_lines="skip", quarantine_path=quarantine)) == 2
    bad = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in bad] == [f"{path}:2", f"{path}:3"]
    assert [row["raw"] for row in bad] == ["rubbish é\n", '{"text": "", "label": "a"}\n']
    assert bad[1]["reason"] == "'text' is empty"
    assert caplog.messages == [f"2 bad lines were left out; they are in {quarantine}"]


def test_nothing_left(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["rubbish", "more"])
    message = fault(path, on_bad_lines="skip")
    assert message.startswith(f"{path}:1: malformed JSON")
    assert message.endswith("all 2 lines are bad, no document is left")


def test_reading_streams(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, "rubbish"])
    reading = read_records(path)
    assert next(reading).text == "war and peace"


def test_check_text():
    assert check_text("war") == "war"
    with pytest.raises(DataFormatError, match="text is a list"):
        check_text(["war"])
