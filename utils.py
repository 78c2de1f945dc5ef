"""What every stage shares: errors with their exit codes, stage decorators, logging, device and memory.

- errors: `ReBertaError` and its family; each class carries the exit code that `main` returns
- `error_handler`, `validate_params`: decorators for stages (load data, build model, fit, evaluate, save)
- `expected_error`: what a library's error means: a full disk, no memory, a data worker that ended
- `is_main_process`: which of several processes writes and reports (see `processes`)
- `setup_logging`: one format, to the console and, where asked, to a file
- `get_device`, `mixed_precision_type`: where to compute, and in what
- `limit_gpu_memory`, `clean_gpu_memory`, `log_gpu_usage`: the GPU's memory
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import inspect
import logging
import os
import pickle
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, ParamSpec, TextIO, TypeVar, overload

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

P = ParamSpec("P")
R = TypeVar("R")

# Errors of the code, which no input should raise, except where a stage reads what strangers wrote
BUGS = (AttributeError, NameError, AssertionError, TypeError)

logger = logging.getLogger("reberta")


class ReBertaError(Exception):
    """An expected failure. Its message says what is wrong, where, and what to do next."""

    exit_code = 1
    level = logging.ERROR


class ConfigError(ReBertaError, ValueError):
    """Options or configuration."""

    exit_code = 2


class DataError(ReBertaError):
    """The documents."""

    exit_code = 3


class DataFormatError(DataError):
    """A document that breaks the format; the message opens with `file:line`."""


class DataLoadError(DataError):
    """A file that cannot be read at all."""


class ModelError(ReBertaError):
    """An encoder or a checkpoint."""

    exit_code = 4


class TrainingError(ReBertaError):
    """Training went wrong: a loss that is not finite, too many failed windows."""

    exit_code = 5


class ResourceError(ReBertaError):
    """Memory or disk."""

    exit_code = 6


class ProcessLostError(ReBertaError):
    """Another of several processes has ended, and its own message says why."""

    level = logging.WARNING


class StoppedError(ReBertaError):
    """A signal asked to stop. Exit code 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@overload
