"""Files to records, checked line by line.

- JSON Lines, CSV and Parquet, by their ending; a .txt file is a document, the folder that it lies in its label
- streaming: one document at a time, however large the file
- every fault names file and line: bytes that are not UTF-8, NUL, malformed or cut-off lines, duplicate keys, and what
  `records` finds in a row
- bad lines end the run, or are left out, counted and written to a quarantine file
"""

from __future__ import annotations

import contextlib
import csv
import html
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_utils.paths import CSV, JSONL, PARQUET, Paths, expand_paths
from data_utils.records import ID_COLUMN, Columns, ProblemType, Record, RecordCheck, kind_of
from utils import DataFormatError, DataLoadError, logger

OnBadLines = Literal["error", "skip"]

_BUFFER = 2**20  # with the usual 8 kB, finding the end of a long line takes a third of its reading
_CSV_FIELD_LIMIT = 2**28
_PARQUET_ROWS = 64
# a mail address or <stdio.h> is no tag
_REST_OF_TAG = r"(?:\s+[\w:-]+\s*=[^<>]*|\s*/?)>"
_LINE_TAG = re.compile(rf"</?(?:br|hr|p|div|li|tr|h[1-6]|blockquote){_REST_OF_TAG}", re.IGNORECASE)
_COMMENT = r"<!--(?:(?!<!--).)*?-->"  # looked for up to the next one only, or many that do not end would take for ever
_TAG = re.compile(rf"</?[a-z][a-z0-9]*{_REST_OF_TAG}|{_COMMENT}|<!doctype[^<>]*>", re.IGNORECASE | re.DOTALL)
_ENTITY = re.compile(r"&#?\w+;")


class _Row(NamedTuple):
    """What stands at one place of a file: its cells by column, or the fault that kept them from being read."""

    place: str
    raw: str
    cells: dict[str, Any]
    fault: str | None = None


def read_records(
    paths: Paths,
    text_column: str = "text",
    label_column: str = "label",
    *,
    problem_type: ProblemType = "single_label",
    require_labels: bool = True,
    on_bad_lines: OnBadLines = "error",
    quarantine_path: str | Path | None = None,
) -> Iterator[Record]:
    """Yield the documents of `paths` in order.

    A label is a string, an integer or a boolean (`multi_label`: a list of them; in CSV a JSON list, or names with `|`
    between them) and becomes a string. An id is the column `id`, or `filename:line`. Blank lines are not documents.
    A .txt file is one document without its HTML tags, its label the name of its folder, its id its path.
    Without `require_labels` a label that is missing or unusable is None.

    With `on_bad_lines="skip"` a bad line is counted, logged, and written to `quarantine_path` (one JSON object a line:
    source, reason, raw) where that is given. Raises DataFormatError, which opens with `path:line`, for the first bad
    line otherwise, and always for a file without documents or without the columns; DataLoadError for a file that
    cannot be opened.
    """
    columns = Columns(text_column, label_column, require_labels)
    if on_bad_lines == "error":
        yield from checked_records(expand_paths(paths), columns, problem_type)
        return
    with Quarantine(quarantine_path) as quarantine:
        yield from checked_records(expand_paths(paths), columns, problem_type, quarantine)
    if quarantine.count:
        place = f"; they are in {quarantine_path}" if quarantine_path else ""
        logger.warning("%d bad lines were left out%s", quarantine.count, place)


def checked_records(
    files: Sequence[Path], columns: Columns, problem_type: ProblemType, quarantine: Quarantine | None = None
) -> Iterator[Record]:
    """Yield the documents of `files`; bad lines go to `quarantine`, or end the reading where there is none."""
    check = RecordCheck(columns, problem_type)
    names_differ = len({file.name for file in files}) == len(files)
    documents = 0
    for file in files:
        name = file.name if names_differ else str(file)
        typed = file.suffix.lower() != CSV
        for row in _read_rows(file, columns):
            source = f"{file}:{row.place}"
            try:
                if row.fault is not None:
                    raise DataFormatError(row.fault)
                record = check(row.cells, source, f"{name}:{row.place}", typed)
            except DataFormatError as fault:
                if quarantine is None:
                    advice = "correct it, or leave such lines out with --on_bad_lines skip"
                    raise DataFormatError(f"{source}: {fault}; {advice}") from None
                quarantine.add(source, str(fault), row.raw)
                continue
            documents += 1
            yield record
    if quarantine is not None and not documents:
        raise DataFormatError(f"{quarantine.first}; all {quarantine.count} lines are bad, no document is left")


