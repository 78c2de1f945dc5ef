"""Documents prepared once: read, checked, tokenised and cut into windows, kept in a memory-mapped Arrow file.

- the key of a cache is made of all that shapes it: the files (path as written, size, time of change), the tokenizer,
  the settings, the version of this format; a change of any makes another cache
- built beside its place and moved into it when complete; one process builds, others wait for it
- what is found incomplete, by the sizes of its files, is built again
- the bad lines that were left out are kept with it, so that a second start reports them too
- it is safe to delete the folder at any time
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from config import Settings
from data_utils.overlap import text_hash
from data_utils.readers import Quarantine, checked_records
from data_utils.records import Columns, ProblemType, Record
from data_utils.tokenization import Tokens, batches, tokenize
from data_utils.windows import Reading, flat_windows, word_starts_at
from files import writing_to
from utils import DataLoadError, ResourceError, logger

FORMAT = 3
DEFAULT_CACHE = Path(Settings.model_fields["cache_dir"].default).expanduser()
DOCUMENTS, QUARANTINE, MANIFEST = "documents.arrow", "quarantine.jsonl", "manifest.json"
_FLUSH_TOKENS = 500_000

Row = tuple[str | list[str] | None, str, str, int]  # a document's label or labels, id, source and text hash

SCHEMA = pa.schema(
    {
        # the windows one after the other, without the padding of the last; with `read` random the content tokens that
        # windows are taken from
        "windows": pa.list_(pa.int32()),
        "tokens": pa.int64(),  # content tokens of the whole document
        "tokens_read": pa.int64(),  # those that stand in windows, each counted once
        "labels": pa.list_(pa.string()),
        "id": pa.string(),
        "source": pa.string(),
        "text_hash": pa.int64(),
        "word_starts": pa.list_(pa.bool_()),  # of the content tokens in `windows`; null where words were not asked for
    }
)


@dataclass(frozen=True)
class Preparation:
    """All that shapes the prepared documents."""

    files: tuple[Path, ...]
    tokenizer: PreTrainedTokenizerBase
    reading: Reading
    columns: Columns
    problem_type: ProblemType
    skip_bad_lines: bool
    words: bool

    def records(self, quarantine: Quarantine) -> Iterator[Record]:
        """The documents of the files; bad lines go to `quarantine`, or end the reading where none may be skipped."""
        return checked_records(self.files, self.columns, self.problem_type, quarantine if self.skip_bad_lines else None)

    def key(self) -> str:
        """A name for the cache of exactly this preparation."""
        reading = self.reading
        content = {
            "format": FORMAT,
            "files": [_stamp(file) for file in self.files],
            "tokenizer": self._tokenizer_hash,
            "tokenizers": tokenizers.__version__,
            "special": [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id],
            "windows": [reading.window_size, reading.window_overlap, reading.token_limit],
            "read": [reading.read, *([] if reading.read == "first" else [reading.max_len, reading.room])],
            "reading": [self.columns, self.problem_type, self.skip_bad_lines, self.words],
        }
        return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:32]

    @functools.cached_property
    def _tokenizer_hash(self) -> str:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return hashlib.sha256(backend.to_str().encode("utf-8")).hexdigest()

    def build(self, folder: Path) -> None:
        """Write the prepared documents, the quarantine and, last, the manifest into `folder`."""
        path = folder / DOCUMENTS
        with (
            Quarantine(folder / QUARANTINE) as quarantine,
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_stream(file, SCHEMA) as writer,
            _frozen_heap(),
        ):
            for documents in batches(self._tokenized(quarantine), lambda row: len(row[1].ids), _FLUSH_TOKENS):
                writer.write_batch(self._record_batch(documents))
        sizes = {name: (folder / name).stat().st_size for name in (DOCUMENTS, QUARANTINE)}
        (folder / MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")

    def _tokenized(self, quarantine: Quarantine) -> Iterator[tuple[Row, Tokens]]:
        bar = tqdm(self.records(quarantine), desc="Preparing documents", unit=" documents", disable=None)
        rows = (((*record[1:], text_hash(record.text)), record.text) for record in bar)
        return tokenize(self.tokenizer, rows, self.words)

    def _record_batch(self, documents: list[tuple[Row, Tokens]]) -> pa.RecordBatch:
        reading = self.reading
        rows, tokens = zip(*documents, strict=True)
        labels, names, sources, hashes = zip(*rows, strict=True)
        lengths_D = np.array([len(document.ids) for document in tokens])
        kept = [self._kept(document) for document in tokens]
        ids = np.concatenate([document.ids for document in kept])
        kept_D = np.array([len(document.ids) for document in kept])
        stored, slots_D = ids, kept_D
        if reading.read != "random":
            special = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
            stored, slots_D = flat_windows(ids, kept_D, reading.window_size, *special, reading.window_overlap)
        columns = {
            "windows": _lists(stored, slots_D),
            "tokens": lengths_D,
            "tokens_read": lengths_D if reading.token_limit is None else np.minimum(lengths_D, reading.token_limit),
            "labels": [[label] if isinstance(label, str) else label for label in labels],
            "id": names,
            "source": sources,
            "text_hash": hashes,
            "word_starts": [None] * len(documents),
        }
        if self.words:
            columns["word_starts"] = _lists(np.concatenate([document.word_starts for document in kept]), kept_D)
        return pa.record_batch(columns, schema=SCHEMA)

    def _kept(self, document: Tokens) -> Tokens:
        """The tokens that its windows are cut from."""
        ids, word_starts = document
        if self.reading.read == "head_tail":
            places = self.reading.positions(len(ids))
            return Tokens(ids[places], None if word_starts is None else word_starts_at(word_starts, places))
        limit = self.reading.max_len if self.reading.read == "random" else self.reading.token_limit
        return Tokens(ids[:limit], None if word_starts is None else word_starts[:limit])


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep what exists already out of garbage collection: with all that torch loads, a full one takes 0.15 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _lists(values: np.ndarray, lengths_D: np.ndarray) -> pa.ListArray:
    """`values` cut into lists of these lengths."""
    return pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths_D)).astype(np.int32), values)


def prepare(preparation: Preparation, cache_dir: Path | None = None) -> Path:
    """The folder that holds these prepared documents; they are prepared now if they are not there yet.

    Raises DataError for documents that cannot be read, ResourceError where the cache folder cannot be written.
    """
    root = Path(cache_dir or DEFAULT_CACHE)
    key = preparation.key()
    folder = root / key
    if is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _acquired(root / f"{key}.lock")
    except OSError as error:
        raise ResourceError(f"{root}: the cache cannot be written ({error}); make the folder writable") from error
    with lock:
        if not is_whole(folder):
            _build_in_place(preparation, key, folder)
    return folder


def _acquired(path: Path) -> contextlib.AbstractContextManager:
    """The lock, which is released when the context ends."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        logger.info("Another process prepares these documents; waiting for it")
        return lock.acquire()


def _build_in_place(preparation: Preparation, key: str, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{key}.*"):
        shutil.rmtree(leftover)
    if folder.exists():
        logger.warning("%s: the cache is incomplete or damaged; it is built again", folder)
        shutil.rmtree(folder)
    temporary = folder.parent / f".{key}.{os.getpid()}"
    temporary.mkdir()
    try:
        with writing_to(folder.parent):
            preparation.build(temporary)
        if preparation.key() != key:
            raise DataLoadError(f"{preparation.files[0]}: a data file was changed while it was read; start again")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a complete cache."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == sizes[name] for name in (DOCUMENTS, QUARANTINE))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stamp(file: Path) -> tuple[str, str, int, int]:
    """As it was named too, for that stands in ids and errors."""
    status = file.stat()
    return str(file), str(file.resolve()), status.st_size, status.st_mtime_ns
