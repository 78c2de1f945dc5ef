"""What a model of this package is built from; for a ReBerta, also what of it an encoder cannot do."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .aggregation import AGGREGATIONS
from .encoder import READS_PADDING, is_bert_shaped, max_window_size
from .pipeline import CUSTOM_PIPELINES

try:  # transformers runs a copy of this file beside saved weights, and looks for all imports but those in a `try`
    if __package__ != "models":
        raise ImportError  # or somebody else's `utils` would be run there
    from utils import ConfigError
except ImportError:
    ConfigError = ValueError  # type: ignore[misc, assignment]


POOLINGS = ("cls", "mean")
WINDOW_WEIGHTS = ("tokens", "equal")
CARRIES = ("gru", "gated", "residual", "none")


class DocumentConfig(PreTrainedConfig):
    """What all models have: what of a document is read, and how logits become labels.

    `id2label`, `label2id` and `problem_type` are transformers' own. `calibration_temperature`, by which logits are
    divided before they become probabilities, and `thresholds` by class are fitted to validation data. (A plain
    `temperature` is transformers' own, for generation.)
    """

    window_size: int = 256
    window_overlap: int = 0
    max_windows: int = 16
    max_len: int | None = None
    read: str = "first"
    dropout: float = 0.1
    memory_level: int | str = "auto"
    calibration_temperature: float = 1.0
    thresholds: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.custom_pipelines = CUSTOM_PIPELINES
        super().__post_init__(**kwargs)


class ReBertaConfig(DocumentConfig):
    """What `RecurrentRoBERTa` is built from."""

    model_type = "reberta"

    encoder_config: dict | PreTrainedConfig | None = None
    num_repeats: int = 1
    encoder_layers: int | None = None
    pooling: str = "cls"
    carry: str = "gru"
    alpha: float = 0.8
    global_alpha: float | None = None
    gate_bias: float = 0.0
    aggregation: str = "encoder"
    window_weights: str = "tokens"
    position_encoding: str = "absolute"
    attention_dropout: float = 0.0
    window_loss: float = 0.0
    cls_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As it was saved; before there were `window_weights`, all windows counted alike."""
        return super().from_dict({"window_weights": "equal", **config_dict}, **kwargs)

    def check(self, encoder: PreTrainedModel) -> None:
        """Raises ConfigError with all that this encoder cannot do."""
        positions = max_window_size(encoder)
        faults = []
        if encoder.config.model_type in READS_PADDING:
            faults.append(f"what a {encoder.config.model_type!r} reads depends on padding; use another encoder")
        if not 4 <= self.window_size <= positions:
            faults.append(f"window_size is {self.window_size}; this encoder takes windows of 4 to {positions} tokens")
        if not 0 <= self.window_overlap < self.window_size - 2:
            faults.append(f"window_overlap is {self.window_overlap}; it must leave room in {self.window_size} tokens")
        if self.encoder_layers not in (None, encoder.config.num_hidden_layers):
            there = encoder.config.num_hidden_layers
            faults.append(f"encoder_layers is {self.encoder_layers}; this encoder has {there} layers")
        if self.carry == "residual" and encoder.get_input_embeddings().embedding_dim != encoder.config.hidden_size:
            faults.append("carry is 'residual'; this encoder's word embeddings are not as wide as its states")
        if self.position_encoding == "rope" and not is_bert_shaped(encoder):
            faults.append(
                f"position_encoding is 'rope'; it needs an encoder shaped as BERT, not {type(encoder).__name__}"
            )
        if self.carry == "none" and self.num_repeats > 1:
            faults.append(
                f"num_repeats is {self.num_repeats}; with carry 'none' nothing is carried into a second reading"
            )
        if self.read == "random" and self.window_overlap:
            faults.append(f"window_overlap is {self.window_overlap}; windows that are read at random share no tokens")
        if self.aggregation == "encoder" and self.max_windows > positions - 2:
            faults.append(
                f"max_windows is {self.max_windows}; aggregation by this encoder takes at most {positions - 2}: "
                "use another aggregation or fewer windows"
            )
        for name, choices in (
            ("read", ("first", "head_tail", "random")),
            ("pooling", POOLINGS),
            ("carry", CARRIES),
            ("aggregation", AGGREGATIONS),
            ("window_weights", WINDOW_WEIGHTS),
            ("position_encoding", ("absolute", "rope")),
            ("memory_level", ("auto", 0, 1, 2)),
        ):
            if getattr(self, name) not in choices:
                faults.append(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, choices))}")
        if faults:
            raise ConfigError("; ".join(faults))
