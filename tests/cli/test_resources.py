"""A disk that is full, memory that is short and data workers that end: exit code, one message, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from data_utils import dataset
from engine import trainer
from files import atomic_path, writing_to
from main import main
from models.checkpoint import load_model_and_config
from tests.conftest import write_corpus
from utils import ResourceError, error_handler, expected_error, setup_logging

UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


def limit(size: int) -> None:
    """Let no file grow beyond so many bytes: what a full disk does, without the rights to make one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED[1]))


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """The limit must be gone when the test ends: pytest reports to a file, maybe."""
    limit(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)


@pytest.fixture
def run(project, monkeypatch, capsys):
    """Run the command here, with a limit on its files from the start if any is given: exit code and console."""

    def run(arguments: str, size: int = UNLIMITED[0]) -> tuple[int, str]:
        monkeypatch.chdir(project)
        with limited(size):
            code = main(arguments.split())
        return code, capsys.readouterr().err

    return run


def one_message(console: str, *parts: str) -> None:
    [line] = [line for line in console.splitlines() if " ERROR " in line]
    assert all(part in line for part in parts), console
    assert "Traceback" not in console
    assert "Logging error" not in console


def _arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema({"a": pa.int64()})) as writer:
        writer.write_batch(pa.record_batch({"a": np.zeros(9999, dtype=np.int64)}))


WRITERS = {
    "torch": lambda path: torch.save({"a": torch.zeros(9999)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(9999)}, path),
    "pyarrow": _arrow,
    "numpy": lambda path: np.save(path, np.zeros(9999)),
    "text": lambda path: path.write_text("x" * 9999),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_whoever_writes_it(tmp_path, writer):
    path = tmp_path / "file"

    @error_handler()
    def save():
        with limited(1000), writing_to(path):
            WRITERS[writer](path)

    with pytest.raises(ResourceError, match=f"{path}: the disk is full .*free some space"):
        save()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_the_system_says_of_a_full_disk(number):
    assert "the disk is full" in str(expected_error(OSError(number, os.strerror(number))))
    assert "the disk is full" in str(
        expected_error(RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})"))
    )
    assert expected_error(OSError(errno.EACCES, "no")) is None


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / "report"
    path.write_text("old")
    with pytest.raises(ResourceError, match="report: the disk is full"), limited(1000), atomic_path(path) as temporary:
        temporary.write_text("x" * 5000)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report": "old"}


def test_a_log_that_does_not_fit_is_given_up_with_one_warning(tmp_path, capsys):
    log = setup_logging("INFO", tmp_path / "run.log")
    with limited(200):
        for number in range(20):
            log.info("line %d", number)
    console = capsys.readouterr().err
    assert console.count("goes no further") == 1
    assert console.count(" INFO line ") == 20
    assert "Traceback" not in console


@pytest.mark.parametrize("size", [150_000, 50_000])
def test_a_disk_that_fills_up_in_training(project, run, monkeypatch, size):
    """The second checkpoint does not fit: safetensors' file, or torch's. The first one is gone on from."""
    step_end = trainer.EngineCallback.on_step_end

    def fill_up(self, args, state, control, **kwargs):
        if state.global_step == 5:
            limit(size)
        step_end(self, args, state, control, **kwargs)

    name = f"full{size}"
    arguments = f"--config tiny.yaml --mode train --epochs 3 --save_total_limit 9 --output_dir logs/{name}"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.EngineCallback, "on_step_end", fill_up)
        code, console = run(arguments)
    assert code == 6, console
    one_message(console, name, "the disk is full", "free some space, what was saved before is intact")
    assert [path.name for path in (project / "logs" / name).glob("checkpoint-*")] == ["checkpoint-3"]
    load_model_and_config(project / "models" / "saved" / name / "model.pt")
    code, console = run(arguments)
    assert code == 0, console
    assert f"going on from logs/{name}/checkpoint-3" in console
    assert (project / "logs" / name / "checkpoint-9").is_dir()