def error_handler(
    error_type: type[ReBertaError] = ..., reraise: Literal[True] = ...
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
@overload
def error_handler(
    error_type: type[ReBertaError] = ..., *, reraise: Literal[False]
) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
def error_handler(
    error_type: type[ReBertaError] = ReBertaError, reraise: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Wrap a stage so that whatever it raises is one of our errors.

    Our own errors pass through with a note that names the stage, and so do BUGS in a stage that computes, whose
    traceback helps more; what `expected_error` knows becomes what it says; anything else becomes `error_type`, raised
    `from` the original. With `reraise=False` the stage returns None instead of raising (for stages whose failure must
    not end the run, such as a figure).
    """

    def decorate(stage: Callable[P, R]) -> Callable[P, R | None]:
        name = getattr(stage, "__name__", "stage")
        bugs = BUGS if error_type in (ReBertaError, TrainingError) else ()

        @functools.wraps(stage)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | None:
            try:
                return stage(*args, **kwargs)
            except (ReBertaError, *bugs) as error:
                if isinstance(error, ReBertaError):
                    error.args = (_without_worker(str(error)), *error.args[1:])
                error.add_note(f"in stage {name}")
                if reraise:
                    raise
            except Exception as error:
                if reraise:
                    known = expected_error(error)
                    kind = error_type if known is None else type(known)
                    raise kind(f"{name}: {known or f'{type(error).__name__}: {error}'}") from error
            return None

        return wrapped

    return decorate


def expected_error(error: Exception) -> ReBertaError | None:
    """What an error of a library means where it must be expected: a full disk, no memory, weights that are none, a data
    worker or another process that ended. None for any other."""
    message = _without_worker(str(error))
    by_gloo = isinstance(error, RuntimeError) and re.search(r"\bgloo\b", message)
    if isinstance(error, torch.distributed.DistError) or by_gloo:
        return ProcessLostError(f"another process has ended, whose message says why; if none does: {message}")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY_SAID.search(message):
        return ResourceError(f"out of memory ({message}); lower --batch_size or raise --memory_level")
    if (isinstance(error, OSError) and error.errno in _DISK_FULL) or _DISK_FULL_SAID.search(message):
        return ResourceError(f"the disk is full ({message}); free some space, what was saved before is intact")
    if lost := _WORKER_LOST.search(f"{error.__cause__} {message}"):
        said = lost[0]
        for number in _signals_of_workers(error):
            said = said.replace("exited unexpectedly", f"is killed by signal: {signal.strsignal(number)}")
        if said.endswith(("Killed", "Bus error")):
            advice = "probably for want of memory: lower --num_workers or --batch_size, or see that /dev/shm is larger"
            return ResourceError(f"{said}, {advice}")
        return DataError(f"{said}; --num_workers 0 reads in this process, which says more")
    if isinstance(error, SafetensorError):
        return ModelError(f"a file of weights is damaged ({message})")
    if isinstance(error, pickle.UnpicklingError):
        return ModelError("a file holds more than weights and plain data, which are all that is ever loaded")
    if message != str(error):
        return DataError(f"{type(error).__name__}: {message}")
    return None


def _signals_of_workers(error: Exception) -> list[int]:
    """What killed the data workers that torch found ended. It tells their signal only where its handler of SIGCHLD came
    before whatever else asks for the exit status, as starting another process does; else they stand in its frame alone.
    """
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    return [-worker.exitcode for found in frames for worker in found.get("failed_workers", ()) if worker.exitcode < 0]


# EFBIG is a limit of the shell's (ulimit) or of the file system; torch and numpy say no more than that a write failed
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY_SAID = re.compile("can't allocate memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_DISK_FULL_SAID = re.compile(
    r"\(os error (28|122|27)\)|PytorchStreamWriter|unexpected pos \d+ vs|iostream error|\d+ requested and \d+ written"
)
_WORKER_LOST = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) [\w ]+(: [\w ]+\w)?")
_WORKER_RAISED = re.compile(
    r"Caught \w+ in (DataLoader worker process \d+)\.\nOriginal Traceback.*\n  .*?\n(.*)", re.DOTALL
)


def _without_worker(message: str) -> str:
    """What an error said in a data worker, where `message` is the worker's traceback."""
    raised = _WORKER_RAISED.fullmatch(message.rstrip("\n"))
    return message if raised is None else f"{raised[2].partition(': ')[2] or raised[2]} (in {raised[1]})"


def is_main_process() -> bool:
    """Whether this is the only process, or number 0 of those that torchrun started: the one that writes and reports."""
    return int(os.environ.get("RANK", 0)) == 0


def validate_params(**types: type | tuple[type, ...]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the types of a stage's arguments, e.g. `@validate_params(batch_size=int)`.

    A name that the stage does not have raises TypeError when it decorates; at the call, all wrong arguments are
    reported in one ConfigError. A bool is not an int here. None passes where it is the parameter's default.
    """

    def decorate(stage: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(stage)
        unknown = sorted(set(types) - set(signature.parameters))
        if unknown:
            raise TypeError(f"validate_params: {stage.__name__} has no parameter {', '.join(unknown)}")

        @functools.wraps(stage)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            faults = []
            for name, expected in types.items():
                if name not in given or (given[name] is None and signature.parameters[name].default is None):
                    continue
                allowed = expected if isinstance(expected, tuple) else (expected,)
                value = given[name]
                if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                    wanted = " or ".join(t.__name__ for t in allowed)
                    faults.append(f"{name} must be {wanted}, not {type(value).__name__} ({value!r})")
            if faults:
                raise ConfigError(f"{stage.__name__}: " + "; ".join(faults))
            return stage(*args, **kwargs)

        return wrapped

    return decorate


def setup_logging(level: str = "INFO", log_file: str | Path | None = None) -> logging.Logger:
    """Send the `reberta` logger to stderr and, where given, append it to `log_file`. May be called again.

    Of several processes number 0 speaks; the others tell of their own errors only.
    """
    handlers: list[logging.Handler] = [_Console(sys.stderr)]
    who = "" if is_main_process() else f"process {os.environ['RANK']}: "
    if log_file is not None and is_main_process():
        make_folder(Path(log_file).parent, "output_dir")
        try:
            handlers.append(_LogFile(log_file, encoding="utf-8"))
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise ConfigError(f"--output_dir: {log_file} cannot be written ({error.strerror}); give another") from error
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(level if is_main_process() else logging.ERROR)
    logger.propagate = False
    return logger


def make_folder(folder: Path, option: str) -> None:
    """Make it, and those above it, where it is not there. `option` has named it.

    Raises:
        ConfigError: something is in its way, or it may not be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise ConfigError(f"--{option}: the folder {folder} cannot be made ({error.strerror}); give another") from error


class _Console(logging.StreamHandler[TextIO]):
    """Lines of their own, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        _raise_lost_worker()
        super().handleError(record)


class _LogFile(logging.FileHandler):
    """A log that is given up, with one warning, when it cannot be written; else each line would print a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        _raise_lost_worker()
        logger.removeHandler(self)
        with contextlib.suppress(OSError):
            self.close()
        logger.warning("%s: goes no further (%s)", self.baseFilename, sys.exc_info()[1])


def _raise_lost_worker() -> None:
    """torch tells of a data worker's end by a signal, whose handler raises wherever the program happens to be; while a
    line is logged, logging would drop that error."""
    if (error := sys.exc_info()[1]) is not None and _WORKER_LOST.search(str(error)):
        raise error


def quiet_libraries(level: str) -> None:
    """Leave the console to us: libraries report warnings only, and draw no bars of their own."""
    if level != "DEBUG":
        transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


def get_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the GPU where there is one. Raises ConfigError for a GPU that is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no usable GPU; leave --device out, or say --device cpu")
    return device


def mixed_precision_type(wanted: str, device: torch.device) -> str:
    """The 16-bit type that `device` computes in: bf16 gives way to fp16 on a GPU without it, fp16 to bf16 on a CPU."""
    if wanted == "fp16" and device.type == "cpu":
        logger.warning("--mixed_precision_type fp16: CPUs compute in bf16, so bf16 it is")
        return "bf16"
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning("--mixed_precision_type bf16: this GPU does not have it, so fp16 it is")
        return "fp16"
    return wanted


def limit_gpu_memory(fraction: float | None) -> None:
    """Let this process use at most `fraction` of its GPU's memory."""
    if fraction is not None and not torch.cuda.is_available():
        logger.warning("--gpu_memory_fraction: there is no GPU here")
    elif fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, int(os.environ.get("LOCAL_RANK", 0)))


def clean_gpu_memory() -> None:
    """Free what lies in reference cycles, as a trainer does, and give unused GPU memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def log_gpu_usage() -> None:
    """Log allocated, reserved and total memory of each GPU."""
    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        sizes = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index), total
        gigabytes = (size / 2**30 for size in sizes)
        logger.info("GPU %d: %.2f GiB allocated, %.2f GiB reserved, %.2f GiB in all", index, *gigabytes)
