"""The run folder: what a run writes down about itself, and whether an older run may be continued.

- `settings.json`, `environment.json` (versions, command, seed, hashes of the data), `train.log`, `metrics.jsonl`,
  `learning_curves.png`, `checkpoint-N/`, quarantined lines
- `open_run_folder`: a fresh folder, or a run to continue; never one to overwrite
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from config import Settings
from utils import ConfigError, logger, made_up_folder, setup_logging, write_text

SETTINGS_FILE = "settings.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "scikit-learn", "numpy")
FREE_TO_CHANGE = {
    *("mode", "output_dir", "log_level", "log_steps", "device", "gpu_memory_fraction", "num_workers", "report_to"),
    *("max_memory", "int8"),
    *("test_path", "cache_dir", "memory_level", "gradient_checkpointing", "resume", "save_total_limit"),
    *("save_predictions", "max_window_failures", "early_stopping_patience"),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    folder: Path

    @property
    def best_model(self) -> Path:
        return Path("models/saved") / self.folder.name

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def quarantine(self, name: str) -> Path:
        return self.folder / f"quarantine_{name}.jsonl"

    def record_data(self, files: Iterable[Path]) -> None:
        """Add the SHA-256 of each data file to `environment.json`."""
        path = self.folder / "environment.json"
        environment = json.loads(path.read_text(encoding="utf-8"))
        environment["data"] = {}
        for file in files:
            with file.open("rb") as stream:
                environment["data"][str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
        _write_json(path, environment)


def open_run_folder(settings: Settings) -> tuple[RunFolder, str | None]:
    """The run's folder, with its log open, and the checkpoint to go on from, if any.

    Raises:
        ConfigError: the folder holds something else, or a run that must not or cannot be continued.
    """
    folder = Path(settings.output_dir) if settings.output_dir else made_up_folder(settings.model_type)
    run = RunFolder(folder)
    resume_from = None if settings.resume in ("auto", "never") else _existing_checkpoint(settings.resume)
    if folder.is_dir() and any(folder.iterdir()):
        _refuse_to_overwrite(folder, settings)
        resume_from = resume_from or get_last_checkpoint(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    setup_logging(settings.log_level, folder / "train.log")
    _write_json(folder / SETTINGS_FILE, settings.model_dump(mode="json"))
    _write_json(folder / "environment.json", _environment(settings))
    if resume_from is not None:
        logger.info("going on from %s", resume_from)
    return run, resume_from


def _existing_checkpoint(path: str) -> str:
    if not (Path(path) / "trainer_state.json").is_file():
        raise ConfigError(f"--resume {path}: is no checkpoint of a run (a folder checkpoint-N inside of a run folder)")
    return path


def _refuse_to_overwrite(folder: Path, settings: Settings) -> None:
    if not (folder / SETTINGS_FILE).is_file():
        raise ConfigError(f"--output_dir {folder}: is not empty and holds no run; give another folder")
    if settings.resume == "never":
        raise ConfigError(f"--output_dir {folder}: holds a run; give another folder, or --resume auto to continue it")
    before: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    now = settings.model_dump(mode="json")
    changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if changed:
        listed = "; ".join(f"--{name} was {before.get(name)}, is {now[name]}" for name in changed)
        raise ConfigError(f"--output_dir {folder}: holds a run with other settings ({listed}); give another folder")


def _environment(settings: Settings) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": settings.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
