"""The same text in two sets: hashes of 8 bytes a document, which prepared documents and checkpoints carry.

- `text_hash`: the same for texts that differ in case, character width and spaces only
- `warn_of_overlap`: which documents of a set were trained on
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from utils import logger

if TYPE_CHECKING:
    from data_utils.dataset import LongTextDataset

_LOWER = bytes(range(256)).lower()
_SPACES = b" \t\n\r\v\f"  # NFKC turns wide and non-breaking spaces into these
_SHOWN = 5


def text_hash(text: str) -> int:
    """A signed 64-bit hash (BLAKE2b) of the text without its spaces, its case and its character width."""
    if text.isascii():  # there folding is lower case, and normalisation changes nothing
        plain = text.encode().translate(_LOWER, _SPACES)
    else:
        plain = unicodedata.normalize("NFKC", text).casefold().encode("utf-8").translate(None, _SPACES)
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big", signed=True)


def warn_of_overlap(dataset: LongTextDataset, name: str, training_texts: np.ndarray) -> int:
    """How many documents of `dataset`, called `name` in the warning, have a text whose hash is in `training_texts`."""
    places = np.flatnonzero(np.isin(dataset.text_hashes, training_texts)).tolist()
    if places:
        shown = [f"{dataset.ids[place]} ({dataset.sources[place]})" for place in places[:_SHOWN]]
        logger.warning(
            "%d of the %d documents of the %s set were trained on, which makes its scores too good: %s%s; "
            "leave them out of one of the two sets (--mode analyze lists them all)",
            len(places),
            len(dataset),
            name,
            ", ".join(shown),
            ", ..." if len(places) > _SHOWN else "",
        )
    return len(places)
