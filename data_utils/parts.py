"""An output file made in parts, so that its making can be stopped, shared between processes and gone on with.

- parts lie in `<output>.parts/`, each moved into place when it is whole; its first line counts what it holds and has
  the SHA-256 of its rows
- a fingerprint says what makes the parts: those of another making are refused, never mixed and never overwritten
- when all are there they are put together in order, with `<output>.json`, which holds fingerprint and counts
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock

from files import TEMPORARY, atomic_path, file_sha256, write_text
from utils import ConfigError, logger, make_folder

FINGERPRINT = "fingerprint.json"
LOCK = "lock"


class Parts:
    """The parts of `output`. `fingerprint` holds plain values by name, all that its rows depend on."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.output = output
        self.fingerprint = dict(fingerprint)
        self.folder = output.with_name(f"{output.name}.parts")
        self.summary = output.with_name(f"{output.name}.json")
        self.quarantine = output.with_name(f"{output.name}.quarantine.jsonl")
        self.lock = FileLock(self.folder / LOCK)
        self._whole: dict[int, dict[str, int]] = {}  # the counts of parts that this process wrote or found whole

    def is_finished(self) -> bool:
        """Whether the output is there, whole and of this making.

        Raises:
            ConfigError: there is another file in its place.
        """
        if not self.output.exists():
            return False
        summary = _read_object(self.summary)
        made = summary.get("fingerprint")
        if made is None:
            raise ConfigError(f"--output_path {self.output}: exists already; give another file")
        self._refuse(made, f"{self.output} exists already and was made otherwise")
        if summary.get("sha256") != file_sha256(self.output):
            raise ConfigError(f"--output_path {self.output}: exists already and was changed; give another file")
        return True

    def open(self) -> None:
        """Make the folder, or go on in it.

        Raises:
            ConfigError: it cannot be made, or holds parts of another making, or something else.
        """
        make_folder(self.folder, "output_path")
        with self.lock:
            if self._is_begun():
                return
            others = [file.name for file in self.folder.iterdir() if not file.name.startswith((TEMPORARY, LOCK))]
            if others:
                raise ConfigError(f"{self.folder}: holds {others[0]}, which is no part of a prediction; move it away")

    def _is_begun(self) -> bool:
        """Whether the folder has a fingerprint, ours. Raises ConfigError where it is another."""
        path = self.folder / FINGERPRINT
        if path.is_file():
            self._refuse(_read_object(path), f"{self.folder} holds parts that were made otherwise")
        return path.is_file()

    def write(self, number: int, rows: str, counts: Mapping[str, int]) -> None:
        """Put part `number` into place; before the first one, the fingerprint.

        Raises:
            ConfigError: another process has begun parts of another making since.
        """
        with self.lock:
            if not self._is_begun():
                written = json.dumps(self.fingerprint, indent=2, ensure_ascii=False)
                write_text(self.folder / FINGERPRINT, written + "\n")
        encoded = rows.encode("utf-8")
        head = json.dumps({**counts, "sha256": hashlib.sha256(encoded).hexdigest()})
        with atomic_path(self._path(number)) as temporary:
            temporary.write_bytes(head.encode("utf-8") + b"\n" + encoded)
        self._whole[number] = dict(counts)

    def counts(self, number: int) -> dict[str, int] | None:
        """What part `number` counts, or None if it is not there or damaged. A part that is whole is read once."""
        if number in self._whole:
            return self._whole[number]
        path = self._path(number)
        if not path.is_file():
            return None
        head, rows = _split(path)
        try:
            counts = json.loads(head)
        except ValueError:
            counts = {}
        if counts.pop("sha256", None) == hashlib.sha256(rows).hexdigest():
            self._whole[number] = counts
            return counts
        logger.warning("%s: is damaged; it is made again", path)
        return None

    def merge(self, parts: int, head: str, counts: Mapping[str, int], quarantine: Path | None) -> None:
        """Put parts 0 to `parts` - 1, all of which are there, below `head`; the output is moved into place last."""
        digest = hashlib.sha256()
        merged = self.folder / "merged"
        with atomic_path(merged) as temporary, temporary.open("wb") as file:
            for rows in chain([head.encode("utf-8")], (_split(self._path(number))[1] for number in range(parts))):
                file.write(rows)
                digest.update(rows)
            file.flush()
            os.fsync(file.fileno())
        self.quarantine.unlink(missing_ok=True)  # an earlier output's
        if quarantine is not None:
            os.replace(quarantine, self.quarantine)
        summary = {**counts, "sha256": digest.hexdigest(), "fingerprint": self.fingerprint}
        write_text(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        os.replace(merged, self.output)

    def remove(self) -> None:
        """Delete the folder, once the output is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)  # another process may be deleting it too

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:07d}"

    def _refuse(self, made: Mapping[str, Any], what: str) -> None:
        names = [name for name in {**made, **self.fingerprint} if made.get(name) != self.fingerprint.get(name)]
        if names:
            listed = "; ".join(f"{name} was {made.get(name)}, is {self.fingerprint.get(name)}" for name in names)
            raise ConfigError(f"--output_path: {what} ({listed}); give another file, or delete it to start anew")


def _split(path: Path) -> tuple[bytes, bytes]:
    """A part's first line and its rows."""
    head, _, rows = path.read_bytes().partition(b"\n")
    return head, rows


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
