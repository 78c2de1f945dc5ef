"""The run folder: what a run writes down about itself, and whether an older run may be continued.

- `settings.json`, `environment.json` (versions, command, seed, hashes of the data), `train.log`, `metrics.jsonl`,
  `learning_curves.png`, `checkpoint-N/`, quarantined lines
- `status.json`: where the run stands (running, finished, stopped or failed, and at which step) and why it ended
- `open_run_folder`: a fresh folder, one whose run never made a checkpoint, or a run to continue; never one to overwrite
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from config import Settings
from engine.run_checkpoints import STATE_FILE, fault, newest_whole, set_aside, step_of
from files import TEMPORARY, file_sha256, made_up_folder, write_text
from pretrained import RUN_STATUS
from processes import gather, process_count
from utils import (
    ConfigError,
    DataError,
    ModelError,
    ReBertaError,
    ResourceError,
    StoppedError,
    is_main_process,
    logger,
    make_folder,
    setup_logging,
)

SETTINGS_FILE, ENVIRONMENT_FILE, STATUS_FILE = "settings.json", "environment.json", RUN_STATUS
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "scikit-learn", "numpy")
FREE_TO_CHANGE = {
    *("mode", "output_dir", "log_level", "log_steps", "device", "gpu_memory_fraction", "num_workers", "report_to"),
    *("max_memory", "int8"),
    *("test_path", "cache_dir", "memory_level", "gradient_checkpointing", "resume", "save_total_limit"),
    *("save_predictions", "max_window_failures", "input_path", "output_path", "shard"),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and what is written of it by process 0."""

    folder: Path

    @property
    def best_model(self) -> Path:
        return Path("models/saved") / self.folder.name

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def staging(self) -> Path:
        """Where checkpoints are written, before they are whole and moved into place."""
        return self.folder / f"{TEMPORARY}checkpoint"

    def quarantine(self, name: str) -> Path | None:
        return self.folder / f"quarantine_{name}.jsonl" if is_main_process() else None

    def record_data(self, files: Iterable[Path]) -> None:
        """Add the SHA-256 of each data file to `environment.json`.

        Raises:
            DataError: the run goes on with other data than it began with.
        """
        path = self.folder / ENVIRONMENT_FILE
        environment = _read_json(path)
        before, now = environment["data"], {str(file): file_sha256(file) for file in files}
        if before and before != now:
            changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            raise DataError(
                f"{', '.join(changed)}: changed since this run began; restore what it was trained on, "
                "or start a new run with another --output_dir"
            )
        _write_json(path, environment | {"data": now})

    def report(self, **facts: Any) -> None:
        """Bring `status.json` up to date."""
        if is_main_process():
            path = self.folder / STATUS_FILE
            before = _read_json(path)
            _write_json(path, {**before, **facts, "updated": datetime.now().astimezone().isoformat(timespec="seconds")})

    @contextlib.contextmanager
    def status(self) -> Iterator[None]:
        """Note that the run is at work, and in the end how it ended. A run that was killed still says `running`."""
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        self.report(state="running", reason=None, exit_code=None, **me)
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, (StoppedError, KeyboardInterrupt))
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", ReBertaError.exit_code)
            with contextlib.suppress(OSError, ResourceError):  # a full disk must not hide the error itself
                reason = str(error) or type(error).__name__
                self.report(state="stopped" if stopped else "failed", reason=reason, exit_code=code)
            raise
        self.report(state="finished", exit_code=0)


