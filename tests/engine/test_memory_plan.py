"""--max_memory: what is measured against direct counts, what is chosen, and that training stays as it is."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from command_line import parse_settings
from engine import memory_plan
from engine.memory_plan import (
    MARGIN,
    Cost,
    Meter,
    Plan,
    choose,
    largest_batches,
    measure_costs,
    memory_budget,
    training_state,
)
from engine.run_folder import open_run_folder
from engine.trainer import ReBertaTrainer
from main import main
from models.registry import build_model
from tests.conftest import write_corpus
from tests.training import assert_same, last_checkpoint, weights
from train import build_trainer, load_data, train
from utils import ConfigError

FLAGS = (
    "--window_size 64 --max_windows 6 --batch_size 4 --epochs 1 --optimizer_type sgd --learning_rate 0.05 --dropout 0 "
    "--num_warmup_steps 0 --log_steps 1 --device cpu --train_path train.jsonl --val_path val.jsonl --cache_dir cache"
)
WINDOWS = 6


@pytest.fixture
def arguments(tmp_path, monkeypatch, encoder_folder):
    """The command line of a small run in a fresh folder, by a program that itself takes no memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory_plan, "held_memory", lambda device: 0)
    write_corpus(tmp_path / "train.jsonl", 8, words=(300, 400))
    write_corpus(tmp_path / "val.jsonl", 4, seed=1)

    def arguments(flags: str, name: str) -> list[str]:
        return f"{FLAGS} --model_path {encoder_folder} --output_dir logs/{name} {flags}".split()

    return arguments


@pytest.fixture
def fine(monkeypatch):
    """Costs of single documents of the tiny encoder can be told apart."""
    monkeypatch.setattr(memory_plan, "MEASURED_TOKENS", 1)


@pytest.fixture
def run(arguments, blank_curves):
    def run(flags: str, name: str):
        return train(parse_settings(arguments(flags, name)))

    return run


@pytest.fixture
def trainer(arguments) -> ReBertaTrainer:
    settings = parse_settings(arguments("--memory_level 2", "measured"))
    with open_run_folder(settings) as (folder, _):
        data = load_data(settings, folder)
    model = build_model(settings, data.train.label_names, data.tokenizer)
    return build_trainer(settings, data, folder, model, torch.device("cpu"), None)


def one_pass(trainer: ReBertaTrainer, level: int, documents: int, windows: int) -> tuple[Meter, int]:
    """A training pass: its meter, and the bytes that autograd keeps for the backward pass, counted on their own."""
    model, kept = trainer.model.train(), {}
    model.config.memory_level = level
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    input_ids = torch.zeros(documents, windows, 64, dtype=torch.long)
    with Meter(model) as meter, saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids, torch.ones_like(input_ids)).logits.sum()
        loss.backward()
    return meter, sum(kept.values())


def test_the_meter_counts_what_autograd_keeps(trainer):
    one_pass(trainer, 0, 1, 1)  # gradients are there from now on
    counts = {windows: one_pass(trainer, 0, 2, windows) for windows in (2, 4, 6)}
    peaks = {windows: meter.peak for windows, (meter, _) in counts.items()}
    kept = {windows: saved for windows, (_, saved) in counts.items()}
    assert peaks[6] - peaks[4] == pytest.approx(peaks[4] - peaks[2], rel=1e-2)
    assert peaks[6] - peaks[4] == pytest.approx(kept[6] - kept[4], rel=0.05)
    assert kept[2] < peaks[2] < 1.3 * kept[2]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_expected_peak_is_that_of_larger_passes(trainer, level):
    """A little above it; the last two have an aggregation half as long as a window, and as long as one."""
    cost = measure_costs(trainer, math.inf)[level]
    one_pass(trainer, 0, 1, 1)  # gradients are there from now on
    for shape in ((4, 6), (8, 6), (3, 30), (8, 60)):
        meter, _ = one_pass(trainer, level, *shape)
        real = meter.peak + meter.peak_tables
        assert 0.98 * real < cost.peak(*shape) < 1.2 * real, shape


def test_a_measurement_that_needs_too_much_is_given_up(trainer):
    one_pass(trainer, 0, 1, 1)
    needed = max(one_pass(trainer, 0, *shape)[0].peak for shape in ((4, 2), (8, 1)))
    trainer.model.zero_grad()
    assert set(measure_costs(trainer, 1.01 * needed)) == {0, 1, 2}
    assert set(measure_costs(trainer, 0.99 * needed)) == {2}


