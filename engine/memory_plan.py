"""What fits into `--max_memory`: memory level and documents at a time, chosen by a measurement before training.

- `Meter`: bytes of the tensors that live, counted operation by operation, on any device
- `measure_costs`: what a training pass needs, by memory level, documents and windows, from a few small passes of the
  model that will be trained, at its window size and precision
- `choose`: the lowest memory level at which whole batches fit, else parts of them (see `piecewise`); the updates stay
- `plan_memory`: measures, chooses, sets the trainer accordingly and logs it, or says what length would fit

Nothing that training sees is changed by the measurement: random numbers, gradients and weights are as before.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from pydantic import ByteSize, TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Settings
from data_utils.windows import capacity
from engine.trainer import ReBertaTrainer
from models.encoder import max_window_size
from utils import ResourceError, TrainingError, error_handler, logger

# on what is measured: masks of padded windows, kernels' workspaces, holes in the heap (up to 5 % were seen)
MARGIN = 1.1
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MEASURED_TOKENS = 256  # a measured pass is of so many tokens at least, or weight gradients would drown activations
MOST_WINDOWS = 100_000  # as good as no limit, for aggregations that have none
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 1}
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class TooMuch(Exception):
    """A measured pass needs more than there is."""


class Meter(TorchDispatchMode):
    """Bytes of the tensors that were made while it is open and still live.

    Tensors as large as the word embeddings, which are gradients of these, are counted apart: they do not grow with the
    documents, and a small pass would show them alone. TooMuch is raised once the others need more than `room`.
    """

    def __init__(self, model: nn.Module, room: float = math.inf) -> None:
        super().__init__()
        self.room = room
        self.table = model.get_input_embeddings().weight.shape  # type: ignore[operator]
        self.live = self.peak = self.live_tables = self.peak_tables = 0
        old = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in old}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), tensor.shape == self.table)
        return result

    def _note(self, storage: Any, is_table: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._forget, key, size, is_table)
            self._add(size, is_table)
            if self.live > self.room:
                raise TooMuch

    def _forget(self, key: int, size: int, is_table: bool) -> None:
        del self._known[key]
        self._add(-size, is_table)

    def _add(self, size: int, is_table: bool) -> None:
        if is_table:
            self.live_tables += size
            self.peak_tables = max(self.peak_tables, self.live_tables)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)


class Cost(NamedTuple):
    """Bytes that a training pass needs at one memory level, besides weights, gradients and optimizer state."""

    least: float
    """What the smallest of the measured passes needed: most of it gradients of the weights."""
    fixed: float
    document: float
    """A document's activations that are computed again, a part at a time; at level 0, what windows do not add to."""
    window: float
    """What is kept of each window of a document."""
    aggregation: float
    """What each window adds to a document's aggregation, which is computed when `document` is not needed."""

    def peak(self, documents: int, windows: int) -> float:
        at_once = max(self.document, self.aggregation * (windows + 2))
        return max(self.least, self.fixed + documents * (at_once + self.window * windows))

    def longest(self, room: float, limit: int) -> int:
        """Windows of the longest document that fits alone, up to `limit`; 0 if none does."""
        return bisect.bisect_right(range(1, limit + 1), room, key=lambda windows: self.peak(1, windows))


class Plan(NamedTuple):
    """What was chosen, and the batch that needs most."""

    memory_level: int
    parts: int
    documents: int
    windows: int
    peak: float


