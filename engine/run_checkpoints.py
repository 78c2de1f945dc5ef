"""The checkpoints of a run: whole or not, which one to go on from, which ones to keep.

- `seal`: gives a staged checkpoint its manifest (size and SHA-256 of every file, written last) and moves it into place
- `fault`: what is missing from a checkpoint or damaged in it
- `newest_whole`: the checkpoint to go on from; damaged ones are named, set aside and never taken
- `keep`: the last ones and the best one stay, the others go

A checkpoint is the folder `checkpoint-STEP` of a run folder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from files import file_sha256, write_text
from utils import ModelError, logger

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(run_folder: Path) -> list[Path]:
    """Those in the run folder, whole or not, the newest first."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def seal(staged: Path, place: Path) -> None:
    """Write the manifest of a staged checkpoint, once all else is on the disk, and move it to `place`."""
    entries = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[str(path.relative_to(staged))] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    write_text(staged / MANIFEST, json.dumps({"files": entries}, indent=2) + "\n")
    if place.exists():
        shutil.rmtree(place)
    os.replace(staged, place)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None if it is whole."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing: it was not written to its end"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if STATE_FILE not in expected:
        return f"{MANIFEST} does not list {STATE_FILE}"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.resolve().is_relative_to(checkpoint.resolve()):
            return f"{MANIFEST} lists {name}, which is outside of it"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes in place of {size}"
        if file_sha256(file) != digest:
            return f"{name} is damaged: its SHA-256 is not that of {MANIFEST}"
    return None


def newest_whole(run_folder: Path) -> Path | None:
    """The checkpoint to go on from, or None if the run has none yet.

    Raises:
        ModelError: it has some, and all of them are damaged.
    """
    damaged: list[str] = []
    for checkpoint in checkpoints(run_folder):
        reason = fault(checkpoint)
        if reason is None:
            if damaged:
                logger.warning("going back to %s", checkpoint)
            return checkpoint
        logger.warning("%s: cannot be used: %s", checkpoint, reason)
        damaged.append(f"{checkpoint.name}: {reason}")
    if damaged:
        raise ModelError(
            f"{run_folder}: none of its checkpoints is whole ({'; '.join(damaged)}). Restore one of them, "
            "or start anew with another --output_dir"
        )
    return None


def set_aside(run_folder: Path, after_step: int) -> None:
    """Rename the checkpoints later than `after_step`: the run that goes on from there must not mix with them."""
    for checkpoint in checkpoints(run_folder):
        if step_of(checkpoint) > after_step:
            aside = checkpoint.with_name(f"{checkpoint.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
            logger.warning("%s is kept as %s", checkpoint, aside.name)


def keep(run_folder: Path, last: int, best_step: int | None) -> None:
    """Delete all but the `last` newest checkpoints and the one of `best_step`."""
    for checkpoint in checkpoints(run_folder)[last:]:
        if step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)
