"""The real command line, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import write_corpus

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="session")
def start():
    """Start a script of the project in a folder, as a user does."""

    def start(
        folder: Path, arguments: str, script: str = "main.py", launcher: Sequence[str] = (sys.executable,)
    ) -> subprocess.Popen:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "xdg")}
        return subprocess.Popen(
            [*launcher, ROOT / script, *arguments.split()],
            cwd=folder,
            env={**os.environ, **quiet},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def command(start):
    """The same, and wait for its end."""

    def run(
        folder: Path, arguments: str, script: str = "main.py", launcher: Sequence[str] = (sys.executable,)
    ) -> subprocess.CompletedProcess:
        process = start(folder, arguments, script, launcher)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def project(tmp_path_factory, encoder_folder) -> Path:
    """A folder with data where the defaults look for them, and a configuration for the tiny encoder."""
    folder = tmp_path_factory.mktemp("project")
    for seed, (name, documents) in enumerate((("train", 24), ("evaluation", 10), ("validation", 13))):
        (folder / "data" / name).mkdir(parents=True)
        write_corpus(folder / "data" / name / f"{name}.jsonl", documents, seed)
    (folder / "tiny.yaml").write_text(
        f"model_path: {encoder_folder}\nwindow_size: 12\nmax_windows: 4\nbatch_size: 8\nlearning_rate: 1e-3\n"
        f"log_steps: 1\nprobe_epochs: 0\ncache_dir: {folder}/cache\ndevice: cpu\n"
    )
    return folder


@pytest.fixture(scope="session")
def trained(project, command) -> Path:
    """The best model of `--mode train_and_evaluate`, run once for all."""
    done = command(
        project, "--config tiny.yaml --mode train_and_evaluate --epochs 2 --output_dir logs/first --save_predictions"
    )
    assert done.returncode == 0, done.stderr
    return project / "models" / "saved" / "first"
