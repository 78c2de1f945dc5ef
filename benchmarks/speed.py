"""Tokens a second of ReBerta and its peers at equal encoder shape: training steps and inference, in fp32 and bf16.

    python -m benchmarks.speed [--layers 6 --width 384 --tokens 4096 16384 --batch 2 --output FILE.json]

- a cell is one model, precision, mode and length; a warm-up, then calls until --seconds are spent: the median counts.
  A warm-up that takes longer than --seconds is the measurement ("cold")
- a cell that fails is a row with its error
- the work of a cell, in FLOPs of its matrix products, is counted while it runs; set against the speed of a plain matrix
  product (the roofline, measured at the start and at the end) it says how much of the machine a model uses
- figures are of one run on one machine, with random weights; compare ratios, not figures of different runs
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from benchmarks import common, peers
from models.linear import product_by_onednn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("training", "inference")
ROOFLINE_SIZE = 2048
ROOFLINE_REPEATS = 10

Sizes = Sequence[int]


def elapsed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def roofline() -> dict[str, float]:
    """FLOPs a second of a product of two square matrices, by precision: the best of some, by torch and by oneDNN."""
    found = {}
    for precision, dtype in PRECISIONS.items():
        matrix = torch.randn(ROOFLINE_SIZE, ROOFLINE_SIZE).to(dtype)
        by_torch = functools.partial(torch.matmul, matrix, matrix)
        by_onednn = functools.partial(product_by_onednn, matrix, matrix)
        best = min(elapsed(multiply) for multiply in (by_torch, by_onednn) for _ in range(ROOFLINE_REPEATS))
        found[precision] = 2 * ROOFLINE_SIZE**3 / best
    return found


def _linear_flops(values: Sizes, weight: Sizes, *_: object, **__: object) -> int:
    return 2 * math.prod(values) * weight[0]


def _sdpa_flops(query: Sizes, key: Sizes, value: Sizes, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward_flops(gradient: Sizes, query: Sizes, key: Sizes, value: Sizes, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def flop_counter() -> FlopCounterMode:
    """Counts the FLOPs of matrix products while it is open, also of those by oneDNN and of attention on a CPU."""
    left_out = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
    }
    if torch.backends.mkldnn.is_available():
        left_out[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return FlopCounterMode(display=False, custom_mapping=left_out)


def call(model: nn.Module, input_ids: Tensor, mode: str, precision: str) -> None:
    model.zero_grad()
    peers.step(model, input_ids, mode, precision)


def measure(cell: dict[str, Any], shape: peers.Shape, batch: int, seconds: float) -> dict[str, Any]:
    """Median seconds of a call, how many calls that is of, and the FLOPs of one."""
    model = peers.build(cell["model"], shape, cell["tokens"])
    input_ids = peers.documents(batch, cell["tokens"])
    work = functools.partial(call, model, input_ids, cell["mode"], cell["precision"])
    original = peers.original(cell["model"])
    counted = model if original == cell["model"] else peers.build(original, shape, cell["tokens"])
    with flop_counter() as counter:
        warm_up = elapsed(functools.partial(call, counted, input_ids, cell["mode"], cell["precision"]))
    if counted is not model:
        work()  # whatever a variant does at its first call only
    times = [warm_up] if counted is model and warm_up > seconds else []
    cold = bool(times)
    while not times or sum(times) < seconds:
        times.append(elapsed(work))
    median = statistics.median(times)
    return {
        "seconds": median,
        "calls": len(times),
        "cold": cold,
        "flops": counter.get_total_flops(),
        "tokens_per_second": input_ids.numel() / median,
    }


def attempt(cell: dict[str, Any], shape: peers.Shape, batch: int, seconds: float) -> dict[str, Any]:
    """The cell with its figures, or with the error that it ended with: a limit of the model, or memory."""
    try:
        return {**cell, **measure(cell, shape, batch, seconds)}
    except Exception as error:
        return {**cell, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument(
        "--tokens", type=common.full_windows, nargs="+", default=[4096], help="tokens a document (default 4096)"
    )
    parser.add_argument("--batch", type=int, default=2, help="documents (default 2)")
    parser.add_argument(
        "--models", nargs="+", choices=peers.PEERS, default=list(peers.PEERS), help="default: all of them"
    )
    parser.add_argument("--variants", nargs="*", choices=peers.VARIANTS, default=[], help="also measure these")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seconds", type=float, default=20, help="time for the calls of a cell (default 20)")
    options = parser.parse_args(argv)

    figures = {name: getattr(options, name) for name in ("layers", "width", "batch", "seconds")}
    results = common.Results("speed", figures, options.output)
    cells = [
        {"tokens": tokens, "precision": precision, "mode": mode, "model": model}
        for tokens, precision, mode, model in itertools.product(
            options.tokens, options.precisions, MODES, [*options.models, *options.variants]
        )
        if model != "ReBerta, int8" or (precision, mode) == ("fp32", "inference")
    ]
    pending = results.pending(cells)
    if pending:
        session = results.start_session(argv, roofline_at_start=roofline())
        shape = peers.Shape(options.layers, options.width)
        for cell in (bar := tqdm(pending, disable=None)):
            bar.set_description(" ".join(map(str, cell.values())))
            results.add(attempt(cell, shape, options.batch, options.seconds))
        session["roofline_at_end"] = roofline()
        results.save()
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
