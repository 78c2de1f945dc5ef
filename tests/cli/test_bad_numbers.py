"""A metric that is no number never chooses the best model."""

from __future__ import annotations

import json
import math

import pytest

from engine import trainer
from main import main


@pytest.mark.parametrize("metric", ["loss", "f1_macro"])
def test_a_metric_that_is_not_a_number_is_never_best(project, monkeypatch, metric):
    """Of three evaluations the first and the last give none."""
    values = iter([math.nan, 0.5, math.nan])
    evaluate = trainer.ReBertaTrainer.evaluate

    def with_nan(self, *arguments, **options):
        return {**evaluate(self, *arguments, **options), f"eval_{metric}": next(values)}

    monkeypatch.setattr(trainer.ReBertaTrainer, "evaluate", with_nan)
    monkeypatch.chdir(project)
    flags = f"--metric_for_best {metric} --save_total_limit 1 --output_dir logs/nan_{metric}"
    assert main(f"--config tiny.yaml --mode train --epochs 3 {flags}".split()) == 0
    run = project / "logs" / f"nan_{metric}"
    state = json.loads((run / "checkpoint-9" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (0.5, 6)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}
    assert (project / "models" / "saved" / f"nan_{metric}" / "model.pt").is_file()
