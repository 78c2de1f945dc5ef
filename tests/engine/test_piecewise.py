"""Out of memory in training: the update is the same, in smaller pieces; what cannot be mended says what to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from command_line import parse_settings
from main import main
from models.reberta import RecurrentRoBERTa
from tests.conftest import FLAGS, write_corpus
from tests.engine.test_watch import with_a_poisoned_word
from tests.training import assert_same, last_checkpoint, rows, weights
from train import train
from utils import ResourceError, TrainingError

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
DOCUMENTS = 12
SGD = "--epochs 1 --optimizer_type sgd --learning_rate 0.05"  # Adam would blow up rounding where a gradient is 0


@pytest.fixture
def arguments(tmp_path, monkeypatch, encoder_folder) -> Callable[[str, str], list[str]]:
    """The command line of a small training run in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "train.jsonl", DOCUMENTS)
    write_corpus(tmp_path / "val.jsonl", 4, seed=1)
    paths = f"--train_path train.jsonl --val_path val.jsonl --model_path {encoder_folder} --cache_dir cache"

    def arguments(flags: str, name: str) -> list[str]:
        return f"{FLAGS} {paths} --device cpu --num_warmup_steps 0 --output_dir logs/{name} {flags}".split()

    return arguments


@pytest.fixture
def run(arguments, blank_curves):
    def run(flags: str, name: str = "run"):
        return train(parse_settings(arguments(flags, name)))

    return run


@pytest.fixture
def limited(monkeypatch):
    """Let the model run out of memory; gives the numbers of documents of all training passes that were tried."""
    forward = RecurrentRoBERTa.forward
    tried: list[int] = []

    def limit(fits: Callable[[RecurrentRoBERTa, torch.Tensor], bool], error: Exception, *, backward: bool = False):
        def fail(gradient: torch.Tensor) -> None:
            raise error

        def fail_at_the_end(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            output.register_hook(fail)

        def limited(self, input_ids, attention_mask):
            if not self.training:
                return forward(self, input_ids, attention_mask)
            tried.append(len(input_ids))
            if fits(self, attention_mask):
                return forward(self, input_ids, attention_mask)
            if not backward:
                raise error
            with self.encoder.embeddings.LayerNorm.register_forward_hook(fail_at_the_end):
                return forward(self, input_ids, attention_mask)

        monkeypatch.setattr(RecurrentRoBERTa, "forward", limited)
        return tried

    return limit


def at_most(documents: int):
    return lambda model, attention_mask: len(attention_mask) <= documents


def losses(trained) -> list[float]:
    return [row["loss"] for row in rows(trained) if "loss" in row]


def warnings(trained) -> list[str]:
    lines = (trained.run_folder / "train.log").read_text().splitlines()
    return [line.split(" WARNING ")[1] for line in lines if " WARNING " in line]


@pytest.mark.parametrize(
    ("error", "backward"),
    [
        (torch.OutOfMemoryError(FULL), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), False),
        (MemoryError(), False),
    ],
)
def test_the_weights_and_losses_are_those_of_the_run_with_enough_memory(run, limited, error, backward):
    """Failing in the backward pass leaves gradients of some parameters behind, of the head for one."""
    whole = run(SGD, "whole")
    tried = limited(at_most(1), error, backward=backward)
    mended = run(SGD, "mended")
    assert tried == [4, 2, *[1] * DOCUMENTS]
    assert_same(weights(last_checkpoint(mended)), weights(last_checkpoint(whole)), 1e-6)
    assert losses(mended) == pytest.approx(losses(whole), abs=1e-5)
    assert len(losses(mended)) == DOCUMENTS / 4


def test_out_of_memory_in_the_second_micro_batch_reads_the_first_again(run, limited):
    flags = f"{SGD} --gradient_accumulation_steps 3"
    whole = run(flags, "whole")
    tried = limited(lambda model, mask: len(tried) != 2, torch.OutOfMemoryError(FULL), backward=True)
    mended = run(flags, "mended")
    assert tried == [4, 4, 2, 2, 2, 2, 2, 2]
    assert_same(weights(last_checkpoint(mended)), weights(last_checkpoint(whole)), 1e-6)
    assert losses(mended) == pytest.approx(losses(whole), abs=1e-5)


def test_the_log_says_step_documents_windows_and_what_follows(run, limited):
    tried = limited(lambda model, mask: len(tried) != 2, torch.OutOfMemoryError(FULL))
    trained = run("--epochs 1")
    assert tried == [4, 4, 2, 2, 2, 2]
    [told] = warnings(trained)
    assert re.fullmatch(
        r"step 2: out of memory with 4 documents of up to \d windows; the update starts again with 2 such documents "
        r"at a time, in 2 parts a batch from now on",
        told,
    )


def test_a_failed_window_of_an_abandoned_attempt_counts_once(run, limited, encoder_folder, tmp_path):
    encoder = with_a_poisoned_word(encoder_folder, tmp_path / "poisoned", math.inf)
    for name in ("train", "val"):
        Path(f"{name}.jsonl").write_text(Path(f"{name}.jsonl").read_text().replace("w50", "w51"))
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    lines[3]["text"] = "w51 " * 15 + "w50 " + "w51 " * 60  # the second window; the longest document comes first
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tried = limited(lambda model, mask: len(tried) != 3, torch.OutOfMemoryError(FULL))
    flags = "--epochs 1 --gradient_accumulation_steps 3 --max_window_failures 0.1"
    trained = run(f"--model_path {encoder} {flags}")
    assert tried == [4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert sum("train-3, window 1: its state is not finite" in line for line in warnings(trained)) == 1


def test_other_errors_pass_unchanged(run, limited):
    tried = limited(at_most(0), RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(TrainingError, match="RuntimeError: mat1 and mat2") as caught:
        run("")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert tried == [4]


def test_a_lone_document_raises_the_memory_level(run, limited):
    whole = run(f"{SGD} --memory_level 2", "whole")
    tried = limited(lambda model, mask: model.config.memory_level == 2, torch.OutOfMemoryError(FULL))
    mended = run(f"{SGD} --memory_level 0", "mended")
    assert tried[:4] == [4, 2, 1, 1]
    assert_same(weights(last_checkpoint(mended)), weights(last_checkpoint(whole)), 1e-6)
    assert "with one document, train-" in (mended.run_folder / "train.log").read_text()


def test_a_document_that_does_not_fit_at_all_is_named(arguments, limited, capsys):
    tried = limited(lambda model, mask: False, torch.OutOfMemoryError(FULL))
    assert main(arguments("", "run")) == 6
    assert tried == [4, 2, 1, 1]
    error = next(line for line in capsys.readouterr().err.splitlines() if " ERROR " in line)
    assert re.search(r"step 1: out of memory with one document, train-\d+ of \d windows, at memory level 2", error)
    assert "--train_windows" in error


def test_several_processes_are_told_to_plan_ahead(run, limited, monkeypatch):
    limited(at_most(2), torch.OutOfMemoryError(FULL))
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    with pytest.raises(ResourceError, match="--max_memory"):
        run("")
