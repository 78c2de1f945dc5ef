"""How a model starts, before any training, and what becomes of it: docs/starts.md.

    python -m benchmarks.starts [--measures documents memory training --encoder FOLDER --output FILE.json]

- documents: what tells documents apart in a fresh model's document states: their spread, and a linear probe of them
- memory: how far window 0 is heard in a fresh model: by the states of later windows when another text stands there,
  and by their gradients
- training: `make train` from other starts, with one thread: log loss in validation by epoch, and the test
- all on the bundled corpus, in windows of 128 tokens
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import common
from benchmarks.quality_cell import evaluations
from command_line import parse_settings
from data_utils.dataset import LongTextDataset, dataset_options, evaluation_loader, load_tokenizer
from engine.linear_probe import FOLDS
from models.output import INITIALIZER_RANGE
from models.reberta import RecurrentRoBERTa
from models.registry import build_model
from utils import quiet_libraries

ROOT = Path(__file__).parents[1]
CORPUS = [ROOT / "data" / split for split in ("train", "evaluation", "validation")]
ENCODER = ROOT / "models" / "pretrained" / "minilm-l6"
WINDOWS = 8  # of a document whose state is looked at
LATER = 8  # windows after the one whose text is exchanged
HEARD = 16  # documents in which it is
BATCH = 8
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of a probe's logistic regression
AS_DESCRIBED = "--carry residual --alpha 0.8 --gate_bias -2 --global_alpha 0.8"
SPEAKS = "what it adds from usual start values"

# by name: options, and whether what is silent at the start gets the start values of other fresh layers
STATES: dict[str, tuple[str, bool]] = {
    "mean of windows": ("--model_type mean", False),
    "the encoder's aggregate alone": ("--carry none --global_alpha 1", False),
    "0.8 of it, 0.2 of the mean": ("--carry none --global_alpha 0.8", False),
    "as first described": (AS_DESCRIBED, False),
    f"tobert, {SPEAKS}": ("--model_type tobert", True),
    "tobert": ("--model_type tobert", False),
    f"reberta, {SPEAKS}": ("", True),
    "reberta": ("", False),
}
MEMORIES = {
    "residual, alpha 0.8, gates at -2": "--carry residual --alpha 0.8 --gate_bias -2",
    "residual, alpha 0.5, gates at 4": "--carry residual --alpha 0.5 --gate_bias 4",
    "gated, gates at 0": "--carry gated",
    "gru, gates at -4": "--gate_bias -4",
    "gru, gates at 0": "",
}
RUNS = {
    "as `make train` has it": "",
    "fresh parts at ten times the encoder's rate": "--fresh_lr_factor 10",
    "a random head, no probe": "--probe_epochs 0 --fresh_lr_factor 10",
    "the encoder's aggregate alone": "--global_alpha 1",
    "as first described": f"{AS_DESCRIBED} --probe_epochs 0 --window_loss 0 --fresh_lr_factor 10",
}


def fresh(encoder: Path, flags: str, windows: int) -> tuple[RecurrentRoBERTa, LongTextDataset]:
    """A model that was never trained, the same each time, and the corpus as it reads it."""
    shape = f"--model_path {encoder} --window_size 128 --max_windows {windows} --memory_level 0"
    settings = parse_settings([*shape.split(), *flags.split()])
    dataset = LongTextDataset(CORPUS, **dataset_options(settings, load_tokenizer(encoder)))
    torch.manual_seed(0)
    model = build_model(settings, dataset.label_names, dataset.tokenizer)
    return model.eval().requires_grad_(False), dataset


@torch.no_grad()
def let_speak(model: RecurrentRoBERTa) -> None:
    """What starts at zero, so that memory and Transformer say nothing at first, starts as any other fresh layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.normal_(std=INITIALIZER_RANGE)


def documents(encoder: Path, start: tuple[str, bool]) -> dict[str, float]:
    """The spread of document states, and how well a logistic regression of them does on documents that it has not
    seen, its strength chosen in a cross-validation within the others."""
    flags, speaks = start
    model, dataset = fresh(encoder, flags, WINDOWS)
    if speaks:
        let_speak(model)
    states, labels = [], []
    with torch.inference_mode():
        for batch in evaluation_loader(dataset, BATCH):
            states.append(model(batch["input_ids"], batch["attention_mask"]).hidden_states.document_state)
            labels.append(batch["labels"])
    values, known = torch.cat(states).double().numpy(), torch.cat(labels).numpy()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    chosen = GridSearchCV(probe, {"logisticregression__C": STRENGTHS}, scoring="neg_log_loss", cv=folds)
    probabilities = cross_val_predict(chosen, values, known, cv=folds, method="predict_proba")
    return {
        "documents": len(known),
        "spread": spread(torch.cat(states)),
        "log_loss": float(log_loss(known, probabilities)),
        "accuracy": float(accuracy_score(known, probabilities.argmax(1))),
    }


