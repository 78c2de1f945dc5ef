"""Options from the command line and from a file: defaults, precedence, and every fault at once."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest
from pydantic import ValidationError

from command_line import parse_settings
from config import GROUPS, Settings
from models.configuration import ReBertaConfig
from models.registry import ARCHITECTURE, BEHAVIOUR, MODEL_TYPES, READING
from presets import FIXED
from utils import ConfigError

SPECIFIED = """
--mode --config --seed --output_dir --log_level --log_steps --device --gpu_memory_fraction --num_workers --report_to
--train_path --val_path --test_path --sample_data --batch_size --max_len --text_column --label_column --problem_type
--on_bad_lines --max_windows_per_batch --max_window_failures
--model_path --model_type --window_size --window_overlap --num_repeats --max_windows --dropout --carry --alpha
--global_alpha --gate_bias --aggregation --position_encoding --memory_level --gradient_checkpointing
--epochs --total_steps --eval_every --learning_rate --weight_decay --gradient_accumulation_steps
--early_stopping_patience --metric_for_best --ema_decay --class_weights --label_smoothing --gradient_clip_val --resume
--save_total_limit --scheduler_type --num_warmup_steps --optimizer_type --mixed_precision --mixed_precision_type
--use_augmentation --random_mask_prob --max_mask_tokens --whole_word_mask --save_predictions
"""  # section 3 of the specification


def test_help_shows_every_option_in_its_group_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--help"], description="What it does.")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    options = set(re.findall(r"^  (--\w+)", shown, re.MULTILINE))
    assert options == {f"--{name}" for name in Settings.model_fields} | {"--config"}
    assert set(SPECIFIED.split()) <= options
    assert len(SPECIFIED.split()) == 61
    assert [line.rstrip(":") for line in shown.splitlines() if re.fullmatch(r"\w+:", line)][1:] == [
        group.__doc__ for group in GROUPS
    ]
    flat = " ".join(shown.split())
    assert "peak learning rate (default: 5e-05)" in flat
    assert "training files (jsonl, csv, parquet) or folders (default: data/train)" in flat


def test_a_script_shows_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"], mode="evaluate", sample_data=32)
    flat = " ".join(capsys.readouterr().out.split())
    assert "to ONNX (default: evaluate)" in flat
    assert "stratified by label (default: 32)" in flat


def test_a_script_is_what_it_is_whatever_the_file_says(tmp_path):
    """A run's own file serves its evaluation, too, where it must not begin to train."""
    (tmp_path / "run.yaml").write_text("mode: train_steps\ntotal_steps: 900\nseed: 7\nbatch_size: 4")
    argv = ["--config", str(tmp_path / "run.yaml"), "--batch_size", "2"]
    settings = parse_settings(argv, mode="train", total_steps=None, batch_size=3)
    assert (settings.mode, settings.total_steps, settings.seed, settings.batch_size) == ("train", None, 7, 2)


def test_defaults():
    settings = parse_settings([])
    assert (settings.max_windows, settings.window_size, settings.num_repeats) == (16, 256, 1)
    assert (settings.train_path, settings.val_path, settings.test_path) == (("data/train",), ("data/evaluation",), None)
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1


def test_the_models_own_defaults_are_the_same():
    model, settings = ReBertaConfig(), parse_settings([])
    fields = ARCHITECTURE + READING + BEHAVIOUR
    assert len(fields) == 18
    assert {name: getattr(model, name) for name in fields} == {name: getattr(settings, name) for name in fields}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--mixed_precision"], True),
        (["--mixed_precision", "True"], True),
        (["--mixed_precision", "False"], False),
        ([], False),
    ],
)
def test_a_boolean_is_accepted_bare_and_in_words(argv, expected):
    assert parse_settings(argv).mixed_precision is expected


def test_flags_win_over_the_file(tmp_path):
    values = {"learning_rate": "1e-4", "epochs": 7, "train_path": "a.jsonl", "memory_level": 2, "max_len": None}
    yaml, json_file = tmp_path / "run.yaml", tmp_path / "run.json"
    yaml.write_text("learning_rate: 1e-4\nepochs: 7\ntrain_path: a.jsonl\nmemory_level: 2\nmax_len: null\n")
    json_file.write_text(json.dumps(values))
    for file in (yaml, json_file):
        settings = parse_settings(["--config", str(file), "--epochs", "2"], log_steps=1, epochs=9)
        assert (settings.epochs, settings.learning_rate, settings.log_steps) == (2, 1e-4, 1)
        assert (settings.train_path, settings.memory_level, settings.max_len) == (("a.jsonl",), "2", None)


