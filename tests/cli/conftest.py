"""The real command line, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def command():
    """Run a script of the project in a folder, as a user does."""

    def run(folder: Path, arguments: str, script: str = "main.py") -> subprocess.CompletedProcess:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "xdg")}
        return subprocess.run(
            [sys.executable, ROOT / script, *arguments.split()],
            cwd=folder,
            env={**os.environ, **quiet},
            capture_output=True,
            text=True,
            timeout=300,
        )

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
        f"log_steps: 1\ncache_dir: {folder}/cache\ndevice: cpu\n"
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