def _read_rows(file: Path, columns: Columns) -> Iterator[_Row]:
    rows = 0
    try:
        for row in _READERS.get(file.suffix.lower(), _read_text)(file, columns):
            rows += 1
            yield row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataLoadError(f"{file}: cannot be read ({error}); check that it is whole and may be read") from error
    if not rows:
        raise DataFormatError(f"{file}: the file is empty; it must hold at least one document")


def _read_jsonl(file: Path, columns: Columns) -> Iterator[_Row]:
    with file.open("rb", _BUFFER) as lines:
        for number, line in enumerate(lines, 1):
            raw = _without_bom(line) if number == 1 else line
            if not raw.strip():
                continue
            try:
                yield _Row(str(number), raw.decode("utf-8", "backslashreplace"), _parse_json(raw))
            except DataFormatError as fault:
                yield _Row(str(number), raw.decode("utf-8", "backslashreplace"), {}, str(fault))


def _parse_json(raw: bytes) -> dict[str, Any]:
    text = _decode(raw)
    try:
        value = _JSON.decode(text)
    except json.JSONDecodeError as error:
        cut_off = "" if raw.endswith(b"\n") else "; the file ends in this line: it may be cut off"
        raise DataFormatError(f"malformed JSON ({error.msg} at column {error.colno}){cut_off}") from None
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"malformed JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataFormatError(f"the line is {kind_of(value)}; it must be a JSON object")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataFormatError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return cells


_JSON = json.JSONDecoder(object_pairs_hook=_distinct_keys)  # `json.loads` would make one for every line