def spread(states_BD: Tensor) -> float:
    """Root mean square distance of states from their mean, as a share of the mean's norm."""
    mean_D = states_BD.mean(0)
    return float((states_BD - mean_D).norm(dim=1).square().mean().sqrt() / mean_D.norm())


def memory(encoder: Path, flags: str) -> dict[str, list[float]]:
    """For each later window: the change of its state when another document's text stands in window 0, as a share of the
    state's norm; and the gradient of its state, along a random direction, by the word embeddings of window 0, as a
    share of that by its own. Means over documents."""
    model, dataset = fresh(encoder, flags, LATER + 1)
    chosen = [index for index, windows in enumerate(dataset.window_counts) if windows == LATER + 1][:HEARD]
    ids_BNW, mask_BNW = (
        torch.stack([dataset[index][name] for index in chosen]) for name in ("input_ids", "attention_mask")
    )
    exchanged_BNW = ids_BNW.clone()
    exchanged_BNW[:, 0] = ids_BNW[:, 0].roll(1, 0)
    read: list[Tensor] = []  # word embeddings of each window in turn

    def keep(_module: nn.Module, _ids: Any, embeddings: Tensor) -> Tensor:
        read.append(embeddings.requires_grad_())
        return embeddings

    with model.encoder.get_input_embeddings().register_forward_hook(keep):
        states_BND = model(ids_BNW, mask_BNW).hidden_states.window_states
    with torch.inference_mode():
        others_BND = model(exchanged_BNW, mask_BNW).hidden_states.window_states
    change_BN = (others_BND - states_BND).norm(dim=-1) / states_BND.norm(dim=-1)
    direction_D = torch.randn(states_BND.shape[-1])
    gradients = []
    for window in range(1, LATER + 1):
        along = (states_BND[:, window] @ direction_D).sum()
        first_BWD, own_BWD = torch.autograd.grad(along, [read[0], read[window]], retain_graph=True)
        gradients.append(float((first_BWD.flatten(1).norm(dim=1) / own_BWD.flatten(1).norm(dim=1)).mean()))
    return {"change": change_BN[:, 1:].mean(0).tolist(), "gradient": gradients}


def training(encoder: Path, flags: str) -> dict[str, Any]:
    """`make train` with other options: log loss in validation by epoch, 0 a probe, and the best model's test."""
    with tempfile.TemporaryDirectory(prefix="reberta-starts-") as folder:
        command = [sys.executable, str(ROOT / "main.py"), "--mode=train_and_evaluate", "--output_dir=run"]
        command += [f"--config={ROOT / 'configs' / 'sotu.yaml'}", f"--model_path={encoder}", "--device=cpu"]
        command += ["--log_level=ERROR"]
        paths = zip(("train_path", "val_path", "test_path"), CORPUS, strict=True)
        command += [f"--{name}={path}" for name, path in paths]
        alone = {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *flags.split()], cwd=folder, env=os.environ | alone, check=True)
        rows = evaluations(Path(folder) / "run")
        tested = json.loads((Path(folder) / "run" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        status = json.loads((Path(folder) / "run" / "status.json").read_text(encoding="utf-8"))
    return {
        "validation": {str(round(row["epoch"])): row["eval_log_loss"] for row in rows},
        "best_epoch": next(round(row["epoch"]) for row in rows if row["step"] == status["best_step"]),
        "accuracy": tested["accuracy"],
        "test_log_loss": tested["log_loss"],
    }


MEASURES: dict[str, tuple[Callable[[Path, Any], dict[str, Any]], Mapping[str, Any]]] = {
    "documents": (documents, STATES),
    "memory": (memory, MEMORIES),
    "training": (training, RUNS),
}


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")
    parser.add_argument("--encoder", type=Path, default=ENCODER, help="a folder (default: MiniLM, models/pretrained)")
    options = parser.parse_args(argv)
    quiet_libraries("INFO")
    results = common.Results("starts", {"encoder": options.encoder.name}, options.output, machines=True)
    cells = [{"measure": measure, "start": start} for measure in options.measures for start in MEASURES[measure][1]]
    pending = results.pending(cells)
    if pending:
        results.start_session(argv, machine=common.machine())
    for cell in (bar := tqdm(pending, disable=None)):
        bar.set_description(" ".join(cell.values()))
        measured, starts = MEASURES[cell["measure"]]
        results.add({**cell, **measured(options.encoder.resolve(), starts[cell["start"]])})
    results.show()


if __name__ == "__main__":
    main(sys.argv[1:])
