"""The end of a process of several, with mocks for what needs a GPU. See tests/cli/test_processes.py for the rest."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from processes import leave_processes, said_once
from utils import TrainingError


class EndedAtOnce(Exception):
    pass


@pytest.mark.parametrize(("joined", "level"), [(True, logging.DEBUG), (False, logging.ERROR)])
def test_processes_that_are_not_joined_tell_of_their_own_errors(monkeypatch, joined, level):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: joined)
    assert said_once(TrainingError("x")).level == level


@pytest.mark.parametrize(("backend", "exit_code"), [("nccl", 0), ("gloo", 0), ("gloo", 5), ("nccl", 5), ("nccl", 143)])
def test_one_that_failed_does_not_wait_for_others_that_wait_for_it(monkeypatch, backend, exit_code):
    ended = []

    def end(code):
        ended.append(code)
        raise EndedAtOnce

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append("together"))
    monkeypatch.setattr(os, "_exit", end)
    if backend == "nccl" and exit_code:
        with pytest.raises(EndedAtOnce):
            leave_processes(exit_code)
        assert ended == [exit_code]
    else:
        leave_processes(exit_code)
        assert ended == ["together"]
