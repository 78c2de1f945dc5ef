"""A trained model on disk: a folder, and in it `model.pt`, which carries all of it in one file.

- folder: `config.json` (with the label maps), `model.safetensors`, the tokenizer, `settings.json`, `model.pt`
- `save_checkpoint` writes the folder beside its place and moves it there whole
- `load_model_and_config`, `load_checkpoint_tokenizer`: from either form; nothing pickled is ever run
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.configuration import ReBertaConfig
from models.reberta import RecurrentRoBERTa
from utils import ConfigError, ModelError, error_handler, validate_params

FORMAT = 1
MODEL_FILE = "model.pt"
SETTINGS_FILE = "settings.json"
WEIGHTS_FILE = "model.safetensors"


class Checkpoint(NamedTuple):
    """`model, settings, label_maps = load_model_and_config(path)`"""

    model: RecurrentRoBERTa
    settings: dict[str, Any]
    """The options that the model was trained with."""
    label_maps: dict[str, dict]
    """`id2label` and `label2id`."""


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a `.pt` file or a folder with a saved ReBerta (and not a bare encoder)."""
    path = Path(path)
    if path.suffix == ".pt":
        return True
    config = path / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "reberta"


@error_handler(error_type=ModelError)
@validate_params(settings=dict, folder=(str, Path))
def save_checkpoint(
    model: RecurrentRoBERTa, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], folder: str | Path
) -> Path:
    """Write model, tokenizer and settings to `folder`, which is replaced whole if it exists."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
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
        torch.save(content, fresh / MODEL_FILE)
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(fresh, folder)
    return folder


def load_model_and_config(path: str | Path) -> Checkpoint:
    """Load a `.pt` file or a folder that `save_checkpoint` wrote.

    Raises:
        ModelError: it is missing, damaged, of another kind, or holds anything but plain data.
    """
    path = _existing(path)
    if path.is_dir():
        config, settings, state = _read_folder(path)
    else:
        content = _read_file(path)
        config, settings, state = content["config"], content["settings"], content["state_dict"]
    try:
        model = RecurrentRoBERTa(ReBertaConfig.from_dict(config))
        model.load_state_dict(state)
    except (ConfigError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its weights do not fit its configuration: {error}") from error
    maps = {"id2label": dict(model.config.id2label), "label2id": dict(model.config.label2id)}
    return Checkpoint(model.eval(), settings, maps)


def load_checkpoint_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the model.

    Raises:
        ModelError: as `load_model_and_config`.
    """
    path = _existing(path)
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in _read_file(path)["tokenizer"].items():
            if Path(name).name != name:
                raise ModelError(f"{path}: refuses to write the tokenizer file {name!r} outside of its folder")
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: there is no such checkpoint; --model_path takes a .pt file or a folder")
    return path


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, since it is damaged or holds more than weights and plain data; "
            "only files that ReBerta wrote can be loaded"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: is no checkpoint or is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(f"{path}: is no ReBerta checkpoint of format {FORMAT}; train and save it again")
    return content


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in ("config.json", WEIGHTS_FILE, SETTINGS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: is no saved ReBerta model: {', '.join(missing)} missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        return config, settings, load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: is damaged: {error}") from error
