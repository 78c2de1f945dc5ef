"""Whether memory stays flat, and nothing is lost, over many documents of very different lengths.

    python -m benchmarks.stress [--documents 20000 --seed 0 --output FILE.json]

- documents of log-normal length, median 200 tokens, up to 100,000; the first one and four more have just as many
- a tiny encoder through the real command line: training for an epoch, evaluation, prediction; every document is read
  whole, in up to 394 windows of 256 tokens
- the resident memory of each stage and of all that it starts, twice a second; `private` is without pages that files or
  other processes share, such as those of the memory-mapped cache
- documents in and documents out, and the share of tokens that was read
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from benchmarks import common
from benchmarks.synthetic import save_tiny_encoder, write_corpus

ROOT = Path(__file__).parents[1]
MEDIAN, SPREAD, LONGEST, LONGEST_DOCUMENTS = 200, 1.5, 100_000, 5
VALIDATION_DOCUMENTS = 200
BATCHES = "--batch_size 8 --max_windows_per_batch 400 --device cpu --cache_dir cache"
WINDOWS = "--window_size 256 --max_windows 394"
SECONDS_BETWEEN = 0.5
POINTS = 200  # of a curve

Row = dict[str, Any]


def lengths(documents: int, seed: int) -> list[int]:
    """Words of each document."""
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN), SPREAD, documents).astype(int).clip(1, LONGEST)
    drawn[:: math.ceil(documents / LONGEST_DOCUMENTS)] = LONGEST
    return drawn.tolist()


def memory_of(process: psutil.Process) -> tuple[float, float]:
    """Resident memory of a process and all that it started, and what of it is private, in MB."""
    resident = private = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # one has just ended
        for member in [process, *process.children(recursive=True)]:
            memory = member.memory_info()
            resident += memory.rss
            private += memory.rss - memory.shared
    return resident / 1e6, private / 1e6


def watched(arguments: Sequence[str], folder: Path) -> Row:
    """Run the command line; its exit code, and the course of its memory."""
    with (folder / "console.log").open("ab") as console:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *arguments],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=console,
            stderr=console,
        )
    start, samples, looked_at = time.monotonic(), [], psutil.Process(process.pid)
    while process.poll() is None:
        samples.append((time.monotonic() - start, *memory_of(looked_at)))
        time.sleep(SECONDS_BETWEEN)
    samples.pop()  # it may have been ending
    code = process.wait()
    if code != 0:
        said = (folder / "console.log").read_text(encoding="utf-8")
        raise RuntimeError(f"{shlex.join(arguments)}: exit code {code}\n{said[-3000:]}")
    return {"exit_code": code, "seconds": round(time.monotonic() - start), **course(samples)}


def course(samples: Sequence[tuple[float, float, float]]) -> Row:
    """Peaks, and points of the curves, equally far apart."""
    curves = dict(zip(("time", "resident", "private"), zip(*samples, strict=True), strict=True))
    every = math.ceil(len(samples) / POINTS)
    row: Row = {f"{name}_peak_mb": round(max(curves[name])) for name in ("resident", "private")}
    return row | {name: [round(value) for value in curve[::every]] for name, curve in curves.items()}


def train(folder: Path, texts: Sequence[str]) -> Row:
    """A document counts as read where the epoch came to it."""
    options = f"{BATCHES} {WINDOWS} --epochs 1 --eval_every 1000 --log_steps 100 --output_dir logs/stress"
    places = {
        "train_path": "corpus.jsonl",
        "val_path": "validation.jsonl",
        "model_path": "encoder",
        "cache_dir": "cache",
    }
    row = watched(["--mode", "train", *options.split(), *flags(places)], folder)
    last = json.loads((folder / "logs" / "stress" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    # the sampler deals every document once an epoch
    return row | {"documents_out": round(last["epoch"] * len(texts)), "steps": last["step"]}


def evaluate(folder: Path, texts: Sequence[str]) -> Row:
    places = {"model_path": "models/saved/stress/model.pt", "test_path": "corpus.jsonl"}
    options = f"{BATCHES} --save_predictions --output_dir logs/evaluation"
    row = watched(["--mode", "evaluate", *options.split(), *flags(places)], folder)
    metrics = json.loads((folder / "logs" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    out = column(folder / "logs" / "evaluation" / "predictions.csv", "id")
    coverage = metrics["coverage"]
    counted = {"documents_out": len(out), "same_ids_in_order": out == list(texts)}
    return row | counted | {"tokens": coverage["tokens_total"], "tokens_read": coverage["tokens_read"]}


def predict(folder: Path, texts: Sequence[str]) -> Row:
    places = {
        "model_path": "models/saved/stress/model.pt",
        "input_path": "corpus.jsonl",
        "output_path": "out/predicted.csv",
    }
    row = watched(["--mode", "predict", *BATCHES.split(), *flags(places)], folder)
    file = folder / "out" / "predicted.csv"
    out = column(file, "id")
    counted = {"documents_out": len(out), "same_ids_in_order": out == list(texts)}
    tokens = {name: sum(map(int, column(file, name))) for name in ("tokens", "tokens_read")}
    same = column(file, "predicted") == column(folder / "logs" / "evaluation" / "predictions.csv", "predicted")
    return row | counted | tokens | {"predicts_as_evaluation": same}


STAGES = {"training": train, "evaluation": evaluate, "prediction": predict}


def flags(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def column(path: Path, name: str) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of documents and encoder (default 0)")
    options = parser.parse_args(argv)
    figures = {name: value for name, value in vars(options).items() if name != "output"}
    results = common.Results("stress", figures, options.output)
    if not results.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = lengths(options.documents, options.seed)
            write_corpus(folder / "corpus.jsonl", words, options.seed)
            write_corpus(folder / "validation.jsonl", lengths(VALIDATION_DOCUMENTS, options.seed + 1), options.seed + 1)
            save_tiny_encoder(folder / "encoder", positions=512, seed=options.seed)
            results.start_session(argv)
            texts = [f"corpus-{number}" for number in range(len(words))]
            counted = {"documents_in": len(words), "tokens_in": sum(words), "longest": max(words)}
            for stage, run in (bar := tqdm(STAGES.items(), disable=None)):
                bar.set_description(stage)
                results.rows.append({"stage": stage, **counted, **run(folder, texts)})
        results.save()
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
