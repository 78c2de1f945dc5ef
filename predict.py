"""Predict a corpus: `python main.py --mode predict`, or `python predict.py` with the same options.

- streams: documents are read, tokenised and predicted in parts, in constant memory but for 8 bytes an id
- each part is written when it is done; the same command, started again, goes on with those that are not there
- parts are shared between processes: those of torchrun, or `--shard I/N` wherever it is started
- the process that finds all parts there puts them together and counts
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from calibration import confidences, predicted_labels, probabilities
from config import Settings
from data_utils.cache import Preparation
from data_utils.dataset import evaluation_loader
from data_utils.parts import Parts
from data_utils.paths import expand_paths, tell_of_others
from data_utils.predictions import FORMATS, Row
from data_utils.readers import Quarantine
from data_utils.records import Columns
from data_utils.stream import DocumentPart, documents_in_parts
from data_utils.tokenization import one_ahead
from data_utils.windows import Reading
from evaluate import Reader, load_reader
from evaluation_utils import check_documents, check_share, predict
from files import TEMPORARY
from models.checkpoint import checkpoint_hash
from models.registry import READING
from processes import process_count, under_torchrun
from utils import ConfigError, DataError, DataLoadError, error_handler, get_device, logger

PART_DOCUMENTS = 1000
PART_CHARACTERS = 5_000_000  # what is lost by a kill stays small with long documents too
COUNTED = ("documents", "documents_cut", "tokens", "tokens_read", "windows", "failed_windows")


class Share(NamedTuple):
    """Parts `number`, `number` + `of`, `number` + 2 `of` and on are this process's."""

    number: int
    of: int


def predict_corpus(settings: Settings) -> None:
    """Write what the checkpoint says of `--input_path` to `--output_path`, or this process's share of its parts.

    Raises:
        ConfigError: the output exists, or its parts were made by another model, from other input or otherwise.
        DataError, ModelError, TrainingError: as the stage that fails says it.
    """
    assert settings.input_path is not None
    assert settings.output_path is not None
    logger.setLevel(settings.log_level)  # under torchrun too each process tells of its own parts
    share = share_of(settings)
    output = Path(settings.output_path)
    if output.parent.resolve() in {Path(path).resolve() for path in settings.input_path}:
        raise ConfigError(f"--output_path {output}: lies in the input's folder and would be read as input later on")
    files = expand_paths(settings.input_path, unlabelled=True)
    tell_of_others(settings.input_path, files)
    reader = load_reader(settings, device_of(settings))
    preparation = Preparation(
        files=tuple(files),
        tokenizer=reader.tokenizer,
        reading=Reading(**{name: getattr(reader.settings, name) for name in READING}),
        columns=Columns(reader.settings.text_column, label=None, needs_label=False),
        problem_type=reader.settings.problem_type,
        skip_bad_lines=settings.on_bad_lines == "skip",
        words=False,
    )
    before = stamps(map(str, files))
    parts = Parts(output, {**fingerprint(reader), "the input": summary(before)})
    finished = parts.is_finished()
    if not finished:
        parts.open()
        with tempfile.TemporaryDirectory(dir=parts.folder, prefix=TEMPORARY) as scratch:
            bad_lines = Path(scratch) / "quarantine.jsonl" if preparation.skip_bad_lines else None
            with Quarantine(bad_lines) as quarantine:
                documents = predict_parts(reader, preparation, before, parts, share, quarantine)
            finished = finish(reader, parts, documents, quarantine.count, bad_lines)
    if finished:
        parts.remove()
        logger.info("%s is finished", output)


def share_of(settings: Settings) -> Share:
    """As `--shard` says, or torchrun."""
    if not under_torchrun():
        number, of = (settings.shard or "1/1").split("/")
        return Share(int(number) - 1, int(of))
    if settings.shard is not None:
        raise ConfigError("--shard does not go with torchrun, which gives each of its processes a share; leave it out")
    return Share(int(os.environ["RANK"]), process_count())


def device_of(settings: Settings) -> torch.device:
    """Under torchrun each process has a GPU of its own."""
    device = get_device(settings.device)
    if device.type == "cuda" and under_torchrun():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # or pinned memory would open a context on the first GPU, too
    return device


def fingerprint(reader: Reader) -> dict[str, Any]:
    """All that rows depend on besides the input, by the name to report."""
    return {
        "the model": checkpoint_hash(str(reader.settings.model_path)),
        "precision": reader.precision,
        **{f"--{name}": getattr(reader.settings, name) for name in (*READING, "text_column")},
        "a part": f"{PART_DOCUMENTS} documents or {PART_CHARACTERS} characters",
    }


