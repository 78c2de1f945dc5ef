"""What 16 and 8 bits cost: a trained model evaluated on a test set in fp32, bf16 and int8.

    python -m benchmarks.accuracy --model_path models/saved/RUN --test_path data/validation [--output FILE.json]

`changed` counts documents with another predicted label than in fp32, `largest` is the largest change of a probability;
tokens a second are those of the whole evaluation, reading of data and report included.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from command_line import parse_settings
from evaluate import evaluate

PRECISIONS = {"fp32": "", "bf16": "--mixed_precision", "int8": "--int8"}


def measure(flags: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Figures of one evaluation, and its predictions document by document."""
    with tempfile.TemporaryDirectory() as folder:
        settings = parse_settings(["--mode", "evaluate", *flags, "--save_predictions", "--output_dir", folder])
        start = time.perf_counter()
        metrics = evaluate(settings)
        seconds = time.perf_counter() - start
        with (Path(folder) / "predictions.csv").open(encoding="utf-8", newline="") as file:
            predictions = list(csv.DictReader(file))
    figures = {
        "documents": metrics["documents"],
        "tokens": metrics["coverage"]["tokens_read"],
        "accuracy": metrics["accuracy"],
        "f1_macro": metrics["f1_macro"],
        "log_loss": metrics["log_loss"],
        "tokens_per_second": metrics["coverage"]["tokens_read"] / seconds,
    }
    return figures, predictions


def differences(predictions: list[dict[str, str]], reference: list[dict[str, str]]) -> dict[str, Any]:
    pairs = list(zip(predictions, reference, strict=True))
    return {
        "changed": sum(said["predicted"] != before["predicted"] for said, before in pairs),
        "largest": max(
            abs(float(said[name]) - float(before[name]))
            for said, before in pairs
            for name in said
            if name.startswith("prob_")
        ),
    }


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model_path", required=True, help="a trained model")
    parser.add_argument("--test_path", default="data/validation", help="its test set (default data/validation)")
    parser.add_argument("--max_windows", help="windows of a document to read (default: the model's own number)")
    options = parser.parse_args(argv)
    paths = ["--model_path", options.model_path, "--test_path", options.test_path]
    flags = [*paths, "--device", "cpu"]
    model = {"model_path": options.model_path, "test_path": options.test_path}
    if options.max_windows is not None:
        flags += ["--max_windows", options.max_windows]
        model["max_windows"] = options.max_windows
    results = common.Results("accuracy", model, options.output)
    if not results.rows:
        results.start_session(argv)
        found = {name: measure([*flags, *extra.split()]) for name, extra in PRECISIONS.items()}
        for name, (figures, predictions) in found.items():
            results.add({"precision": name, **figures, **differences(predictions, found["fp32"][1])})
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