def test_a_model_type_fixes_options_in_training_and_says_nothing_of_a_checkpoint():
    settings = parse_settings(["--model_type", "head_tail"])
    fixed = {"carry": "none", "aggregation": "mean", "read": "head_tail", "max_windows": 1, "window_size": 512}
    assert {name: getattr(settings, name) for name in fixed} == fixed
    assert parse_settings(["--model_type", "head", "--window_size", "128", "--read", "first"]).window_size == 128
    evaluation = ["--mode", "evaluate", "--model_path", "m", "--test_path", "t"]
    settings = parse_settings([*evaluation, "--model_type", "head_tail"])
    assert settings.read == "first"
    assert "read" not in settings.model_fields_set
    kinds = Settings.model_fields["model_type"].annotation
    assert set(get_args(kinds)) == FIXED.keys() == MODEL_TYPES.keys()


@pytest.mark.parametrize(("name", "text"), [("run.json", '{"epochs": 7}'), ("run.yaml", "epochs: 7")])
def test_a_config_file_of_windows(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert parse_settings(["--config", str(tmp_path / name)]).epochs == 7


def test_a_negative_number_is_a_value():
    assert parse_settings(["--gate_bias", "-1e-1"]).gate_bias == -0.1


def test_several_paths_and_none():
    settings = parse_settings(["--train_path", "a.jsonl", "b.csv", "--max_len", "none", "--train_path", "c.jsonl"])
    assert settings.train_path == ("a.jsonl", "b.csv", "c.jsonl")
    assert settings.max_len is None


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "x.yaml").write_text("train_path: [~/a.jsonl, b~.jsonl]\nmodel_path: ~/encoder\n")
    settings = parse_settings([f"--config={tmp_path}/x.yaml", "--output_dir=~/run", "--resume=~/run/checkpoint-2"])
    assert settings.train_path == ("/home/me/a.jsonl", "b~.jsonl")
    assert settings.model_path == "/home/me/encoder"
    assert settings.output_dir == "/home/me/run"
    assert settings.resume == "/home/me/run/checkpoint-2"
    assert settings.cache_dir == "/home/me/.cache/reberta"


def test_all_faults_are_reported_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rte: 1\ncarry: open\n")
    with pytest.raises(ConfigError) as caught:
        parse_settings(f"--config {file} --batch_size 0 --epochs x --windw_size 3 --mode evaluate --carry".split())
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    for expected in (
        "--carry: its value is missing",
        "unknown option --windw_size; did you mean --window_size?",
        f"{file}: unknown option learning_rte; did you mean --learning_rate?",
        "--batch_size 0: input should be greater than or equal to 1",
        "--epochs x: input should be a valid integer",
        "--carry open: input should be 'gru', 'gated', 'residual' or 'none'",
        "--mode evaluate needs --model_path",
        "--mode evaluate needs --test_path",
    ):
        assert sum(expected in line for line in lines) == 1, expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--mode export", "needs --model_path"),
        ("--mode train_steps", "needs --total_steps"),
        ("--mode train_steps --total_steps 5 --epochs 2", "--epochs does not go with"),
        ("--mode train --total_steps 5", "use --mode train_steps"),
        ("--mode train_and_evaluate --total_steps 5 --epochs 2", "two budgets"),
        ("--mode train_steps --total_steps 5 --num_warmup_steps 6", "never reach its peak"),
        ("--scheduler_type constant --num_warmup_steps 6", "constant_with_warmup"),
        ("--gradient_checkpointing --memory_level 0", "--memory_level 2"),
        ("--mixed_precision_type bf16", "needs --mixed_precision"),
        ("--int8", "--int8 belongs to --mode evaluate and predict, not train"),
        ("--mode evaluate --model_path m --test_path t --int8 --mixed_precision", "two precisions"),
        ("--mode evaluate --model_path m --test_path t --int8 --device cuda", "does not go with --device cuda"),
        ("--train_windows 17", "--train_windows is more than --max_windows"),
        ("--text_column label", "--text_column and --label_column name one column"),
        ("--mode predict --model_path m --input_path x --output_path logs/.csv", "must end in .csv or .jsonl"),
        ("--alpha 0.5", "belongs to --carry residual"),
        ("--global_alpha 0.5 --aggregation mean", "belongs to --aggregation encoder"),
        ("--window_weights tokens --aggregation max", "--window_weights does not go with --aggregation max"),
        ("--window_overlap 254", "--window_overlap must be less"),
        ("--gpu_memory_fraction 0.5 --device cpu", "does not go with --device cpu"),
        ("--gate_bias 1 --carry none", "--gate_bias does not go with --carry none"),
        ("--num_repeats 2 --carry none", "--num_repeats does not go with --carry none"),
        ("--read random --window_overlap 3", "--window_overlap does not go with --read random"),
        ("--model_type mean --carry gated", "--carry gated does not go with --model_type mean, which has --carry none"),
        ("--model_type head --max_windows 2", "--max_windows 2 does not go with --model_type head"),
        ("--model_type transformer --freeze_except_last 1", "--freeze_except_last 1 does not go with --model_type tra"),
        ("--model_type tobert --num_repeats 2", "--num_repeats 2 does not go with --model_type tobert"),
        ("--random_mask_prob 0.5", "--random_mask_prob needs --use_augmentation"),
        ("--max_mask_tokens 5", "--max_mask_tokens needs --use_augmentation"),
        ("--whole_word_mask", "--whole_word_mask needs --use_augmentation"),
        ("--learning_rate nan", "finite number"),
        ("--learning_rate -1", "greater than 0"),
        ("--learning_rate -1e-3", "--learning_rate -1e-3: input should be greater than 0"),
        ("--learning_rate", "--learning_rate: its value is missing"),
        ("--train_path", "--train_path: its value is missing"),
        ("--config", "--config: its value is missing"),
        ("--label_smoothing 1.5", "less than 1"),
        ("--mixed_precision maybe", "valid boolean"),
        ("stray", "'stray' belongs to no option"),
    ],
)
def test_contradictions_and_wrong_values_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings(argv.split())
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("options", ["--input_path x --output_path y.csv", "--model_type mean --carry gru"])
def test_a_wrong_mode_is_not_held_against_other_options(options):
    with pytest.raises(ConfigError) as caught:
        parse_settings(["--mode", "predct", *options.split()])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["wrong options", "  --mode predct"]