def test_a_disk_that_is_full_from_the_start(run):
    code, console = run("--config tiny.yaml --mode train --epochs 1 --output_dir logs/full_first", 500)
    assert code == 6, console
    one_message(console, "logs/full_first/", "the disk is full")


def test_a_cache_that_does_not_fit(project, run):
    write_corpus(project / "long.jsonl", 1000)
    cache = project / "full_cache"
    arguments = f"--config tiny.yaml --mode train --epochs 1 --train_path long.jsonl --cache_dir {cache}"
    code, console = run(f"{arguments} --output_dir logs/full_cache", 50_000)
    assert code == 6, console
    one_message(console, str(cache), "the disk is full")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_report_that_does_not_fit(project, trained, run):
    arguments = (
        f"--mode evaluate --model_path {trained} --test_path data/validation --device cpu --output_dir full_report"
    )
    code, console = run(arguments, 9_000)
    assert code == 6, console
    one_message(console, "full_report/", "the disk is full")
    assert not list((project / "full_report").glob(".*"))


ENDS = {
    "exit": (lambda: os._exit(13), 3, r"DataLoader worker \(pid(\(s\))? \d+\) exited unexpectedly.*--num_workers 0"),
    "kill": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        6,
        r"DataLoader worker \(pid(\(s\))? \d+\) is killed by signal: Killed, probably for want of memory",
    ),
    "raise": (lambda: os.environ["LOST"], 3, r"KeyError: 'LOST' \(in DataLoader worker process \d\)"),
    "memory": (lambda: bytearray(2**62), 6, r"out of memory \(MemoryError \(in DataLoader worker process \d\)\)"),
}


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("end", ENDS)
def test_a_data_worker_that_ends(trained, run, monkeypatch, mode, end):
    item = dataset.LongTextDataset.__getitem__
    act, exit_code, message = ENDS[end]

    def fall(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 5:
            act()
        return item(self, index)

    monkeypatch.setattr(dataset.LongTextDataset, "__getitem__", fall)
    what = "--config tiny.yaml --epochs 1" if mode == "train" else f"--model_path {trained} --test_path data/validation"
    code, console = run(f"--mode {mode} {what} --device cpu --num_workers 2 --output_dir logs/worker-{mode}-{end}")
    assert code == exit_code, console
    one_message(console)
    assert re.search(message, console), console


def test_a_killed_data_worker_whose_signal_nobody_heard(trained, run, monkeypatch):
    """As when something else asks for its exit status first: torch finds it gone after five seconds, and no more."""
    item = dataset.LongTextDataset.__getitem__

    def fall(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, index)

    monkeypatch.setattr(dataset.LongTextDataset, "__getitem__", fall)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._error_if_any_worker_fails", lambda: None)
    where = "--test_path data/validation --device cpu --num_workers 2 --output_dir logs/unheard"
    code, console = run(f"--mode evaluate --model_path {trained} {where}")
    assert code == 6, console
    one_message(console, "is killed by signal: Killed, probably for want of memory")


def test_a_data_worker_that_is_killed_takes_the_others_with_it(project, start):
    """From outside, as the system does it when memory runs out."""
    process = start(project, "--config tiny.yaml --mode train --epochs 500 --num_workers 2 --output_dir logs/killed")
    metrics = project / "logs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    workers[0].kill()
    _, console = process.communicate(timeout=120)
    assert process.returncode == 6, console
    assert console.count(" ERROR ") == 1
    assert f"{workers[0].pid}) is killed by signal: Killed, probably for want of memory" in console
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_memory_that_is_short_in_evaluation(trained, run, monkeypatch):
    monkeypatch.setattr("evaluation_utils.probabilities", lambda *arguments: torch.empty(2**60))
    code, console = run(f"--mode evaluate --model_path {trained} --test_path data/validation --output_dir no_memory")
    assert code == 6, console
    one_message(console, "out of memory", "can't allocate memory", "lower --batch_size")
