"""One cell of benchmarks.memory, in a process of its own: prints its figures as a line of JSON.

python -m benchmarks.memory_cell MODEL MODE LAYERS WIDTH TOKENS
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from pathlib import Path

from benchmarks import peers

PROCESS = Path("/proc/self")
SHORT = 1024  # tokens; up to 704 BigBird reads with full attention, and stays with it


def resident(which: str, process: Path = PROCESS) -> int:
    """Bytes of a process in memory: `VmRSS` now, `VmHWM` the most since its peak was reset."""
    found = re.search(rf"^{which}:\s+(\d+) kB$", (process / "status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0  # a process that has just ended has none


def main() -> None:
    name, mode, layers, width, tokens = sys.argv[1:]
    model = peers.build(name, peers.Shape(int(layers), int(width)), int(tokens))
    document = peers.documents(1, int(tokens))
    peers.step(model, document[:, :SHORT], mode)  # what is allocated once, gradients among it
    gc.collect()
    before = resident("VmRSS")
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    start = time.perf_counter()
    peers.step(model, document, mode)
    seconds = time.perf_counter() - start
    extra = resident("VmHWM") - before
    print(json.dumps({"before_mb": round(before / 1e6), "extra_mb": round(extra / 1e6), "seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