def choose(
    costs: dict[int, Cost], levels: Sequence[int], batches: Sequence[tuple[int, int]], batch_size: int, room: float
) -> Plan | None:
    """The first of `levels` at which all `batches` (documents, windows) fit, else the last one with parts of batches.

    A level without a cost is one that could not be measured, since it needs too much. None if nothing fits.
    """
    divisors = [parts for parts in range(2, batch_size + 1) if batch_size % parts == 0]
    for level, parts in [*((level, 1) for level in levels), *((levels[-1], parts) for parts in divisors)]:
        if level in costs:
            cut = [(-(-documents // parts), windows) for documents, windows in batches]
            peak, documents, windows = max((costs[level].peak(*shape), *shape) for shape in cut)
            if peak <= room:
                return Plan(level, parts, documents, windows, peak)
    return None


@error_handler(error_type=TrainingError)
def plan_memory(trainer: ReBertaTrainer) -> None:
    """Choose the trainer's memory level and parts so that training stays within `--max_memory`.

    Raises:
        ResourceError: not even the longest document alone fits; the message says what length would.
    """
    settings, model = trainer.settings, trainer.model
    assert settings.max_memory is not None
    device = trainer.args.device
    if device.type == "cpu":
        _give_back_what_is_freed()
    budget = memory_budget(settings, device, trainer.args.world_size)
    state = training_state(trainer)
    costs = measure_costs(trainer, budget - held_memory(device) - state)
    held = held_memory(device) + state  # the weights are read from their file and the libraries loaded by now
    room = (budget - held) / MARGIN
    levels = [0, 1, 2] if model.config.memory_level == "auto" else [model.config.memory_level]
    counts = trainer.data.train.window_counts
    plan = choose(costs, levels, largest_batches(settings, counts), settings.batch_size, room)
    encoder_reads = settings.aggregation == "encoder"
    limit = max_window_size(model.encoder) - 2 if encoder_reads else MOST_WINDOWS
    longest = {level: cost.longest(room, limit) for level, cost in sorted(costs.items())}
    if plan is None:
        raise ResourceError(_refusal(settings, int(counts.max()), longest.get(levels[-1], 0), levels[-1], held, budget))
    model.config.memory_level = plan.memory_level
    trainer.parts = plan.parts
    logger.info(
        "memory: level %d, %d documents x %d windows at a time, %d parts a batch; expected peak %s of %s",
        *(plan.memory_level, plan.documents, plan.windows, plan.parts),
        *(_gigabytes(held + plan.peak * MARGIN), _gigabytes(budget)),
    )
    fits = (f"level {level} {_length(settings, windows)}" for level, windows in longest.items())
    logger.info("memory: the longest document that fits, alone: %s", ", ".join(fits))


def _give_back_what_is_freed() -> None:
    """Freed tensors go back to the system, as they do until glibc starts to keep ever larger ones.

    What it keeps is full of holes: MiniLM, 8 documents at memory level 2, took 1.8 GB where 1.1 GB were in use.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)  # its own initial value; setting it is what fixes it


def _refusal(settings: Settings, windows: int, longest: int, level: int, held: float, budget: float) -> str:
    fits = f"one of {_length(settings, longest)} would" if longest else "nor would a much shorter one"
    advice = [f"--train_windows {longest}"] if longest else []
    advice += ["leave --memory_level out"] if level < 2 else []
    advice += ["a smaller --window_size or a smaller encoder"]
    return (
        f"--max_memory {settings.max_memory}: the longest document, {_length(settings, windows)}, does not fit even "
        f"alone and at memory level {level}; {fits}. Of {_gigabytes(budget)}, {_gigabytes(held)} are the program, "
        f"weights, gradients and optimizer state. Try {', '.join(advice)}"
    )


def _length(settings: Settings, windows: int) -> str:
    return f"{windows:,} windows ({capacity(windows, settings.window_size, settings.window_overlap):,} tokens)"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def memory_budget(settings: Settings, device: torch.device, processes: int) -> float:
    """Bytes that this process may hold in all. `auto`: what it holds and what is free now, shared on a CPU."""
    if settings.max_memory != "auto":
        return int(TypeAdapter(ByteSize).validate_python(settings.max_memory))
    held = held_memory(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(held + free, total * (settings.gpu_memory_fraction or 1.0))
    return held + min([psutil.virtual_memory().available, *cgroup_rooms()]) / processes


def cgroup_rooms() -> Iterator[int]:
    """Bytes that are free in this process's control group and in each above it, as containers and SLURM limit them.

    What the limit leaves beside what is in use, but for files that the kernel would drop (cgroups(7), both versions).
    """
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        limit, usage, droppable = CGROUP_V1_FILES if controllers else CGROUP_FILES
        own = root / place.strip("/")
        groups = [group for group in (own, *own.parents) if group.is_relative_to(root) and (group / limit).is_file()]
        for group in groups:
            most = (group / limit).read_text().strip()
            if most != "max":
                statistics = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                yield int(most) - int((group / usage).read_text()) + int(statistics[droppable])


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds now: on a GPU its tensors, else all of it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def training_state(trainer: ReBertaTrainer) -> int:
    """Bytes that training adds to the weights and keeps: gradients, optimizer state, moving average."""
    weights = _bytes([*trainer.model.parameters(), *trainer.model.buffers()])
    trained = _bytes([parameter for parameter in trainer.model.parameters() if parameter.requires_grad])
    gradients = 2 if trainer.args.world_size > 1 else 1  # DistributedDataParallel sends copies of them
    average = 0 if trainer.settings.ema_decay is None else weights
    return trained * (gradients + OPTIMIZER_STATES[trainer.settings.optimizer_type]) + average


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def largest_batches(settings: Settings, window_counts: np.ndarray) -> list[tuple[int, int]]:
    """(documents, windows) of the largest batch that the sampler makes of documents of each length."""
    cap = settings.max_windows_per_batch
    lengths = np.unique(window_counts).tolist()
    most = [settings.batch_size if cap is None else max(1, cap // length) for length in lengths]
    return [(min(settings.batch_size, documents), length) for documents, length in zip(most, lengths, strict=True)]


def measure_costs(trainer: ReBertaTrainer, room: float) -> dict[int, Cost]:
    """Costs by memory level; without levels 0 and 1 where two windows at once need more than `room`."""
    level_before = trainer.model.config.memory_level
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        trainer.model.train()
        costs = {2: _cost(trainer, 2)}
        try:
            costs[0] = _cost(trainer, 0, room)
            costs[1] = _cost_of_level_1(costs[0], costs[2], trainer)
        except TooMuch:
            logger.debug("memory: two windows with all their activations need more than %s", _gigabytes(room))
    trainer.model.zero_grad()
    trainer.model.config.memory_level = level_before
    return costs


class Pass(NamedTuple):
    """Bytes of one measured training pass."""

    kept: int
    """At the end of the forward pass."""
    peak: int
    tables: int
    """Gradients of the word embeddings, at their peak."""


def _measure(trainer: ReBertaTrainer, level: int, documents: int, windows: int, room: float = math.inf) -> Pass:
    """One training pass over full windows, added to gradients that are there already."""
    model, device = trainer.model, trainer.args.device
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    model.config.memory_level = level
    input_ids = torch.zeros(documents, windows, trainer.settings.window_size, dtype=torch.int64, device=device)
    with Meter(model, room) as meter:
        with trainer.accelerator.autocast():
            logits_BC = model(input_ids, torch.ones_like(input_ids)).logits
        kept = meter.live
        logits_BC.sum().backward()
    return Pass(kept, meter.peak, meter.peak_tables)


def _cost(trainer: ReBertaTrainer, level: int, room: float = math.inf) -> Cost:
    """Of level 0 or 2, from three passes: with one window more, and with twice the documents, than the smallest."""
    size = trainer.settings.window_size
    documents, windows = max(1, MEASURED_TOKENS // size), 2 if level == 2 else 1
    shorter, longer, wider = (
        _measure(trainer, level, *shape, room)
        for shape in ((documents, windows), (documents, windows + 1), (2 * documents, windows))
    )
    # with level 2 the peaks differ by sums of gradients, which grow no further
    grown = longer.kept - shorter.kept if level == 2 else longer.peak - shorter.peak
    window = grown / documents
    document = (wider.peak - shorter.peak) / documents - windows * window
    fixed = 2 * shorter.peak - wider.peak + shorter.tables
    aggregation = _aggregation(trainer, document / size) if level == 2 else 0.0
    return Cost(shorter.peak + shorter.tables, fixed, document, window, aggregation)


def _cost_of_level_1(kept: Cost, recomputed: Cost, trainer: ReBertaTrainer) -> Cost:
    """Two windows with all their activations at a time; the states of all, as with level 2."""
    document = kept.document + 2 * kept.window
    aggregation = _aggregation(trainer, document / (2 * trainer.settings.window_size))
    return Cost(recomputed.least, max(kept.fixed, recomputed.fixed), document, recomputed.window, aggregation)


def _aggregation(trainer: ReBertaTrainer, token: float) -> float:
    """The encoder reads a document's states as it reads the tokens of a window, in fp32."""
    if trainer.settings.aggregation != "encoder":
        return 0.0
    return token * (2 if trainer.settings.mixed_precision else 1)
