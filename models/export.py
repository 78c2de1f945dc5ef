"""A trained model as a folder of ONNX graphs that is served without torch: `python main.py --mode export`.

- `encoder.onnx`: embedded tokens and their mask to the output at position 0, or its mean over tokens; it reads the
  windows and, once more, their states, so that the weights exist once
- `enter.onnx` and `carry.onnx`, the recurrent cell: what was read enters a [CLS]; an output becomes a state and what is
  carried on; `enter_again.onnx`, where a document is read more than once
- `head.onnx`: the window states to the document's state and its logits
- `embeddings.npy`, `tokenizer.json`, `config.json`, and `runner.py`, which puts them together (see `onnx_runner`)

All maths of the graphs is the model's own. Each export is compared with the model before its folder appears.

Shapes: B documents, N windows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedTokenizerBase

from config import Settings
from files import made_up_folder
from models.aggregation import masked_max, masked_mean
from models.checkpoint import load_all
from models.encoder import max_window_size
from models.reberta import RecurrentRoBERTa
from models.registry import READING
from utils import ConfigError, ModelError, error_handler, logger, make_folder

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of logits; what is seen is 1e-6


@error_handler(error_type=ModelError)
def export(settings: Settings) -> Path:
    """Write the checkpoint `--model_path` to `--output_dir`; flags such as `--max_windows` win over its way of reading.

    Raises:
        ConfigError: packages are missing, the folder is not empty, or the encoder cannot read that way.
        ModelError: the checkpoint cannot be loaded, or its graphs do not compute what it does.
    """
    assert settings.model_path is not None
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--mode export needs {', '.join(missing)}: run `pip install {' '.join(PACKAGES)}`")
    folder = Path(settings.output_dir) if settings.output_dir else made_up_folder("export")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "is a file" if folder.is_file() else "is not empty"
        raise ConfigError(f"--output_dir {folder}: {what}; give another folder")
    make_folder(folder.parent, "output_dir")
    (model, _, _), tokenizer, _ = load_all(settings.model_path)
    if not isinstance(model, RecurrentRoBERTa):
        raise ConfigError(f"{settings.model_path}: --mode export takes models with a window encoder, not this one")
    model.config.update({name: getattr(settings, name) for name in READING if name in settings.model_fields_set})
    model.check()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh = Path(scratch) / "new"
        write_folder(model, tokenizer, fresh)
        _compare(model, fresh)
        os.replace(fresh, folder)
    logger.info("exported to %s; serve it with `python %s FILE.txt`", folder, folder / "runner.py")
    return folder


def write_folder(model: RecurrentRoBERTa, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all files of an export to `folder`, which must not exist."""
    folder.mkdir()
    _write_graphs(model, folder)
    table = model.encoder.get_input_embeddings()
    with torch.no_grad():
        np.save(folder / "embeddings.npy", table(torch.arange(table.num_embeddings)).numpy())
    config = model.config
    fields = ("window_size", "window_overlap", "max_windows", "max_len", "num_repeats", "aggregation", "carry", "read")
    decisions = ("problem_type", "calibration_temperature", "thresholds")
    content = {
        **{name: getattr(config, name) for name in (*fields, *decisions)},
        **{name: getattr(tokenizer, name) for name in ("cls_token_id", "sep_token_id", "pad_token_id")},
        "positions": max_window_size(model.encoder),
        "weighs_windows": _weighs_windows(model),
        "labels": [config.id2label[index] for index in range(config.num_labels)],
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(Path(__file__).with_name("onnx_runner.py"), folder / "runner.py")


def _write_graphs(model: RecurrentRoBERTa, folder: Path) -> None:
    config, size = model.config, model.encoder.config.hidden_size
    width = model.encoder.get_input_embeddings().embedding_dim
    examples = {
        "embeddings": torch.randn(2, 5, width),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "states": torch.randn(2, 5, size),
        # one tensor for several of them would tie these inputs to each other
        "memory": torch.randn(2, 5, size),
        "weights": torch.randint(1, 9, (2, 5)),
        **{name: torch.randn(2, width) for name in ("cls", "fused")},
        **{name: torch.randn(2, size) for name in ("output", "carried", "aggregate")},
    }
    parts = {
        "weights": _weighs_windows(model),
        "aggregate": config.aggregation == "encoder",
        "memory": config.carry == "gru",
    }
    beside = [name for name, is_there in parts.items() if is_there]
    graphs: list[tuple[str, Callable[..., Any], list[str], list[str]]] = [
        ("encoder", _encode, ["embeddings", "attention_mask"], ["output"]),
        ("carry", _carry, ["output", "fused", "carried"], ["state", "content", "carried_on"]),
        ("head", _head, ["states", *beside], ["document", "logits"]),
    ]
    if config.carry != "none":
        graphs.append(("enter", _enter, ["cls", "carried"], ["fused"]))
    if config.num_repeats > 1:
        graphs.append(("enter_again", _enter_again, ["cls", "carried"], ["fused"]))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports each operator of torchvision as missing
    for name, function, inputs, outputs in graphs:
        values = tuple(examples[name] for name in inputs)
        axes = tuple(
            {axis: Dim.DYNAMIC for axis, n in enumerate(value.shape) if n not in (size, width)} for value in values
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.onnx.export(
                _Graph(model, function).eval(),
                values,
                folder / f"{name}.onnx",
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes={"inputs": axes},
                dynamo=True,
                external_data=False,
                verbose=False,
            )


class _Graph(nn.Module):
    """A function of the model and of tensors, in the form that is exported."""

    def __init__(self, model: RecurrentRoBERTa, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.model, *inputs)


def _encode(model: RecurrentRoBERTa, embeds_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return model._encode(embeds_BLD, mask_BL)


def _enter(model: RecurrentRoBERTa, cls_BD: Tensor, carried_BD: Tensor) -> Tensor:
    return model._let_in(cls_BD, carried_BD, model.window_norm, model.window_gate)[0]


def _enter_again(model: RecurrentRoBERTa, cls_BD: Tensor, document_BD: Tensor) -> Tensor:
    return model._let_in(cls_BD, document_BD, model.global_norm, model.global_gate)[0]


def _carry(
    model: RecurrentRoBERTa, output_BD: Tensor, fused_BD: Tensor, carried_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A window's state, what stands for it in the aggregation, and what is carried on."""
    state_BD = model._blend(output_BD, fused_BD)
    content_BD = model.window_norm(state_BD) if model.config.aggregation == "encoder" else state_BD
    carried_on_BD = model._carry_on(carried_BD, state_BD)
    return state_BD, content_BD, state_BD if carried_on_BD is None else carried_on_BD


def _head(model: RecurrentRoBERTa, states_BND: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    """`beside`: the windows' tokens [B, N], where they are weighed by these; what the encoder makes of the sequence of
    states [B, D], where it is the encoder that aggregates; the memory after each window [B, N, D], with a `gru`."""
    exists_BN = torch.ones(states_BND.shape[:2], dtype=torch.bool)
    parts = iter(beside)
    weights_BN = next(parts) if _weighs_windows(model) else exists_BN
    if model.config.aggregation == "max":
        document_BD = masked_max(states_BND, exists_BN)
    elif model.config.aggregation in ("attention", "transformer"):
        document_BD = model.aggregation(states_BND, weights_BN)
    else:
        document_BD = masked_mean(states_BND, weights_BN)
    if model.config.aggregation == "encoder":
        aggregation: Any = model.aggregation
        document_BD = aggregation.join(next(parts), document_BD)
    document_BD = model._with_memory(document_BD, next(parts, None), exists_BN)
    return document_BD, model._head(document_BD)


def _weighs_windows(model: RecurrentRoBERTa) -> bool:
    return model.config.window_weights == "tokens" and model.config.aggregation != "max"


def _compare(model: RecurrentRoBERTa, folder: Path) -> None:
    """Read one random document, whose last window is short, with the model and with its export."""
    from models.onnx_runner import OnnxReBerta  # onnxruntime is optional

    shape = (min(3, model.config.max_windows), model.config.window_size)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.encoder.config.vocab_size, shape, generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, 3:] = 0
    with torch.inference_mode():
        expected = model(input_ids[None], attention_mask[None]).logits[0]
    got = OnnxReBerta(folder).logits(input_ids.numpy(), attention_mask.numpy())
    difference = float(np.abs(got - expected.numpy()).max())
    if not difference <= TOLERANCE:
        raise ModelError(
            f"the exported graphs do not compute what the model does: logits differ by {difference:.1e}; "
            f"{type(model.encoder).__name__} cannot be exported"
        )
    logger.info(
        "the export's logits differ from the model's by %.1e at most, on a document of random tokens", difference
    )
