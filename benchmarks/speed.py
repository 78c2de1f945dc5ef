"""Tokens a second of ReBerta against independent windows through transformers, at the same encoder shape.

    python -m benchmarks.speed [--layers 6 --width 384 --tokens 4096 --batch 2 --output FILE.json]

All figures are of one run on one machine, with random weights; compare ratios, not figures of different runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, RobertaConfig

from models.reberta import RecurrentRoBERTa

WINDOW = 256


class IndependentWindows(nn.Module):
    """What a user would write: all windows as one batch through transformers, the mean of their [CLS], a classifier."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        windows = self.encoder(input_ids=input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1))
        states = windows.last_hidden_state[:, 0].unflatten(0, input_ids.shape[:2])
        return self.classifier(states.mean(1))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` timed calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(model: nn.Module, input_ids: Tensor, precision: str, repeats: int) -> dict[str, float]:
    """Tokens a second of training steps (forward and backward) and of inference."""
    mask = torch.ones_like(input_ids)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = model(input_ids=input_ids, attention_mask=mask)
        return output if isinstance(output, Tensor) else output.logits

    def train() -> None:
        model.zero_grad()
        forward().float().logsumexp(-1).sum().backward()

    def infer() -> None:
        with torch.inference_mode():
            forward()

    model.train()
    training = input_ids.numel() / seconds(train, repeats)
    model.eval()
    return {"training": training, "inference": input_ids.numel() / seconds(infer, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a document (default 4096)")
    parser.add_argument("--batch", type=int, default=2, help="documents (default 2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    config = RobertaConfig(
        vocab_size=30522,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        intermediate_size=4 * options.width,
        max_position_embeddings=514,
        attention_probs_dropout_prob=0.0,
    )
    windows = options.tokens // WINDOW
    input_ids = torch.randint(5, config.vocab_size, (options.batch, windows, WINDOW))
    models: dict[str, nn.Module] = {
        "ReBerta": RecurrentRoBERTa(num_classes=5, encoder=config, max_windows=windows, memory_level=0),
        "independent windows": IndependentWindows(config),
    }
    cases = [(name, precision) for precision in ("fp32", "bf16") for name in models]
    rows = [
        {"model": name, "precision": precision, **measure(models[name], input_ids, precision, options.repeats)}
        for name, precision in tqdm(cases, disable=None)
    ]
    print(f"tokens a second on {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print(f"{'model':<22}{'precision':<11}{'training':>10}{'inference':>11}")
    for row in rows:
        print(f"{row['model']:<22}{row['precision']:<11}{row['training']:>10,.0f}{row['inference']:>11,.0f}")
    if options.output:
        report = {"options": {**vars(options), "output": str(options.output)}, "torch": torch.__version__, "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