@contextlib.contextmanager
def open_run_folder(settings: Settings) -> Iterator[tuple[RunFolder, str | None]]:
    """The run's folder, with its log open, and the checkpoint to go on from, if any; the same in all processes.

    While it is open, no other run can use the folder.

    Raises:
        ConfigError: the folder holds something else, or a run that must not be continued, or that is at work.
        ModelError: it holds a run none of whose checkpoints is whole, or `--resume` names one that is not.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(settings.output_dir) if settings.output_dir else made_up_folder(settings.model_type)
        if is_main_process():
            stack.enter_context(_claimed(folder))
            _enter(folder, settings)
        run = RunFolder(gather(folder)[0])
        stack.enter_context(run.status())
        yield run, gather(_resume_from(folder, settings) if is_main_process() else None)[0]


def _claimed(folder: Path) -> contextlib.AbstractContextManager:
    """The folder, made if need be, for this run alone."""
    if folder.name in ("", ".."):
        raise ConfigError(f"--output_dir {folder}: give it a name of its own; the best model is saved under that name")
    if _holds_files(folder) and not (folder / SETTINGS_FILE).is_file():
        raise ConfigError(f"--output_dir {folder}: is not empty and holds no run; give another folder")
    make_folder(folder, "output_dir")
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        status = _read_json(folder / STATUS_FILE)
        who = f"process {status.get('pid')} on {status.get('host')}"
        raise ConfigError(f"--output_dir {folder}: {who} is at work on this run; wait for it or stop it") from None


def _enter(folder: Path, settings: Settings) -> None:
    """Refuse what must not go on here, or write the settings and open the log."""
    named = _named_checkpoint(settings)
    if named is not None:
        if not (named / STATE_FILE).is_file():
            raise ConfigError(
                f"--resume {named}: is no checkpoint of a run (a folder checkpoint-N inside of a run folder)"
            )
        _refuse_other_settings(f"--resume {named}", named.parent, settings)
    if settings.resume == "never" and (folder / SETTINGS_FILE).is_file():
        raise ConfigError(f"--output_dir {folder}: holds a run; give another folder, or --resume auto to continue it")
    if any(folder.glob("checkpoint-*")):  # without one, a run whose options were wrong is started anew
        _refuse_other_settings(f"--output_dir {folder}", folder, settings)
    _refuse_to_replace_another_model(RunFolder(folder))
    _write_json(folder / SETTINGS_FILE, settings.model_dump(mode="json"))
    setup_logging(settings.log_level, folder / "train.log")
    _remove_unfinished(folder)


def _resume_from(folder: Path, settings: Settings) -> str | None:
    """The checkpoint to go on from; `environment.json` keeps those of the starts before this one as `earlier`."""
    named = _named_checkpoint(settings)
    if named is not None and (reason := fault(named)):
        raise ModelError(f"--resume {named}: cannot be used: {reason}; give another one, or --resume auto")
    checkpoint = named if named and named.parent.resolve() == folder.resolve() else newest_whole(folder) or named
    environment = _environment(settings)
    if checkpoint is not None:
        before = _read_json(checkpoint.parent / ENVIRONMENT_FILE)
        environment["data"] = before.pop("data")
        environment["earlier"] = [*before.pop("earlier", []), before]
        set_aside(folder, after_step=step_of(checkpoint))
        logger.info("going on from %s", checkpoint)
    _write_json(folder / ENVIRONMENT_FILE, environment)
    return None if checkpoint is None else str(checkpoint)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _remove_unfinished(folder: Path) -> None:
    """What a kill left of files that were being written."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _named_checkpoint(settings: Settings) -> Path | None:
    return None if settings.resume in ("auto", "never") else Path(settings.resume)


def _refuse_other_settings(option: str, folder: Path, settings: Settings) -> None:
    before, now = _read_json(folder / SETTINGS_FILE), settings.model_dump(mode="json")
    changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    faults = [f"--{name} was {before.get(name)}, is {now[name]}" for name in changed]
    processes = _read_json(folder / ENVIRONMENT_FILE).get("processes", process_count())
    if processes != process_count():
        faults.append(f"it had {processes} processes, now {process_count()}")
    if faults:
        raise ConfigError(f"{option}: holds a run with other settings ({'; '.join(faults)}); give another folder")


def _refuse_to_replace_another_model(run: RunFolder) -> None:
    """Runs whose folders have one name share the best model's place; another run's model and other files stay there."""
    owner = _read_json(run.best_model / SETTINGS_FILE).get("output_dir")
    if owner is not None and Path(owner).resolve() != run.folder.resolve():
        raise ConfigError(
            f"--output_dir {run.folder}: {run.best_model} holds the best model of the run in {owner}; give another name"
        )
    is_taken = any(run.best_model.iterdir()) if run.best_model.is_dir() else run.best_model.exists()
    if is_taken and not (run.folder / SETTINGS_FILE).is_file():
        raise ConfigError(
            f"--output_dir {run.folder}: {run.best_model}, where the best model of this run would lie, is not empty; "
            "give another name, or move that folder away"
        )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _environment(settings: Settings) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": settings.seed,
        "processes": process_count(),
        "data": {},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
