"""The leaderboard: models of `--model_type` and a linear SVM on the same splits, each tuned with the same budget.

    python -m benchmarks.quality [--tables leaderboard --corpora brown-15 --models reberta mean --jobs 2]
        [--output benchmarks/results/quality.json]

- what is run, and with which options, stands in benchmarks/quality_protocol.py; three tables: leaderboard, ablations,
  synthetic
- a cell is one training and test, in a process of one thread; `--jobs` of them at a time. First come the learning
  rates of all models on a corpus (its first fold or seed), those of a grid and beyond it while they get better, then
  the other folds or seeds with the rate that validation chose; the chosen one's run in tuning is its first row
- a finished cell is saved at once and not run again; Ctrl-C or SIGTERM gives up those at work. A cell that fails ends
  the session once the others at work have ended
- a table may come from several machines and versions of the code, since what counts in it are labels: each row names
  its session, and that its machine and commit
- rows that were made with other options than the protocol now has are dropped when their study is chosen again
- with `--output benchmarks/results/quality.json` docs/results.md is written anew whenever a session ends
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import common, corpora, quality_report, report, synthetic_suite, tfidf_svm
from benchmarks import quality_protocol as protocol
from benchmarks.corpora import LONG, SPLITS, Document, accuracy_of_long, load_split
from benchmarks.quality_protocol import Study
from benchmarks.quality_statistics import chosen_rate, select
from benchmarks.report_tables import find
from files import write_text
from utils import ReBertaError, TrainingError, logger, setup_logging

ROOT = Path(__file__).parents[1]
LOG_LINES = 25  # of a failed cell that are shown

Cell = dict[str, Any]
Row = dict[str, Any]


def cells(group: Sequence[Study], rows: Sequence[Row]) -> list[Cell]:
    """All cells of a group of studies that can be named so far, in the order of work.

    What follows upon tuning can be named when all the cells of tuning have their rows.
    """
    found, later = [], []
    for study in group:
        tuning = study.tuning(rows)
        found += tuning
        if all(find(rows, **cell) for cell in tuning):
            later.append(study.others(chosen_rate(select(rows, **study.identity))))
    turns = max(map(len, later), default=0)
    return found + [others[turn] for turn in range(turns) for others in later if turn < len(others)]


def drop_other_options(results: common.Results, chosen: Sequence[Study]) -> None:
    """Forget the rows of these studies that were made in another way than the protocol now says."""
    kept = [
        row
        for row in results.rows
        if not any(s.identity.items() <= row.items() and not s.how.items() <= row.items() for s in chosen)
    ]
    if dropped := len(results.rows) - len(kept):
        logger.warning("%d rows were made with other options than the protocol now has: dropped", dropped)
        results.content["rows"] = kept


class Workshop:
    """Where cells are worked on: a folder with data and cache, and a folder for each cell while it lasts."""

    def __init__(self, folder: Path, corpora_dir: Path) -> None:
        self.folder, self.corpora_dir = folder, corpora_dir
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self._places: dict[str, Path] = {}

    def prepare(self, corpus: str, folds: Iterable[int]) -> dict[str, Any]:
        """Make what is not there yet. Labels, documents by split of the first fold, tokens of tested ones by fold."""
        if corpus in protocol.CORPORA:
            source = corpora.make_corpus(protocol.CORPORA[corpus].source, self.corpora_dir)
            shortened = protocol.CORPORA[corpus].long_only
            self._places[corpus] = long_only(source, self.folder / corpus) if shortened else source
            tests = {fold: load_split(self.data(corpus, fold), "test") for fold in sorted(folds)}
        else:
            suite = protocol.SYNTHETIC_SUITE._replace(model_path=str(ROOT / protocol.SYNTHETIC_ENCODER))
            self._places[corpus] = synthetic_suite.make_task(corpus, self.folder, suite)
            tests = {}
        parts = {part: load_split(self.data(corpus, 0), part) for part in SPLITS}
        return {
            "labels": len({document["label"] for document in parts["train"]}),
            "documents": {part: len(documents) for part, documents in parts.items()},
            "tokens": {str(fold): " ".join(str(d["tokens"]) for d in documents) for fold, documents in tests.items()},
        }

    def data(self, corpus: str, fold: int) -> Path:
        """The folder of the three splits."""
        return self._places[corpus] / f"fold-{fold}" if corpus in protocol.CORPORA else self._places[corpus]

    def measure(self, cell: Cell) -> Row:
        """The figures of a cell. Raises TrainingError when its process fails, with the end of what it said."""
        folder = Path(tempfile.mkdtemp(prefix="cell-", dir=self.folder))
        data = self.data(cell["corpus"], cell["fold"])
        if cell["variant"] == protocol.SHUFFLED:
            data = rewrite(data, folder / "shuffled", shuffled)
        job = {
            "cell": cell,
            "encoder": str(ROOT / cell["encoder"]),
            "data": str(data.resolve()),
            "cache": str(self.folder / "cache"),
        }
        write_text(folder / "job.json", json.dumps(job))
        with (folder / "console.log").open("wb") as console:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.quality_cell", "job.json", "figures.json"],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                stdout=console,
                stderr=console,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
            self._processes.add(process)
            if self._closed:
                process.kill()
            code = process.wait()
        log = (folder / "console.log").read_text(encoding="utf-8", errors="replace").splitlines()
        if code:
            said = "\n".join(log[-LOG_LINES:])
            raise TrainingError(f"{name_of(cell)}: ended with exit code {code}. The end of what it said:\n{said}")
        figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        shutil.rmtree(folder)
        return figures

    def close(self) -> None:
        """End the cells that are at work."""
        self._closed = True
        for process in list(self._processes):
            process.kill()


def rewrite(source: Path, folder: Path, change: Callable[[list[Document]], list[Document]]) -> Path:
    """A fold with each of its splits changed."""
    corpora.write_fold(folder, {part: change(load_split(source, part)) for part in SPLITS})
    return folder


def long_only(source: Path, folder: Path) -> Path:
    """The corpus without the documents that one window can hold."""
    folder.mkdir()
    for fold in sorted(source.glob("fold-*")):
        rewrite(fold, folder / fold.name, lambda documents: [d for d in documents if d["tokens"] > LONG])
    return folder


def shuffled(documents: list[Document]) -> list[Document]:
    """The same documents with runs of words, as long as windows about, in an order drawn by their ids."""
    changed = []
    for document in documents:
        words = document["text"].split()
        runs = [words[start : start + protocol.RUN] for start in range(0, len(words), protocol.RUN)]
        random.Random(document["id"]).shuffle(runs)
        changed.append(Document({**document, "text": " ".join(chain.from_iterable(runs))}))
    return changed


def measure(cell: Cell, workshop: Workshop) -> Row:
    """The row of a cell."""
    data = workshop.data(cell["corpus"], cell["fold"])
    documents = load_split(data, "test")
    if cell["model"] == protocol.LINEAR:
        figures = tfidf_svm.measure({part: load_split(data, part) for part in SPLITS}, None) | {"share_read": 1.0}
    else:
        figures = workshop.measure(cell)
    if cell["corpus"] in synthetic_suite.TASKS:
        figures["accuracy_by_distance"] = by_distance(documents, figures["right"])
    else:
        figures["accuracy_long"] = accuracy_of_long(documents, figures["right"])
    return {**cell, **figures}


def by_distance(examples: Sequence[Mapping[str, Any]], right: str) -> dict[str, float]:
    """Accuracy by the distance of what decides."""
    hits: dict[int, list[int]] = defaultdict(list)
    for example, hit in zip(examples, right, strict=True):
        hits[example["distance"]].append(int(hit))
    return {str(distance): mean(found) for distance, found in sorted(hits.items())}


def name_of(cell: Cell) -> str:
    named = (f"{name} {cell[name]}" for name in ("fold", "seed", "learning_rate"))
    return " ".join(filter(None, [cell["corpus"], cell["model"], cell["variant"], *named]))


def left(groups: Sequence[Sequence[Study]], rows: Sequence[Row]) -> int:
    """How many cells have no row yet, of as many as can be told so far."""
    done = sum(find(rows, **cell) is not None for group in groups for cell in cells(group, rows))
    return sum(len(study.tuning(rows)) + len(study.runs) - 1 for group in groups for study in group) - done


def run(groups: Sequence[Sequence[Study]], results: common.Results, workshop: Workshop, jobs: int) -> None:
    """Measure what has no row yet, `jobs` cells at a time, and save each row at once.

    Raises what the first cell that failed raised, once the others that were at work have ended.
    """
    session = results.content["sessions"][-1]["started"] if groups else None
    failures: list[BaseException] = []
    working: dict[Future[Row], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=left(groups, results.rows), unit="cell", disable=None) as bar:
        try:
            while True:
                known = chain.from_iterable(cells(group, results.rows) for group in groups)
                waiting = [cell for cell in results.pending(known) if cell not in working.values()]
                for cell in waiting[: 0 if failures else jobs - len(working)]:
                    working[pool.submit(measure, cell, workshop)] = cell
                bar.set_description("; ".join(map(name_of, working.values())))
                if not working:
                    break
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    del working[future]
                    if error := future.exception():
                        failures.append(error)
                    else:
                        row = {**future.result(), "session": session}
                        results.add(row)
                        bar.update()
                        bar.write(f"{name_of(row)}: accuracy {row['accuracy']:.3f}, {row['seconds']:.0f} s to train")
        except KeyboardInterrupt:
            workshop.close()
            raise
    if failures:
        raise failures[0]


def main(argv: Sequence[str]) -> int:
    """Measure, print the tables and return the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--tables", nargs="+", default=[], metavar="TABLE", help=f"{', '.join(protocol.TABLES)} (default all)"
    )
    names = ", ".join([*protocol.CORPORA, *synthetic_suite.TASKS])
    parser.add_argument("--corpora", nargs="+", default=[], metavar="CORPUS", help=f"{names} (default all)")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="MODEL", help=f"{', '.join(protocol.MODELS)} (default all)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each of one thread (default 2)")
    parser.add_argument(
        "--corpora_dir",
        type=Path,
        default=corpora.OUTPUT,
        metavar="DIR",
        help="where corpora lie (default %(default)s)",
    )
    options = parser.parse_args(argv)
    setup_logging()
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        fill(options, argv)
    except ReBertaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the cells that had ended are saved", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def fill(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Bring the results up to the protocol. Raises ReBertaError."""
    groups = protocol.studies(options.tables, options.corpora, options.models)
    results = common.Results("quality", {"threads a cell": 1}, options.output, machines=True)
    drop_other_options(results, list(chain.from_iterable(groups)))
    unfinished = [group for group in groups if left([group], results.rows)]
    if unfinished:
        results.start_session(argv, machine=common.machine(), jobs=options.jobs, commit=commit())
        results.content["runs"] = {study.name: len(study.runs) for study in chain.from_iterable(protocol.studies())}
    folds: dict[str, set[int]] = defaultdict(set)
    for study in chain.from_iterable(unfinished):
        folds[study.corpus] |= {fold for fold, _ in study.runs}
    with tempfile.TemporaryDirectory(prefix="reberta-quality-") as folder:
        workshop = Workshop(Path(folder), options.corpora_dir)
        for corpus, numbers in folds.items():
            about = results.content.setdefault("corpora", {}).setdefault(corpus, {"tokens": {}})
            facts = workshop.prepare(corpus, numbers)
            about |= {**facts, "tokens": about["tokens"] | facts["tokens"]}
        try:
            run(unfinished, results, workshop, options.jobs)
        finally:
            if options.output is not None and options.output.resolve().parent == report.RESULTS:
                report.main()
    page = quality_report.Page(results.content)
    print("\n\n".join([*quality_report.answers(page), *quality_report.evidence(page)]))


def commit() -> str:
    """The project's, with -dirty where code was changed since; empty without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("describe", "--always") + ("-dirty" if git("diff", "--name-only", "HEAD", "--", "*.py") else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
