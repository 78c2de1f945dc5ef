"""Excerpts of the bundled State of the Union addresses that fill windows exactly, for benchmarks.synthetic_suite."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import NamedTuple

from benchmarks.corpora import SPLITS
from data import make_sotu
from data_utils.readers import read_records
from utils import ConfigError

YEARS_APART = range(50, 61)


class Address(NamedTuple):
    """A State of the Union address."""

    year: int
    words: list[str]
    totals: list[int]
    """Tokens before each word, and of all."""
    places: dict[int, int]
    """The word before which there are so many tokens."""
    may_begin: list[bool]
    """Whether a word has as many at the start of a text, so that a window, and thus a document, may begin with it."""


class Addresses:
    """The addresses of one split of the bundled corpus.

    `room` is how many tokens a window holds; `count` gives the tokens of each of some words, with what stands before
    them as its second argument.
    """

    def __init__(self, split: str, room: int, count: Callable[[Sequence[str], str], list[int]]) -> None:
        self._room = room
        folder = make_sotu.DATA / dict(zip(SPLITS, make_sotu.SPLITS, strict=True))[split]
        texts = {record.id: record.text.split() for record in read_records(folder)}
        known = sorted(set().union(*texts.values()))
        counts = dict(zip(known, count(known, " "), strict=True))
        at_first = dict(zip(known, count(known, ""), strict=True))
        self._addresses = []
        for name, words in texts.items():
            totals = [0, *accumulate(counts[word] for word in words)]
            places = {total: place for place, total in enumerate(totals)}
            may_begin = [counts[word] == at_first[word] for word in words]
            self._addresses.append(Address(int(name.split("-")[0]), words, totals, places, may_begin))

    @functools.cached_property
    def _pairs(self) -> list[tuple[Address, Address]]:
        pairs = product(self._addresses, self._addresses)
        return [(older, newer) for older, newer in pairs if newer.year - older.year in YEARS_APART]

    def pairs(self, windows: int) -> list[tuple[Address, Address]]:
        """Older and newer address, of which so many windows can be taken. Raises ConfigError where there are none."""
        needed = (windows + 1) * self._room  # with what is left out between windows
        found = [pair for pair in self._pairs if all(address.totals[-1] >= needed for address in pair)]
        if not found:
            raise ConfigError(f"--distances {windows}: the addresses are shorter than so many windows")
        return found

    def excerpt(self, address: Address, windows: int, draw: random.Random) -> list[str]:
        """So many full windows of an address, from a random place on.

        Each is words as they follow one another; what lies between two windows is the words at which none begins that
        ends with a word.
        """
        while True:
            found: list[str] = []
            at = draw.randrange(len(address.words))
            while len(found) < windows and at < len(address.words):
                end = address.places.get(address.totals[at] + self._room)
                if end is None or not address.may_begin[at]:
                    at += 1
                    continue
                found.append(" ".join(address.words[at:end]))
                at = end
            if len(found) == windows:
                return found
