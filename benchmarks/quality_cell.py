"""One cell of benchmarks.quality, in a process of its own and in the current folder, which it fills.

    python -m benchmarks.quality_cell JOB.json FIGURES.json

- trains and tests by the command line's own `main`; the best model is the one of the epoch that validation chose
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import main
from benchmarks.corpora import load_split
from command_line import parse_settings
from files import write_text

RUN = Path("run")
BEST_MODEL = Path("models/saved") / RUN.name / "model.pt"


class Job(TypedDict):
    """A cell, and what it works on: a folder with {train,validation,test}.jsonl."""

    cell: dict[str, Any]
    encoder: str
    data: str
    cache: str


def run(job: Job) -> dict[str, Any]:
    """Train and test; the figures of the cell's row."""
    cell, data = job["cell"], Path(job["data"])
    arguments = ["--mode=train", f"--output_dir={RUN}", f"--model_path={job['encoder']}"]
    arguments += [f"--train_path={data / 'train.jsonl'}", f"--val_path={data / 'validation.jsonl'}"]
    arguments += [f"--seed={cell['seed']}", f"--learning_rate={cell['learning_rate']}", f"--cache_dir={job['cache']}"]
    arguments += cell["options"].split()
    start = time.perf_counter()
    command(arguments)
    seconds = time.perf_counter() - start
    status = json.loads((RUN / "status.json").read_text(encoding="utf-8"))
    settings = parse_settings(arguments)
    arguments = ["--mode=evaluate", f"--model_path={BEST_MODEL}", f"--test_path={data / 'test.jsonl'}"]
    shared = ("mixed_precision", "batch_size", "device", "cache_dir")
    arguments += [f"--{name}={getattr(settings, name)}" for name in shared]
    command([*arguments, "--output_dir=test", "--save_predictions"])
    tested = json.loads(Path("test/metrics.json").read_text(encoding="utf-8"))
    with Path("test/predictions.csv").open(encoding="utf-8", newline="") as file:
        said = {row["id"]: row["predicted"] for row in csv.DictReader(file)}
    documents = load_split(data, "test")
    return {
        **{
            name: tested[name]
            for name in ("accuracy", "f1_macro", "log_loss", "ece", "ece_uncalibrated", "temperature")
        },
        **best_epoch(RUN, status, settings.metric_for_best),
        "parameters": status["trained_parameters"],
        "share_read": tested["coverage"]["share"],
        "seconds": round(seconds, 1),
        "right": "".join(str(int(said[document["id"]] == document["label"])) for document in documents),
    }


def command(arguments: Sequence[str]) -> None:
    """main.py with these arguments; a failure, which it has reported, ends this process with its exit code."""
    if code := main.main(arguments):
        sys.exit(code)


def best_epoch(run: Path, status: dict[str, Any], loss: str) -> dict[str, float]:
    """Where the best model comes from, and how it did in validation; `loss` is what it was chosen by."""
    best = status["best_step"]
    row = next(row for row in evaluations(run) if row["step"] == best)
    return {
        "best_epoch": round(row["epoch"], 2),
        "validation_loss": row[f"eval_{loss}"],
        "validation_accuracy": row["eval_accuracy"],
    }


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that tell of the validation set, in the order of time."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "eval_loss" in row]


if __name__ == "__main__":
    write_text(sys.argv[2], json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
