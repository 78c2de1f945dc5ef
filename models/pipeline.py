"""transformers' text-classification pipeline over whole documents: the tokenizer cuts them into windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TextClassificationPipeline

CUSTOM_PIPELINES = {
    "text-classification": {
        "impl": "pipeline.ReBertaPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}


class ReBertaPipeline(TextClassificationPipeline):
    """`pipeline("text-classification", model=DIR, trust_remote_code=True)` reads up to `max_windows` windows."""

    def preprocess(self, inputs: str, **tokenizer_kwargs: Any) -> dict[str, Tensor]:
        config = self.model.config
        if config.max_len is not None:
            plain = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
            offsets = self.tokenizer(inputs, **plain)["offset_mapping"]
            inputs = inputs[: offsets[: config.max_len][-1][1]]
        windows = self.tokenizer(
            inputs,
            max_length=config.window_size,
            stride=config.window_overlap,
            truncation=True,
            padding="max_length",
            return_overflowing_tokens=True,
            split_special_tokens=True,
            return_tensors="pt",
            **tokenizer_kwargs,
        )
        return {name: windows[name][: config.max_windows].unsqueeze(0) for name in ("input_ids", "attention_mask")}

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.model(**model_inputs).logits}
