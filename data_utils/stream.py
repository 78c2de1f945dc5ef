"""Documents streamed in parts, for what is read once and never again: nothing is kept on the disk.

- `documents_in_parts`: fixed parts in the order of the input, bounded in documents and in characters
- `DocumentPart`: such a part as a data set of windows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data_utils.cache import Preparation
from data_utils.records import Record
from data_utils.tokenization import tokenize
from data_utils.windows import cut_windows, window_counts


class DocumentPart(Dataset[dict[str, Any]]):
    """Documents in memory as content tokens; items are those of `LongTextDataset` without labels.

    Attributes, in the order of the items: `ids`, `token_counts` (content tokens of the whole document), `tokens_read`
    (those in windows, each counted once), `window_counts`; and `files`, those that they come from.
    """

    def __init__(self, records: Sequence[Record], preparation: Preparation) -> None:
        self.tokenizer = preparation.tokenizer
        reading = preparation.reading
        self._windows = reading.window_size, reading.window_overlap
        self._tokens: list[np.ndarray] = []
        self.ids = [record.id for record in records]
        self.files = list(dict.fromkeys(record.source.rpartition(":")[0] for record in records))
        self.token_counts: list[int] = []
        for _, tokens in tokenize(self.tokenizer, ((None, record.text) for record in records)):
            self.token_counts.append(len(tokens.ids))
            self._tokens.append(tokens.ids[reading.positions(len(tokens.ids))])
        self.tokens_read = [len(ids) for ids in self._tokens]
        self.window_counts = window_counts(np.array(self.tokens_read), *self._windows)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size, overlap = self._windows
        special = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id
        input_ids, attention_mask = map(torch.from_numpy, cut_windows(self._tokens[index], size, *special, overlap))
        return {"input_ids": input_ids.long(), "attention_mask": attention_mask.long(), "index": index}


def documents_in_parts(
    records: Iterable[Record],
    preparation: Preparation,
    most_documents: int,
    most_characters: int,
    wanted: Callable[[int], bool],
) -> Iterator[tuple[int, DocumentPart | None]]:
    """For each part of the input, from number 0, how many documents it has, and itself if its number is `wanted`.

    A part ends with the document that reaches one of the two bounds, so that its borders follow from the input alone.
    """
    waiting: list[Record] = []
    number = characters = 0
    for record in records:
        waiting.append(record)
        characters += len(record.text)
        if len(waiting) == most_documents or characters >= most_characters:
            yield len(waiting), DocumentPart(waiting, preparation) if wanted(number) else None
            waiting, number, characters = [], number + 1, 0
    if waiting:
        yield len(waiting), DocumentPart(waiting, preparation) if wanted(number) else None
