"""Training runs that benchmarks.kills starts, interrupts and compares.

- `prepare`: a tiny encoder, a small corpus, and the options of a run with everything on that has a state to lose
- `Run`: one run in a folder of its own, as a process, as two under torchrun, or in a fork of this process
- `Run.unfinished`: the files that are being written right now, or that a kill left behind
- `differences`: weights and rows of metrics, bit for bit
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

import main
from benchmarks.synthetic import save_tiny_encoder, write_corpus
from engine.run_checkpoints import checkpoints

ROOT = Path(__file__).parents[1]
ONE, TWO = "one process", "two under torchrun"
START = {
    ONE: [],
    TWO: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
EPOCHS, DOCUMENTS = 3, 240
OPTIONS = (
    "--mode train --window_size 12 --max_windows 6 --batch_size 4 --gradient_accumulation_steps 2 --eval_every 2 "
    "--learning_rate 1e-3 --fresh_lr_factor 1 --dropout 0.1 --use_augmentation --ema_decay 0.5 "
    "--early_stopping_patience 14 --probe_epochs 0 --log_steps 1 --seed 1 --device cpu --output_dir logs/run"
)
OF_LAST_PROCESS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
HOURGLASS = 300  # seconds after which a run hangs
SECONDS_TO_END = 10


def prepare(folder: Path, seed: int) -> list[str]:
    """Make encoder and corpora in `folder`; the options that train on them."""
    save_tiny_encoder(folder / "encoder", positions=64, seed=seed)
    draw = np.random.default_rng(seed)
    places = {
        "train_path": write_corpus(folder / "train.jsonl", draw.integers(5, 60, DOCUMENTS), seed=2 * seed),
        "val_path": write_corpus(folder / "val.jsonl", draw.integers(5, 60, 40), seed=2 * seed + 1),
        "model_path": folder / "encoder",
        "cache_dir": folder / "cache",
    }
    return [*OPTIONS.split(), "--epochs", str(EPOCHS), *(f"--{name}={path}" for name, path in places.items())]


@dataclass(frozen=True)
class Run:
    """A run in `folder`, which is its working directory; what it says is added to `console.log` there."""

    folder: Path
    options: Sequence[str]
    processes: str = ONE

    @property
    def run_folder(self) -> Path:
        return self.folder / "logs" / "run"

    @property
    def best_model(self) -> Path:
        return self.folder / "models" / "saved" / "run"

    @property
    def console(self) -> str:
        return (self.folder / "console.log").read_text(encoding="utf-8", errors="replace")

    @property
    def checkpoints(self) -> list[Path]:
        """In the order of their steps."""
        return checkpoints(self.run_folder)[::-1]

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_folder / "status.json").read_text(encoding="utf-8"))

    @property
    def is_finished(self) -> bool:
        return (self.run_folder / "status.json").is_file() and self.status["state"] == "finished"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without what is of the last process alone."""
        lines = (self.run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if name not in OF_LAST_PROCESS} for line in lines
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """The command line, as a user types it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "console.log").open("ab") as console:
            return subprocess.Popen(
                [sys.executable, *START[self.processes], str(ROOT / "main.py"), *self.options],
                cwd=self.folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=console,
                stderr=console,
            )

    def fork(self) -> int | None:
        """The same in a fork of this process, which saves the imports; its exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(self,))
        process.start()
        process.join()
        return process.exitcode

    def training_began(self) -> tuple[int, int] | None:
        """What changes each time that training begins: the identity of a new metrics.jsonl."""
        try:
            found = (self.run_folder / "metrics.jsonl").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_ctime_ns

    def unfinished(self) -> set[tuple[str, int]]:
        """Temporary files and folders, by path and inode, of checkpoints and best model."""
        found = set()
        for folder in (self.run_folder, self.best_model.parent):
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    found |= {(entry.path, entry.inode()) for entry in entries if _is_temporary(entry.name)}
        return found


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and ("checkpoint" in name or "run" in name)


def _in_fork(run: Run) -> None:
    os.chdir(run.folder)
    console = os.open("console.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(console, descriptor)
    sys.stdout = sys.stderr = os.fdopen(console, "w", buffering=1, encoding="utf-8")
    sys.exit(main.main(run.options))


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all that it started, those that torchrun started among them."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def outlives(process: psutil.Process) -> bool:
    """Whether it is still there some seconds after the others. A zombie is not: whoever collects it may be slow."""
    deadline = time.monotonic() + SECONDS_TO_END
    try:
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        pass
    return False


def differences(expected: Run, found: Run) -> list[str]:
    """Where two finished runs differ: last checkpoint, moving average, best model, metrics. Empty if nowhere."""
    last = [run.checkpoints[-1].name if run.checkpoints else "none" for run in (expected, found)]
    if last[0] != last[1]:
        return [f"the last checkpoint is {last[1]} in place of {last[0]}"]
    faults = []
    for place in (f"logs/run/{last[0]}/model", f"logs/run/{last[0]}/ema", "models/saved/run/model"):
        faults += _weight_differences(expected.folder, found.folder, f"{place}.safetensors")
    rows = expected.metrics, found.metrics
    if len(rows[0]) != len(rows[1]):
        faults.append(f"metrics.jsonl has {len(rows[1])} rows in place of {len(rows[0])}")
    different = [(one, other) for one, other in zip(*rows, strict=False) if one != other]
    if different:
        faults.append(
            f"metrics.jsonl: {len(different)} rows differ, the first is {different[0][1]} in place of {different[0][0]}"
        )
    return faults


def _weight_differences(expected: Path, found: Path, place: str) -> list[str]:
    if not (found / place).is_file():
        return [f"{place}: there is none"]
    tensors = load_file(expected / place), load_file(found / place)
    if tensors[0].keys() != tensors[1].keys():
        return [f"{place}: other tensors: {sorted(tensors[0].keys() ^ tensors[1].keys())}"]
    different = [name for name, tensor in tensors[0].items() if not torch.equal(_bits(tensor), _bits(tensors[1][name]))]
    if not different:
        return []
    return [f"{place}: {len(different)} of {len(tensors[0])} tensors differ, such as {different[0]}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
