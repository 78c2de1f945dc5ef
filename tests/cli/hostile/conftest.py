"""A stranger's pickle, and copies of good files for a test to change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from main import main

CANARY = "canary"
USES = {
    "evaluate": "--mode evaluate --output_dir out --test_path {data} --model_path ",
    "export": "--mode export --output_dir out --model_path ",
    "predict": "--mode predict --input_path {data} --output_path out.csv --model_path ",
    "train": "--mode train --output_dir out --train_path {data} --val_path {data} --model_path ",
}


class Payload:
    """Makes the canary when it is unpickled, in the folder where the command runs."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(project, here, capsys, blank_curves):
    """Run the command: this exit code, one message with this part, no traceback, and no canary."""

    def run(arguments: str, code: int, part: str = "") -> None:
        got = main(f"--config {project}/tiny.yaml --cache_dir {here}/cache {arguments}".split())
        console = capsys.readouterr().err
        assert not list(here.rglob(CANARY)), console
        assert got == code, console
        assert console.count(" ERROR ") == (code > 0), console
        assert "Traceback" not in console
        assert part in console

    return run


@pytest.fixture
def data(project) -> str:
    return f"--train_path {project}/data/train --val_path {project}/data/evaluation"


@pytest.fixture
def model(trained, here) -> Path:
    return Path(shutil.copytree(trained, here / "model"))


@pytest.fixture
def encoder(encoder_folder, here) -> Path:
    return Path(shutil.copytree(encoder_folder, here / "encoder"))
