"""Whether data hold the model up: preparation, second start, padding, and training end to end.

    python -m benchmarks.data [--documents 100000 --megabytes 30 --repeats 5 --steps 30 --output FILE.json]

- tokenisation: preparing documents (read, checked, tokenised, cut, written) against the fast tokenizer alone, which is
  handed the same texts as strings in batches of 1,000 texts or a million characters; both in turn, the medians
- second start: `LongTextDataset` on documents that are prepared already, in a fresh process; its imports apart
- padding: of the tokens that the model computes for the bundled training documents; window i of a batch costs as many
  rows as documents have one, each as long as the longest of them
- training: the engine's step, data included, against forward, backward, clipping and optimizer on a batch in memory;
  both in turn, the sums; without evaluation and checkpoints

All documents are cut from the bundled corpus, in a temporary folder.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase, RobertaConfig, TrainerCallback

from benchmarks import common
from benchmarks.peers import WINDOW, Shape
from command_line import parse_settings
from data_utils.dataset import LongTextBatchSampler, LongTextDataset, collate, load_tokenizer
from data_utils.readers import read_records
from engine.run_folder import open_run_folder
from models.registry import build_model
from train import build_trainer, load_data, run_training
from utils import quiet_libraries, setup_logging

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "data" / "train"
WORDS = {"bundled documents": None, "documents of 2,000 tokens": 1700, "documents of 100 tokens": 85}
RAW_TEXTS, RAW_CHARACTERS = 1000, 1_000_000
WINDOWS, BATCH, WARM_UP = 8, 4, 5
SECOND_START = """
import sys, time
start = time.perf_counter()
from data_utils.dataset import LongTextDataset
imported = time.perf_counter()
path, model, cache_dir, documents = sys.argv[1:]
assert len(LongTextDataset(path, None, model, cache_dir=cache_dir)) == int(documents)
print(imported - start, time.perf_counter() - imported)
"""

Row = dict[str, Any]


def row(measure: str, value: float, unit: str, target: str = "") -> Row:
    return {"measure": measure, "value": round(value, 3), "unit": unit, "target": target}


def texts(words: int | None) -> Iterator[str]:
    """The bundled training documents without end, cut into pieces of so many words where that is given."""
    for record in cycle(list(read_records(CORPUS))):
        if words is None:
            yield record.text
        else:
            split = record.text.split()
            yield from (" ".join(split[at : at + words]) for at in range(0, len(split) - words + 1, words))


def write_documents(path: Path, chosen: Sequence[str]) -> Path:
    """The texts as JSON Lines; every fifth has the same label."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(chosen):
            file.write(json.dumps({"id": f"d{number}", "text": text, "label": f"l{number % 5}"}) + "\n")
    return path


