"""What the benchmarks share: a description of the machine, and results in a JSON file that a restart continues.

Linux only: the machine describes itself in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import report, report_tables
from benchmarks.peers import WINDOW
from files import write_text
from utils import ConfigError


def machine() -> dict[str, Any]:
    """The processor and what torch makes of it; memory in GB of 10^9 bytes."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"^model name\s*: (.*)$", processor, re.MULTILINE)
    return {
        "cpu": name.group(1) if name else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_tile" in processor,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
    }


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


class Results:
    """The rows of one benchmark. With a file, each is saved at once, and those that it holds are not measured again.

    `options` are what a row's figures depend on beside its cell. `machines`: whether they may come from several, which
    sessions are then to name.

    Raises:
        ConfigError: the file holds figures of other options or versions, or of another machine where that counts.
    """

    def __init__(self, benchmark: str, options: dict[str, Any], path: Path | None, *, machines: bool = False) -> None:
        self.benchmark = benchmark
        self.path = path
        origin = {"benchmark": benchmark, "options": options, "versions": versions()}
        if not machines:
            origin["machine"] = machine()
        self.content: dict[str, Any] = {**origin, "sessions": [], "rows": []}
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            other = [
                f"{key} was {stored.get(key)}, is {value}" for key, value in origin.items() if stored.get(key) != value
            ]
            if other:
                raise ConfigError(f"--output {path} is of another run; name another file. " + "; ".join(other))
            self.content = stored

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def pending(self, cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The cells that have no row yet."""
        return [cell for cell in cells if report_tables.find(self.rows, **cell) is None]

    def start_session(self, arguments: Sequence[str], **facts: Any) -> dict[str, Any]:
        """Note by which command figures are measured from now on. What is added to what it returns is saved too."""
        session = {
            "command": shlex.join(["python", "-m", f"benchmarks.{self.benchmark}", *arguments]),
            "started": datetime.now().isoformat(sep=" ", timespec="seconds"),
            **facts,
        }
        self.content["sessions"].append(session)
        return session

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def show(self) -> None:
        """Print the table; renew docs/benchmarks.md if the file is one of those that it shows."""
        print(report.section(self.content))
        if self.path is not None and self.path.resolve().parent == report.RESULTS:
            report.main()


def full_windows(text: str) -> int:
    """An argument that counts tokens of a document: a multiple of the window's 256."""
    tokens = int(text)
    if tokens < WINDOW or tokens % WINDOW:
        raise argparse.ArgumentTypeError(f"{tokens} is not a multiple of {WINDOW}, the tokens of a window")
    return tokens


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that the benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="save figures to this JSON file; what it holds is not measured again")
    return made
