"""notebooks/predict.ipynb runs from top to bottom, and what it shows is what the model says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import Tensor

from config import Settings
from data_utils.dataset import LongTextDataset
from models.checkpoint import save_checkpoint
from models.reberta import RecurrentRoBERTa
from tests.conftest import LABELS, tiny_encoder, word_tokenizer, write_corpus

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "predict.ipynb"
READING: dict[str, Any] = {"window_size": 12, "window_overlap": 2, "max_windows": 4}
TEMPERATURE = 1.5


class Run(NamedTuple):
    """A notebook that was run, and what it was run on."""

    cells: list[Any]
    model: RecurrentRoBERTa
    windows: dict[str, Tensor]
    document: dict[str, str]

    def printed(self, cell: str) -> str:
        outputs = next(found.outputs for found in self.cells if found.id == cell)
        return "".join(output.text for output in outputs if output.get("name") == "stdout")

    @torch.inference_mode()
    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> list[float]:
        logits = self.model(input_ids.unsqueeze(0), attention_mask.unsqueeze(0)).logits[0] / TEMPERATURE
        several = self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if several else logits.softmax(-1)).tolist()


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters_cell(notebook: Any) -> Any:
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return cell


def tiny_model(problem_type: str, **options: Any) -> RecurrentRoBERTa:
    """A model whose probabilities depend on what it reads."""
    torch.manual_seed(7)
    model = RecurrentRoBERTa(
        encoder=tiny_encoder("roberta"),
        cls_token_id=word_tokenizer().cls_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        problem_type=f"{problem_type}_classification",
        calibration_temperature=TEMPERATURE,
        **READING,
        **options,
    ).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    torch.nn.init.normal_(model.pooler.weight, std=0.3)
    return model


@pytest.fixture(scope="module", params=["single_label", "multi_label"])
def run(request, tmp_path_factory) -> Run:
    """One label: a folder, from notebooks/, the longest document. Several: a .pt file, from the root, by id."""
    several = request.param == "multi_label"
    tmp = tmp_path_factory.mktemp(request.param)
    corpus = write_corpus(tmp / "corpus.jsonl", 7)
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    if several:
        corpus.write_text("".join(json.dumps({**row, "label": [row["label"]]}) + "\n" for row in rows))
    document = sorted(rows, key=lambda row: len(row["text"]))[-2 if several else -1]
    tokenizer = word_tokenizer()
    windows = LongTextDataset.preprocess_single_text(
        tokenizer, document["text"], READING["window_size"], READING["max_windows"], window_overlap=2
    )

    model = tiny_model(request.param, num_repeats=2 if several else 1)
    case = Run(read_notebook().cells, model, windows, document)
    if several:  # the less likely label is predicted, the other is not
        scores = case.probabilities(**windows)
        model.config.thresholds = [p - 0.01 if p == min(scores) else p + 0.01 for p in scores]
    settings = Settings(problem_type=request.param, **READING)
    folder = save_checkpoint(model, tokenizer, settings.model_dump(mode="json"), tmp / "saved" / "run")

    notebook = read_notebook()
    parameters_cell(notebook).source = (
        f"MODEL = Path({str(folder / 'model.pt' if several else folder)!r})\n"
        f"TEXT_FILE = Path({str(corpus)!r})\n"
        f"DOCUMENT = {document['id'] if several else None!r}"
    )
    place = str(ROOT if several else ROOT / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp / "hf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("IPYTHONDIR", str(tmp / "ipython"))
        patch.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": place}}).execute()
    return case._replace(cells=notebook.cells)


@pytest.fixture(scope="module")
def summary(run) -> dict[str, Any]:
    return json.loads(run.printed("summary"))


def test_label_and_probabilities_are_the_models(run, summary):
    expected = run.probabilities(**run.windows)
    assert list(summary["probabilities"]) == list(LABELS)
    assert list(summary["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    choose = min if run.model.config.thresholds else max
    predicted = LABELS[expected.index(choose(expected))]
    assert summary["predicted"] == [predicted]
    for name, p in zip(LABELS, expected, strict=True):
        mark = "  <- predicted" if name == predicted else ""
        assert f"{name:<5}  {p:7.2%}{mark}\n" in run.printed("predict")


def test_pipeline_and_batch_say_the_same(run, summary):
    expected = run.probabilities(**run.windows)
    assert summary["pipeline"] == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-5)
    assert summary["batch"][run.document["id"]] == pytest.approx(expected, abs=1e-5)
    assert len(summary["batch"]) == 3, "the document, and one of each label"
    assert "transformers_modules" in run.printed("pipeline")


def test_tokens_and_windows(run, summary):
    tokens = len(run.document["text"].split())
    assert summary["document"] == run.document["id"]
    assert summary["tokens"] == tokens
    assert summary["tokens_read"] == min(tokens, 10 + 3 * 8)
    number, read = len(run.windows["input_ids"]), summary["tokens_read"]
    assert f"{number} windows hold {read} of them: {read / tokens:.1%} is read\n" in run.printed("windows")


def test_influence_is_what_a_text_without_the_window_loses(run, summary):
    """The notebook masks a window; here it is cut out."""
    scores = run.probabilities(**run.windows)
    likeliest = scores.index(max(scores))
    number = len(run.windows["input_ids"])
    assert number > 2
    expected = []
    for left_out in range(number):
        kept = [i for i in range(number) if i != left_out]
        rest = {name: tensor[kept] for name, tensor in run.windows.items()}
        expected.append(scores[likeliest] - run.probabilities(**rest)[likeliest])
    assert summary["influence"] == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3, "nothing to compare"
    strongest = max(range(number), key=lambda i: abs(expected[i]))
    assert summary["strongest_window"] == strongest
    words = run.document["text"].split()[8 * strongest : 8 * strongest + 10]
    assert run.printed("strongest").split("\n\n")[1].split() == words


def test_gates_are_the_models(run, summary):
    hidden = run.model(**{name: tensor.unsqueeze(0) for name, tensor in run.windows.items()}).hidden_states
    expected = hidden.window_gates[:, 0].clone()
    expected[:, 0] = hidden.global_gates[:, 0]
    torch.testing.assert_close(torch.tensor(summary["gates"]), expected, atol=1e-5, rtol=0)
    assert (expected > 0).sum() == expected.numel() - 1, "only window 0 of the first repeat hears of nothing"


def test_figures_and_no_noise(run):
    outputs = [output for cell in run.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    noise = "".join(output["text"] for output in outputs if output.get("name") == "stderr").splitlines()
    honest = "tokens are read: the model takes 4 windows of 12 tokens"
    assert [line[-len(honest) :] for line in noise] == [honest]


def test_the_stored_notebook_has_no_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert len(cells) == 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_default_model_is_the_newest(tmp_path, monkeypatch):
    source = parameters_cell(read_notebook()).source
    monkeypatch.chdir(tmp_path)

    def parameters() -> dict[str, Any]:
        variables: dict[str, Any] = {"os": os, "Path": Path}
        exec(source, variables)
        return variables

    assert not parameters()["MODEL"].exists(), "named in the error of load_model_and_config"
    for age, name in enumerate(("newest", "older", "oldest")):
        folder = tmp_path / "models" / "saved" / name
        folder.mkdir(parents=True)
        (folder / "model.pt").touch()
        os.utime(folder, (1_000_000 - age, 1_000_000 - age))
    assert parameters()["MODEL"] == Path("models/saved/newest")
    assert (ROOT / parameters()["TEXT_FILE"]).is_file()
