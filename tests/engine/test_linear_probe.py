"""The head that a linear probe gives, against scikit-learn's logistic regression, and training that starts from it."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from calibration import fit_temperature, probabilities
from command_line import parse_settings
from data_utils.dataset import LongTextDataset, collate, load_tokenizer
from engine.linear_probe import FOLDS, LEAST_DEVIATION, SPREAD, STRENGTHS, States, fit_classifiers
from engine.objective import Objective
from engine.trainer import clearly_lower
from models.checkpoint import load_model_and_config
from models.registry import build_model
from tests.conftest import write_corpus
from train import train
from utils import ConfigError

FLAGS = "--window_size 12 --max_windows 6 --batch_size 4 --epochs 2 --metric_for_best loss --device cpu"


@pytest.fixture
def argv(tmp_path, monkeypatch, encoder_folder, blank_curves):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "train.jsonl", 22)
    write_corpus(tmp_path / "val.jsonl", 10, seed=1)
    paths = f"--train_path train.jsonl --val_path val.jsonl --model_path {encoder_folder} --cache_dir cache"
    return f"{FLAGS} {paths}".split()


def started(argv: list[str], name: str, *more: str):
    """Train in the run folder `name`; what `train` gives, and the rows of its metrics."""
    trained = train(parse_settings([*argv, f"--output_dir=logs/{name}", *more]))
    rows = [json.loads(line) for line in (trained.run_folder / "metrics.jsonl").read_text().splitlines()]
    return trained, rows


def last(trained):
    """The folder of the last checkpoint, after two epochs of six steps."""
    return trained.run_folder / "checkpoint-12"


def said_of_the_probe(trained) -> list[str]:
    """Of each evaluation that did not clearly beat it, once."""
    return sorted(set(re.findall("not clearly better .*", (trained.run_folder / "train.log").read_text())))


@torch.no_grad()
def read(model, path: str, labels: list[str], encoder: str):
    """Hidden states, logits and labels of a set, read whole."""
    documents = LongTextDataset(
        path, tokenizer=load_tokenizer(encoder), window_size=12, max_windows=6, label_names=labels
    )
    batch = collate([documents[i] for i in range(len(documents))])
    output = model.eval()(batch["input_ids"], batch["attention_mask"])
    return output.hidden_states, output.logits, batch["labels"].numpy()


@pytest.mark.parametrize("window_loss", [0.0, 0.5])
def test_the_start_is_a_logistic_regression_of_the_fresh_models_states(argv, encoder_folder, window_loss):
    """Chosen among the strengths by documents held out, in a cross-validation of the training set and in validation;
    a learning rate of nothing leaves it the best model."""
    argv.append("--seed=7")
    trained, rows = started(argv, "run", "--probe_epochs=1", "--learning_rate=1e-12", f"--window_loss={window_loss}")
    settings = parse_settings(argv)
    best = load_model_and_config(trained.best_model).model
    labels = list(best.config.id2label.values())
    fresh = build_model(settings, labels, load_tokenizer(encoder_folder))
    torch.testing.assert_close(fresh.encoder.state_dict(), best.encoder.state_dict(), atol=1e-6, rtol=0)
    (hidden, _, truth), (held_out_hidden, _, held_out_truth) = (
        read(best, f"{name}.jsonl", labels, encoder_folder) for name in ("train", "val")
    )
    rows_of_x, rows_of_y, weights, owners = [], [], [], []
    for document, label in enumerate(truth):
        shares = (hidden.window_weights[document] / hidden.window_weights[document].sum()).tolist()
        windows = [state for state, share in zip(hidden.window_states[document], shares, strict=True) if share]
        rows_of_x += [hidden.document_state[document], *windows]
        rows_of_y += [label] * (1 + len(windows))
        weights += [1.0, *(window_loss * share for share in shares if share)]
        owners += [document] * (1 + len(windows))
    states, rows_of_y, weights, owners = map(np.array, (rows_of_x, rows_of_y, weights, owners))
    mean = np.average(states, axis=0, weights=weights)
    deviation = np.sqrt(np.average((states - mean) ** 2, axis=0, weights=weights))
    values, held_out_values = (
        np.tanh(SPREAD * (x - mean) / deviation) for x in (states, held_out_hidden.document_state.numpy())
    )

    def fits(rows: np.ndarray) -> list[LogisticRegression]:
        # of two classes scikit-learn has one vector of weights where we have two of half its length
        return [
            LogisticRegression(C=2 * c / (1 + window_loss), tol=1e-8, max_iter=10_000).fit(
                values[rows], rows_of_y[rows], weights[rows]
            )
            for c in STRENGTHS
        ]

    predicted = [f.predict_log_proba(held_out_values) for f in fits(np.full(len(owners), True))]
    fold_of = torch.randperm(22, generator=torch.Generator().manual_seed(settings.seed)).numpy() % FOLDS
    first_rows = np.flatnonzero(np.diff(owners, prepend=-1))
    tried, tried_truth = [predicted], [held_out_truth]
    for fold in range(FOLDS):
        left_out = fold_of == fold
        tried.append([f.predict_log_proba(values[first_rows[left_out]]) for f in fits(~left_out[owners])])
        tried_truth.append(truth[left_out])
    all_truth = np.concatenate(tried_truth)
    assert len(all_truth) == 32
    losses = []
    for said in map(np.concatenate, zip(*tried, strict=True)):
        at_temperature = probabilities(said, "single_label", fit_temperature(said, all_truth))
        losses.append(-np.log(at_temperature[range(32), all_truth]).mean())
    chosen = int(np.argmin(losses))
    logits = read(best, "val.jsonl", labels, encoder_folder)[1]
    np.testing.assert_allclose(logits.log_softmax(-1).numpy(), predicted[chosen], atol=5e-3)
    said = re.search(r"C = (\S+), log loss (\S+) of 32 documents", (trained.run_folder / "train.log").read_text())
    assert said is not None
    assert [float(number) for number in said.groups()] == pytest.approx([STRENGTHS[chosen], min(losses)], rel=2e-3)
    first = next(row for row in rows if "eval_loss" in row)
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(-predicted[chosen][range(10), held_out_truth].mean(), abs=2e-3)


@pytest.mark.parametrize(
    ("more", "states"), [([], 22), (["--read=random"], 66), (["--train_windows=1"], 66), (["--use_augmentation"], 66)]
)
def test_epochs_that_do_not_differ_are_read_once(argv, more, states):
    trained, _ = started(argv, "run", "--probe_epochs=3", "--epochs=1", *more)
    assert f"linear probe of {states} document states" in (trained.run_folder / "train.log").read_text()


def test_the_best_model_is_never_worse_than_the_probe(argv):
    """A learning rate that ruins the model."""
    trained, rows = started(argv, "run", "--probe_epochs=1", "--learning_rate=0.3", "--fresh_lr_factor=1")
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert losses[0] < min(losses[6], losses[12])
    assert trained.best_metric == losses[0]
    assert json.loads((trained.run_folder / "status.json").read_text())["best_step"] == 0
    assert (trained.best_model / "model.pt").is_file()


@pytest.mark.parametrize(
    ("validation", "strengths", "more", "beaten"),
    [("val.jsonl", STRENGTHS, [], False), ("train.jsonl", (1e-6,), ["--dropout=0", "--epochs=4"], True)],
)
def test_by_log_loss_a_probe_must_be_beaten_by_more_than_a_standard_error(
    argv, encoder_folder, monkeypatch, validation, strengths, more, beaten
):
    """Ten documents do not tell; a probe that is regularised to nothing is beaten on the documents of training."""
    monkeypatch.setattr("engine.linear_probe.STRENGTHS", strengths)
    argv[argv.index("val.jsonl")] = validation
    argv += ["--probe_epochs=1", "--metric_for_best=log_loss", "--learning_rate=1e-3"]
    trained, rows = started(argv, "run", "--save_total_limit=9", *more)
    validated = {row["step"]: row["eval_log_loss"] for row in rows if "eval_loss" in row}
    assert min(validated, key=validated.__getitem__) > 0
    probe, _ = started(argv, "probe", "--learning_rate=1e-12")
    model = load_model_and_config(probe.best_model).model
    losses, best = {}, 0
    for step in validated:
        if step:
            model.load_state_dict(load_file(trained.run_folder / f"checkpoint-{step}" / "model.safetensors"))
        _, logits, truth = read(model, validation, list(model.config.id2label.values()), encoder_folder)
        said = probabilities(logits.numpy(), "single_label", fit_temperature(logits.numpy(), truth))
        losses[step] = -np.log(said[range(len(truth)), truth])
        gains = losses[0] - losses[step]
        if gains.mean() > gains.std(ddof=1) / len(truth) ** 0.5 and losses[step].mean() < losses[best].mean():
            best = step
    assert validated == pytest.approx({step: loss.mean() for step, loss in losses.items()}, abs=1e-4)
    assert (best > 0) == beaten
    assert json.loads((trained.run_folder / "status.json").read_text())["best_step"] == best
    assert trained.best_metric == validated[best]


@pytest.mark.parametrize(("gain", "is_clear"), [(0.19, False), (0.21, True)])
def test_the_standard_error_is_that_of_the_mean_over_documents(gain, is_clear):
    """Of 26 gains that deviate by 1 it is 0.2."""
    deviations = torch.tensor([1.0, -1.0]).repeat(13) * (25 / 26) ** 0.5
    assert clearly_lower(torch.zeros(26), gain + deviations) == is_clear


def test_a_fitted_head_learns_at_the_encoders_rate(argv):
    """Only what neither the encoder nor the probe brings is fresh."""
    flags = ["--learning_rate=1e-12", "--fresh_lr_factor=1e9", "--metric_for_best=log_loss"]
    trained, _ = started(argv, "run", "--probe_epochs=1", *flags)
    assert json.loads((trained.run_folder / "status.json").read_text())["best_step"] < 12
    start, end = (load_file(folder / "model.safetensors") for folder in (trained.best_model, last(trained)))
    moved = {name.split(".")[0] for name in start if (start[name] - end[name]).abs().max() > 1e-5}
    assert moved == {"window_gate", "window_norm", "carry_cell", "carry_output", "aggregation"}


def test_a_dimension_that_is_all_but_constant_is_not_drawn_out(argv, tmp_path, encoder_folder):
    """As three of MiniLM's 384 are."""
    folder = tmp_path / "encoder"
    shutil.copytree(encoder_folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = max(name for name in weights if name.endswith("output.LayerNorm.weight") and "attention" not in name)
    weights[name][:2] = torch.tensor([0.0, 1e-6])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    trained, _ = started(argv, "run", "--probe_epochs=1", f"--model_path={folder}", "--learning_rate=1e-12")
    scale = load_file(trained.best_model / "model.safetensors")["pooler.weight"].diag()
    mean = float((SPREAD / scale[2:]).sum()) / len(scale)
    assert scale[:2].tolist() == pytest.approx([SPREAD / (LEAST_DEVIATION * mean)] * 2, rel=1e-3)


def test_a_run_that_goes_on_does_not_probe_again(argv):
    flags = [
        "--probe_epochs=2",
        "--read=random",
        "--max_windows=2",
        "--learning_rate=1e-3",
        "--metric_for_best=log_loss",
    ]
    argv = [word for word in argv if word not in ("--max_windows", "6")]
    whole, _ = started(argv, "whole", *flags)
    started(argv, "parts", *flags)
    shutil.rmtree(whole.run_folder.with_name("parts") / "checkpoint-12")  # as a kill in the second epoch leaves it
    parts, rows = started(argv, "parts", *flags)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 6, 12]
    assert said_of_the_probe(whole) == said_of_the_probe(parts) != []
    ours, theirs = (load_file(last(run) / "model.safetensors") for run in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_several_labels_a_document(weights):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(60, 5))
    labels = (values[:, :3] + generator.normal(size=(60, 3)) > 0.4).astype(np.int64)
    objective = Objective(class_weights=None if weights is None else torch.tensor(weights))
    states = States(
        torch.from_numpy(values).float(), torch.from_numpy(labels).float(), torch.ones(60), torch.arange(60)
    )
    for strength, ours in zip(STRENGTHS, fit_classifiers(states, 3, objective), strict=True):
        relative = 1e-7 if strength <= 3 else 2e-3  # in fp32 the least of a flat cost is not found more exactly
        for i in range(3):
            more = None if weights is None else {0: 1.0, 1: weights[i]}
            # the mean over documents and classes divides each class's loss by 3
            theirs = LogisticRegression(C=strength / 3, class_weight=more, tol=1e-8).fit(values, labels[:, i])
            np.testing.assert_allclose(ours.weight[i].detach(), theirs.coef_[0], rtol=relative, atol=1e-3)
            np.testing.assert_allclose(ours.bias[i].detach(), theirs.intercept_[0], rtol=relative, atol=1e-3)


def test_a_model_from_scratch_has_nothing_to_probe(argv):
    with pytest.raises(ConfigError, match="--probe_epochs 1 does not go with --model_type transformer"):
        parse_settings([*argv, "--model_type=transformer", "--probe_epochs=1"])


def test_a_single_document_cannot_be_probed(argv):
    with pytest.raises(ConfigError, match="--probe_epochs: one training document tells no labels apart"):
        started(argv, "run", "--probe_epochs=1", "--sample_data=1")


def test_few_documents_are_probed_where_nothing_is_said_of_it(argv, monkeypatch):
    def evaluated(name: str, *more: str) -> tuple[list[int], str]:
        trained, rows = started(argv, name, "--epochs=1", *more)
        return [row["step"] for row in rows if "eval_loss" in row], str(trained.best_model)

    steps, best_model = evaluated("from-an-encoder")
    assert steps == [0, 6]
    assert load_model_and_config(f"{best_model}/model.pt").settings["probe_epochs"] == 1
    assert evaluated("without", "--probe_epochs=0")[0] == [6]
    assert evaluated("from-a-saved-model", f"--model_path={best_model}")[0] == [6]
    monkeypatch.setattr("train.FEW_DOCUMENTS", 21)
    assert evaluated("many")[0] == [6]