def raw_tokenisation(tokenizer: PreTrainedTokenizerBase, chosen: Sequence[str]) -> int:
    """How many tokens the tokenizer alone makes of the texts."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    tokens = start = characters = 0
    for end, text in enumerate(chosen, 1):
        characters += len(text)
        if end - start == RAW_TEXTS or characters >= RAW_CHARACTERS or end == len(chosen):
            encodings = backend.encode_batch_fast(chosen[start:end], add_special_tokens=False)
            tokens += sum(len(encoding) for encoding in encodings)
            start, characters = end, 0
    return tokens


def tokenisation(kind: str, model: str, megabytes: float, repeats: int, folder: Path) -> list[Row]:
    """Tokens a second of the tokenizer alone and of preparing documents, and the ratio of the two."""
    tokenizer = load_tokenizer(model)
    chosen, room = [], megabytes * 1e6
    for text in texts(WORDS[kind]):
        chosen.append(text)
        room -= len(text)
        if room <= 0:
            break
    path = write_documents(folder / "tokenisation.jsonl", chosen)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = raw_tokenisation(tokenizer, chosen)
        raw = tokens / (time.perf_counter() - start)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            start = time.perf_counter()
            prepared = LongTextDataset(path, tokenizer=tokenizer, cache_dir=Path(cache))
            ours = tokens / (time.perf_counter() - start)
        assert int(prepared.token_counts.sum()) == tokens
        rates.append((raw, ours, 100 * ours / raw))
    raw, ours, share = map(statistics.median, zip(*rates, strict=True))
    name = f"tokenisation, {kind}"
    return [
        row(f"{name}: tokenizer alone", raw, "tokens/s"),
        row(f"{name}: prepared", ours, "tokens/s"),
        row(name, share, "% of the tokenizer's rate", ">= 90"),
    ]


def second_start(model: str, documents: int, folder: Path) -> list[Row]:
    path = write_documents(
        folder / "second_start.jsonl", list(islice(texts(WORDS["documents of 100 tokens"]), documents))
    )
    LongTextDataset(path, None, model, cache_dir=folder)
    arguments = [sys.executable, "-c", SECOND_START, str(path), model, str(folder), str(documents)]
    run = subprocess.run(arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    imports, seconds = map(float, run.stdout.split())
    name = f"second start on {documents:,} documents"
    return [row(f"{name}: imports", imports, "s"), row(name, seconds, "s", "< 2")]


def padding_share(loader: DataLoader[dict[str, Tensor]]) -> float:
    """The share of padding in the tokens that the model computes."""
    computed = real = 0
    for batch in loader:
        lengths_BN = batch["attention_mask"].sum(-1)
        computed += int(((lengths_BN > 0).sum(0) * lengths_BN.amax(0)).sum())
        real += int(lengths_BN.sum())
    return 1 - real / computed


def padding(model: str, folder: Path) -> list[Row]:
    rows = []
    for max_windows in (16, None):
        documents = LongTextDataset(CORPUS, None, model, window_size=WINDOW, max_windows=max_windows, cache_dir=folder)
        for batch_size in (4, 8):
            sampler = LongTextBatchSampler(documents.window_counts, batch_size)
            share = padding_share(DataLoader(documents, batch_sampler=sampler, collate_fn=collate))
            name = f"padding, {max_windows or 'all'} windows, batches of {batch_size}"
            rows.append(row(name, 100 * share, "% of the computed tokens", "< 3"))
    return rows


class Alternate(TrainerCallback):
    """Takes the time of each step of the engine, and makes a bare step on the same documents after it."""

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self.model, self.batches = model.train(), batches
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.engine: list[float] = []
        self.bare: list[float] = []
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        between = time.perf_counter()
        self.step(self.batches[state.global_step - 1])
        end = time.perf_counter()
        self.engine.append(between - self.start)
        self.bare.append(end - between)
        control.should_training_stop = state.global_step == len(self.batches)
        self.start = end

    def step(self, batch: dict[str, Tensor]) -> None:
        logits_BC = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nn.functional.cross_entropy(logits_BC, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def save_encoder(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, folder: Path, *, positions: int = WINDOW, **changes: Any
) -> Path:
    """A RoBERTa with random weights, and this tokenizer, as `--model_path` takes it."""
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=positions + tokenizer.pad_token_id + 1,
        pad_token_id=tokenizer.pad_token_id,
        type_vocab_size=1,
        **changes,
    )
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def training(model: str, shape: Shape, steps: int, folder: Path) -> list[Row]:
    """Seconds of a step through the engine and of a bare one, and the ratio of the two."""
    chosen = list(islice(texts(WINDOWS * WINDOW), BATCH * (WARM_UP + steps)))
    options = {
        "mode": "train_steps",
        "train_path": write_documents(folder / "train.jsonl", chosen),
        "val_path": write_documents(folder / "val.jsonl", chosen[:5]),
        "model_path": save_encoder(load_tokenizer(model), shape, folder / "encoder"),
        "output_dir": folder / "run",
        "cache_dir": folder,
        "batch_size": BATCH,
        "max_windows": WINDOWS,
        "total_steps": 2 * len(chosen),  # it is stopped before, so that it neither evaluates nor saves
        "eval_every": 2 * len(chosen),
        "device": "cpu",
        "log_level": "WARNING",
    }
    settings = parse_settings([word for name, value in options.items() for word in (f"--{name}", str(value))])
    with open_run_folder(settings) as (run, _):
        data = load_data(settings, run)
    ours, bare = (build_model(settings, data.train.label_names, data.tokenizer) for _ in range(2))
    trainer = build_trainer(settings, data, run, ours, torch.device("cpu"), None, settings.total_steps)
    batches = [trainer.data_collator([data.train[i] for i in batch]) for batch in trainer.train_sampler]
    alternate = Alternate(bare, batches)
    trainer.add_callback(alternate)
    run_training(trainer, None)
    engine_seconds, bare_seconds = (sum(times[WARM_UP:]) / steps for times in (alternate.engine, alternate.bare))
    return [
        row("training: bare step", bare_seconds, "s"),
        row("training: step through the engine", engine_seconds, "s"),
        row("training", 100 * bare_seconds / engine_seconds, "% of the bare step rate", ">= 95"),
    ]


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--documents", type=int, default=100_000, help="documents of the second start (default 100000)")
    parser.add_argument("--megabytes", type=float, default=30, help="text that is tokenised (default 30)")
    parser.add_argument("--repeats", type=int, default=5, help="tokenisations of each kind (default 5)")
    parser.add_argument("--steps", type=int, default=30, help="training steps, after 5 to warm up (default 30)")
    parser.add_argument("--layers", type=int, default=4, help="of the encoder that is trained (default 4)")
    parser.add_argument("--width", type=int, default=256, help="of the encoder that is trained (default 256)")
    parser.add_argument("--model", default="minilm-l6", help="whose tokenizer, a name or folder (default minilm-l6)")
    options = parser.parse_args(argv)

    figures = {name: value for name, value in vars(options).items() if name != "output"}
    results = common.Results("data", figures, options.output)
    setup_logging("WARNING")
    quiet_libraries("WARNING")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages: dict[str, Callable[[], list[Row]]] = {  # by the last measure of each
            f"tokenisation, {kind}": partial(
                tokenisation, kind, options.model, options.megabytes, options.repeats, folder
            )
            for kind in WORDS
        }
        stages |= {
            f"second start on {options.documents:,} documents": partial(
                second_start, options.model, options.documents, folder
            ),
            "padding, all windows, batches of 8": partial(padding, options.model, folder),
            "training": partial(training, options.model, Shape(options.layers, options.width), options.steps, folder),
        }
        pending = results.pending({"measure": measure} for measure in stages)
        if pending:
            results.start_session(argv)
        for cell in (bar := tqdm(pending, disable=None)):
            bar.set_description(cell["measure"])
            for measured in stages[cell["measure"]]():
                results.add(measured)
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
