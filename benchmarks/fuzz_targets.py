"""What is fuzzed: everything that reads files of strangers. The tests give these targets hypothesis's bytes.

A target writes the bytes into a folder of its own and reads them as a command does. It returns where they are read or
refused with the right error, and lets any other error through.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig

from command_line import parse_settings
from data_utils.readers import read_records
from data_utils.records import check_text
from models.checkpoint import load_checkpoint_tokenizer, load_model_and_config, load_training_texts, save_checkpoint
from models.reberta import RecurrentRoBERTa
from utils import ConfigError, DataError, ModelError, quiet_libraries

ROWS = [
    {"id": "a", "text": 'war, "peace"', "label": "early"},
    {"id": "b", "text": "Übermut 中国 😀", "label": "late"},
    {"id": "c", "text": "two\nlines", "label": "early"},
]
CONFIG = {"mode": "train_steps", "total_steps": 3, "learning_rate": 1e-3, "train_path": ["a", "b"], "max_len": None}


class Target(NamedTuple):
    """`read` takes bytes; `seeds` are sound ones to begin with."""

    read: Callable[[bytes], None]
    seeds: list[bytes]


def targets(folder: Path) -> dict[str, Target]:
    """All targets by name, working in `folder`."""
    quiet_libraries("WARNING")
    model = _saved_model(folder / "model")
    archive = (model / "model.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        pickled = next(records.read(name) for name in records.namelist() if name.endswith("/data.pkl"))
    csv = "id,text,label\r\n" + "".join(f'{r["id"]},"{r["text"].replace(chr(34), chr(34) * 2)}",x\r\n' for r in ROWS)
    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    config_json = (model / "config.json").read_bytes()
    return {
        "data, .jsonl": Target(_reader(folder / "x.jsonl"), [jsonl.encode(), json.dumps(ROWS[1]).encode()]),
        "data, .csv": Target(_reader(folder / "x.csv"), [csv.encode()]),
        "data, .parquet": Target(_reader(folder / "x.parquet"), [_parquet()]),
        "model.pt": Target(_checkpoint(folder / "x.pt", folder / "x.pt", lambda data: data), [archive]),
        "pickle within model.pt": Target(
            _checkpoint(folder / "y.pt", folder / "y.pt", lambda data: _with_pickle(archive, data)), [pickled]
        ),
        "config.json of a model": Target(_checkpoint(model, model / "config.json", lambda data: data), [config_json]),
        "--config, .yaml": Target(
            _config(folder / "x.yaml"), [b"mode: train\ntrain_path: [a, b]\nalpha: &a 0.5\nseed: *a\n"]
        ),
        "--config, .json": Target(_config(folder / "x.json"), [json.dumps(CONFIG).encode()]),
    }


def _reader(path: Path) -> Callable[[bytes], None]:
    """Both ways of reading: what comes out is sound, and leaving bad lines out loses nothing that is good."""

    def read(data: bytes) -> None:
        path.write_bytes(data)
        counts = []
        for on_bad_lines in ("error", "skip"):
            try:
                records = list(read_records(path, on_bad_lines=on_bad_lines))
            except DataError:
                continue
            for record in records:
                check_text(record.text)
                check_text(record.id)
                check_text(record.label)
            assert records
            assert len({record.id for record in records}) == len(records)
            counts.append(len(records))
        assert len(set(counts)) < 2

    return read


def _checkpoint(path: Path, changed: Path, content: Callable[[bytes], bytes]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        changed.write_bytes(content(data))
        for load in (load_model_and_config, load_checkpoint_tokenizer, load_training_texts):
            try:
                load(path)
            except ModelError:
                continue

    return read


def _config(path: Path) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        path.write_bytes(data)
        said = ""
        try:
            parse_settings(["--config", str(path)])
        except ConfigError as error:
            said = str(error)
        assert len(said) < 100_000 + 100 * len(data)

    return read


def _with_pickle(archive: bytes, pickled: bytes) -> bytes:
    """The archive with another pickle, and the weights as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer, compression="none")
    return buffer.getvalue()


def _saved_model(folder: Path) -> Path:
    torch.manual_seed(0)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special.values())}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    encoder = RobertaConfig(vocab_size=4, max_position_embeddings=16, type_vocab_size=1, pad_token_id=1, **shape)
    model = RecurrentRoBERTa(num_classes=2, encoder=encoder, window_size=8, max_windows=2, cls_token_id=2)
    save_checkpoint(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), {"max_len": 3}, folder)
    for source in folder.glob("*.py"):
        source.unlink()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return folder
