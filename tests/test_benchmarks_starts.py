"""benchmarks/starts.py through its command line, with a tiny random encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report, starts
from benchmarks.synthetic import save_tiny_encoder, write_corpus

POSITIONS = 160  # for windows of 128 tokens


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("starts") / "tiny", POSITIONS)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch) -> None:
    """A small corpus, a page of its own, and one run."""
    splits = {"train": 20, "evaluation": 6, "validation": 6}
    paths = [write_corpus(tmp_path / f"{split}.jsonl", [1200] * number) for split, number in splits.items()]
    monkeypatch.setattr(starts, "CORPUS", paths)
    monkeypatch.setattr(starts, "WINDOWS", 2)
    monkeypatch.setattr(starts, "STRENGTHS", (0.1, 1.0))
    monkeypatch.setattr(
        starts, "RUNS", {"quick": "--epochs 2 --probe_epochs 1 --max_windows 9 --mixed_precision false"}
    )
    monkeypatch.setitem(starts.MEASURES, "training", (starts.training, starts.RUNS))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_start_is_measured_once_and_the_page_shows_it(tmp_path, encoder, capsys):
    output = tmp_path / "results" / "starts.json"
    arguments = ["--encoder", str(encoder), "--output", str(output)]
    starts.main(arguments)
    content = json.loads(output.read_text(encoding="utf-8"))
    measured = [(row["measure"], row["start"]) for row in content["rows"]]
    assert measured == [(measure, start) for measure, (_, of) in starts.MEASURES.items() for start in of]
    rows = dict(zip(measured, content["rows"], strict=True))
    (run,) = starts.RUNS
    assert list(rows["training", run]["validation"]) == ["0", "1", "2"]
    before = output.read_bytes()
    starts.main(arguments)
    assert output.read_bytes() == before
    page = (tmp_path / "docs" / "starts.md").read_text(encoding="utf-8")
    for row in content["rows"]:
        assert f"| {row['start']} |" in page
    assert (
        "| mean of windows | {spread:.2%} | {log_loss:.3f} | {accuracy:.3f} |".format(
            **rows["documents", "mean of windows"]
        )
        in page
    )


def test_spread_is_the_distance_from_the_mean_as_a_share_of_it():
    assert starts.spread(torch.tensor([[1.0, 3.0], [3.0, 3.0]])) == pytest.approx(1 / 13**0.5)


def test_tobert_starts_as_its_mean_of_windows(encoder):
    """And does not where its layers speak at once."""
    found = {name: starts.documents(encoder, start) for name, start in starts.STATES.items() if "reberta" not in name}
    assert found["tobert"] == pytest.approx(found["mean of windows"], rel=1e-4)
    assert found[f"tobert, {starts.SPEAKS}"]["spread"] != pytest.approx(found["tobert"]["spread"], rel=1e-3)


def test_nothing_is_heard_through_gates_that_are_shut(encoder):
    shut = starts.memory(encoder, "--carry gated --gate_bias -40")
    ajar = starts.memory(encoder, "--carry gated --gate_bias 0")
    assert len(ajar["change"]) == len(ajar["gradient"]) == starts.LATER
    assert max(shut["change"] + shut["gradient"]) < 1e-9
    assert min(ajar["change"] + ajar["gradient"]) > 1e-6


def test_what_is_heard_is_what_two_documents_with_exchanged_windows_hear(encoder, monkeypatch):
    monkeypatch.setattr(starts, "HEARD", 2)
    model, dataset = starts.fresh(encoder, "", starts.LATER + 1)
    with torch.inference_mode():
        for_each = []
        for mine, other in ((0, 1), (1, 0)):
            ids = dataset[mine]["input_ids"]
            with_other = torch.cat([dataset[other]["input_ids"][:1], ids[1:]])
            mask = torch.ones_like(ids)
            before, after = (model(i[None], mask[None]).hidden_states.window_states[0] for i in (ids, with_other))
            for_each.append((after - before).norm(dim=-1) / before.norm(dim=-1))
    assert starts.memory(encoder, "")["change"] == pytest.approx(torch.stack(for_each).mean(0)[1:].tolist(), rel=1e-3)
