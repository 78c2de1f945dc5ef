"""Serve a ReBerta that `--mode export` wrote, on a machine without torch.

It needs numpy, onnxruntime and tokenizers, and stands in the exported folder as `runner.py`:

  python runner.py FILE.txt [FILE.txt ...]          label, confidence and name of each file, tab-separated

- a file is read as `--mode predict` reads a .txt: UTF-8, without HTML tags; what share was read, if not all, is said
- `OnnxReBerta(folder)`: `predict`, texts to labels and calibrated probabilities; `logits`, the windows of one document
  to class scores as they are
- window after window, padding left off: besides the tokens themselves a document costs one vector a window
- `what_is_read`, `cut_windows`: tokens to windows, as in evaluation

Shapes: N windows, W tokens of a window, L tokens of the one at hand, D hidden size, C classes.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

Graph = Callable[..., list[np.ndarray]]

# as in data_utils.readers
_REST_OF_TAG = r"(?:\s+[\w:-]+\s*=[^<>]*|\s*/?)>"
_LINE_TAG = re.compile(rf"</?(?:br|hr|p|div|li|tr|h[1-6]|blockquote){_REST_OF_TAG}", re.IGNORECASE)
_COMMENT = r"<!--(?:(?!<!--).)*?-->"  # looked for up to the next one only, or many that do not end would take for ever
_TAG = re.compile(rf"</?[a-z][a-z0-9]*{_REST_OF_TAG}|{_COMMENT}|<!doctype[^<>]*>", re.IGNORECASE | re.DOTALL)
_ENTITY = re.compile(r"&#?\w+;")


class OnnxReBerta:
    """An exported model.

    Args:
        folder: what `--mode export` wrote.
        threads: to compute with; 0 takes all cores.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.labels: list[str] = self.config["labels"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens written out in a text are plain text
        self._embeddings_VD = np.load(folder / "embeddings.npy", mmap_mode="r")
        self._encoder, self._carry, self._head = (
            _load(folder / f"{name}.onnx", threads) for name in ("encoder", "carry", "head")
        )
        if self.config["carry"] != "none":
            self._enter = _load(folder / "enter.onnx", threads)
        if self.config["num_repeats"] > 1:
            self._enter_again = _load(folder / "enter_again.onnx", threads)

    def predict(self, texts: Iterable[str]) -> list[dict[str, Any]]:
        """For each text a dict.

        `label` and its `confidence` (several labels: `labels`, and the probability of that set, taken as independent),
        `probabilities` by label, and `tokens` of the text with `tokens_read`, those that stood in windows.

        Raises ValueError for a text that is empty, holds NUL or a lone surrogate or no token, and as `logits`;
        TypeError for a lone string in place of several.
        """
        if isinstance(texts, str):
            raise TypeError("texts are wanted, a list of them, not a single one")
        return [self._predict(text) for text in texts]

    def logits(self, input_ids_NW: np.ndarray, attention_mask_NW: np.ndarray) -> np.ndarray:
        """Class scores [C] of one document; a window whose mask is all zero does not exist.

        Raises ValueError where there is no window, where the encoder has no positions for so many windows or tokens,
        and where a window's state is not finite.
        """
        ends_N = ((attention_mask_NW != 0) * np.arange(1, attention_mask_NW.shape[1] + 1)).max(axis=1)
        windows = [
            (ids_W[:end], mask_W[:end].astype(np.int64))
            for ids_W, mask_W, end in zip(input_ids_NW, attention_mask_NW, ends_N, strict=True)
            if end
        ]
        if not windows:
            raise ValueError("the document has no window: its mask is all zero")
        document_1D: np.ndarray | None = None
        for _ in range(self.config["num_repeats"]):
            document_1D, logits_1C = self._read(windows, document_1D)
        return logits_1C[0]

    def _read(self, windows: list[tuple[np.ndarray, np.ndarray]], document_1D: np.ndarray | None) -> list[np.ndarray]:
        """One pass over the document, knowing what the pass before found: document state [1, D] and logits [1, C]."""
        states: list[np.ndarray] = []
        contents: list[np.ndarray] = []
        memory: list[np.ndarray] = []
        carried_1D = document_1D
        for ids_L, mask_L in windows:
            embeds_1LD = self._embeddings_VD[ids_L][None]
            if carried_1D is not None:
                enter = self._enter if states else self._enter_again
                [embeds_1LD[:, 0]] = enter(embeds_1LD[:, 0], carried_1D)
            output_1D = self._encode(embeds_1LD, mask_L)
            fused_1D, before_1D = embeds_1LD[:, 0], carried_1D
            if before_1D is None:
                # the output stands in for what was read before: blended with itself it stays what it is
                fused_1D = output_1D if self.config["carry"] == "residual" else fused_1D
                before_1D = np.zeros_like(output_1D) if self.config["carry"] == "gru" else output_1D
            state_1D, content_1D, memory_1D = self._carry(output_1D, fused_1D, before_1D)
            if not np.isfinite(state_1D).all():
                raise ValueError(f"window {len(states)} of the document gives a state that is not finite")
            carried_1D = None if self.config["carry"] == "none" else memory_1D
            states.append(state_1D)
            contents.append(content_1D)
            memory.append(memory_1D)
        beside: list[Any] = []
        if self.config["weighs_windows"]:
            beside.append(np.array([[mask_L.sum() for _, mask_L in windows]]))
        if self.config["aggregation"] == "encoder":
            ids_L, mask_L = windows[0]
            first_1D, last_1D = self._embeddings_VD[ids_L[[0]]], self._embeddings_VD[ids_L[[mask_L.sum() - 1]]]
            sequence_1LD = np.stack([first_1D, *contents, last_1D], axis=1)
            beside.append(self._encode(sequence_1LD, np.ones(sequence_1LD.shape[1], dtype=np.int64)))
        if self.config["carry"] == "gru":
            beside.append(np.stack(memory, axis=1))
        return self._head(np.stack(states, axis=1), *beside)

    def _encode(self, embeds_1LD: np.ndarray, mask_L: np.ndarray) -> np.ndarray:
        """What the encoder makes of the tokens, [1, D]."""
        length, positions = len(mask_L), self.config["positions"]
        if length > positions:
            raise ValueError(f"the encoder has {positions} positions, not {length}: give fewer windows or shorter ones")
        [output_1D] = self._encoder(embeds_1LD, mask_L[None])
        return output_1D

    def _predict(self, text: str) -> dict[str, Any]:
        if not text.strip():
            raise ValueError("the text is empty")
        if "\0" in text:
            raise ValueError("the text holds a NUL character")
        text.encode("utf-8")  # a lone surrogate is a ValueError here, and a TypeError in the tokenizer
        config = self.config
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError("the text shows nothing: the tokenizer finds no token in it")
        special = config["cls_token_id"], config["sep_token_id"], config["pad_token_id"]
        size, overlap = config["window_size"], config["window_overlap"]
        room = size - 2 + (config["max_windows"] - 1) * (size - 2 - overlap)
        read_ids = what_is_read(ids[: config["max_len"]], room, config["read"], size)
        windows = cut_windows(read_ids, size, *special, overlap)
        read = {"tokens": len(ids), "tokens_read": len(read_ids)}
        scores_C = self.logits(*windows).astype(np.float64) / config["calibration_temperature"]
        if config["problem_type"] == "multi_label_classification":
            scores_C = 1 / (1 + np.exp(-scores_C))
            is_said_C = scores_C >= (0.5 if config["thresholds"] is None else np.array(config["thresholds"]))
            said: dict[str, Any] = {
                "labels": [self.labels[i] for i in np.flatnonzero(is_said_C)],
                "confidence": float(np.where(is_said_C, scores_C, 1 - scores_C).prod()),
            }
        else:
            scores_C = np.exp(scores_C - scores_C.max())
            scores_C /= scores_C.sum()
            said = {"label": self.labels[scores_C.argmax()], "confidence": float(scores_C.max())}
        return {**said, "probabilities": dict(zip(self.labels, scores_C.tolist(), strict=True)), **read}


def _load(path: Path, threads: int) -> Graph:
    """The graph in `path` as a function of its inputs, in their order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def what_is_read(token_ids: Sequence[int], room: int, read: str, window_size: int) -> Sequence[int]:
    """The tokens that are read of a document: its first ones, head and tail, or windows that are evenly spread."""
    tokens = len(token_ids)
    if tokens <= room or read == "first":
        return token_ids[:room]
    if read == "head_tail":
        head = (room + 2) // 4
        return [*token_ids[:head], *token_ids[tokens - (room - head) :]]
    content = window_size - 2
    windows = room // content
    starts = [(i * tokens + (tokens - room) // 2) // windows for i in range(windows)]
    return [token for start in starts for token in token_ids[start : start + content]]


def cut_windows(
    token_ids: Sequence[int], window_size: int, cls_id: int, sep_id: int, pad_id: int, overlap: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Cut content tokens into `input_ids` and `attention_mask`, both int64 [N, W]."""
    content = window_size - 2
    starts = range(0, max(len(token_ids) - overlap, 1), content - overlap)
    input_ids_NW = np.full((len(starts), window_size), pad_id, dtype=np.int64)
    attention_mask_NW = np.zeros_like(input_ids_NW)
    for row, start in enumerate(starts):
        window = [cls_id, *token_ids[start : start + content], sep_id]
        input_ids_NW[row, : len(window)] = window
        attention_mask_NW[row, : len(window)] = 1
    return input_ids_NW, attention_mask_NW


def read_text(file: str | Path) -> str:
    """The document in a text file. Raises OSError, and ValueError for bytes that are not UTF-8."""
    text = Path(file).read_bytes().decode("utf-8-sig")
    return _ENTITY.sub(lambda found: html.unescape(found[0]), _TAG.sub("", _LINE_TAG.sub("\n", text)))


def main(files: Sequence[str]) -> int:
    """Label each file with the model beside this file. Returns the exit code: 1 where a file could not be read."""
    if not files:
        print("usage: python runner.py FILE ...", file=sys.stderr)
        return 2
    model, code = OnnxReBerta(Path(__file__).parent), 0
    for file in files:
        try:
            [result] = model.predict([read_text(file)])
        except (OSError, ValueError) as error:
            print(f"error: {file}: {error}", file=sys.stderr)
            code = 1
            continue
        label = result["label"] if "label" in result else "|".join(result["labels"])
        print(f"{label}\t{result['confidence']:.4f}\t{file}")
        if result["tokens_read"] < result["tokens"]:
            print(f"{file}: {result['tokens_read']:,} of {result['tokens']:,} tokens were read", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
