"""Bytes that no one would write, for hours: whatever reads files of strangers refuses them with its own error.

    pip install atheris
    python -m benchmarks.fuzz --seconds 3600 [--output FILE.json] [--crashes FOLDER]

- atheris (libFuzzer) mutates sound files, led by which lines of the readers they reach; the seconds are shared out
  evenly between the targets of `fuzz_targets`, each in a process of its own
- a crash is an error of another kind, counted once for each line that raises it, or the end of the process; the first
  bytes that show it are kept in the folder `--crashes`
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTRUMENTED = ["config", "data_utils", "models.checkpoint", "models.configuration", "json", "csv", "yaml", "zipfile"]
MEGABYTES = 6000
LONGEST_SECONDS = 30


def fuzz(name: str, seconds: int, folder: Path, crashes: Path) -> None:
    """Fuzz one target; does not return. Unexpected errors are noted in `folder`/crashes.json, and fuzzing goes on."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from benchmarks.fuzz_targets import targets

    logging.getLogger("reberta").setLevel(logging.CRITICAL + 1)
    target = targets(folder)[name]
    found: dict[str, str] = {}

    def read(data: bytes) -> None:
        try:
            target.read(data)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} at {place.filename}:{place.lineno}"
            if key not in found:
                found[key] = str(error)
                (folder / "crashes.json").write_text(json.dumps(found))
                (crashes / f"{re.sub(r'[^a-z]+', '-', name)}-{len(found)}").write_bytes(data)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEGABYTES}", f"-timeout={LONGEST_SECONDS}"]
    most = max(map(len, target.seeds)) + 1000
    atheris.Setup(
        [sys.argv[0], *limits, f"-max_len={most}", "-print_final_stats=1", f"-artifact_prefix={crashes}/", str(corpus)],
        read,
    )
    atheris.Fuzz()


def fuzz_apart(name: str, seconds: int, crashes: Path) -> dict[str, Any]:
    """The row of one target, fuzzed in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--target", name, "--seconds", str(seconds), "--folder", folder, "--crashes", str(crashes)]
        start = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", *arguments], capture_output=True, text=True, errors="replace"
        )
        took = time.monotonic() - start
        noted = Path(folder) / "crashes.json"
        found = json.loads(noted.read_text()) if noted.is_file() else {}
    executions = re.search(r"number_of_executed_units: (\d+)", run.stderr)
    if executions is None:
        raise RuntimeError(f"{name}: {run.stderr[-3000:]}")
    for place, message in found.items():
        print(f"{name}: {place}: {message[:300]}")
    if run.returncode:
        print(f"{name}: the process ended: {run.stderr[-3000:]}")
    crashed = len(found) + (run.returncode != 0)
    return {"target": name, "executions": int(executions[1]), "crashes": crashed, "seconds": round(took)}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=180, help="of fuzzing, all targets together (default 180)")
    parser.add_argument("--output", type=Path, help="save figures to this JSON file; what it holds is not fuzzed again")
    parser.add_argument(
        "--crashes", type=Path, default=Path("crashes"), help="where bytes that crash go (default crashes)"
    )
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if find_spec("atheris") is None:
        parser.error("needs atheris: pip install atheris")
    options.crashes.mkdir(parents=True, exist_ok=True)
    if options.target:
        fuzz(options.target, options.seconds, options.folder, options.crashes)

    from benchmarks import common
    from benchmarks.fuzz_targets import targets

    results = common.Results("fuzz", {"seconds": options.seconds}, options.output)
    with tempfile.TemporaryDirectory() as folder:
        names = list(targets(Path(folder)))
    pending = results.pending({"target": name} for name in names)
    if pending:
        results.start_session(argv, atheris=importlib.metadata.version("atheris"))
    for cell in pending:
        results.add(fuzz_apart(cell["target"], options.seconds // len(names), options.crashes))
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