@error_handler()
def stamps(files: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file, which tell whether it is still the same.

    Raises:
        DataLoadError: one of them is gone.
    """
    try:
        return {file: (status.st_size, status.st_mtime_ns) for file in files for status in [os.stat(file)]}
    except OSError as error:
        raise DataLoadError(
            f"{error.filename}: {error.strerror}; the input must stay until all of it is read"
        ) from error


def summary(before: Mapping[str, tuple[int, int]]) -> str:
    """How many files of how many bytes, and a hash of their paths, sizes and times of change."""
    digest = hashlib.sha256()
    for file, (size, changed) in before.items():
        digest.update(f"{file}\0{size}\0{changed}\0".encode())
    return f"{len(before):,} files, {sum(size for size, _ in before.values()):,} bytes, {digest.hexdigest()}"


@error_handler()
def predict_parts(
    reader: Reader,
    preparation: Preparation,
    before: Mapping[str, tuple[int, int]],
    parts: Parts,
    share: Share,
    quarantine: Quarantine,
) -> list[int]:
    """Write the parts of this share that are not there yet. Returns the number of documents of every part.

    Raises:
        DataLoadError: a file is no longer what its stamp in `before` says.
    """

    def wanted(number: int) -> bool:
        return number % share.of == share.number and parts.counts(number) is None

    records = preparation.records(quarantine)
    stream = documents_in_parts(records, preparation, PART_DOCUMENTS, PART_CHARACTERS, wanted)
    documents: list[int] = []
    start, predicted = time.monotonic(), 0
    bar = tqdm(desc="documents", unit=" documents", disable=None)
    with bar, contextlib.closing(one_ahead(stream)) as ahead:
        for number, (size, part) in enumerate(ahead):
            if part is not None:
                if parts.output.exists():  # another shard found all parts there; it has removed them since
                    break
                rows, counts = predict_part(reader, part)
                for file, now in stamps(part.files).items():
                    if now != before[file]:
                        raise DataLoadError(f"{file}: was changed while it was read; start again, with another output")
                parts.write(number, rows, counts)
                predicted += size
                speed = predicted / (time.monotonic() - start)
                logger.info("part %d: %d documents; %.1f documents a second", number + 1, size, speed)
            documents.append(size)
            bar.update(size)
    return documents


def predict_part(reader: Reader, part: DocumentPart) -> tuple[str, dict[str, int]]:
    """The lines of a part, and its counts.

    Raises:
        TrainingError: nothing could be read of a document.
    """
    settings = reader.settings
    loader = evaluation_loader(
        part,
        settings.batch_size,
        max_windows_per_batch=settings.max_windows_per_batch,
        pin_memory=reader.device.type == "cuda",
    )
    with reader.autocast():
        prediction = predict(reader.model, loader, reader.device)
    check_documents(prediction, part.ids)
    config = reader.model.config
    scores = probabilities(prediction.logits, settings.problem_type, config.calibration_temperature)
    predicted = predicted_labels(scores, settings.problem_type, config.thresholds)
    sure = confidences(scores, predicted).tolist()
    rows = map(Row, part.ids, predicted, sure, scores, part.token_counts, part.tokens_read)
    cut = sum(read < tokens for read, tokens in zip(part.tokens_read, part.token_counts, strict=True))
    counts = (len(part), cut, sum(part.token_counts), sum(part.tokens_read))
    lines = FORMATS[Path(str(settings.output_path)).suffix].lines(rows, reader.label_names)
    return lines, dict(zip(COUNTED, (*counts, prediction.windows, prediction.failed_windows), strict=True))


@error_handler()
def finish(reader: Reader, parts: Parts, documents: Sequence[int], bad_lines: int, quarantine: Path | None) -> bool:
    """Put the parts together if all are there: `documents` of each, and so many bad lines, were read.

    Returns whether the output is there now.

    Raises:
        DataError: the parts hold not as many documents as the input.
        TrainingError: too many windows failed.
    """
    with parts.lock:
        if parts.is_finished():
            return True
        held = [parts.counts(number) for number in range(len(documents))]
        missing = [str(number) for number, counts in enumerate(held, 1) if counts is None]
        if missing:
            logger.info(
                "%d of %d parts are still to be made by the other shards (%s); the last one puts them together",
                len(missing),
                len(held),
                ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else ""),
            )
            return False
        whole = [counts for counts in held if counts is not None]
        for number, (counts, read) in enumerate(zip(whole, documents, strict=True), 1):
            if counts["documents"] != read:
                raise DataError(f"part {number} holds {counts['documents']} documents, but {read} were read for it")
        totals = {name: sum(counts[name] for counts in whole) for name in COUNTED}
        most = reader.settings.max_window_failures
        check_share(totals["failed_windows"], totals["windows"], most, f"the log names them; {parts.folder} stays")
        totals |= {"bad_lines": bad_lines, "rows": totals["documents"] + bad_lines}
        head = FORMATS[parts.output.suffix].head(reader.label_names)
        parts.merge(len(whole), head, totals, quarantine)
    logger.info(
        "%d documents, %d windows; %.1f %% of %d tokens were read; %d documents cut; %d windows failed; "
        "%d rows read in all, %d bad lines left out",
        *(totals["documents"], totals["windows"], 100 * totals["tokens_read"] / max(1, totals["tokens"])),
        *(totals["tokens"], totals["documents_cut"], totals["failed_windows"], totals["rows"], bad_lines),
    )
    if bad_lines:
        logger.warning("%d bad lines were left out; they are in %s", bad_lines, parts.quarantine)
    return True


if __name__ == "__main__":
    from main import main

    sys.exit(main(description=__doc__, mode="predict"))