def test_nothing_is_left_of_a_measurement(trainer):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    random = torch.get_rng_state()
    measure_costs(trainer, math.inf)
    assert_same(dict(trainer.model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.config.memory_level == 2


COSTS = {
    0: Cost(least=0, fixed=100, document=0, window=40, aggregation=0),
    1: Cost(least=0, fixed=100, document=80, window=1, aggregation=0.5),
    2: Cost(least=0, fixed=100, document=10, window=1, aggregation=0.5),
}


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (3000, Plan(0, 1, 4, 16, 2660)),
        (2660, Plan(0, 1, 4, 16, 2660)),
        (2659, Plan(1, 1, 4, 16, 484)),
        (300, Plan(2, 1, 4, 16, 204)),
        (203, Plan(2, 2, 2, 16, 152)),
        (130, Plan(2, 4, 1, 16, 126)),
        (125, None),
    ],
)
def test_the_lowest_level_that_fits_is_chosen_then_parts(room, expected):
    assert choose(COSTS, [0, 1, 2], [(4, 3), (4, 16)], 4, room) == expected


def test_a_level_that_was_asked_for_is_kept_and_an_unmeasured_one_left_out():
    assert choose(COSTS, [0], [(4, 16)], 4, 2659) == Plan(0, 2, 2, 16, 1380)
    assert choose({2: COSTS[2]}, [0, 1, 2], [(4, 16)], 4, 3000) == Plan(2, 1, 4, 16, 204)
    assert choose({2: COSTS[2]}, [1], [(4, 16)], 4, 3000) is None


def test_the_longest_document_that_fits():
    assert COSTS[0].longest(500, 510) == 10
    assert COSTS[0].longest(139, 510) == 0
    assert COSTS[2].longest(111, 510) == 1
    assert COSTS[2].longest(5000, 510) == 510
    assert COSTS[2].longest(200, 510) == 66  # 100 + (66 + 2) / 2 + 66: the aggregation outgrows a window


def test_the_largest_batches():
    counts = np.array([3, 1, 5, 5, 12])
    assert largest_batches(parse_settings(["--batch_size", "4"]), counts) == [(4, 1), (4, 3), (4, 5), (4, 12)]
    capped = parse_settings(["--batch_size", "4", "--max_windows_per_batch", "10"])
    assert largest_batches(capped, counts) == [(4, 1), (3, 3), (2, 5), (1, 12)]


@pytest.mark.parametrize(
    ("flag", "size"),
    [("12GB", 12e9), ("500MB", 5e8), ("64KB", 64e3), ("1.5GiB", 1.5 * 2**30), ("3MiB", 3 * 2**20), ("2KiB", 2048)],
)
def test_sizes(flag, size):
    assert memory_budget(parse_settings(["--max_memory", flag]), torch.device("cpu"), 1) == size


@pytest.mark.parametrize("flag", ["12", "12 GB", "much", "-1GB", "1e3MB", "12TB"])
def test_what_is_no_size(flag):
    with pytest.raises(ConfigError, match=re.escape(f"--max_memory {flag}: must look like")):
        parse_settings([f"--max_memory={flag}"])


def test_auto_is_what_is_free_within_the_containers_limit(monkeypatch, tmp_path):
    settings, cpu = parse_settings(["--max_memory", "auto"]), torch.device("cpu")
    monkeypatch.setattr(memory_plan, "held_memory", lambda device: 100)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(memory_plan, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_plan, "CGROUPS", tmp_path / "fs")
    assert memory_budget(settings, cpu, 1) == 1100
    (tmp_path / "own").write_text("4:memory:/job/step\n3:cpu,cpuacct:/\n0::/user/me\n")
    assert memory_budget(settings, cpu, 1) == 1100
    group(tmp_path / "fs/user/me", "max", "current", 500, "max")
    assert memory_budget(settings, cpu, 1) == 1100
    group(tmp_path / "fs/user", "max", "current", 500, 1000)
    assert memory_budget(settings, cpu, 1) == 100 + 1000 - 500 + 50
    assert memory_budget(settings, cpu, 2) == 100 + (1000 - 500 + 50) / 2
    group(tmp_path / "fs/memory/job", "limit_in_bytes", "usage_in_bytes", 700, 2**63 - 4096, "total_")
    assert memory_budget(settings, cpu, 1) == 100 + 1000 - 500 + 50
    group(tmp_path / "fs/memory/job/step", "limit_in_bytes", "usage_in_bytes", 700, 800, "total_")
    assert memory_budget(settings, cpu, 1) == 100 + 800 - 700 + 50


