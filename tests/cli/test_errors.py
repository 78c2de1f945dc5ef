"""Wrong options and wrong files: the exit code, one message that says where, no traceback."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from main import main
from train import Trained


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
        ("--config tiny.yaml --val_path nowhere.jsonl --model_path no/such/encoder", 3, "nowhere.jsonl"),
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


@pytest.mark.parametrize(
    "arguments",
    [
        "--output_dir tiny.yaml/run",
        "--output_dir tiny.yaml",
        "--mode analyze --output_dir tiny.yaml",
        "--mode evaluate --model_path {model} --test_path data/validation --output_dir tiny.yaml",
        "--mode predict --model_path {model} --input_path data/validation --output_path tiny.yaml/x.csv",
        "--mode export --model_path {model} --output_dir tiny.yaml/onnx",
        "--mode export --model_path {model} --output_dir tiny.yaml",
    ],
)
def test_a_folder_that_cannot_be_made(trained, fails, arguments):
    code, console = fails(f"--config tiny.yaml {arguments.format(model=trained)}")
    assert code == 2, console
    assert re.search(
        "tiny.yaml(/run|/onnx|/x.csv.parts)? cannot be made|tiny.yaml: is a file; give another folder", console
    )
    assert console.count(" ERROR ") == 1
    assert "Traceback" not in console


def test_a_log_that_cannot_be_written(trained, project, fails):
    (project / "logs" / "taken" / "evaluation.log").mkdir(parents=True)
    arguments = f"--mode evaluate --model_path {trained} --test_path data/validation --output_dir logs/taken"
    code, console = fails(arguments)
    assert code == 2
    assert "--output_dir: logs/taken/evaluation.log cannot be written (Is a directory); give another" in console


def test_a_class_without_a_document_shows_in_the_report(trained, project, fails):
    lines = (project / "data" / "validation" / "validation.jsonl").read_text().splitlines()
    (project / "early.jsonl").write_text("\n".join(line for line in lines if '"early"' in line))
    evaluation = f"--config tiny.yaml --mode evaluate --model_path {trained} --output_dir logs/early"
    assert fails(f"{evaluation} --test_path early.jsonl")[0] == 0
    report = (project / "logs" / "early" / "evaluation_results.txt").read_text()
    assert re.search("^classes absent +1 of 2 have no document here, and count as 0 in macro averages$", report, re.M)


def test_an_error_is_said_whatever_the_log_level(fails):
    arguments = "--mode evaluate --model_path none.pt --test_path data --output_dir logs/critical"
    code, console = fails(f"{arguments} --log_level CRITICAL")
    assert code == 4
    assert "none.pt: there is no such checkpoint" in console


def test_analysis_looks_for_the_data_first(fails):
    arguments = "--mode analyze --train_path nowhere.jsonl --model_path no/such/encoder --output_dir logs/no-analysis"
    code, console = fails(arguments)
    assert code == 3
    assert "nowhere.jsonl: no such file" in console


def test_a_signal_in_the_last_step_is_not_followed_by_an_evaluation(fails, monkeypatch):
    monkeypatch.setattr("train.train", lambda settings: Trained(Path("best"), Path("logs/x"), 1.0, signal.SIGTERM))
    code, console = fails("--config tiny.yaml --mode train_and_evaluate --output_dir logs/x")
    assert code == 143
    assert "training is finished and saved, logs/x; the test set was not evaluated" in console


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


def test_a_report_says_how_many_documents_were_left_out(project, trained, fails):
    good = (project / "data" / "validation" / "validation.jsonl").read_bytes().splitlines()
    _bad(project, "left-out.jsonl", [*good, b'{"text": "w7", "label": "never"}', b"{broken"])
    evaluation = f"--config tiny.yaml --mode evaluate --model_path {trained} --output_dir logs/left-out"
    assert fails(f"{evaluation} --test_path left-out.jsonl --on_bad_lines skip")[0] == 0
    report, quarantine = project / "logs" / "left-out", project / "logs" / "left-out" / "quarantine_test.jsonl"
    assert json.loads((report / "metrics.json").read_text())["bad_lines"] == 2
    assert re.search(r"^bad lines +2, left out of all this$", (report / "evaluation_results.txt").read_text(), re.M)
    assert len(quarantine.read_text().splitlines()) == 2
    assert fails(f"{evaluation} --test_path data/validation")[0] == 0
    assert json.loads((report / "metrics.json").read_text())["bad_lines"] == 0
    assert not quarantine.exists()


def test_ctrl_c(fails, monkeypatch):
    def interrupt(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("main.dispatch", interrupt)
    assert fails("--mode train")[0] == 130


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("main.dispatch", ZeroDivisionError("by chance"), "by chance"),
        ("train.build_trainer", AttributeError("a bug"), "a bug\nin stage fit"),
    ],
)
def test_the_unexpected_shows_its_traceback(fails, monkeypatch, place, error, said):
    def fall(*arguments, **options):
        raise error

    monkeypatch.setattr(place, fall)
    code, console = fails("--mode train --config tiny.yaml --output_dir logs/unexpected")
    assert code == 1
    assert "Traceback" in console
    assert said in console


def test_never_resumed_is_never_replaced(fails):
    run = "--config tiny.yaml --epochs 1 --output_dir logs/held"
    assert fails(f"{run} --train_path nowhere.jsonl")[0] == 3
    code, console = fails(f"{run} --resume never")
    assert code == 2
    assert "holds a run; give another folder" in console


def test_a_run_that_never_began_is_started_anew_with_other_options(fails):
    run = "--config tiny.yaml --epochs 1 --output_dir logs/typo"
    assert fails(f"{run} --train_path nowhere.jsonl")[0] == 3
    code, console = fails(run)
    assert code == 0, console
    code, console = fails(f"{run} --dropout 0.3")
    assert code == 2
    assert "holds a run with other settings (--dropout was 0.1, is 0.3)" in console


def test_a_missing_test_set_is_known_before_training(fails, project):
    arguments = "--config tiny.yaml --mode train_and_evaluate --test_path nowhere.jsonl --output_dir logs/no_test"
    code, console = fails(arguments)
    assert code == 3
    assert "nowhere.jsonl" in console
    assert not (project / "logs" / "no_test").exists()


def test_default_sets_beside_data_of_ones_own_are_named(fails):
    own = "--config tiny.yaml --train_path data/train/train.jsonl --epochs 1 --mode train_and_evaluate"
    code, console = fails(f"{own} --output_dir logs/own")
    assert code == 0, console
    assert "--val_path is not given: validation documents are those of data/evaluation" in console
    assert "--test_path is not given: test documents are those of data/validation" in console


def test_the_default_training_set_beside_validation_data_of_ones_own_is_named(fails):
    own = "--config tiny.yaml --val_path data/evaluation/evaluation.jsonl --mode train_steps --total_steps 1"
    _, console = fails(f"{own} --output_dir logs/own_validation")
    assert "--train_path is not given: train documents are those of data/train" in console
    assert "--val_path is not given" not in console


def test_training_that_was_to_be_an_evaluation_says_so(fails):
    """`--mode evaluate` left out: the model is trained on, and nothing else would tell."""
    _, console = fails("--config tiny.yaml --test_path data/validation --train_path none --output_dir logs/mode")
    assert "--mode train reads no --test_path; --mode evaluate does" in console


def test_one_label_is_not_enough(project, fails):
    _bad(project, "one.jsonl", [b'{"text": "w7 w8", "label": "early"}', b'{"text": "w7 w9", "label": "early"}'])
    code, console = fails("--config tiny.yaml --train_path one.jsonl --val_path one.jsonl --output_dir logs/one")
    assert code == 3
    assert "one.jsonl: all 2 documents have the label 'early'; two labels at least are needed" in console


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("semicolons.csv", "text;label\nw1;early\n", "columns must be separated by commas"),
        ("lines.csv", '{"text": "w1", "label": "early"}\n', "it looks like JSON Lines: name it .jsonl"),
        ("headless.csv", f"{'w1 ' * 300},early\n", "'w1 w1 w1 w1 ... w1 w1 w1 w1 ', 'early'); set --text_column"),
    ],
)
def test_a_header_that_is_none(project, fails, name, content, hint):
    (project / name).write_text(content)
    code, console = fails(f"--config tiny.yaml --train_path {name} --val_path {name} --output_dir logs/header")
    assert code == 3
    assert hint in console
    assert len(console) < 1000


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--max_memory 10", "--max_memory 10: must look like 12GB or 800MiB or auto"),
        ("--shard 3", "--shard 3: must look like 1/4"),
        ("--train_windows 17", "--train_windows is more than --max_windows"),
    ],
)
def test_options_that_say_what_they_take(fails, option, message):
    code, console = fails(option)
    assert code == 2
    assert message in console


def test_what_is_no_model_is_told_by_what_it_is(fails, trained):
    fails("--config tiny.yaml --epochs 1 --output_dir logs/run")
    for place in ("logs/run", "logs/run/checkpoint-3"):
        for arguments in ("--config tiny.yaml --output_dir logs/again", "--mode evaluate --test_path data/validation"):
            code, console = fails(f"{arguments} --model_path {place}")
            assert code == 4
            assert f"{place}: is the folder of a run or one of its checkpoints; its best model is models/saved/run" in (
                console
            )
    code, console = fails(f"--mode evaluate --test_path data/validation --model_path {trained}/model.safetensors")
    assert code == 4
    assert f"is part of a saved model; give its folder, {trained}" in console


@pytest.mark.parametrize("options", ["--carry none", "--aggregation mean", "--pooling mean"])
def test_a_checkpoint_is_not_evaluated_as_another_model(fails, trained, options):
    code, console = fails(f"--mode evaluate --model_path {trained} --test_path data/validation {options}")
    assert code == 2
    assert f"was built with {options.split()[0]} " in console


def test_a_checkpoint_is_not_evaluated_as_another_type(fails, trained):
    evaluate = f"--mode evaluate --model_path {trained} --test_path data/validation --output_dir logs/type"
    for option in ("--model_type mean", "--problem_type multi_label"):
        code, console = fails(f"{evaluate} {option}")
        assert code == 2
        assert f"was trained with {option.split()[0]} " in console
    code, console = fails(f"{evaluate} --model_type reberta --problem_type single_label --carry gru")
    assert code == 0, console


def test_a_report_holds_no_predictions_of_an_earlier_one(fails, project, trained):
    evaluate = f"--mode evaluate --model_path {trained} --test_path data/validation --output_dir logs/twice"
    assert fails(f"{evaluate} --save_predictions")[0] == 0
    assert (project / "logs" / "twice" / "predictions.csv").is_file()
    assert fails(evaluate)[0] == 0
    assert not (project / "logs" / "twice" / "predictions.csv").exists()


def test_going_on_from_a_model_reads_as_it_does(fails, project, trained):
    options = f"--model_path {trained} --epochs 1 --device cpu"
    for option, windows, name in (("", 4, "as_before"), ("--max_windows 3", 3, "fewer")):
        assert fails(f"{options} {option} --output_dir logs/{name}")[0] == 0
        config = json.loads((project / "models" / "saved" / name / "config.json").read_text())
        assert (config["max_windows"], config["window_size"]) == (windows, 12)


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("main.process_count", lambda: 2)
    for mode in ("analyze", "export --model_path x"):
        assert main(f"--mode {mode} --output_dir {tmp_path}/out".split()) == 2
        assert "is done by one process; start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_training_is_refused(fails, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    code, console = fails(f"--config tiny.yaml --output_dir logs/{variable}")
    assert code == 2
    assert f"{variable} is set: FSDP and DeepSpeed are not supported" in console
