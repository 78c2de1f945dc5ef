"""Tokens to windows [N, W]; pure functions.

- a window is [CLS] + at most W-2 content tokens + [SEP], padded on the right
- neighbours share `overlap` content tokens; no window holds only what the one before already held
- what is read of a document that is longer than its windows: its first tokens, head and tail, or windows from all over
  (`Reading`)
- the mask follows from lengths, never from comparing with the pad id
- one document as padded windows, or many at once as the flat windows that are stored

N windows, W tokens a window, T content tokens, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from utils import ConfigError

Read = Literal["first", "head_tail", "random"]

SPECIALS = 2  # [CLS] and [SEP]


def check_window_options(
    window_size: int,
    overlap: int = 0,
    max_windows: int | None = None,
    max_len: int | None = None,
    read: Read = "first",
) -> None:
    """Raise ConfigError unless windows of this shape can be cut."""
    if window_size <= SPECIALS:
        raise ConfigError(f"--window_size {window_size}: a window needs room for [CLS], [SEP] and a token; at least 3")
    if not 0 <= overlap < window_size - SPECIALS:
        raise ConfigError(
            f"--window_overlap {overlap}: must be at least 0 and below the {window_size - SPECIALS} content tokens "
            "of a window"
        )
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"--max_windows {max_windows}: must be at least 1")
    if max_len is not None and max_len < 1:
        raise ConfigError(f"--max_len {max_len}: must be at least 1")
    if read == "random" and overlap:
        raise ConfigError(f"--window_overlap {overlap} does not go with --read random, whose windows share no tokens")


def window_counts(lengths_D: np.ndarray | int, window_size: int, overlap: int = 0) -> np.ndarray:
    """How many windows documents of so many content tokens make; no tokens make one."""
    content = window_size - SPECIALS
    return 1 + np.maximum(0, -(-(lengths_D - content) // (content - overlap)))


def capacity(windows: int, window_size: int, overlap: int = 0) -> int:
    """How many content tokens `windows` windows hold, each counted once."""
    content = window_size - SPECIALS
    return content + (windows - 1) * (content - overlap)


class Draw(NamedTuple):
    """A document's lot in an epoch: `key` is its own, and the same in all epochs."""

    key: tuple[int, ...]
    epoch: int

    def windows(self, count: int, among: int) -> np.ndarray:
        """Which `count` of `among` windows, ascending; each comes once before any comes again in a later epoch."""
        order = np.random.default_rng(self.key).permutation(among)
        return np.sort(order[(self.epoch * count + np.arange(count)) % among])