def _decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:  # before NUL: UTF-16 has both, and this is what to do about it
        raise DataFormatError(
            f"byte 0x{raw[error.start]:02x} at position {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    if b"\0" in raw:
        raise DataFormatError(f"NUL byte at position {raw.index(0) + 1}")
    return text


def _without_bom(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf")


class _CsvLines:
    """The lines of a CSV file, with what is needed to report on the row that `csv.reader` makes of them."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self.number = 0
        self.taken: list[str] = []
        self.fault: str | None = None

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        raw = next(self._lines)
        self.number += 1
        if self.number == 1:
            raw = _without_bom(raw)
        try:
            line = _decode(raw)
        except DataFormatError as fault:
            self.fault = self.fault or f"{fault} (line {self.number})"
            line = raw.decode("utf-8", "backslashreplace")
        self.taken.append(line)
        return line

    def start_row(self) -> int:
        """Forget the last row; the number of the line on which the next one starts."""
        self.taken, self.fault = [], None
        return self.number + 1


def _read_csv(file: Path, columns: Columns) -> Iterator[_Row]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with file.open("rb") as binary:
        lines = _CsvLines(binary)
        reader = csv.reader(lines, strict=True)
        header = _csv_header(file, reader, lines, columns)
        while True:
            start = lines.start_row()
            try:
                cells = next(reader, None)
                fault = lines.fault
            except csv.Error as error:
                cells = ["?"]
                fault = lines.fault or f"malformed CSV ({error}); look for a quote that is not closed or not doubled"
                if len(lines.taken) > 1:
                    fault += f"; lines {start} to {lines.number} are one row so"
            if cells is None:
                return
            if not cells:
                continue
            if fault is None and len(cells) != len(header):
                fault = f"the row has {len(cells)} cells, the header {len(header)}"
            named = {} if fault else dict(zip(header, cells, strict=True))
            yield _Row(str(start), "".join(lines.taken), named, fault)


def _csv_header(file: Path, reader: Iterator[list[str]], lines: _CsvLines, columns: Columns) -> list[str]:
    try:
        header = next((row for row in reader if row), [])
    except csv.Error as error:
        fault = lines.fault or f"malformed CSV header ({error}); correct it"
        raise DataFormatError(f"{file}:{lines.number}: {fault}") from None
    if lines.fault:
        raise DataFormatError(f"{file}:{lines.number}: {lines.fault}")
    if header:
        _check_header(f"{file}:{lines.number}", header, columns)
    return header


def _read_parquet(file: Path, columns: Columns) -> Iterator[_Row]:
    # as it comes, or a whole row group would be held in memory: often all of the file
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as parquet:
        present = parquet.schema_arrow.names
        _check_header(str(file), present, columns)
        named = dict.fromkeys((columns.text, columns.label, ID_COLUMN))
        wanted = [name for name in named if name is not None and name in present]
        number = 0
        for batch in parquet.iter_batches(_PARQUET_ROWS, columns=wanted, use_threads=False):
            for row in range(batch.num_rows):
                number += 1
                yield _parquet_row(f"row {number}", {name: batch.column(name)[row] for name in wanted})


def _parquet_row(place: str, scalars: dict[str, Any]) -> _Row:
    try:
        cells = {name: scalar.as_py() for name, scalar in scalars.items()}
    except UnicodeDecodeError as error:
        cell = error.object.decode("utf-8", "backslashreplace")
        return _Row(place, cell, {}, f"byte 0x{error.object[error.start]:02x} is not UTF-8")
    return _Row(place, json.dumps(cells, default=str), cells)


def _read_text(file: Path, columns: Columns) -> Iterator[_Row]:
    raw = _without_bom(file.read_bytes())
    cells, fault = {}, None
    try:
        cells[columns.text] = _without_html(_decode(raw))
    except DataFormatError as error:
        fault = str(error)
    if columns.label is not None:
        cells[columns.label] = file.parent.name
    yield _Row("1", raw.decode("utf-8", "backslashreplace"), cells | {ID_COLUMN: str(file)}, fault)


def _without_html(text: str) -> str:
    """Line breaks for the tags that make one, nothing for other tags, characters for entities."""
    return _ENTITY.sub(lambda found: html.unescape(found[0]), _TAG.sub("", _LINE_TAG.sub("\n", text)))


def _check_header(where: str, present: list[str], columns: Columns) -> None:
    if len(set(present)) < len(present):
        raise DataFormatError(f"{where}: a column is named twice ({', '.join(present)}); rename one")
    options = {"--text_column": columns.text} | ({"--label_column": columns.label} if columns.needs_label else {})
    for option, name in options.items():
        if name not in present:
            shown = ", ".join(map(reprlib.repr, present))
            hint = f"set {option}"
            if present and present[0].lstrip().startswith("{"):
                hint = "it looks like JSON Lines: name it .jsonl"
            elif len(present) == 1 and ({";", "\t"} & set(present[0])):
                hint = "columns must be separated by commas"
            raise DataFormatError(f"{where}: no column {name!r} (it has: {shown}); {hint}")


_READERS: dict[str, Callable[[Path, Columns], Iterator[_Row]]] = {
    JSONL: _read_jsonl,
    CSV: _read_csv,
    PARQUET: _read_parquet,
}


class Quarantine(contextlib.AbstractContextManager["Quarantine"]):
    """Counts the bad lines and, given a path, keeps them there (the file is made even if none is bad)."""

    def __init__(self, path: str | Path | None) -> None:
        self.count = 0
        self.first = ""
        self._path = None if path is None else Path(path)
        self._file: TextIO | None = None

    def __enter__(self) -> Quarantine:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        return self

    def add(self, source: str, reason: str, raw: str) -> None:
        """Keep one line."""
        self.count += 1
        self.first = self.first or f"{source}: {reason}"
        logger.log(logging.DEBUG if self._file else logging.WARNING, "%s: %s; left out", source, reason)
        if self._file is not None:
            self._file.write(json.dumps({"source": source, "reason": reason, "raw": raw}) + "\n")

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
