"""transformers' text-classification pipeline over whole documents: the tokenizer cuts them into windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TextClassificationPipeline
from transformers.utils import logging

logger = logging.get_logger(__name__)

CUSTOM_PIPELINES = {
    "text-classification": {
        "impl": "pipeline.ReBertaPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}


def _what_is_read(ids: list[int], room: int, read: str, content: int) -> list[int]:
    """Those of a document's tokens that stand in windows, as `read_positions` of `data_utils.windows` chooses them."""
    if len(ids) <= room or read == "first":
        return ids[:room]
    if read == "head_tail":
        head = (room + 2) // 4
        return ids[:head] + ids[len(ids) - (room - head) :]
    windows = room // content
    starts = [(i * len(ids) + (len(ids) - room) // 2) // windows for i in range(windows)]
    return [token for start in starts for token in ids[start : start + content]]


class ReBertaPipeline(TextClassificationPipeline):
    """`pipeline("text-classification", model=DIR, trust_remote_code=True)` reads up to `max_windows` windows.

    Its scores are calibrated, also with `function_to_apply="none"`, which gives logits over the temperature. Of several
    labels it says the likeliest, as transformers does; `top_k=None` gives all scores, for `config.thresholds`.

    Raises ValueError for a text that is empty, holds NUL or a lone surrogate or no token, or of which nothing can
    be read.
    """

    def preprocess(self, inputs: str, **tokenizer_kwargs: Any) -> dict[str, Tensor]:
        if tokenizer_kwargs:
            raise ValueError(
                f"leave {', '.join(tokenizer_kwargs)} out: a document is cut into windows here, and up to the model's "
                "max_windows of them are read"
            )
        if not inputs.strip():
            raise ValueError("the text is empty")
        if "\0" in inputs:
            raise ValueError("the text holds a NUL character")
        inputs.encode("utf-8")  # a lone surrogate is a ValueError here, and anything in the tokenizer
        config, tokenizer = self.model.config, self.tokenizer
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids = tokenizer(inputs, **plain)["input_ids"]
        if not ids:
            raise ValueError("the text shows nothing: the tokenizer finds no token in it")
        content = config.window_size - 2
        step = content - config.window_overlap
        tokens = len(ids)
        ids = _what_is_read(ids[: config.max_len], content + (config.max_windows - 1) * step, config.read, content)
        if len(ids) < tokens:
            logger.warning(
                "%d of a document's %d tokens are read: the model takes %d windows of %d tokens%s",
                len(ids),
                tokens,
                config.max_windows,
                config.window_size,
                "" if config.max_len is None else f", {config.max_len} at most",
            )
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        starts = range(0, max(1, len(ids) - config.window_overlap), step)
        windows = {"input_ids": [[cls, *ids[start : start + content], sep] for start in starts]}
        padded = tokenizer.pad(windows, padding="max_length", max_length=config.window_size, return_tensors="pt")
        return {name: padded[name].unsqueeze(0) for name in ("input_ids", "attention_mask")}

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, hidden_states = self.model(**model_inputs)
        if not logits.isfinite().all():
            raise ValueError("nothing of the document could be read: no window's state is finite")
        for _, window in hidden_states.window_failures.nonzero().tolist():
            logger.warning(
                "window %d of a document failed: its state is not finite, the one before stands for it", window
            )
        return {"logits": logits / self.model.config.calibration_temperature}
