"""benchmarks/data.py through its command line at a tiny size, and how it counts padding."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import data

KINDS = ("bundled documents", "documents of 2,000 tokens", "documents of 100 tokens")
TINY = "--documents 20 --megabytes 0.05 --repeats 1 --steps 2 --layers 1 --width 32"


def test_every_measure_once_with_its_target(tmp_path, monkeypatch, encoder_folder, capsys):
    for name, value in (("WINDOWS", 2), ("BATCH", 2), ("WARM_UP", 1)):
        monkeypatch.setattr(data, name, value)
    output = tmp_path / "data.json"
    arguments = [*TINY.split(), "--model", str(encoder_folder), "--output", str(output)]
    data.main(arguments)
    table = capsys.readouterr().out
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert all(list(row) == ["measure", "value", "unit", "target"] for row in rows)
    assert {row["measure"]: row["target"] for row in rows if row["target"]} == {
        **{f"tokenisation, {kind}": ">= 90" for kind in KINDS},
        "second start on 20 documents": "< 2",
        **{f"padding, {windows} windows, batches of {size}": "< 3" for windows in ("16", "all") for size in (4, 8)},
        "training": ">= 95",
    }
    assert len(rows) == 9 + 3 * 2 + 1 + 2  # those of a target, and what they are made of
    values = {row["measure"]: row["value"] for row in rows}
    assert min(values.values()) > 0
    for kind in KINDS:
        name = f"tokenisation, {kind}"
        share = 100 * values[f"{name}: prepared"] / values[f"{name}: tokenizer alone"]
        assert values[name] == pytest.approx(share, abs=0.01)
    assert max(value for measure, value in values.items() if measure.startswith("padding")) < 3

    assert [line for line in table.splitlines() if line.endswith("| < 2 |")] == [
        f"| second start on 20 documents | {values['second start on 20 documents']:.3g} | s | < 2 |"
    ]
    before = output.read_bytes()
    data.main(arguments)
    assert output.read_bytes() == before


def test_padding_is_counted_as_the_model_computes():
    lengths_BN = torch.tensor([[4, 4, 3], [4, 2, 0], [2, 0, 0]])
    mask = (torch.arange(6) < lengths_BN.unsqueeze(-1)).long()
    # window 0: three rows of 4, window 1: two rows of 4, window 2: one row of 3
    assert data.padding_share([{"attention_mask": mask}]) == pytest.approx(1 - 19 / 23)
    assert data.padding_share([{"attention_mask": mask}, {"attention_mask": mask[:1]}]) == pytest.approx(1 - 30 / 34)
