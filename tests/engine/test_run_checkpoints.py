"""What a run goes on from, whatever happened to its checkpoints, and what its folder says of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from command_line import parse_settings
from engine import trainer
from engine.run_checkpoints import MANIFEST, checkpoints, fault, keep, newest_whole, step_of
from engine.run_folder import RunFolder
from main import main
from tests.conftest import MODEL_CODE, write_corpus
from train import train
from train_by_steps import train_by_steps
from utils import ConfigError, DataError, ModelError, StoppedError, TrainingError

FLAGS = (
    "--window_size 12 --max_windows 4 --batch_size 4 --learning_rate 1e-3 --dropout 0.1 --ema_decay 0.9 "
    "--early_stopping_patience 9 --probe_epochs 0 --log_steps 5 --device cpu --train_path train.jsonl "
    "--val_path val.jsonl"
)
FILES = {
    *("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("ema.safetensors", "watch.json"),
    *MODEL_CODE,
}


@pytest.fixture
def start(tmp_path, monkeypatch, encoder_folder, blank_curves):
    """Train in a folder of its own, by default 8 steps with a checkpoint every 2; gives the run folder."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "train.jsonl", 22)
    write_corpus(tmp_path / "val.jsonl", 6, seed=1)

    def start(flags: str = "--mode train_steps --total_steps 8 --eval_every 2", name: str = "run") -> Path:
        arguments = f"{FLAGS} --model_path {encoder_folder} --cache_dir cache --output_dir logs/{name} {flags}"
        settings = parse_settings(arguments.split())
        return (train(settings) if settings.total_steps is None else train_by_steps(settings)).run_folder

    return start


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def rows(run: Path) -> list[dict]:
    """Of metrics.jsonl, without the run times."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "runtime" not in line]


def assert_same_end(first: Path, second: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = (load_file(run / "checkpoint-8" / name) for run in (first, second))
        assert len(one) > 40
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(rows(first)) == 4 + 6  # the loss is logged with each checkpoint, besides the first step and every fifth
    assert rows(first) == rows(second)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(start):
    """Every file, in three ways, is named; three of the cases are resumed: to the same weights and rows."""
    run = start()
    assert names(run)[:2] == ["checkpoint-8", "checkpoint-6"]
    reference = shutil.copytree(run, run.with_name("reference"))
    newest = run / "checkpoint-8"
    assert {path.name for path in newest.iterdir()} == FILES | {MANIFEST}
    for name in sorted(FILES | {MANIFEST}):
        for how in ("removed", "truncated", "one bit changed"):
            shutil.rmtree(newest)
            shutil.copytree(reference / "checkpoint-8", newest)
            assert fault(newest) is None
            damage(newest / name, how)
            assert name in (fault(newest) or "")
            assert newest_whole(run) == run / "checkpoint-6"
    for name, how in (("optimizer.pt", "truncated"), (MANIFEST, "removed"), ("rng_state.pth", "one bit changed")):
        shutil.rmtree(run)
        shutil.copytree(reference, run)
        damage(run / "checkpoint-8" / name, how)
        start()
        log = (run / "train.log").read_text()
        assert f"checkpoint-8: cannot be used: {name}" in log
        assert "going back to logs/run/checkpoint-6" in log
        assert "checkpoint-8 is kept as checkpoint-8.aside" in log
        assert_same_end(run, reference)


def test_no_whole_checkpoint_is_an_error_and_never_a_fresh_start(start):
    run = start()
    for checkpoint in checkpoints(run):
        damage(checkpoint / "model.safetensors", "truncated")
    with pytest.raises(ModelError, match="none of its checkpoints is whole") as caught:
        start()
    assert all(f"{name}: model.safetensors has " in str(caught.value) for name in names(run))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert "none of its checkpoints is whole" in status["reason"]
    with pytest.raises(ModelError, match=r"--resume logs/run/checkpoint-8: cannot be used: model\.safetensors has"):
        start("--mode train_steps --total_steps 8 --eval_every 2 --resume logs/run/checkpoint-8")


def test_a_manifest_that_points_elsewhere_is_refused(start):
    run = start("--mode train_steps --total_steps 2 --eval_every 2")
    manifest = run / "checkpoint-2" / MANIFEST
    listed = json.loads(manifest.read_text())
    listed["files"]["../../../train.jsonl"] = listed["files"]["config.json"]
    manifest.write_text(json.dumps(listed))
    assert fault(run / "checkpoint-2") == f"{MANIFEST} lists ../../../train.jsonl, which is outside of it"
    manifest.write_text(json.dumps({"files": {}}))
    assert fault(run / "checkpoint-2") == f"{MANIFEST} does not list trainer_state.json"


def test_keep(tmp_path):
    for step in (2, 4, 6, 8, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-9.aside").mkdir()
    keep(tmp_path, last=2, best_step=4)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [100, 10, 4]
    keep(tmp_path, last=1, best_step=None)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [100]
    assert (tmp_path / "checkpoint-9.aside").is_dir()


def test_a_finished_run_is_not_trained_further(start):
    """By steps in mid-epoch, by epochs, and by early stopping."""
    for name, flags in (
        ("steps", "--mode train_steps --total_steps 8 --eval_every 2"),
        ("epochs", "--epochs 2"),
        ("early", "--epochs 30 --metric_for_best accuracy --learning_rate 1e-9 --early_stopping_patience 2"),
    ):
        run = start(flags, name)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if "checkpoint-" in str(path)}
        metrics = (run / "metrics.jsonl").read_text()
        environments = [json.loads((run / "environment.json").read_text())]
        for _ in range(2):
            start(flags, name)
            environments.append(json.loads((run / "environment.json").read_text()))
        data, earlier = environments[0].pop("data"), environments[-1]["earlier"]
        assert [environment["data"] for environment in environments[1:]] == [data, data]
        assert earlier == [environments[0], {n: v for n, v in environments[1].items() if n not in ("data", "earlier")}]
        assert "the run is at its end already" in (run / "train.log").read_text()
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if "checkpoint-" in str(path)} == before
        assert (run / "metrics.jsonl").read_text() == metrics
        assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_going_back_to_a_named_checkpoint(start):
    flags = "--mode train_steps --total_steps 8 --eval_every 2 --save_total_limit 9"
    run = start(flags)
    reference = shutil.copytree(run, run.with_name("reference"))
    start(f"{flags} --resume logs/run/checkpoint-4")
    assert names(run) == ["checkpoint-8", "checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert {path.name for path in run.glob("*.aside")} == {"checkpoint-6.aside", "checkpoint-8.aside"}
    assert_same_end(run, reference)
    other = start(f"{flags} --resume logs/reference/checkpoint-4", "other")
    assert_same_end(other, reference)
    evaluated = {row["step"]: row["eval_accuracy"] for row in rows(other) if "eval_accuracy" in row}
    assert json.loads((other / "status.json").read_text())["best_step"] == max((6, 8), key=evaluated.__getitem__)
    assert (Path("models/saved/other") / "model.pt").is_file()
    with pytest.raises(ConfigError, match=r"checkpoint-8: its run is at its end, and models/saved/fourth holds no"):
        start(f"{flags} --resume logs/reference/checkpoint-8", "fourth")
    with pytest.raises(ConfigError, match=r"--resume logs/run/checkpoint-4: holds .*--learning_rate was 0\.001"):
        start(f"{flags} --resume logs/run/checkpoint-4 --learning_rate 0.5", "third")


def test_changed_data_are_refused(start):
    run = start()
    write_corpus(Path("train.jsonl"), 23)
    with pytest.raises(DataError, match=r"train\.jsonl: changed since this run began"):
        start()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "train.jsonl: changed" in status["reason"]


def test_what_a_kill_leaves_is_cleaned_up(start):
    run = Path("logs/run")
    run.mkdir(parents=True)
    (run / ".writing.settings.json.abc.json").write_text("{")
    (run / ".writing.checkpoint" / "checkpoint-2").mkdir(parents=True)
    start()
    assert not list(run.glob(".writing*"))
    assert names(run)[0] == "checkpoint-8"


def test_two_runs_in_one_folder_are_refused(start):
    start()
    with FileLock("logs/run/.lock"), pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is at work"):
        start()


def test_run_folders_of_one_name_do_not_share_a_best_model(start):
    flags = "--mode train_steps --total_steps 2 --eval_every 2"
    start(flags)
    Path("elsewhere").mkdir()
    with pytest.raises(ConfigError, match=r"models/saved/run holds the best model of the run in logs/run"):
        start(flags, "../elsewhere/run")


def test_what_lies_where_the_best_model_would_is_kept(start):
    flags = "--mode train_steps --total_steps 2 --eval_every 2"
    run = start(flags)
    shutil.rmtree(run)
    stale, of_another = Path("models/saved/.writing.run.a1b2c3d4"), Path("models/saved/.writing.run.2.a1b2c3d4")
    stale.mkdir()
    of_another.mkdir()
    with pytest.raises(ConfigError, match=r"models/saved/run, where the best model of this .* is not empty"):
        start(flags)
    shutil.move("models/saved/run", "moved")
    start(flags)
    assert not stale.exists()
    assert of_another.exists()


def test_a_run_that_went_on_elsewhere_goes_on_there(start, monkeypatch):
    """Its checkpoints know of no probe. A renamed folder has no best model either."""
    flags = "--mode train_steps --total_steps 8 --eval_every 2 --save_total_limit 9"
    flags += " --probe_epochs 1 --metric_for_best log_loss"
    run = start(flags)
    other = start(f"{flags} --resume logs/run/checkpoint-2", "other")
    shutil.rmtree(other / "checkpoint-8")
    start(flags, "other")
    assert names(other)[0] == "checkpoint-8"
    run.rename("logs/renamed")
    shutil.rmtree("logs/renamed/checkpoint-8")
    start(flags, "renamed")
    assert Path("models/saved/renamed/model.pt").is_file()
    shutil.rmtree("models/saved/renamed")
    with pytest.raises(ConfigError, match=r"logs/renamed/checkpoint-8: its run is at its end, and models/saved/ren"):
        start(flags, "renamed")


def test_a_run_of_a_made_up_folder_owns_its_best_model(start):
    run = start("--mode train_steps --total_steps 2 --eval_every 2 --output_dir none")
    saved = Path("models/saved") / run.name
    assert json.loads((saved / "settings.json").read_text())["output_dir"] == str(run)


def test_status_tells_why_a_run_ended(start, monkeypatch):
    run = start()
    status = json.loads((run / "status.json").read_text())
    assert {name: status[name] for name in ("state", "step", "max_steps", "exit_code", "checkpoint", "pid")} == {
        "state": "finished",
        "step": 8,
        "max_steps": 8,
        "exit_code": 0,
        "checkpoint": "checkpoint-8",
        "pid": os.getpid(),
    }
    with pytest.raises(TrainingError):
        start("--learning_rate 1e30 --num_warmup_steps 0 --optimizer_type sgd --gradient_clip_val 0", "bad")
    status = json.loads(Path("logs/bad/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert "the loss is not finite" in status["reason"]


@pytest.mark.parametrize("eval_every", ["", "--eval_every 2"])
def test_a_signal_at_any_step_changes_nothing(start, monkeypatch, eval_every):
    """At each step, the last of an epoch and of the run included: stopped there, gone on, the same end."""
    flags = f"--epochs 2 --batch_size 8 --save_total_limit 99 --log_steps 1 {eval_every}"
    reference = start(flags, "reference")
    on_step_end = trainer.EngineCallback.on_step_end
    for step in range(1, 7):

        def stopping(self, args, state, control, step=step, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            on_step_end(self, args, state, control, **kwargs)

        monkeypatch.setattr(trainer.EngineCallback, "on_step_end", stopping)
        name = f"stopped-{step}"
        if step == 6:
            start(flags, name)
        else:
            with pytest.raises(StoppedError, match=f"stopped at step {step} of 6, which is saved"):
                start(flags, name)
            monkeypatch.setattr(trainer.EngineCallback, "on_step_end", on_step_end)
            start(flags, name)
        for file in ("model.safetensors", "ema.safetensors"):
            one, other = (load_file(Path("logs") / run / "checkpoint-6" / file) for run in (name, "reference"))
            assert all(torch.equal(one[key], other[key]) for key in one)
        best = [load_file(Path("models/saved") / run / "model.safetensors") for run in (name, "reference")]
        assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])
        assert rows(Path("logs") / name) == rows(reference)


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch, encoder_folder, capsys, blank_curves):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "train.jsonl", 22)
    write_corpus(tmp_path / "val.jsonl", 6, seed=1)
    on_step_end = trainer.EngineCallback.on_step_end

    def twice(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.EngineCallback, "on_step_end", twice)
    arguments = f"{FLAGS} --model_path {encoder_folder} --cache_dir cache --output_dir logs/run --epochs 1"
    assert main(arguments.split()) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not list(Path("logs/run").glob("checkpoint-*"))
    assert json.loads(Path("logs/run/status.json").read_text())["state"] == "stopped"


def test_status_while_at_work(tmp_path):
    run = RunFolder(tmp_path)
    with run.status():
        assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
