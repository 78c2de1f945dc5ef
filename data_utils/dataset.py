"""Documents as windows, ready for the model.

- `LongTextDataset`: prepared once and memory-mapped (see `cache`); labels, counts and coverage of all documents
- a sample, seeded and stratified by label; masking that follows the epoch into the workers
- `collate`: documents of a batch padded to the longest, windows trimmed to the longest
- `evaluation_loader`: every document once, in batches of like length
- `LongTextBatchSampler` (see `sampler`) and `load_tokenizer` (see `tokenization`) are importable from here too

B documents, N windows, W tokens a window, C labels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from config import Settings
from data_utils.augmentation import Masking
from data_utils.cache import DOCUMENTS, QUARANTINE, Preparation, prepare
from data_utils.labels import distinct_labels, encode_labels, stratified_sample
from data_utils.paths import Paths, expand_paths, tell_of_others
from data_utils.readers import OnBadLines
from data_utils.records import Columns, ProblemType, check_text
from data_utils.sampler import LongTextBatchSampler
from data_utils.stream import DocumentPart
from data_utils.tokenization import load_tokenizer, tokenize
from data_utils.windows import (
    Draw,
    Read,
    Reading,
    content_positions,
    cut_windows,
    flat_windows,
    window_counts,
    word_starts_at,
)
from files import atomic_path
from utils import ConfigError, DataFormatError, ModelError, logger

__all__ = ["LongTextBatchSampler", "LongTextDataset", "Masking", "collate", "evaluation_loader", "load_tokenizer"]


class LongTextDataset(Dataset[dict[str, Any]]):
    """Labelled documents, each cut into windows.

    Item i is a dict: `input_ids` and `attention_mask`, LongTensor [N, W]; `labels`, LongTensor [] (`multi_label`:
    FloatTensor [C]), absent where the documents have no labels; `index`, i.

    Attributes, in the order of the items: `window_counts`, `token_counts` (content tokens of the whole document),
    `tokens_read` (those in windows, each counted once), `ids`, `sources` (file:line), `text_hashes`, and `labels`:
    int64 [documents], `multi_label` int8 [documents, C], or None. `label_names` gives the labels' order: as handed in,
    or sorted, whole numbers by value.

    `read` says what is read of a document that is longer than `max_windows` (see `read_positions`); with `random`,
    `draw_windows` draws it anew in each epoch, from (seed, epoch, document), else it is evenly spread. Of what is read,
    an item holds at most `train_windows` windows, drawn anew in each epoch; all, where that is None.

    Raises DataFormatError (with file and line) for bad documents and labels that `label_names` does not know,
    DataLoadError for files that cannot be read, ModelError for a tokenizer that cannot be used, ConfigError for
    options that cannot be. Without `on_bad_lines="skip"` what an earlier run left at `quarantine_path` is removed.
    """

    def __init__(
        self,
        file_paths: Paths,
        max_len: int | None = None,
        model_name: str | Path = "roberta-base",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        window_size: int = 256,
        max_windows: int | None = 16,
        window_overlap: int = 0,
        text_column: str = "text",
        label_column: str = "label",
        problem_type: ProblemType = "single_label",
        label_names: Sequence[str] | None = None,
        require_labels: bool = True,
        on_bad_lines: OnBadLines = "error",
        quarantine_path: str | Path | None = None,
        cache_dir: Path | None = None,
        sample_data: int | None = None,
        seed: int = 42,
        augmentation: Masking | None = None,
        read: Read = "first",
        draw_windows: bool = False,
        train_windows: int | None = None,
    ) -> None:
        if sample_data is not None and sample_data < 1:
            raise ConfigError(f"--sample_data {sample_data}: must be at least 1")
        self.tokenizer = load_tokenizer(model_name) if tokenizer is None else tokenizer
        self.augmentation = augmentation
        files = tuple(expand_paths(file_paths))
        tell_of_others(file_paths, files)
        self.preparation = Preparation(
            files=files,
            tokenizer=self.tokenizer,
            reading=Reading(window_size, window_overlap, max_windows, max_len, read),
            columns=Columns(text_column, label_column, require_labels),
            problem_type=problem_type,
            skip_bad_lines=on_bad_lines == "skip",
            words=augmentation is not None and augmentation.whole_word,
        )
        self._draws = draw_windows and read == "random"
        self._train_windows = train_windows
        self._seed = seed
        folder = prepare(self.preparation, cache_dir)
        self._documents = datasets.Dataset.from_file(str(folder / DOCUMENTS))
        self.label_names = distinct_labels(self._column("labels")) if label_names is None else list(label_names)
        self.labels, known = self._known_labels()
        self.skipped = self._leave_out(np.flatnonzero(~known), folder / QUARANTINE, quarantine_path)
        self._rows = np.flatnonzero(known)
        if sample_data is not None:
            labels = None if self.labels is None else self.labels[self._rows]
            self._rows = self._rows[stratified_sample(labels, len(self._rows), sample_data, seed)]
        if self.labels is not None:
            self.labels = self.labels[self._rows]
        self.token_counts = self._column("tokens").to_numpy()[self._rows]
        if not self.token_counts.any():
            raise ModelError(
                f"{self.tokenizer.name_or_path}: the tokenizer finds no token in any of {len(self):,} documents; "
                "its files are damaged"
            )
        self.tokens_read = self._column("tokens_read").to_numpy()[self._rows]
        counts = window_counts(self.tokens_read, window_size, window_overlap)
        self._windows_read = counts
        self.window_counts = counts if train_windows is None else np.minimum(counts, train_windows)
        self._special_ids = np.array(self.tokenizer.all_special_ids)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._log_coverage()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, reading = int(self._rows[index]), self.preparation.reading
        flat = self._cell("windows", row)
        draw = Draw((self._seed, row, 1), int(self._epoch))
        positions = np.arange(self.tokens_read[index])
        if reading.read == "random":
            positions = reading.positions(len(flat), draw if self._draws else None)
            special = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
            flat, _ = flat_windows(flat[positions], self.tokens_read[[index]], reading.window_size, *special)
        shape_NW = (int(self._windows_read[index]), reading.window_size)
        input_ids = np.full(shape_NW, self.tokenizer.pad_token_id, dtype=np.int64)
        input_ids.reshape(-1)[: len(flat)] = flat
        attention_mask = torch.zeros(shape_NW, dtype=torch.int64)
        attention_mask.view(-1)[: len(flat)] = 1
        if self.augmentation is not None:
            input_ids = self._masked(self.augmentation, input_ids, row, positions)
        if (drawn := int(self.window_counts[index])) < len(input_ids):
            chosen_N = draw.windows(drawn, len(input_ids))
            input_ids, attention_mask = input_ids[chosen_N], attention_mask[chosen_N]
        item = {"input_ids": torch.from_numpy(input_ids), "attention_mask": attention_mask, "index": index}
        if self.labels is not None:
            item["labels"] = torch.as_tensor(self.labels[index], dtype=self._label_type)
        return item

    @property
    def epochs_differ(self) -> bool:
        """Whether items depend on the epoch."""
        drawn = self._draws or bool((self.window_counts < self._windows_read).any())
        return drawn or self.augmentation is not None

    @property
    def ids(self) -> Sequence[str]:
        """The documents' ids; read from the file when asked for."""
        return _Cells(self._column("id"), self._rows)

    @property
    def sources(self) -> Sequence[str]:
        """The documents' places, file:line; read from the file when asked for."""
        return _Cells(self._column("source"), self._rows)

    @property
    def text_hashes(self) -> np.ndarray:
        """A hash of each text, int64 [documents] (see `overlap.text_hash`)."""
        return self._column("text_hash").to_numpy()[self._rows]

    @property
    def truncated(self) -> int:
        """How many documents are longer than what is read of them."""
        return int((self.tokens_read < self.token_counts).sum())

    def coverage(self) -> dict[str, int | float]:
        """`tokens_total`, `tokens_read`, `share` (read of total; 1.0 where there are none), `documents_truncated`."""
        total, read = int(self.token_counts.sum()), int(self.tokens_read.sum())
        share = read / total if total else 1.0
        return {"tokens_total": total, "tokens_read": read, "share": share, "documents_truncated": self.truncated}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose masks and windows are drawn; workers that are already running see it too."""
        self._epoch[0] = epoch

    @staticmethod
    def preprocess_single_text(
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        window_size: int = 512,
        max_windows: int | None = 50,
        *,
        window_overlap: int = 0,
        max_len: int | None = None,
        read: Read = "first",
    ) -> dict[str, Tensor]:
        """One text as `input_ids` and `attention_mask`, LongTensors [N, W].

        A text that is not read to its end is reported in the log. Raises DataFormatError for a bad text, ConfigError
        for windows that cannot be cut.
        """
        reading = Reading(window_size, window_overlap, max_windows, max_len, read)
        _, tokens = next(tokenize(tokenizer, [(None, check_text(text))]))
        special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        ids = tokens.ids[reading.positions(len(tokens.ids))]
        windows = cut_windows(ids, window_size, *special, window_overlap)
        input_ids, attention_mask = (torch.from_numpy(array).long() for array in windows)
        if len(tokens.ids) > len(ids):
            which = "the first " if read == "first" else ""
            logger.warning("Of the text's %d tokens %s%d are read", len(tokens.ids), which, len(ids))
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @property
    def _label_type(self) -> torch.dtype:
        return torch.int64 if self.preparation.problem_type == "single_label" else torch.float32

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._documents.data.column(name)

    def _cell(self, name: str, row: int) -> np.ndarray:
        return self._column(name)[row].values.to_numpy(zero_copy_only=False)

    def _masked(self, masking: Masking, input_ids: np.ndarray, row: int, read: np.ndarray) -> np.ndarray:
        """`read` says which of the stored content tokens stand in the windows."""
        reading = self.preparation.reading
        positions = content_positions(len(read), reading.window_size, reading.window_overlap)
        positions[np.isin(input_ids, self._special_ids)] = -1
        word_starts = np.ones(len(read), dtype=bool)
        if masking.whole_word:
            word_starts = word_starts_at(self._cell("word_starts", row), read)
        return masking.apply(input_ids, positions, word_starts, int(self._epoch), row)

    def _known_labels(self) -> tuple[np.ndarray | None, np.ndarray]:
        """The labels of all prepared documents (None where some have none and need none), and which are known."""
        labels, known = encode_labels(self._column("labels"), self.label_names, self.preparation.problem_type)
        if known.all() or self.preparation.columns.needs_label:
            return labels, known
        if known.any():
            logger.warning("%d of %d documents have no known label; labels are not used", (~known).sum(), len(known))
        return None, np.ones_like(known)

    def _leave_out(self, unknown: np.ndarray, quarantine: Path, quarantine_path: str | Path | None) -> int:
        """Report the bad lines and, as such, the documents with unknown labels: how many there are."""
        if len(unknown) and not self.preparation.skip_bad_lines:
            fault = self._unknown_label(int(unknown[0]))
            advice = "correct it, or leave such lines out with --on_bad_lines skip"
            raise DataFormatError(f"{fault['source']}: {fault['reason']}; {advice}")
        if len(unknown) == len(self._documents):
            fault = self._unknown_label(0)
            raise DataFormatError(f"{fault['source']}: {fault['reason']}; as in all documents, none is left")
        with quarantine.open(encoding="utf-8") as lines:
            skipped = sum(1 for _ in lines) + len(unknown)
        if quarantine_path is not None and self.preparation.skip_bad_lines:
            with atomic_path(quarantine_path) as temporary:
                shutil.copyfile(quarantine, temporary)
                with temporary.open("a", encoding="utf-8") as more:
                    more.writelines(json.dumps(self._unknown_label(int(row))) + "\n" for row in unknown)
        elif quarantine_path is not None:
            Path(quarantine_path).unlink(missing_ok=True)  # of an earlier run that left some out
        if skipped:
            logger.warning("%d bad lines were left out; they are in %s", skipped, quarantine_path or quarantine)
        return skipped

    def _unknown_label(self, row: int) -> dict[str, str]:
        document = {name: self._column(name)[row].as_py() for name in ("source", "id", "labels")}
        unknown = ", ".join(repr(name) for name in document["labels"] if name not in self.label_names)
        known = ", ".join(self.label_names[:20]) + (", ..." if len(self.label_names) > 20 else "")
        reason = f"unknown label {unknown}; the known ones are {known}"
        return {"source": document.pop("source"), "reason": reason, "raw": json.dumps(document)}

    def _log_coverage(self) -> None:
        coverage, files = self.coverage(), self.preparation.files
        more = f" and {len(files) - 3:,} more files" if len(files) > 3 else ""
        logger.info(
            "%s%s: %d documents, %d windows; %.1f %% of %d tokens are read; %d documents are read in part",
            ", ".join(map(str, files[:3])),
            more,
            len(self),
            self._windows_read.sum(),
            100 * coverage["share"],
            coverage["tokens_total"],
            coverage["documents_truncated"],
        )
        if drawn := int((self.window_counts < self._windows_read).sum()):
            logger.info("of %d documents %d windows are drawn in each epoch", drawn, self._train_windows)


class _Cells(Sequence[str]):
    """Some rows of a column of strings, read one by one when asked for."""

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray) -> None:
        self._column = column
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._column[int(self._rows[index])].as_py()


def collate(items: Sequence[dict[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Items of a `LongTextDataset` as one batch.

    `input_ids` and `attention_mask` [B, N, W], N of the document with the most windows, W of the longest window;
    windows that a document does not have are padding with a mask of zeros. `labels` [B] or [B, C] where there are any;
    `index` [B].
    """
    windows = max(len(item["input_ids"]) for item in items)
    width = max(int(item["attention_mask"].sum(dim=1).max()) for item in items)
    input_ids = torch.full((len(items), windows, width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for place, item in enumerate(items):
        input_ids[place, : len(item["input_ids"])] = item["input_ids"][:, :width]
        attention_mask[place, : len(item["input_ids"])] = item["attention_mask"][:, :width]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "labels" in items[0]:
        batch["labels"] = torch.stack([item["labels"] for item in items])
    batch["index"] = torch.tensor([item["index"] for item in items])
    return batch


def dataset_options(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of `LongTextDataset` that the settings decide, the same for every set."""
    reading = ("max_len", "window_size", "max_windows", "window_overlap", "read")
    corpus = ("text_column", "label_column", "problem_type", "on_bad_lines", "sample_data", "seed")
    options = {name: getattr(settings, name) for name in (*reading, *corpus)}
    return {**options, "tokenizer": tokenizer, "cache_dir": Path(settings.cache_dir)}


def evaluation_loader(
    dataset: LongTextDataset | DocumentPart,
    batch_size: int,
    *,
    max_windows_per_batch: int | None = None,
    num_replicas: int = 1,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Batches such as `collate` makes, the longest first: each document once, in one of `num_replicas` processes."""
    return DataLoader(
        dataset,
        batch_sampler=LongTextBatchSampler(
            dataset.window_counts,
            batch_size,
            num_replicas=num_replicas,
            rank=rank,
            max_windows_per_batch=max_windows_per_batch,
            shuffle=False,
        ),
        collate_fn=partial(collate, pad_token_id=dataset.tokenizer.pad_token_id),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw its seed from the global one, as dropout does
    )
