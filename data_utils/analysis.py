"""What is in a corpus, before any training.

- lengths in tokens, and how many documents, and what share of the tokens, 4, 8, 16, 32, 64 windows cover
- label counts
- duplicates within a split, and documents that stand in two splits: equal but for case, character width and spaces
- written as analysis.json, analysis.txt and token_lengths.png

Texts are read as a stream; of each document a token count and a hash of 8 bytes stay in memory.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from config import DEFAULT_ENCODER, Settings
from data_utils.labels import label_order
from data_utils.overlap import text_hash
from data_utils.paths import Paths, expand_paths, tell_of_others
from data_utils.readers import OnBadLines, Quarantine, checked_records
from data_utils.records import Columns, ProblemType, Record
from data_utils.tokenization import load_tokenizer, tokenize
from data_utils.windows import capacity, check_window_options
from files import made_up_folder, write_text
from utils import logger, setup_logging
from visualization_utils import save_length_coverage

WINDOW_COUNTS = (4, 8, 16, 32, 64)
_SHOWN_GROUPS = 20


class _Split(NamedTuple):
    name: str
    files: list[Path]
    columns: Columns
    problem_type: ProblemType
    skip_bad_lines: bool

    def records(self, quarantine: Quarantine) -> Iterator[Record]:
        return checked_records(self.files, self.columns, self.problem_type, quarantine if self.skip_bad_lines else None)


def analyze(
    splits: Mapping[str, Paths],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_size: int = 256,
    window_overlap: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    problem_type: ProblemType = "single_label",
    require_labels: bool = True,
    on_bad_lines: OnBadLines = "error",
    quarantine_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Describe the documents of `splits` (name -> files or folders).

    Returns `window_size`, `window_overlap`, `splits` (name -> `documents`, `bad_lines`, `unlabelled`, `labels`,
    `lengths`, `coverage`), `duplicates` and `leaks` (lists of groups of equal documents, each of these with `split`,
    `id`, `source`, `label`), and `token_counts` (name -> int64 array), which alone is not plain Python.
    With `on_bad_lines="skip"` the bad lines of a split go to `quarantine_dir`/quarantine-NAME.jsonl.
    Raises DataError as `read_records` does, and ConfigError for windows that cannot be cut.
    """
    check_window_options(window_size, window_overlap)
    columns = Columns(text_column, label_column, require_labels)
    parts = [
        _Split(name, expand_paths(paths), columns, problem_type, on_bad_lines == "skip")
        for name, paths in splits.items()
    ]
    report: dict[str, Any] = {"window_size": window_size, "window_overlap": window_overlap, "splits": {}}
    token_counts, hashes = {}, {}
    for part in parts:
        tell_of_others(splits[part.name], part.files)
        path = None if quarantine_dir is None else Path(quarantine_dir) / f"quarantine-{part.name}.jsonl"
        if path is not None:
            path.unlink(missing_ok=True)  # an earlier analysis's
        with Quarantine(path if part.skip_bad_lines else None) as quarantine:
            summary, token_counts[part.name], hashes[part.name] = _read_split(part, tokenizer, quarantine)
        lengths = token_counts[part.name]
        summary["bad_lines"] = quarantine.count
        summary["lengths"] = _lengths(lengths)
        summary["coverage"] = [_coverage(lengths, windows, window_size, window_overlap) for windows in WINDOW_COUNTS]
        report["splits"][part.name] = summary
    groups = _equal_documents(parts, hashes)
    report["duplicates"] = [same for group in groups for same in _within_splits(group)]
    report["leaks"] = [group for group in groups if len({document["split"] for document in group}) > 1]
    return report | {"token_counts": token_counts}