@pytest.mark.parametrize(
    "options",
    [
        *("--train_windows 17", "--window_overlap 300", "--alpha 0.7", "--global_alpha 0.5 --carry none"),
        "--mode evaluate --test_path t --max_windows 4 --train_windows 8",
        "--mode evaluate --test_path t --text_column label",
        "--mode predict --input_path i --output_path o.csv --text_column label",
    ],
)
def test_defaults_that_a_saved_model_may_replace_do_not_contradict(options):
    assert parse_settings(["--model_path", "m", *options.split()])


def test_what_a_model_type_fixes_counts_as_said_and_its_defaults_do_not():
    said = parse_settings(["--model_type", "head", "--epochs", "2"]).model_fields_set
    assert said == {"model_type", "epochs", "carry", "num_repeats", "aggregation", "read", "max_windows"}


@pytest.mark.parametrize("argv", [["--model_path", ""], ["--train_path", ""], ["--train_path", "a", ""]])
def test_an_empty_value_is_none(argv):
    with pytest.raises(ConfigError, match=f"{argv[0]}: its value is missing"):
        parse_settings(argv)


def test_a_bad_config_file_does_not_hide_other_faults():
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read: No such file.*\n.*--batch_size 0.*$"):
        parse_settings(["--config", "missing.yaml", "--batch_size", "0", "--int8"])


@pytest.mark.parametrize("option", ["--sample_data 5", "--max_len 100"])
def test_analyze_refuses_what_it_would_not_heed(option):
    with pytest.raises(ConfigError, match=f"{option.split()[0]} does not go with --mode analyze"):
        parse_settings(f"--mode analyze {option}".split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.yaml", "- a\n- b\n", "must hold one mapping"),
        ("run.yaml", "a: [", "is no valid yaml"),
        ("run.yaml", "epochs: 3\nepochs: 5\n", "is no valid yaml: 'epochs' stands there twice"),
        ("run.yaml", "epochs: true\n", "epochs: true is no value of this option"),
        ("run.json", "{", "is no valid json"),
        ("run.json", '{"epochs": 3, "epochs": 5}', "is no valid json: 'epochs' stands there twice"),
        ("run.toml", "a = 1", r"\.yaml or \.json file is needed"),
        ("run.yaml", None, "cannot be read: No such file"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings(["--config", str(tmp_path / name)])
    assert name in str(caught.value)
