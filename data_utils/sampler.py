"""Batches of documents of like window count.

- one group of documents an update: `batch_size` x `accumulation` x `num_replicas` of them, whatever the split, so that
  (8 x 1) and (2 x 4) train on the same documents in the same updates
- the order follows from (seed, epoch) alone: a restart in mid-epoch skips the batches that were done
- every document once an epoch, also with several processes; each of them gets the same number of batches
- `max_windows_per_batch` caps the windows of a batch, padding included
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils import ConfigError

POOL_GROUPS = 50


class LongTextBatchSampler(Sampler[list[int]]):
    """Yields lists of document indices for one of `num_replicas` processes.

    Documents are shuffled, sorted by window count within an even number of pools of up to 50 groups (rising and falling
    in turn, so that borders stay smooth), rolled by a random offset and cut into groups, and the groups are shuffled.
    The last group may be smaller. Within a group the documents are dealt out by length, so that all processes work on
    like lengths at the same time and differ by at most one document. All processes have the same number of batches:
    - without a cap, a batch may hold one document more than `batch_size` where the last group does not divide evenly,
      and a last group with fewer documents than processes joins the one before it;
    - with a cap, a batch is split in two, or, where all hold one document, the two shortest are joined, until the
      batches divide evenly. A document above the cap makes a batch of its own. A group is then `accumulation` batches a
      process, and its documents are the next ones by length, shuffled among those of equal length.

    Without `shuffle` the longest come first.
    """

    def __init__(
        self,
        window_counts: np.ndarray,
        batch_size: int,
        *,
        accumulation: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        max_windows_per_batch: int | None = None,
        shuffle: bool = True,
        seed: int = 42,
    ) -> None:
        counts = {"batch_size": batch_size, "accumulation": accumulation, "num_replicas": num_replicas}
        faults = [f"{name} {value} must be at least 1" for name, value in counts.items() if value < 1]
        if max_windows_per_batch is not None and max_windows_per_batch < 1:
            faults.append(f"max_windows_per_batch {max_windows_per_batch} must be at least 1")
        if not 0 <= rank < num_replicas:
            faults.append(f"rank {rank} must be between 0 and num_replicas - 1")
        if len(window_counts) < num_replicas:
            faults.append(f"{len(window_counts)} documents cannot be shared by {num_replicas} processes; start fewer")
        if faults:
            raise ConfigError("; ".join(faults))
        self.window_counts = np.asarray(window_counts)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.num_replicas = num_replicas
        self.rank = rank
        self.max_windows_per_batch = max_windows_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._plan: tuple[int, list[list[np.ndarray]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._planned(self.epoch)[0])

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._planned(self.epoch)[self.rank]:
            yield batch.tolist()

    def _planned(self, epoch: int) -> list[list[np.ndarray]]:
        """The batches of each process in `epoch`."""
        if self._plan is None or self._plan[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            if not self.shuffle:
                order = np.argsort(-self.window_counts, kind="stable")
            elif self.max_windows_per_batch is None:
                order = self._pooled_order(random)
            else:  # only documents of equal length change places, so that every epoch has the same number of batches
                order = np.lexsort((random.permutation(len(self.window_counts)), self.window_counts))
            deal = self._by_documents if self.max_windows_per_batch is None else self._by_windows
            self._plan = epoch, deal(order, random)
        return self._plan[1]

    def _pooled_order(self, random: np.random.Generator) -> np.ndarray:
        documents = len(self.window_counts)
        group = self.batch_size * self.accumulation * self.num_replicas
        pools = np.array_split(random.permutation(documents), 2 * -(-documents // (2 * POOL_GROUPS * group)))
        rising = [pool[np.argsort(self.window_counts[pool], kind="stable")] for pool in pools]
        smooth = [pool[::-1] if number % 2 else pool for number, pool in enumerate(rising)]
        return np.roll(np.concatenate(smooth), random.integers(documents))

    def _by_documents(self, order: np.ndarray, random: np.random.Generator) -> list[list[np.ndarray]]:
        size = self.batch_size * self.accumulation * self.num_replicas
        full, rest = np.split(order, [len(order) // size * size])
        groups = list(full.reshape(-1, size))
        if self.shuffle:
            random.shuffle(groups)
        if len(rest) >= self.num_replicas:
            groups.append(rest)
        elif len(rest):
            groups[-1] = np.concatenate([groups[-1], rest])
        replicas: list[list[np.ndarray]] = [[] for _ in range(self.num_replicas)]
        for group in groups:
            falling = group[np.argsort(-self.window_counts[group], kind="stable")]
            batches = -(-(len(group) // self.num_replicas) // self.batch_size)
            for rank, replica in enumerate(replicas):
                replica += np.array_split(falling[rank :: self.num_replicas], batches)
        return replicas

    def _by_windows(self, order: np.ndarray, random: np.random.Generator) -> list[list[np.ndarray]]:
        batches = self._divisible(self._capped(order))
        size = self.accumulation * self.num_replicas
        groups = [batches[start : start + size] for start in range(0, len(batches), size)]
        last = [groups.pop()] if len(groups[-1]) < size else []
        if self.shuffle:
            random.shuffle(groups)
        replicas: list[list[np.ndarray]] = [[] for _ in range(self.num_replicas)]
        for group in groups + last:
            group.sort(key=self._windows, reverse=True)
            for rank, replica in enumerate(replicas):
                replica += group[rank :: self.num_replicas]
        return replicas

    def _capped(self, order: np.ndarray) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        start, longest = 0, 0
        for end, windows in enumerate(self.window_counts[order].tolist()):
            longest = max(longest, windows)
            full = end - start == self.batch_size
            if end > start and (full or (end + 1 - start) * longest > (self.max_windows_per_batch or 0)):
                batches.append(order[start:end])
                start, longest = end, windows
        batches.append(order[start:])
        return batches

    def _divisible(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """Batches whose number is a multiple of the number of processes."""
        missing = -len(batches) % self.num_replicas
        if len(self.window_counts) - len(batches) >= missing:
            for _ in range(missing):
                largest = max(range(len(batches)), key=lambda place: len(batches[place]))
                batches[largest : largest + 1] = np.array_split(batches[largest], 2)
        else:
            for _ in range(len(batches) % self.num_replicas):
                first, second = sorted(range(len(batches)), key=lambda place: self._windows(batches[place]))[:2]
                batches[first] = np.concatenate([batches[first], batches[second]])
                del batches[second]
        return batches

    def _windows(self, batch: np.ndarray) -> int:
        return len(batch) * int(self.window_counts[batch].max())
