"""Which data files the paths of the command line mean.

- .jsonl, .csv or .parquet; a folder gives all of its files
- a folder of folders of texts, as IMDB's: a .txt file is a document, the folder that it lies in its label
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from files import nearest
from utils import DataLoadError, logger

JSONL, CSV, PARQUET = TABLES = (".jsonl", ".csv", ".parquet")
TEXT = ".txt"

Paths = str | Path | Sequence[str | Path]

_SHOWN = 5
_UNLABELLED = "unsup"  # IMDB's name of the folder of texts without labels


def expand_paths(paths: Paths, *, unlabelled: bool = False) -> list[Path]:
    """The data files that `paths` means, in order; a folder stands for its *.jsonl, *.csv and *.parquet, sorted.

    A folder without any stands for the *.txt of the folders in it, those of `unsup` left out. Where documents may be
    `unlabelled` these count, too, and so do a folder's own *.txt, and a .txt file by itself.

    Raises DataLoadError for a path that is missing, given twice or has another ending, for a folder without data, and
    for one whose texts lie both in it and in folders.
    """
    files: list[Path] = []
    for path in _given(paths):
        files += _folder_files(path, unlabelled) if path.is_dir() else [_data_file(path, unlabelled)]
    if not files:
        raise DataLoadError("no data file was given; name a .jsonl, .csv or .parquet file, or a folder of them")
    seen = set()
    for file in files:
        if (place := file.resolve()) in seen:
            raise DataLoadError(f"{file}: given twice; name each file once")
        seen.add(place)
    return files


def tell_of_others(paths: Paths, files: Sequence[Path]) -> None:
    """Log what lies in the folders of `paths` and is not among `files`, since nobody would miss it in the results.

    Such as x.json, x.jsonl.gz, or the folder of IMDB's texts that have no labels.
    """
    folders = {path for path in _given(paths) if path.is_dir()}
    folders |= {file.parent for file in files if file.parent.parent in folders}  # of labels
    read = {*files, *folders}
    for folder in sorted(folders):
        others = [path.name for path in _visible(folder) if path not in read]
        if others:
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            logger.info("%s: not read as data: %s%s", folder, ", ".join(others[:_SHOWN]), more)


def _given(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _data_file(file: Path, unlabelled: bool) -> Path:
    if file.is_dir():
        raise DataLoadError(f"{file}: is a folder beside data files; name it by itself")
    if not file.is_file():
        raise DataLoadError(f"{file}: no such file{nearest(file) or '; check the path'}")
    endings = (*TABLES, TEXT) if unlabelled else TABLES
    if file.suffix.lower() not in endings:
        raise DataLoadError(f"{file}: unknown ending '{file.suffix}'; data files end in {', '.join(endings)}")
    return file


def _folder_files(folder: Path, unlabelled: bool) -> list[Path]:
    visible = _visible(folder)
    files = [_data_file(file, unlabelled) for file in visible if file.suffix.lower() in TABLES]
    if not files:
        files = [text for label in visible if label.is_dir() for text in _texts(label, unlabelled)]
        own = [file for file in visible if file.suffix.lower() == TEXT] if unlabelled else []
        if files and own:
            raise DataLoadError(
                f"{folder}: holds {len(own)} texts ({own[0].name}) beside folders of texts ({files[0].parent.name}); "
                "name the files and folders that are meant"
            )
        files = files or own
    if not files:
        texts = "*.txt files" if unlabelled else "folders of *.txt files that are named after labels"
        raise DataLoadError(
            f"{folder}: the folder holds no {', '.join('*' + ending for ending in TABLES)} file, nor {texts}"
        )
    return files


def _texts(folder: Path, unlabelled: bool) -> list[Path]:
    if folder.name == _UNLABELLED and not unlabelled:
        return []
    visible = _visible(folder)
    texts = [file for file in visible if file.suffix.lower() == TEXT]
    if texts and any(file.is_dir() for file in visible):
        raise DataLoadError(f"{folder}: holds folders beside its texts, so it is no label; name the folder itself")
    return texts