def _read_split(
    part: _Split, tokenizer: PreTrainedTokenizerBase, quarantine: Quarantine
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """A split's counts, and of each document the number of tokens, int64, and the hash, int64."""
    labels: Counter[str] = Counter()
    unlabelled = 0
    token_counts, hashes = array("q"), array("q")
    bar = tqdm(part.records(quarantine), desc=f"Reading {part.name}", unit=" documents", disable=None)
    keyed = (((record.label, text_hash(record.text)), record.text) for record in bar)
    for (label, hashed), tokens in tokenize(tokenizer, keyed):
        labels.update([label] if isinstance(label, str) else label or [])
        unlabelled += label is None
        token_counts.append(len(tokens.ids))
        hashes.append(hashed)
    counts = {name: labels[name] for name in label_order(labels)}
    summary = {"documents": len(token_counts), "unlabelled": unlabelled, "labels": counts}
    return summary, np.array(token_counts, dtype=np.int64), np.array(hashes, dtype=np.int64)


def _lengths(token_counts: np.ndarray) -> dict[str, float]:
    quantiles = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    values = {name: float(np.percentile(token_counts, share)) for name, share in quantiles.items()}
    return {"total": int(token_counts.sum()), "mean": float(token_counts.mean())} | values


def _coverage(token_counts: np.ndarray, windows: int, window_size: int, overlap: int) -> dict[str, float]:
    room = capacity(windows, window_size, overlap)
    whole = int((token_counts <= room).sum())
    tokens = int(np.minimum(token_counts, room).sum())
    return {
        "windows": windows,
        "tokens": room,
        "documents": whole,
        "documents_share": whole / len(token_counts),
        "tokens_share": tokens / max(int(token_counts.sum()), 1),
    }


def _equal_documents(parts: list[_Split], hashes: Mapping[str, np.ndarray]) -> list[list[dict[str, Any]]]:
    """Groups of equal documents, in the order of their first; the files are read again only if there are any."""
    values, counts = np.unique(np.concatenate(list(hashes.values())), return_counts=True)
    groups: dict[int, list[dict[str, Any]]] = {}
    repeated = set(values[counts > 1].tolist())
    for part in parts if repeated else []:
        with Quarantine(os.devnull) as quarantine:
            for record in part.records(quarantine):
                if (hashed := text_hash(record.text)) in repeated:
                    document = {"split": part.name, "id": record.id, "source": record.source, "label": record.label}
                    groups.setdefault(hashed, []).append(document)
    return list(groups.values())


def _within_splits(group: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for split in dict.fromkeys(document["split"] for document in group):
        same = [document for document in group if document["split"] == split]
        if len(same) > 1:
            yield same


def write_analysis(report: Mapping[str, Any], output_dir: str | Path) -> None:
    """Write analysis.json, analysis.txt and token_lengths.png (all splits together) into `output_dir`."""
    folder = Path(output_dir)
    plain = {name: value for name, value in report.items() if name != "token_counts"}
    write_text(folder / "analysis.json", json.dumps(plain, indent=2, ensure_ascii=False))
    write_text(folder / "analysis.txt", format_analysis(report))
    token_counts = np.concatenate(list(report["token_counts"].values()))
    path = folder / "token_lengths.png"
    save_length_coverage(token_counts, report["window_size"], path, report["window_overlap"])


def format_analysis(report: Mapping[str, Any]) -> str:
    """The report as text with tables."""
    blocks = [_split_text(name, summary, report) for name, summary in report["splits"].items()]
    for kind, title in (("duplicates", "Duplicates within a split"), ("leaks", "Documents that stand in two splits")):
        groups = report[kind]
        lines = [f"{title}: {len(groups) or 'none'}"]
        lines += ["  " + "  =  ".join(_place(document) for document in group) for group in groups[:_SHOWN_GROUPS]]
        if len(groups) > _SHOWN_GROUPS:
            lines.append(f"  ... and {len(groups) - _SHOWN_GROUPS} more in analysis.json")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _place(document: Mapping[str, Any]) -> str:
    return f"{document['split']} {document['id']} ({document['source']})"


def _split_text(name: str, summary: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    lengths = summary["lengths"]
    overlap = f", {report['window_overlap']} shared by neighbours" if report["window_overlap"] else ""
    lines = [
        f"{name}: {summary['documents']:,} documents, {lengths['total']:,} tokens; "
        f"{summary['bad_lines']} bad lines left out, {summary['unlabelled']} documents without label",
        "",
        "tokens a document   " + "".join(f"{key:>10}" for key in ("min", "median", "mean", "p90", "p99", "max")),
        "                    "
        + "".join(f"{lengths[key]:>10,.0f}" for key in ("min", "median", "mean", "p90", "p99", "max")),
        "",
        f"windows of {report['window_size']} tokens{overlap}",
        f"{'windows':>10}{'tokens':>10}{'whole documents':>18}{'share':>10}{'tokens read':>14}",
    ]
    for row in summary["coverage"]:
        lines.append(
            f"{row['windows']:>10}{row['tokens']:>10,}{row['documents']:>18,}{row['documents_share']:>10.1%}"
            f"{row['tokens_share']:>14.1%}"
        )
    lines += ["", f"{'documents':>10}{'share':>10}  label"]
    for label, count in summary["labels"].items():
        lines.append(f"{count:>10,}{count / summary['documents']:>10.1%}  {label}")
    return "\n".join(lines)


def analyze_corpus(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """`--mode analyze`: the splits that were named, or, where none was, the default ones that are there.

    `tokenizer` is that of a saved model; without, it is that of the encoder.
    Raises DataError as `analyze`, and ModelError for an encoder that cannot be found.
    """
    folder = Path(settings.output_dir) if settings.output_dir else made_up_folder("analyze")
    setup_logging(settings.log_level, folder / "analysis.log")
    paths = {
        "train": ("train_path", settings.train_path),
        "validation": ("val_path", settings.val_path),
        "test": ("test_path", settings.test_files),
    }
    named = {split: files for split, (option, files) in paths.items() if option in settings.model_fields_set}
    present = {split: files for split, (_, files) in paths.items() if all(Path(file).exists() for file in files)}
    splits = named or present or {"train": settings.train_path}
    for files in splits.values():
        expand_paths(files)  # looked for first: the tokenizer may have to be fetched
    report = analyze(
        splits,
        tokenizer or load_tokenizer(settings.model_path or DEFAULT_ENCODER),
        window_size=settings.window_size,
        window_overlap=settings.window_overlap,
        text_column=settings.text_column,
        label_column=settings.label_column,
        problem_type=settings.problem_type,
        on_bad_lines=settings.on_bad_lines,
        quarantine_dir=folder,
    )
    write_analysis(report, folder)
    logger.info("%d duplicates, %d documents in two splits", len(report["duplicates"]), len(report["leaks"]))
    logger.info("analysis: %s", folder)
    return report