def group(folder: Path, limit: str, usage: str, used: int, most: int | str, prefix: str = "") -> None:
    """A control group of which 50 bytes are files that may be dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{limit}").write_text(f"{most}\n")
    (folder / f"memory.{usage}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 3\n{prefix}inactive_file 50\n")


def log(name: str) -> str:
    return Path(f"logs/{name}/train.log").read_text()


def test_with_enough_memory_the_weights_are_the_same_bits(run):
    flags = "--dropout 0.1 --memory_level 0 --use_augmentation"
    plain, planned = run(flags, "plain"), run(f"{flags} --max_memory 64GB", "planned")
    assert_same(weights(last_checkpoint(planned)), weights(last_checkpoint(plain)))
    assert "memory: level 0, 4 documents x 6 windows at a time, 1 parts a batch; expected peak" in log("planned")
    assert "memory:" not in log("plain")


def budget(trainer: ReBertaTrainer, need: float) -> str:
    """The flag for a budget in which a pass that needs `need` just fits."""
    return f"--max_memory {(training_state(trainer) + need * MARGIN) / 1000 + 0.1:.3f}KB"


@pytest.mark.usefixtures("fine")
def test_a_tight_budget_takes_level_2_and_single_documents(run, arguments, trainer):
    """Through the command line, with the updates of the run that has enough."""
    cost = measure_costs(trainer, math.inf)[2]
    tight = budget(trainer, cost.peak(1, WINDOWS))
    whole = run("--memory_level 0", "whole")
    assert main(arguments(tight, "tight")) == 0
    assert "memory: level 2, 1 documents x 6 windows at a time, 4 parts a batch" in log("tight")
    assert "alone: level 2 6 windows (372 tokens)" in log("tight")
    assert_same(weights(Path("logs/tight/checkpoint-2")), weights(last_checkpoint(whole)), 1e-6)


@pytest.mark.usefixtures("fine")
def test_a_run_goes_on_in_mid_epoch_under_another_plan(run, trainer):
    cost = measure_costs(trainer, math.inf)[2]
    tight = budget(trainer, cost.peak(1, WINDOWS))
    flags = "--epochs 2 --batch_size 2 --gradient_accumulation_steps 2 --eval_every 3 --save_total_limit 9"
    whole = run(f"{flags} --memory_level 0", "whole")
    expected = weights(last_checkpoint(whole))
    (whole.run_folder / "checkpoint-4").rename("gone")
    run(f"{flags} {tight}", "whole")
    assert "going on from logs/whole/checkpoint-3" in log("whole")
    assert "1 documents x 6 windows at a time, 2 parts a batch" in log("whole")
    assert_same(weights(Path("logs/whole/checkpoint-4")), expected, 1e-6)


@pytest.mark.usefixtures("fine")
def test_levels_by_budget(run, trainer):
    costs = measure_costs(trainer, math.inf)
    for level in (1, 2):
        run(budget(trainer, costs[level].peak(4, WINDOWS)), f"level{level}")
        assert f"memory: level {level}, 4 documents x 6 windows at a time, 1 parts" in log(f"level{level}")


@pytest.mark.usefixtures("fine")
def test_what_does_not_fit_is_refused_with_the_length_that_would(arguments, trainer, capsys):
    need = measure_costs(trainer, math.inf)[2].peak(1, 4)
    assert main(arguments(budget(trainer, need), "long")) == 6
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the longest document, 6 windows (372 tokens), does not fit even alone and at memory level 2" in error
    assert re.search(r"one of 4 windows \(248 tokens\) would.* Try --train_windows 4, a smaller --window_size", error)
    assert main(arguments("--max_memory 1KB --memory_level 1", "tiny")) == 6
    error = capsys.readouterr().err.splitlines()[-1]
    assert "nor would a much shorter one" in error
    assert "Try leave --memory_level out" in error
