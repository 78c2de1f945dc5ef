"""Rows to records: what a document must be, whatever file it comes from.

- the text: a string that is not blank, without NUL and lone surrogates
- the label: a string, a whole number or a boolean, of one type throughout; or a list of them
- the id: given or made, and never twice; 8 bytes are kept for each
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, Literal, NamedTuple

import numpy as np

from utils import DataFormatError

ProblemType = Literal["single_label", "multi_label"]

ID_COLUMN = "id"
_SHOWS_NOTHING = " \ufffd"  # though printable; many tokenizers leave the latter out, as they do what is not
_ID_BUFFER = 2**16
_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a floating-point number",
    str: "a string",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


class Record(NamedTuple):
    """One document. `label` is a list with `multi_label`, and None where labels are not needed and none is given."""

    text: str
    label: str | list[str] | None
    id: str
    source: str


class Columns(NamedTuple):
    """The names of the columns, and whether a document must have a label; labels without a name are not read."""

    text: str
    label: str | None
    needs_label: bool


class RecordCheck:
    """Turns rows into records; remembers the ids and the type of the labels across files."""

    def __init__(self, columns: Columns, problem_type: ProblemType) -> None:
        self._columns = columns
        self._problem_type = problem_type
        self._ids = _IdSet()
        self._label_type: tuple[type, str] | None = None

    def __call__(self, cells: dict[str, Any], source: str, made_id: str, typed: bool) -> Record:
        """The record of a row.

        `made_id` is for rows without an id; `typed` says whether the file tells numbers from strings. Raises
        DataFormatError without the place, which the caller knows.
        """
        text = self._text(cells)
        label = self._label(cells, source, typed)
        return Record(text, label, self._id(cells, made_id), source)

    def _text(self, cells: dict[str, Any]) -> str:
        name = self._columns.text
        if name not in cells:
            raise DataFormatError(
                f"no {name!r} (the line has: {', '.join(map(reprlib.repr, cells))}); set --text_column"
            )
        return check_text(cells[name], repr(name))

    def _label(self, cells: dict[str, Any], source: str, typed: bool) -> str | list[str] | None:
        if self._columns.label is None:
            return None
        value = cells.get(self._columns.label)
        try:
            values = self._label_values(value, typed)
            names = [self._label_name(item) for item in values]
            if len(set(names)) < len(names):
                raise DataFormatError(f"the list of labels names one twice: {names}")
            if typed:
                self._same_type(values, source)
        except DataFormatError:
            if self._columns.needs_label:
                raise
            return None
        return names if self._problem_type == "multi_label" else names[0]

    def _label_values(self, value: Any, typed: bool) -> list[Any]:
        if value is None or value == "":
            hint = "; write [] for a document without any" if self._problem_type == "multi_label" else ""
            raise DataFormatError(f"no label in {self._columns.label!r}; give one, or set --label_column{hint}")
        if self._problem_type == "single_label":
            return [value]
        if not typed:
            value = _csv_label_list(value)
        if not isinstance(value, list):
            raise DataFormatError(f"label is {kind_of(value)}; --problem_type multi_label needs a list of labels")
        return value

    @staticmethod
    def _label_name(value: Any) -> str:
        if isinstance(value, float) and math.isnan(value):
            raise DataFormatError("label is NaN; give one")
        if isinstance(value, float):
            raise DataFormatError(
                f"label is a floating-point number, {value}; classes are told apart, not amounts: write each as a "
                "string or an integer"
            )
        if isinstance(value, list):
            raise DataFormatError("label is a list; for several labels a document set --problem_type multi_label")
        if not isinstance(value, (str, int)):
            raise DataFormatError(f"label is {kind_of(value)}; it must be a string or an integer")
        return check_text(str(value), "label")

    def _same_type(self, values: list[Any], source: str) -> None:
        if not values:
            return
        expected, first = self._label_type or (type(values[0]), source)
        for value in values:
            if type(value) is not expected:
                raise DataFormatError(f"label {value!r} is {kind_of(value)}, but {_KINDS[expected]} at {first}")
        self._label_type = expected, first

    def _id(self, cells: dict[str, Any], made: str) -> str:
        value = cells.get(ID_COLUMN)
        if value is None or value == "":
            value = made
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise DataFormatError(f"id is {kind_of(value)}; it must be a string or an integer")
        identity = check_text(str(value), "id")
        if not self._ids.add(identity):
            raise DataFormatError(f"duplicate id {identity!r}; an earlier document has it")
        return identity


def check_text(value: Any, what: str = "text") -> str:
    """`value` where it is a string that a tokenizer can read and that shows something; DataFormatError otherwise."""
    if not isinstance(value, str):
        raise DataFormatError(f"{what} is {kind_of(value)}; it must be a string")
    if not value.strip():
        raise DataFormatError(f"{what} is empty")
    if "\0" in value:
        raise DataFormatError(f"{what} holds a NUL character at position {value.index(chr(0)) + 1}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataFormatError(
            f"{what} holds a lone surrogate, U+{ord(value[error.start]):04X}, at position {error.start + 1}"
        ) from None
    if not any(character.isprintable() and character not in _SHOWS_NOTHING for character in value):
        raise DataFormatError(f"{what} shows nothing: it holds only characters such as U+{ord(value.strip()[0]):04X}")
    return value


def _csv_label_list(cell: str) -> Any:
    cell = cell.strip()
    if not cell.startswith("["):
        return [name.strip() for name in cell.split("|")]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"label is a malformed JSON list ({error})") from None


def kind_of(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


class _IdSet:
    """Which ids were seen: 8 bytes each, sorted; the newest wait in a small set."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.int64)
        self._newest: set[int] = set()

    def add(self, identity: str) -> bool:
        """Whether `identity` is new."""
        key = hash(identity)
        place = int(self._sorted.searchsorted(np.int64(key)))
        if key in self._newest or (place < len(self._sorted) and int(self._sorted[place]) == key):
            return False
        self._newest.add(key)
        if len(self._newest) >= _ID_BUFFER:
            newest = np.fromiter(self._newest, dtype=np.int64, count=len(self._newest))
            self._sorted = np.sort(np.concatenate([self._sorted, newest]), kind="stable")
            self._newest.clear()
        return True
