"""Masking of tokens or whole words on the fly.

- what is masked follows from (seed, epoch, document) alone: not from workers, order, batches or a restart
- special tokens and padding are never masked
- a token that stands in two windows is masked in both or in neither
- `max_tokens` caps the masked tokens of a document; whole words are taken whole or not at all
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils import ConfigError


@dataclass(frozen=True)
class Masking:
    """Each token (`whole_word`: each word) becomes [MASK] with `probability`.

    Raises ConfigError for a tokenizer without a mask token, a probability outside 0 to 1, a negative cap or seed.
    """

    probability: float
    max_tokens: int | None
    whole_word: bool
    mask_token_id: int
    seed: int = 42

    def __post_init__(self) -> None:
        if self.mask_token_id is None:
            raise ConfigError(
                "--use_augmentation: this tokenizer has no mask token; leave it out or change the encoder"
            )
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"--random_mask_prob {self.probability}: must be between 0 and 1")
        if (self.max_tokens or 0) < 0:
            raise ConfigError(f"--max_mask_tokens {self.max_tokens}: must be at least 0")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: must be at least 0")

    def choose(self, word_starts: np.ndarray, epoch: int, document: int) -> np.ndarray:
        """Which of a document's content tokens are masked in this epoch: bool [T]; `word_starts` is bool [T]."""
        random = np.random.default_rng([self.seed, epoch, document])
        word_of_token = np.cumsum(word_starts) - 1
        sizes = np.bincount(word_of_token)
        words = random.permutation(np.flatnonzero(random.random(len(sizes)) < self.probability))
        if self.max_tokens is not None:
            words = words[np.cumsum(sizes[words]) <= self.max_tokens]
        return np.isin(word_of_token, words)

    def apply(
        self, input_ids: np.ndarray, positions: np.ndarray, word_starts: np.ndarray, epoch: int, document: int
    ) -> np.ndarray:
        """`input_ids` [N, W] with masks set.

        `positions` [N, W] says which content token stands in each slot; slots with -1 are left alone.
        """
        chosen = np.append(self.choose(word_starts, epoch, document), False)
        return np.where(chosen[positions], self.mask_token_id, input_ids)
