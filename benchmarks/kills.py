"""Whether a training run survives being killed, stopped and damaged: it must end as if nothing had happened.

    python -m benchmarks.kills [--kills 50 --torchrun_kills 10 --signals 5 --torchrun_signals 3 --damages 100
                                --seed 0 --folder FOLDER --output FILE.json]

- a reference run that nobody disturbs, with dropout, augmentation, accumulation, moving average and early stopping
- runs that are killed (-9) or stopped (SIGTERM, SIGINT, also twice) at moments drawn from the seed: while they start,
  while they train, or while they save; then the same command is repeated until it ends by itself. Under torchrun all
  processes are killed at once, or one of the two
- a run that was killed in the middle, each file of whose newest checkpoint is truncated, removed or changed in one bit:
  it must go back to the checkpoint before, and say so. Where all checkpoints are damaged it must refuse (exit code 4)
- compared, bit for bit: weights and moving average of the last checkpoint, the best model, the rows of metrics.jsonl
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

from benchmarks import common
from benchmarks.runs import HOURGLASS, ONE, TWO, Run, differences, family, outlives, prepare
from engine.run_checkpoints import step_of

STARTUP, TRAINING, SAVE = MOMENTS = ("while starting", "while training", "aimed at a save")
CHANCES = (0.2, 0.35, 0.45)
SAVE_SECONDS = 0.04  # within which a checkpoint and a best model of the tiny encoder are written
SAVES_AHEAD = 5
POLL_SECONDS = 0.0005
MOST_KILLS_OF_A_RUN = 9

Process = subprocess.Popen[bytes]
Draw = np.random.Generator
Row = dict[str, Any]


def kill_all(process: Process, draw: Draw) -> None:
    for member in family(process):
        member.kill()


def kill_one(process: Process, draw: Draw) -> None:
    """One of those that torchrun started."""
    workers = family(process)[1:]
    workers[draw.integers(len(workers))].kill()


def once(number: int, process: Process, draw: Draw) -> None:
    process.send_signal(number)


def twice(number: int, process: Process, draw: Draw) -> None:
    process.send_signal(number)
    time.sleep(draw.uniform(0, SAVE_SECONDS))
    process.send_signal(number)


@dataclass(frozen=True)
class Scenario:
    """What is done to a run. `exit_code` and `status` are what it must leave behind; None if that is open."""

    name: str
    processes: str
    strike: Callable[[Process, Draw], None]
    exit_code: int | None = None
    status: dict[str, Any] | None = None
    chances: Sequence[float] = CHANCES


def _stops(number: int) -> dict[str, Any]:
    return {"state": "stopped", "exit_code": 128 + number}


LATER = (0, 0.5, 0.5)  # signals are noted once training has begun
UNDISTURBED = "nothing"
SCENARIOS = [
    Scenario("SIGKILL", ONE, kill_all, -signal.SIGKILL),
    Scenario("SIGTERM", ONE, partial(once, signal.SIGTERM), 143, _stops(signal.SIGTERM), LATER),
    Scenario("SIGINT", ONE, partial(once, signal.SIGINT), 130, _stops(signal.SIGINT), LATER),
    Scenario("SIGTERM twice", ONE, partial(twice, signal.SIGTERM), chances=LATER),
    Scenario("SIGINT twice", ONE, partial(twice, signal.SIGINT), chances=LATER),
    Scenario("SIGKILL of all", TWO, kill_all, -signal.SIGKILL),
    Scenario("SIGKILL of one", TWO, kill_one, 1, chances=LATER),
    Scenario("SIGTERM", TWO, partial(once, signal.SIGTERM), None, _stops(signal.SIGTERM), LATER),
]


@dataclass(frozen=True)
class Reference:
    """The undisturbed run, and how many seconds it took to start and to train."""

    run: Run
    starting: float
    training: float


def until(process: Process, condition: Callable[[], Any]) -> bool:
    """Wait for the condition; False if the process ends before. Raises TimeoutExpired."""
    deadline = time.monotonic() + HOURGLASS
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, HOURGLASS)
        time.sleep(POLL_SECONDS)
    return True


def pause(process: Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    return until(process, lambda: time.monotonic() > end)


def undisturbed(run: Run) -> Reference:
    """Raises RuntimeError if it does not end well."""
    start = time.monotonic()
    process = run.start()
    until(process, run.training_began)
    began = time.monotonic()
    if process.wait(HOURGLASS) != 0:
        raise RuntimeError(f"the reference run fails:\n{run.console}")
    return Reference(run, began - start, time.monotonic() - began)


def reach(moment: str, run: Run, process: Process, before: Any, draw: Draw, reference: Reference) -> bool:
    """Wait for a random point of time of that kind; False if the process ends before."""
    if moment == STARTUP:
        return pause(process, draw.uniform(0, reference.starting))
    if not until(process, lambda: run.training_began() != before):
        return False
    if moment == TRAINING:
        return pause(process, draw.uniform(0, reference.training / 2))
    for _ in range(draw.integers(1, SAVES_AHEAD + 1)):
        if not until(process, partial(_more, run, run.unfinished())):
            return False
    return pause(process, draw.uniform(0, SAVE_SECONDS))


def _more(run: Run, seen: set[tuple[str, int]]) -> bool:
    return not run.unfinished() <= seen


def interrupted(scenario: Scenario, reference: Reference, run: Run, draw: Draw, most: int) -> Row:
    """Strike a run up to `most` times, let it end, and compare it with the reference."""
    row: Row = {"scenario": scenario.name, "processes": scenario.processes, **dict.fromkeys(MOMENTS, 0)}
    row |= {"during a save": 0, "starts": 0, "exit codes": [], "faults": []}
    for _ in range(most):
        moment = draw.choice(MOMENTS, p=scenario.chances)
        before, seen = run.training_began(), run.unfinished()
        process = run.start()
        row["starts"] += 1
        if not reach(moment, run, process, before, draw, reference):
            row["faults"] += _ended_badly(process, run)
            break
        members = family(process)
        scenario.strike(process, draw)
        code = process.wait(HOURGLASS)
        if code == 0 or run.is_finished:  # it was at its end already; torchrun itself may have met the signal after it
            break
        row[moment] += 1
        row["exit codes"].append(code)
        row["during a save"] += _more(run, seen)
        row["faults"] += _left_behind(scenario, run, code)
        row["faults"] += [f"process {member.pid} outlives it" for member in members if outlives(member)]
    process = run.start()
    row["starts"] += 1
    process.wait(HOURGLASS)
    row["faults"] += _ended_badly(process, run) or judged(reference.run, run)
    return row


def _ended_badly(process: Process, run: Run) -> list[str]:
    if process.returncode == 0:
        return []
    return [f"it ends by itself with exit code {process.returncode}: {' '.join(run.console.splitlines()[-3:])}"]


def _left_behind(scenario: Scenario, run: Run, code: int) -> list[str]:
    faults = []
    if scenario.exit_code is not None and code != scenario.exit_code:
        faults.append(f"exit code {code} in place of {scenario.exit_code}")
    if scenario.status is not None:
        status = run.status
        if not scenario.status.items() <= status.items():
            faults.append(f"status.json says {status} in place of {scenario.status}")
        elif run.checkpoints[-1].name != f"checkpoint-{status['step']}":
            faults.append(f"it stopped at step {status['step']} and saved {run.checkpoints[-1].name}")
    return faults


def judged(expected: Run, found: Run) -> list[str]:
    """What is not as it must be in a finished run."""
    faults = differences(expected, found)
    if not {"state": "finished", "exit_code": 0}.items() <= found.status.items():
        faults.append(f"status.json says {found.status}")
    return faults + [f"left lying: {path}" for path, _ in sorted(found.unfinished())]


def truncate(file: Path, draw: Draw) -> None:
    os.truncate(file, file.stat().st_size // 2)


def remove(file: Path, draw: Draw) -> None:
    file.unlink()


def change_a_bit(file: Path, draw: Draw) -> None:
    content = bytearray(file.read_bytes())
    content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
    file.write_bytes(content)


DAMAGES = {"truncated": truncate, "removed": remove, "one bit changed": change_a_bit}
NEWEST, EVERY = "newest checkpoint", "all checkpoints"


def cut_off(reference: Run, folder: Path) -> Run:
    """A run that was killed at two thirds of its way, right after a save."""
    run = Run(folder, reference.options)
    steps = [int(path.name.split("-")[1]) for path in reference.checkpoints]
    process = run.start()
    until(process, lambda: run.checkpoints and int(run.checkpoints[-1].name.split("-")[1]) >= steps[-1] * 2 // 3)
    kill_all(process, np.random.default_rng())
    process.wait()
    return run


def damage_cells(run: Run) -> Iterator[Row]:
    newest = run.checkpoints[-1]
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.stat().st_size)
    for where, names in ((NEWEST, files), (EVERY, ["model.safetensors", "manifest.json"])):
        for name in names:
            for damage in DAMAGES:
                yield {"scenario": "damage", "of": where, "file": name, "damage": damage}


def damaged(cell: Row, reference: Run, cut: Run, folder: Path, draw: Draw) -> Row:
    """Damage a copy of the run that was cut off, and go on with it."""
    shutil.copytree(cut.folder, folder)
    run = Run(folder, cut.options)
    (folder / "console.log").unlink()
    before, metrics = run.checkpoints, run.metrics
    for checkpoint in before if cell["of"] == EVERY else before[-1:]:
        if (checkpoint / cell["file"]).exists():  # the oldest one may have been on its way out when the run was killed
            DAMAGES[cell["damage"]](checkpoint / cell["file"], draw)
    code = run.fork()
    warnings = [line for line in run.console.splitlines() if "WARNING" in line]
    faults = [] if any(cell["file"] in line for line in warnings) else [f"no warning names {cell['file']}"]
    if cell["of"] == EVERY:
        if code != 4:
            faults.append(f"exit code {code} in place of 4")
        if run.checkpoints != before or run.metrics != metrics:
            faults.append("it began anew")
    elif code != 0:
        faults.append(f"exit code {code}: {' '.join(run.console.splitlines()[-3:])}")
    else:
        if not any(before[-2].name in line for line in warnings):
            faults.append(f"no warning names {before[-2].name}")
        faults += judged(reference, run)
    return {**cell, "exit codes": [code], "faults": faults}


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of one process (default 50)")
    parser.add_argument("--torchrun_kills", type=int, default=10, help="half of them of one process alone (default 10)")
    parser.add_argument("--signals", type=int, default=5, help="of each kind, to one process (default 5)")
    parser.add_argument("--torchrun_signals", type=int, default=3, help="to torchrun (default 3)")
    parser.add_argument("--damages", type=int, default=100, help="cases at most (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, encoder and moments (default 0)")
    parser.add_argument("--folder", type=Path, help="a new folder to keep all runs in (default: a temporary one)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = common.Results("kills", {"seed": options.seed}, options.output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary) / "runs").resolve()
        folder.mkdir(parents=True)
        try:
            strike_all(options, folder, results, results.start_session(argv))
        finally:  # none is left behind when a run hangs or this one is stopped
            for process in psutil.Process().children(recursive=True):
                process.kill()
    results.show()


def strike_all(options: argparse.Namespace, folder: Path, results: common.Results, session: Row) -> None:
    command = prepare(folder, options.seed)

    @cache
    def reference(processes: str) -> Reference:
        found = undisturbed(Run(folder / f"reference, {processes}", command, processes))
        steps = step_of(found.run.checkpoints[-1])
        session[f"reference, {processes}"] = {
            "steps": steps,
            "evaluations": sum("eval_loss" in row for row in found.run.metrics),
            "seconds to start": round(found.starting, 1),
            "seconds of training": round(found.training, 1),
        }
        return found

    half = options.torchrun_kills // 2
    wanted = [options.kills, *[options.signals] * 4, options.torchrun_kills - half, half, options.torchrun_signals]
    for place, (scenario, total) in enumerate(zip(SCENARIOS, wanted, strict=True)):
        bar = tqdm(total=total, desc=f"{scenario.name}, {scenario.processes}", disable=None)
        while (missing := total - _strikes(results.rows, scenario)) > 0:
            bar.update(total - missing - bar.n)
            number = sum(row["scenario"] == scenario.name for row in results.rows)
            draw = np.random.default_rng([options.seed, place, number])
            run = Run(folder / f"{scenario.name}, {scenario.processes}, {number}", command, scenario.processes)
            most = min(missing, int(draw.integers(1, MOST_KILLS_OF_A_RUN + 1)))
            results.add(interrupted(scenario, reference(scenario.processes), run, draw, most))

    if options.damages:
        damage_all(options, reference(ONE).run, folder, results)


def damage_all(options: argparse.Namespace, reference: Run, folder: Path, results: common.Results) -> None:
    control: Row = {"scenario": UNDISTURBED, "processes": ONE}
    if results.pending([control]):
        again = Run(folder / "again", reference.options)
        again.fork()
        results.add({**control, "starts": 1, "faults": judged(reference, again)})
    cut = cut_off(reference, folder / "cut off")
    cells = list(damage_cells(cut))[: options.damages]
    for number, cell in enumerate(tqdm(results.pending(cells), desc="damage", disable=None)):
        draw = np.random.default_rng([options.seed, len(SCENARIOS), number])
        results.add(damaged(cell, reference, cut, folder / f"damage {number}", draw))


def _strikes(rows: Sequence[Row], scenario: Scenario) -> int:
    same = [row for row in rows if (row["scenario"], row.get("processes")) == (scenario.name, scenario.processes)]
    return sum(row[moment] for row in same for moment in MOMENTS)


if __name__ == "__main__":
    main(sys.argv[1:])
