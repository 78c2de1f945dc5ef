"""Peak memory of one training step, and of inference, against the length of a document.

    python -m benchmarks.memory [--layers 4 --width 256 --tokens 4096 32768 --limit 12 --seconds 300 --output FILE.json]

- a cell is one model, mode and length, in a fresh process. It reads a document of 1,024 tokens first, so that weights,
  gradients and all that is allocated once are there; its figure is the peak (VmHWM) of the step over one whole
  document in fp32 that follows, less what was in memory (VmRSS) before that step
- glibc is told to give freed tensors back at once, or what was freed before would hide what is needed now
- a cell that takes more than --limit GB in all, or more than --seconds with its start, is stopped; longer documents of
  that model are not tried
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import common, peers
from benchmarks.memory_cell import resident

MODELS = [*peers.MEMORY_LEVELS, *(name for name in peers.PEERS if name != "ReBerta")]
TOKENS = [4096, 8192, 16384, 32768, 65536, 129_024]  # the last: 504 windows, 128,016 tokens without [CLS] and [SEP]
INFERENCE_TOKENS = [4096, 32768, 100_864, 129_024]  # 394 windows: 100,076 tokens
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
POLL_SECONDS = 0.05
ROOT = Path(__file__).parents[1]


def measure(cell: dict[str, Any], layers: int, width: int, limit: float, seconds: float) -> dict[str, Any]:
    """The figures of one cell's process, or the reason why it has none."""
    arguments = [cell["model"], cell["mode"], str(layers), str(width), str(cell["tokens"])]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory_cell", *arguments],
        env=os.environ | GIVE_BACK,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + seconds
    while True:
        try:
            output, errors = process.communicate(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            stopped = _beyond(process.pid, limit, deadline, seconds)
        if stopped:
            process.kill()
            process.communicate()
            return {"error": stopped}
    if process.returncode < 0:
        return {"error": f"killed by signal {-process.returncode}"}
    return json.loads(output) if process.returncode == 0 else {"error": errors.strip().splitlines()[-1]}


def _beyond(pid: int, limit: float, deadline: float, seconds: float) -> str | None:
    if resident("VmRSS", Path(f"/proc/{pid}")) > limit * 1e9:
        return f"over {limit:g} GB"
    return f"over {seconds:g} s" if time.monotonic() > deadline else None


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=common.full_windows, nargs="+", default=TOKENS, help="of a training step")
    parser.add_argument("--inference_tokens", type=common.full_windows, nargs="*", default=INFERENCE_TOKENS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of training; default: all")
    parser.add_argument("--limit", type=float, default=12, help="GB that a cell may take (default 12)")
    parser.add_argument("--seconds", type=float, default=300, help="that a cell may take (default 300)")
    options = parser.parse_args(argv)

    figures = {name: getattr(options, name) for name in ("layers", "width", "limit", "seconds")}
    results = common.Results("memory", figures, options.output)
    cells = [
        {"model": model, "mode": "training", "tokens": tokens}
        for model in options.models
        for tokens in sorted(options.tokens)
    ]
    cells += [
        {"model": "ReBerta", "mode": "inference", "tokens": tokens} for tokens in sorted(options.inference_tokens)
    ]
    pending = results.pending(cells)
    if pending:
        results.start_session(argv)
    for cell in (bar := tqdm(pending, disable=None)):
        bar.set_description(" ".join(map(str, cell.values())))
        failed_at = [
            row["tokens"]
            for row in results.rows
            if "error" in row and row["model"] == cell["model"] and row["mode"] == cell["mode"]
        ]
        if failed_at and min(failed_at) < cell["tokens"]:
            results.add({**cell, "error": f"not tried: {min(failed_at):,} tokens failed"})
        else:
            results.add({**cell, **measure(cell, **figures)})
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
