"""Names as they stand on figures and in tables: any length, any script, any number of them.

- `display_width`, `shorten`: columns of text, two for a Chinese character
- `choose_fonts`: Chinese and Japanese are drawn with an installed font or with the one in `FONT_PACKAGE`, loaded when a
  name needs it
- `Names`, `Rows`: names folded to their place on an axis, rows that shrink until the figure must grow
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from utils import logger

POINTS = 72  # in an inch

FONT_PACKAGE = "pylopdf-fonts-zh-cn"  # ships Noto Sans SC under the OFL; its code is never imported
FONT_FILE = ("pylopdf_fonts_zh_cn", "NotoSansSC-Regular.otf")
FONT_FAMILIES = """Noto Sans CJK SC, Noto Sans SC, Source Han Sans SC, Source Han Sans CN, Microsoft YaHei, PingFang SC,
Hiragino Sans GB, WenQuanYi Micro Hei, WenQuanYi Zen Hei, SimHei, Noto Sans CJK JP, Malgun Gothic, Apple SD Gothic Neo,
Noto Sans KR, Arial Unicode MS""".replace("\n", " ").split(", ")

WIDE = "\u2e80-\U0010ffff"  # a line may break beside these


@functools.cache
def _glyphs(font_path: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(font_path).get_charmap()))


def _font_candidates() -> Iterator[tuple[str, str]]:
    """Family and file of the fonts to try after DejaVu Sans: the installed ones, then the one of `FONT_PACKAGE`."""
    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    yield from ((family, installed[family]) for family in FONT_FAMILIES if family in installed)
    package, file_name = FONT_FILE
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        path = str(Path(spec.submodule_search_locations[0]) / file_name)
        if path not in installed.values():
            font_manager.fontManager.addfont(path)
        yield FT2Font(path).family_name, path


def choose_fonts(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """The font families that draw `texts`, DejaVu Sans first, and the characters that none of them has."""
    families = ["DejaVu Sans"]
    missing = set().union(*texts) - _glyphs(font_manager.findfont("DejaVu Sans"))
    candidates = _font_candidates()
    while missing and (candidate := next(candidates, None)):
        family, path = candidate
        if missing & _glyphs(path):
            families.append(family)
            missing -= _glyphs(path)
    if missing:
        logger.warning(
            "figures: no font here has %s; boxes stand for them. `pip install %s` brings Chinese and Japanese",
            " ".join(f"{char!r} (U+{ord(char):04X})" for char in sorted(missing)[:8]),
            FONT_PACKAGE,
        )
    return families, missing


def display_width(text: str) -> int:
    """Columns that `text` takes: two for a wide (Chinese, Japanese, Korean) character, none for a combining mark."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` columns; an ellipsis stands for what is left out of its middle."""
    if display_width(text) <= width:
        return text
    head, tail = "", ""
    while display_width(head + text[len(head)]) <= 0.6 * (width - 1):
        head += text[len(head)]
    while display_width(f"{head}…{text[-len(tail) - 1 :]}") <= width:
        tail = text[-len(tail) - 1 :]
    return f"{head}…{tail}"


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks, after / _ . - and beside wide characters where possible."""
    lines = [""]
    for piece in re.findall(rf"\s|[{WIDE}]|[^\s{WIDE}/_.-]{{1,{width - 1}}}[/_.-]?|[/_.-]", text):
        if display_width(lines[-1] + piece.rstrip()) <= width:
            lines[-1] += piece
        else:
            lines.append(piece.lstrip())
    return [line.rstrip() for line in lines]


def _fold(name: str, width: int, max_lines: int) -> str:
    """`name` on at most `max_lines` lines of `width` columns, shortened if it must be."""
    budget = width * max_lines
    while len(lines := _wrap(shorten(name, budget), width)) > max_lines:
        budget -= 2
    return "\n".join(lines)


class Names(NamedTuple):
    """Names that stand on a figure, the fonts they need and the characters that no font has."""

    names: list[str]
    families: list[str]
    missing: set[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        names = [" ".join(name.split()) for name in names]
        return cls(names, *choose_fonts(names))

    @property
    def drawable(self) -> list[str]:
        """The names with a box for each character that no font has."""
        return ["".join("□" if char in self.missing else char for char in name) for name in self.names]

    def ticks(self, rows: Rows) -> list[str]:
        """The names as they stand on an axis of such rows: folded, and all of them different.

        A name with boxes, or one that folding made equal to another, has its number in front: "#17 ...".
        """
        width = {1: 48, 2: 40, 3: 34}[rows.max_lines]
        drawable = self.drawable
        folded = [_fold(name, width, rows.max_lines) for name in drawable]
        count = Counter(folded)
        return [
            _fold(f"#{i} {drawn}", width, rows.max_lines) if count[fold] > 1 or drawn != name else fold
            for i, (name, drawn, fold) in enumerate(zip(self.names, drawable, folded, strict=True))
        ]


class Rows(NamedTuple):
    """Rows of a figure: height in inches, size of their labels in points; every `step`-th row has a label."""

    number: int
    height: float
    font_size: float
    step: int

    @classmethod
    def of(cls, number: int, largest: float, smallest: float, room: float, limit: float) -> Rows:
        """Rows shrink from `largest` to `smallest` inches as they fill `room` inches; then the figure grows to `limit`
        inches, and beyond that rows shrink further and labels are thinned."""
        height = min(max(min(largest, room / number), smallest), limit / number)
        step = math.ceil(smallest / height - 1e-9)
        return cls(number, height, min(9.0, height * step * POINTS * 0.66), step)

    @property
    def total(self) -> float:
        return self.number * self.height

    @property
    def labelled(self) -> range:
        return range(0, self.number, self.step)

    @property
    def pitch(self) -> float:
        """Points from one label to the next."""
        return self.height * self.step * POINTS

    @property
    def max_lines(self) -> int:
        return min(3, max(1, int(self.pitch / (self.font_size * 1.25))))
