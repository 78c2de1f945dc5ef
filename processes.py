"""The processes of a command: signals that stop them, and several of them under torchrun.

- `StopSignals`: SIGTERM and Ctrl-C, noted so that a run can save; `stop_at_once`, where there is nothing to save
- `join_processes`, `leave_processes`: one group of those that torchrun started; without torchrun nothing changes
- `gather`, `said_once`: what all of them know, and errors that all of them find
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from accelerate import PartialState

from utils import ReBertaError, StoppedError, is_main_process, logger

LONGEST_WAIT = timedelta(hours=2)  # of one process for another, while process 0 prepares the data

T = TypeVar("T")
E = TypeVar("E", bound=ReBertaError)


class StopSignals:
    """While open, the first SIGTERM or Ctrl-C is only noted, in `received`; the second one acts at once.

    Under torchrun later ones are ignored: its agent passes on to its processes what they got from the terminal already,
    and kills them after 30 seconds if they do not end. So is one that comes after an error: it is the agent's, which
    ends all processes when one has ended, and the error is what is to be told.
    """

    received: int | None = None

    def __enter__(self) -> StopSignals:
        self._owner = os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, error: type[BaseException] | None = None, *others: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if error and under_torchrun() else handler)

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner or self.received:  # a data worker goes on until its owner ends it
            return
        logger.warning("%s: stopping after this step, to save it", signal.Signals(number).name)
        self.received = number
        if not under_torchrun():
            self.__exit__()


def stop_at_once(number: int, frame: object) -> NoReturn:
    """The handler of SIGTERM outside of `StopSignals`: cleans up on the way out, as Ctrl-C does.

    Raises:
        StoppedError: always.
    """
    raise StoppedError(f"stopped by {signal.Signals(number).name}", number)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def process_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, by gloo on CPUs and NCCL on GPUs; give this one's own device.

    Without torchrun nothing happens.
    """
    if not under_torchrun():
        return device
    return PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT).device


def leave_processes(exit_code: int) -> None:
    """End the group, with its threads; after an error, where it is NCCL's, this process with it.

    NCCL ends a group in all of its processes together (pytorch/pytorch#180611): one that failed would wait for others
    that wait for it. Once it is gone torchrun stops them.
    A trainer and its model hold the group and lie in reference cycles. Left to the end of the interpreter, a thread of
    gloo that still has a tensor to release aborts the process (pytorch/pytorch#179291).
    """
    if not torch.distributed.is_initialized():
        return
    if exit_code and torch.distributed.get_backend() == "nccl":
        logging.shutdown()
        os._exit(exit_code)
    gc.collect()
    torch.distributed.destroy_process_group()


def said_once(error: E) -> E:
    """The error that all joined processes have found together, so that process 0 alone reports it.

    Those that are not joined, as in prediction, find their own.
    """
    if torch.distributed.is_initialized() and not is_main_process():
        error.level = logging.DEBUG
    return error


def gather(own: T) -> list[T]:
    """What each of the joined processes gives, in their order: in all of them, which must call this together."""
    if not torch.distributed.is_initialized():
        return [own]
    everyones = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, own)
    return everyones
