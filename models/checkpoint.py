"""A trained model on disk: a folder, and in it `model.pt`, which carries all of it in one file.

- folder: `config.json` (with the label maps), `model.safetensors`, the tokenizer, `settings.json`, `model.pt`, and
  `training_texts.safetensors`: hashes of the texts that were trained on, so that an evaluation on them is noticed
- `save_checkpoint` writes the folder beside its place and moves it there whole
- `load_model_and_config`, `load_checkpoint_tokenizer`, `load_training_texts`: from either form; `load_all`: the three,
  and a `.pt` file is read once
- files may come from strangers: nothing pickled is ever run, and a file that unpacks to more than it holds, or whose
  sizes are not those of its weights, is refused before memory is taken
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from files import TEMPORARY, file_sha256, nearest, share_weights, writing_to
from models.reberta import RecurrentRoBERTa
from models.transformer import TransformerClassifier
from pretrained import checked_tokenizer, name_of_layer_count, refuse_run_folder
from utils import ModelError, error_handler, validate_params

FORMAT = 1
MODEL_FILE = "model.pt"
SETTINGS_FILE = "settings.json"
WEIGHTS_FILE = "model.safetensors"
FOLDER_FILES = ("config.json", SETTINGS_FILE, WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json")
TEXTS_FILE = "training_texts.safetensors"
_TEXTS = "training_texts"
MODELS: dict[str, type[RecurrentRoBERTa | TransformerClassifier]] = {
    model.config_class.model_type: model for model in (RecurrentRoBERTa, TransformerClassifier)
}
_PARTS = {"config": dict, "settings": dict, "tokenizer": dict, "state_dict": dict}


class Checkpoint(NamedTuple):
    """`model, settings, label_maps = load_model_and_config(path)`"""

    model: RecurrentRoBERTa | TransformerClassifier
    settings: dict[str, Any]
    """The options that the model was trained with."""
    label_maps: dict[str, dict]
    """`id2label` and `label2id`."""


class Saved(NamedTuple):
    """All that `save_checkpoint` wrote."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    training_texts: np.ndarray | None


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a `.pt` file or a folder with a saved ReBerta (and not a bare encoder)."""
    path = Path(path)
    if path.suffix == ".pt":
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") in MODELS


@error_handler(error_type=ModelError)
@validate_params(settings=dict, folder=(str, Path))
def save_checkpoint(
    model: RecurrentRoBERTa | TransformerClassifier,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    folder: str | Path,
    training_texts: np.ndarray | None = None,
) -> Path:
    """Write model, tokenizer and settings to `folder`, which is replaced whole if it exists.

    `training_texts`, int64 [documents], are the hashes of what was trained on (`LongTextDataset.text_hashes`).
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY}{folder.name}."
    for left_by_a_kill in folder.parent.glob(f"{glob.escape(prefix)}????????"):  # not those of NAME.2
        shutil.rmtree(left_by_a_kill)
    with writing_to(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        fresh = Path(scratch) / "new"
        model.save_pretrained(fresh)
        names = [Path(name).name for name in tokenizer.save_pretrained(fresh) if Path(name).is_file()]
        (fresh / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        content = {
            "format": FORMAT,
            "config": json.loads((fresh / "config.json").read_text(encoding="utf-8")),
            "settings": settings,
            "tokenizer": {name: (fresh / name).read_text(encoding="utf-8") for name in names},
            "state_dict": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        }
        if training_texts is not None:
            content[_TEXTS] = torch.from_numpy(np.unique(training_texts))
            save_file({_TEXTS: content[_TEXTS]}, fresh / TEXTS_FILE)
        torch.save(content, fresh / MODEL_FILE)
        share_weights(fresh)
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(fresh, folder)
    return folder


@error_handler(error_type=ModelError)
def load_model_and_config(path: str | Path) -> Checkpoint:
    """Load a `.pt` file or a folder that `save_checkpoint` wrote.

    Raises:
        ModelError: it is missing, damaged, of another kind, or holds anything but plain data.
    """
    path = _existing(path)
    return _model(path, _read_folder(path) if path.is_dir() else _read_file(path))


@error_handler(error_type=ModelError)
def load_checkpoint_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the model.

    Raises:
        ModelError: as `load_model_and_config`.
    """
    path = _existing(path)
    if path.is_dir():
        return checked_tokenizer(AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
    return _tokenizer(path, _read_file(path))


def load_training_texts(path: str | Path) -> np.ndarray | None:
    """The hashes of the texts that the model was trained on, int64, sorted; None where none were saved with it.

    Raises:
        ModelError: as `load_model_and_config`.
    """
    path = _existing(path)
    if path.is_file():
        return _training_texts(path, _read_file(path))
    file = path / TEXTS_FILE
    return _training_texts(path, _read_tensors(file)) if file.is_file() else None


@error_handler(error_type=ModelError)
def load_all(path: str | Path) -> Saved:
    """What the three functions above load.

    Raises:
        ModelError: as `load_model_and_config`.
    """
    path = _existing(path)
    if path.is_dir():
        return Saved(load_model_and_config(path), load_checkpoint_tokenizer(path), load_training_texts(path))
    content = _read_file(path)
    return Saved(_model(path, content), _tokenizer(path, content), _training_texts(path, content))


def checkpoint_hash(path: str | Path) -> str:
    """SHA-256 of what is loaded from `path` for inference.

    Raises:
        ModelError: there is nothing.
    """
    path = _existing(path)
    digest = hashlib.sha256()
    for part in [path / name for name in FOLDER_FILES] if path.is_dir() else [path]:
        digest.update(bytes.fromhex(file_sha256(part)))
    return digest.hexdigest()


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise ModelError(
            f"{path}: there is no such checkpoint{nearest(path)}; --model_path takes a .pt file or a folder"
        )
    refuse_run_folder(path)
    if path.name in (WEIGHTS_FILE, "config.json", SETTINGS_FILE):
        raise ModelError(f"{path}: is part of a saved model; give its folder, {path.parent}")
    return path


def _read_file(path: Path) -> dict[str, Any]:
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path}: refused, since it is damaged or holds more than weights and plain data; "
            "only files that ReBerta wrote can be loaded"
        ) from error
    except Exception as error:  # whatever the two readers make of bytes that anyone may have written
        raise ModelError(f"{path}: is no checkpoint or is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(f"{path}: is no ReBerta checkpoint of format {FORMAT}; train and save it again")
    wrong = [name for name, kind in _PARTS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ModelError(f"{path}: is damaged: {', '.join(wrong)} missing or of another type")
    tensors = [value for value in content["state_dict"].values() if isinstance(value, Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > path.stat().st_size:  # a tensor may repeat one number without end
        raise ModelError(f"{path}: refused, since its weights would take {size:,} bytes, more than it holds")
    return content


def _read_folder(folder: Path) -> dict[str, Any]:
    missing = [name for name in FOLDER_FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: is no saved ReBerta model: {', '.join(missing)} missing; "
            "give the models/saved/NAME of a run, or train one from it if it is an encoder"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder}: is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(settings, dict):
        raise ModelError(f"{folder}: is damaged: config.json and {SETTINGS_FILE} must hold an object each")
    return {"config": config, "settings": settings, "state_dict": _read_tensors(folder / WEIGHTS_FILE)}


def _model(path: Path, content: dict[str, Any]) -> Checkpoint:
    config, state = content["config"], content["state_dict"]
    try:
        _check_sizes(config, state)
    except Exception as error:  # whatever transformers makes of a configuration that anyone may have written
        raise ModelError(f"{path}: its weights do not fit its configuration: {error}") from error
    with no_init_weights():  # all of them are loaded next
        model = _build(config)
    model.load_state_dict(state)
    _check_decisions(path, model.config)
    maps = {"id2label": dict(model.config.id2label), "label2id": dict(model.config.label2id)}
    return Checkpoint(model.eval(), content["settings"], maps)


def _tokenizer(path: Path, content: dict[str, Any]) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in content["tokenizer"].items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ModelError(f"{path}: refuses to write the tokenizer file {name!r} outside of its folder")
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return checked_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), path)


def _training_texts(path: Path, content: dict[str, Any]) -> np.ndarray | None:
    texts = content.get(_TEXTS)
    if texts is None:
        return None
    if not isinstance(texts, Tensor) or texts.dtype != torch.int64 or texts.dim() != 1:
        raise ModelError(f"{path}: is damaged: the hashes of its training texts are none")
    return texts.numpy()


def _check_archive(path: Path) -> None:
    """Raises ValueError where the records of a zip file are larger than the file; torch writes them as they are."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it unpacks to {unpacked:,} bytes, more than it holds")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: is damaged: {error}") from error


def _check_decisions(path: Path, config: PreTrainedConfig) -> None:
    """Raises ModelError where temperature or thresholds are not values that could be fitted to validation data."""
    temperature, thresholds, classes = config.calibration_temperature, config.thresholds, config.num_labels
    if not _is_within(temperature, 1e-3, 1e3):
        fault = f"its calibration_temperature is {temperature!r}, which must be a number from 0.001 to 1000"
        raise ModelError(f"{path}: is damaged: {fault}")
    if thresholds is None:
        return
    whole = isinstance(thresholds, list) and len(thresholds) == classes
    if not whole or not all(_is_within(threshold, 0, 1) for threshold in thresholds):
        fault = f"its thresholds are {thresholds!r}, which must be {classes} numbers from 0 to 1"
        raise ModelError(f"{path}: is damaged: {fault}")


def _is_within(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _build(config: dict[str, Any]) -> RecurrentRoBERTa | TransformerClassifier:
    model_class = MODELS[config["model_type"]]
    return model_class(model_class.config_class.from_dict(config))


def _check_sizes(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raises ValueError where a model of this configuration has other tensors, before memory is taken for them."""
    for part in (config, config.get("encoder_config", {})):
        counts = {name_of_layer_count(part): len(state), "num_labels": len(state["classifier.bias"])}
        for name, most in counts.items():
            if part.get(name, 0) > most:
                raise ValueError(f"{name} is {part[name]}, more than the weights are of")
    with torch.device("meta"), no_init_weights():
        expected = _build(copy.deepcopy(config)).state_dict()
    names = sorted(expected.keys() ^ state.keys())
    names += [name for name in expected if name in state and expected[name].shape != state[name].shape]
    if names:
        raise ValueError(f"it needs other tensors than it holds: {', '.join(names[:5])}")
