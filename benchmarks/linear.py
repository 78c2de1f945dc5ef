"""TF-IDF and a linear SVM: what words alone say, on the first of them and on whole documents.

    python -m benchmarks.linear [NAME ...] [--corpora DIR --words 380 --output FILE.json]

- the corpora and folds of benchmarks.corpora; trained on a fold's training set alone
- C is chosen in a cross-validation within it and on the validation set, and is in each row
- `long` documents are those that one window of 512 tokens cannot hold
- a row a corpus, fold and number of words; then means and standard deviations over the folds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import common, corpora, tfidf_svm
from benchmarks.corpora import SPLITS, accuracy_of_long, counts, load_split
from benchmarks.report_tables import Row, markdown_table, spread, unique

WHOLE = "whole"
SCORES = ("accuracy", "f1_macro", "accuracy_long")


def measure(folder: Path, words: int | None) -> dict[str, Any]:
    """The figures of one fold; `accuracy_long` is None where no test document is long."""
    fold = {part: load_split(folder, part) for part in SPLITS}
    figures = tfidf_svm.measure(fold, words)
    long = accuracy_of_long(fold["test"], figures.pop("right"))
    return {**figures, "accuracy_long": long, **counts(fold["test"])}


def summary(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over the folds, a line a corpus and number of words, in Markdown."""
    lines = []
    for corpus in unique(rows, "corpus"):
        for words in unique(rows, "words"):
            folds = [row for row in rows if row["corpus"] == corpus and row["words"] == words]
            if folds:
                lines.append(
                    [corpus, words, str(len(folds)), *(spread([row[score] for row in folds]) for score in SCORES)]
                )
    return markdown_table(["corpus", "words", "folds", *SCORES], lines, left=1)


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(corpora.CORPORA)} (default all)")
    parser.add_argument("--corpora", type=Path, default=corpora.OUTPUT, help="where they lie (default %(default)s)")
    parser.add_argument("--words", type=int, default=380, help="how many of a document's first words (default 380)")
    options = parser.parse_args(argv)
    names = options.names or list(corpora.CORPORA)
    folders = {
        (name, folder.name): folder
        for name in names
        for folder in sorted(corpora.make_corpus(name, options.corpora).glob("fold-*"))
    }
    results = common.Results("linear", tfidf_svm.OPTIONS, options.output)
    limits = {str(options.words): options.words, WHOLE: None}
    cells = [{"corpus": name, "fold": fold, "words": words} for name, fold in folders for words in limits]
    pending = results.pending(cells)
    if pending:
        results.start_session(argv)
    for cell in tqdm(pending, disable=None):
        results.add({**cell, **measure(folders[cell["corpus"], cell["fold"]], limits[cell["words"]])})
    results.show()
    print("\n" + summary(results.rows))


if __name__ == "__main__":
    main(sys.argv[1:])