def read_positions(
    tokens: int, limit: int | None, read: Read, window_size: int, draw: Draw | None = None
) -> np.ndarray:
    """Which of a document's content tokens stand in its windows, all of which hold `limit` tokens: int64, ascending.

    `first`: the first ones. `head_tail`: from the head a quarter of the room (special tokens counted in), the rest from
    the tail: of 510 tokens 128 and 382, as in Sun et al. 2019, "How to Fine-Tune BERT for Text Classification?".
    `random`: whole windows, which share no tokens: with `draw` among all of those that follow each other from a drawn
    place on, each once before any comes again in a later epoch; without it in the middle of equal parts of the text.
    """
    if limit is None or tokens <= limit:
        return np.arange(tokens)
    if read == "first":
        return np.arange(limit)
    if read == "head_tail":
        head = (limit + SPECIALS) // 4
        return np.concatenate([np.arange(head), np.arange(tokens - (limit - head), tokens)])
    content = window_size - SPECIALS
    windows = limit // content
    if draw is None:
        starts_N = (np.arange(windows) * tokens + (tokens - limit) // 2) // windows
    else:
        whole = tokens // content
        first = np.random.default_rng([*draw.key, draw.epoch]).integers(tokens - whole * content, endpoint=True)
        starts_N = first + draw.windows(windows, whole) * content
    return (starts_N[:, None] + np.arange(content)).reshape(-1)


@dataclass(frozen=True)
class Reading:
    """What is read of a document, and in windows of which shape. Raises ConfigError where such cannot be cut."""

    window_size: int
    window_overlap: int = 0
    max_windows: int | None = None
    max_len: int | None = None
    read: Read = "first"

    def __post_init__(self) -> None:
        check_window_options(self.window_size, self.window_overlap, self.max_windows, self.max_len, self.read)

    @property
    def room(self) -> int | None:
        """How many content tokens the windows hold."""
        if self.max_windows is None:
            return None
        return capacity(self.max_windows, self.window_size, self.window_overlap)

    @property
    def token_limit(self) -> int | None:
        """How many content tokens of a document are read at most."""
        limits = [limit for limit in (self.max_len, self.room) if limit is not None]
        return min(limits, default=None)

    def positions(self, tokens: int, draw: Draw | None = None) -> np.ndarray:
        """Which of a document's content tokens are read (see `read_positions`)."""
        if self.max_len is not None:
            tokens = min(tokens, self.max_len)
        return read_positions(tokens, self.room, self.read, self.window_size, draw)


def word_starts_at(word_starts_T: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Which of the tokens at `positions` start a word, bool; the rest of a word whose start is left out is one too."""
    return word_starts_T[positions] | (np.diff(positions, prepend=-2) != 1)


def content_positions(tokens: int, window_size: int, overlap: int = 0) -> np.ndarray:
    """For each slot of the windows of `tokens` content tokens the token that stands there, or -1: int64 [N, W]."""
    content = window_size - SPECIALS
    starts_N = np.arange(int(window_counts(tokens, window_size, overlap))) * (content - overlap)
    lengths_N = np.minimum(tokens - starts_N, content)
    slots_W = np.arange(window_size) - 1
    is_content_NW = (slots_W >= 0) & (slots_W < lengths_N[:, None])
    return np.where(is_content_NW, starts_N[:, None] + slots_W, -1)


def cut_windows(
    token_ids: np.ndarray, window_size: int, cls_id: int, sep_id: int, pad_id: int, overlap: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Cut content tokens [T] into `input_ids` and `attention_mask`, both int32 [N, W]."""
    positions_NW = content_positions(len(token_ids), window_size, overlap)
    padded = np.append(np.asarray(token_ids, dtype=np.int32), np.int32(pad_id))
    input_ids_NW = padded[positions_NW]
    content_N = (positions_NW >= 0).sum(axis=1)
    input_ids_NW[:, 0] = cls_id
    input_ids_NW[np.arange(len(content_N)), content_N + 1] = sep_id
    attention_mask_NW = (np.arange(window_size) < content_N[:, None] + SPECIALS).astype(np.int32)
    return input_ids_NW, attention_mask_NW


def flat_windows(
    ids_T: np.ndarray, lengths_D: np.ndarray, window_size: int, cls_id: int, sep_id: int, overlap: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of D documents one after the other, without padding: int32, and the slots of each document, [D].

    `ids_T` holds the content tokens of all documents in a row, `lengths_D` how many are whose.
    """
    content = window_size - SPECIALS
    step = content - overlap
    windows_D = window_counts(lengths_D, window_size, overlap)
    places_N = np.arange(windows_D.sum()) - np.repeat(np.cumsum(windows_D) - windows_D, windows_D)
    sizes_N = np.minimum(np.repeat(lengths_D, windows_D) - places_N * step, content) + SPECIALS
    ends_N = np.cumsum(sizes_N)
    starts_N = np.repeat(np.cumsum(lengths_D) - lengths_D, windows_D) + places_N * step
    sources = np.arange(ends_N[-1]) + np.repeat(starts_N - 1 - (ends_N - sizes_N), sizes_N)
    flat = np.append(ids_T, np.int32(sep_id))[sources]  # at its ends, a window still has its neighbours' tokens
    flat[ends_N - sizes_N] = cls_id
    flat[ends_N - 1] = sep_id
    return flat, lengths_D + (windows_D - 1) * overlap + windows_D * SPECIALS
