"""The kill and stress harnesses at a tiny size, and that they notice what they are there to notice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import kills, report, report_tables, runs, stress
from benchmarks.runs import ONE, Run


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def change_a_weight(path: Path) -> None:
    """The smallest change there is: the sign of a zero."""
    save_file({"weight": torch.tensor([1.0, -0.0]), "bias": torch.ones(1)}, path)


@pytest.fixture
def finished(tmp_path) -> Run:
    """What a run leaves behind that is compared."""
    run = Run(tmp_path / "finished", [])
    for step in (2, 10):
        (run.run_folder / f"checkpoint-{step}").mkdir(parents=True)
    run.best_model.mkdir(parents=True)
    for place in (run.checkpoints[-1] / "model", run.checkpoints[-1] / "ema", run.best_model / "model"):
        save_file({"weight": torch.tensor([1.0, 0.0]), "bias": torch.ones(1)}, place.with_suffix(".safetensors"))
    rows = [{"loss": 0.5, "step": 1}, {"eval_loss": 0.25, "step": 2}, {"train_runtime": 3.0, "step": 2}]
    (run.run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.run_folder / "status.json").write_text(json.dumps({"state": "finished", "exit_code": 0, "step": 10}))
    return run


@pytest.fixture
def other(finished) -> Run:
    """A copy of it, another time taken."""
    run = Run(finished.folder.with_name("other"), [])
    shutil.copytree(finished.folder, run.folder)
    metrics = run.run_folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("3.0", "4.0"))
    return run


def test_equal_runs_are_equal_whatever_time_they_took(finished, other):
    assert kills.judged(finished, other) == []


@pytest.mark.parametrize(
    "place", ["logs/run/checkpoint-10/model", "logs/run/checkpoint-10/ema", "models/saved/run/model"]
)
def test_one_bit_of_one_weight_is_a_difference(finished, other, place):
    change_a_weight(other.folder / f"{place}.safetensors")
    assert kills.judged(finished, other) == [f"{place}.safetensors: 1 of 2 tensors differ, such as weight"]
    (other.folder / f"{place}.safetensors").unlink()
    assert kills.judged(finished, other) == [f"{place}.safetensors: there is none"]


def test_metrics_that_differ(finished, other):
    metrics = other.run_folder / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text(before.replace("0.25", "0.2500000001"))
    (fault,) = kills.judged(finished, other)
    assert "1 rows differ" in fault
    assert "0.2500000001" in fault
    metrics.write_text(before + before.splitlines()[0] + "\n")
    assert kills.judged(finished, other) == ["metrics.jsonl has 4 rows in place of 3"]


def test_another_end_is_a_difference(finished, other):
    (other.run_folder / ".writing.checkpoint").mkdir()
    (other.run_folder / "status.json").write_text(json.dumps({"state": "running", "exit_code": None}))
    status, left = kills.judged(finished, other)
    assert "running" in status
    assert left.endswith(".writing.checkpoint")
    (other.run_folder / "checkpoint-10").rename(other.run_folder / "checkpoint-12")
    assert "the last checkpoint is checkpoint-12 in place of checkpoint-10" in kills.judged(finished, other)


def test_what_a_signal_must_leave_behind(finished):
    sigterm = next(scenario for scenario in kills.SCENARIOS if scenario.name == "SIGTERM")
    status = finished.run_folder / "status.json"
    status.write_text(json.dumps({"state": "stopped", "exit_code": 143, "step": 10}))
    assert kills._left_behind(sigterm, finished, 143) == []
    assert kills._left_behind(sigterm, finished, -15) == ["exit code -15 in place of 143"]
    status.write_text(json.dumps({"state": "stopped", "exit_code": 143, "step": 9}))
    assert kills._left_behind(sigterm, finished, 143) == ["it stopped at step 9 and saved checkpoint-10"]
    status.write_text(json.dumps({"state": "running", "exit_code": None, "step": 10}))
    assert len(kills._left_behind(sigterm, finished, 143)) == 1


def test_damage_is_done(tmp_path):
    draw = np.random.default_rng(0)
    file = tmp_path / "file"
    content = bytes(range(100))
    for name, size in (("truncated", 50), ("one bit changed", 100)):
        file.write_bytes(content)
        kills.DAMAGES[name](file, draw)
        assert len(file.read_bytes()) == size
    changed = [one ^ other for one, other in zip(content, file.read_bytes(), strict=True)]
    assert sum(bits.bit_count() for bits in changed) == 1
    kills.DAMAGES["removed"](file, draw)
    assert not file.exists()


def test_damage_that_goes_unnoticed_is_a_fault(finished, tmp_path, monkeypatch):
    """A program that goes on in silence, whatever was damaged."""
    monkeypatch.setattr(Run, "fork", lambda run: (run.folder / "console.log").write_text("all is well\n") and 0)
    (finished.folder / "console.log").touch()
    cell = {"scenario": "damage", "of": kills.NEWEST, "file": "model.safetensors", "damage": "removed"}
    cells = list(kills.damage_cells(finished))
    assert cell in cells
    assert len(cells) == 3 * (2 + 2)  # two files of the newest checkpoint, two of all checkpoints
    draw = np.random.default_rng(0)
    row = kills.damaged(cell, finished, finished, tmp_path / "damaged", draw)
    assert row["faults"][:2] == ["no warning names model.safetensors", "no warning names checkpoint-2"]
    assert row["faults"][2] == "logs/run/checkpoint-10/model.safetensors: there is none"
    shutil.copy(finished.checkpoints[-1] / "model.safetensors", finished.checkpoints[0])
    row = kills.damaged({**cell, "of": kills.EVERY}, finished, finished, tmp_path / "all", draw)
    assert row["faults"] == ["no warning names model.safetensors", "exit code 0 in place of 4"]


@pytest.mark.slow
def test_a_kill_and_a_damaged_checkpoint_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    for module, name, value in ((runs, "EPOCHS", 1), (runs, "DOCUMENTS", 80), (kills, "SAVES_AHEAD", 1)):
        monkeypatch.setattr(module, name, value)
    sigkill, *others = kills.SCENARIOS
    monkeypatch.setattr(kills, "SCENARIOS", [replace(sigkill, chances=(0, 0, 1)), *others])
    output = tmp_path / "kills.json"
    arguments = "--kills 1 --torchrun_kills 0 --signals 0 --torchrun_signals 0 --damages 1 --seed 1 --output"
    kills.main([*arguments.split(), str(output)])
    content = read(output)
    killed, undisturbed, damaged = content["rows"]
    assert content["sessions"][0]["reference, one process"]["steps"] == 10
    assert (killed["scenario"], killed["exit codes"], killed["starts"]) == ("SIGKILL", [-9], 2)
    assert sum(killed[moment] for moment in kills.MOMENTS) == 1
    assert (undisturbed["scenario"], damaged["exit codes"]) == (kills.UNDISTURBED, [0])
    assert [row["faults"] for row in content["rows"]] == [[], [], []]
    assert "Runs at fault: 0 of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_stress_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setattr(stress, "LONGEST", 2000)
    monkeypatch.setattr(stress, "VALIDATION_DOCUMENTS", 6)
    output = tmp_path / "stress.json"
    stress.main(["--documents", "30", "--output", str(output)])
    rows = read(output)["rows"]
    assert [row["stage"] for row in rows] == ["training", "evaluation", "prediction"]
    for row in rows:
        assert (row["documents_in"], row["documents_out"], row["exit_code"]) == (30, 30, 0)
        assert row["longest"] == 2000
        assert row["resident_peak_mb"] > row["private_peak_mb"] > 50
        assert len(row["time"]) == len(row["resident"]) == len(row["private"])
    for row in rows[1:]:
        assert row["same_ids_in_order"]
        assert row["tokens"] == row["tokens_read"] == row["tokens_in"] == sum(stress.lengths(30, 0))
    assert rows[2]["predicts_as_evaluation"]


def test_lengths_reach_the_cap():
    lengths = stress.lengths(20_000, 0)
    assert len(lengths) == 20_000
    assert lengths.count(100_000) >= stress.LONGEST_DOCUMENTS
    assert max(lengths) == 100_000
    assert min(lengths) >= 1
    assert 0.9 < np.median(lengths) / stress.MEDIAN < 1.1


def test_memory_course():
    samples = [(float(second), 100.0 + 10 * (second == 50), 60.0) for second in range(101)]
    row = stress.course(samples)
    assert (row["resident_peak_mb"], row["private_peak_mb"]) == (110, 60)
    assert row["time"] == list(range(101))
    assert row["resident"] == [100] * 50 + [110] + [100] * 50
    assert len(stress.course(samples * 10)["time"]) <= stress.POINTS


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Results and pages of their own."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    return tmp_path


def test_the_page_of_reliability_waits_for_all_its_results(results):
    strike = {"scenario": "SIGKILL", "processes": ONE, **dict.fromkeys(report_tables.STRIKES, 1)}
    rows = [
        {**strike, "starts": 4, "exit codes": [-9, -9, -9], "faults": []},
        {**strike, "starts": 4, "exit codes": [-9, -9, -9], "faults": ["other weights"]},
        {"scenario": "damage", "of": "newest checkpoint", "file": "a", "damage": "removed", "faults": []},
        {"scenario": "damage", "of": "newest checkpoint", "file": "b", "damage": "removed", "faults": ["silence"]},
    ]
    curve = [0] * 25 + [100] * 70 + [130] * 5
    memory = {"time": list(range(100)), "resident": curve, "private": curve}
    memory |= {"resident_peak_mb": 200, "private_peak_mb": 150}
    stage = {"stage": "training", "documents_in": 20_000, "documents_out": 20_000, **memory}
    contents = {
        "kills": {"benchmark": "kills", "rows": rows},
        "stress": {"benchmark": "stress", "options": {}, "rows": [stage]},
        "fuzz": {"rows": [{"target": "reader", "executions": 123_456, "crashes": 0, "seconds": 60}]},
    }
    page = results / "docs" / "reliability.md"
    for name, content in contents.items():
        (results / f"{name}.json").write_text(json.dumps(content))
        report.main()
        assert page.exists() == (name == "fuzz")
    text = page.read_text(encoding="utf-8")
    assert "| SIGKILL | one process | -9 (6 x) | 2 | 8 | 2 | 2 | 2 | 2 | 1 |" in text
    assert "| newest checkpoint | b | FAULT |" in text
    assert "- SIGKILL, one process: other weights" in text
    assert "- damage, newest checkpoint, b, removed: silence" in text
    assert "| resident memory, growth per 1,000 documents, MB | 2.00 |" in text
    assert "| reader | 123,456 | 0 | 60 |" in text
    assert "](stress-memory.png)" in text
    assert (results / "docs" / "stress-memory.png").read_bytes().startswith(b"\x89PNG")
    assert "Kills" not in report.PAGE.read_text(encoding="utf-8")
