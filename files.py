"""Files: written whole or not at all, found under nearly their name, readable by others.

- `writing_to`, `atomic_path`, `write_text`: a full disk is said of a path; a file is written under a temporary name and
  moved into place
- `made_up_folder`: where reports go
- `nearest`: what a wrong path may have meant
- `file_sha256`, `share_weights`: of files that are there
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from utils import ReBertaError, ResourceError, expected_error

TEMPORARY = ".writing."  # what names of unfinished files begin with; what a kill leaves of them may be deleted


@contextlib.contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Where the disk is full in this block, the error names `path`."""
    try:
        yield
    except Exception as error:
        known = expected_error(error)
        if isinstance(known, ResourceError) and not isinstance(error, ReBertaError):
            raise ResourceError(f"{path}: {known}") from error
        raise


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it becomes `path` when the block ends well and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with writing_to(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def nearest(path: str | Path) -> str:
    """For the message that there is no `path`: what lies where it should and has nearly its name."""
    path = Path(path)
    beside = [file.name for file in path.parent.iterdir() if file.name != path.name] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def share_weights(folder: Path) -> None:
    """Give the *.safetensors of `folder` the permissions of its config.json: safetensors writes for its owner alone."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of what the file holds, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_up_folder(name: str) -> Path:
    """`logs/<name>-<time>`, for a run or report whose folder the user leaves open."""
    return Path("logs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
