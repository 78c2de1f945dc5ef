"""Changed bytes on every path that reads files of strangers: read, or refused with the right error."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_targets import Target, targets

NAMES = [
    *("data, .jsonl", "data, .csv", "data, .parquet", "model.pt", "pickle within model.pt", "config.json of a model"),
    *("--config, .yaml", "--config, .json"),
]
TOKENS = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"\n",
    b"\r",
    b",",
    b"{",
    b"[",
    b"}",
    b"]",
    b":",
    b"NaN",
    b"1e999",
    b"9" * 30,
]
TOKENS += [b"&a ", b"*a", b"!!python/name:os.system", b"null", b"-", b"\x80\x04", b"\\ud800", b"PK\x03\x04"]


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[float, int, bytes]]:
    """Where (as a share of the length), how many bytes go, and what comes in their place."""
    new = st.one_of(st.sampled_from(TOKENS), st.binary(max_size=4))
    return draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), new), min_size=1, max_size=4))


def changed(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, gone, new in edits:
        start = int(place * len(data))
        data = data[:start] + new + data[start + gone :]
    return data


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_these_are_all_targets_and_their_seeds_are_sound(made):
    assert list(made) == NAMES
    for target in made.values():
        for seed in target.seeds:
            target.read(seed)


@pytest.mark.parametrize("name", NAMES)
def test_changed_bytes_are_read_or_refused(made, name):
    logging.getLogger("reberta").setLevel(logging.CRITICAL)
    target = made[name]

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.sampled_from(target.seeds), edits=edits())
    @example(seed=b"", edits=[])
    @example(seed=b"[" * 100_000, edits=[])
    def check(seed: bytes, edits: list[tuple[float, int, bytes]]) -> None:
        target.read(changed(seed, edits))

    check()
