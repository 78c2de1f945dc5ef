"""Errors, stage decorators, files and the device."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace

import pytest
import torch

from files import atomic_path
from utils import (
    ConfigError,
    DataError,
    DataFormatError,
    DataLoadError,
    ModelError,
    ReBertaError,
    ResourceError,
    TrainingError,
    clean_gpu_memory,
    error_handler,
    get_device,
    limit_gpu_memory,
    log_gpu_usage,
    mixed_precision_type,
    setup_logging,
    validate_params,
)


def test_exit_codes():
    codes = {ReBertaError: 1, ConfigError: 2, DataError: 3, ModelError: 4, TrainingError: 5, ResourceError: 6}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert DataFormatError.exit_code == DataLoadError.exit_code == 3


def test_error_handler_turns_anything_into_the_stages_error():
    @error_handler(error_type=ModelError)
    def build():
        raise KeyError("weights")

    with pytest.raises(ModelError, match="build: KeyError: 'weights'") as caught:
        build()
    assert isinstance(caught.value.__cause__, KeyError)


def test_error_handler_passes_our_own_errors_with_a_note():
    @error_handler(error_type=ModelError)
    def load():
        raise DataFormatError("a.jsonl:3: what")

    with pytest.raises(DataFormatError) as caught:
        load()
    assert str(caught.value) == "a.jsonl:3: what"
    assert caught.value.__notes__ == ["in stage load"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_error_handler_knows_what_is_short(error, message):
    @error_handler(error_type=TrainingError)
    def fit():
        raise error

    with pytest.raises(ResourceError, match=message):
        fit()


def test_error_handler_may_let_a_stage_go():
    @error_handler(error_type=ReBertaError, reraise=False)
    def draw():
        raise ValueError

    assert draw() is None


def test_validate_params_collects_all_faults():
    @validate_params(batch_size=int, path=(str, bytes), seed=int, cap=int)
    def load(batch_size, path="a", seed=None, cap=None):
        return batch_size

    assert load(3) == 3
    with pytest.raises(ConfigError) as caught:
        load(True, path=3, cap="x")
    assert str(caught.value) == (
        "load: batch_size must be int, not bool (True); path must be str or bytes, not int (3); "
        "cap must be int, not str ('x')"
    )


def test_validate_params_finds_a_typo_when_it_decorates():
    with pytest.raises(TypeError, match="load has no parameter batchsize"):

        @validate_params(batchsize=int)
        def load(batch_size):
            return batch_size


def test_atomic_path_writes_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "report.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(UnicodeEncodeError), atomic_path(target) as temporary:
        temporary.write_text("half, then \ud800", encoding="utf-8")
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["report.txt"]


def test_setup_logging_writes_to_the_file_at_its_level(tmp_path):
    log = setup_logging("WARNING", tmp_path / "a" / "run.log")
    log.info("quiet")
    log.warning("loud")
    setup_logging()
    assert [line.split(" ", 2)[2] for line in (tmp_path / "a" / "run.log").read_text().splitlines()] == ["WARNING loud"]


@pytest.mark.parametrize("handler", [0, 1])
def test_a_data_worker_that_ends_while_a_line_is_logged(tmp_path, monkeypatch, handler):
    """torch's handler of SIGCHLD raises wherever the program is."""

    def write(text):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    log = setup_logging(log_file=tmp_path / "run.log")
    monkeypatch.setattr(log.handlers[handler], "stream", SimpleNamespace(write=write, flush=int, close=int))
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        log.info("a line")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_device() == get_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no usable GPU"):
        get_device("cuda")


def test_mixed_precision_falls_back_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    assert mixed_precision_type("bf16", torch.device("cpu")) == "bf16"
    assert caplog.text == ""
    assert mixed_precision_type("fp16", torch.device("cpu")) == "bf16"
    assert "CPUs compute in bf16" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert mixed_precision_type("bf16", torch.device("cuda")) == "fp16"
    assert "this GPU does not have it" in caplog.text


def test_gpu_functions_do_nothing_on_a_cpu(caplog):
    assert not torch.cuda.is_available()
    clean_gpu_memory()
    log_gpu_usage()
    limit_gpu_memory(None)
    assert caplog.text == ""
    limit_gpu_memory(0.5)
    assert caplog.messages == ["--gpu_memory_fraction: there is no GPU here"]
