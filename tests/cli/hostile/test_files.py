"""Files from strangers on every path that loads: no code of theirs runs, none leads out of its folder, no bombs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DistilBertConfig

from main import main
from tests.cli.hostile.conftest import CANARY, USES

HOSTILE_CODE = f"open({CANARY!r}, 'w')\nraise SystemExit\n"


def change(path: Path, **values) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def changed_archive(path: Path, change: Callable[[zipfile.ZipInfo, bytes], bytes], compression: int = 0) -> None:
    """The same zip file with other records."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, content in records:
            archive.writestr(entry.filename, change(entry, content))


@pytest.mark.parametrize(
    "text",
    [
        f"seed: !!python/object/apply:os.system ['touch {CANARY}']",
        f"!!python/object/new:os.system ['touch {CANARY}']",
        "seed: !!python/name:os.system",
        "!!binary gASV",
        "a: &a [x, x]\nseed: &b [*a, *a]\nepochs: [*b, *b]",
        "[" * 5000,
    ],
)
def test_a_hostile_config_file(here, capsys, text):
    (here / "evil.yaml").write_text(text)
    assert main(["--config", "evil.yaml"]) == 2
    console = capsys.readouterr().err
    assert console.count(" ERROR ") == 1
    assert "Traceback" not in console
    assert not (here / CANARY).exists()


def test_aliases_that_nest_are_not_written_out(here, capsys):
    (here / "laughs.yaml").write_text(
        "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(12)) + "seed: *a12\n"
    )
    assert main(["--config", "laughs.yaml"]) == 2
    assert len(capsys.readouterr().err) < 5000


@pytest.mark.parametrize("kind", ["roberta", "stranger"])
def test_code_that_an_encoder_brings_is_not_run(encoder, refused, data, kind):
    for name in ("modeling_evil.py", "__init__.py", "tokenization_evil.py"):
        (encoder / name).write_text(HOSTILE_CODE)
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
    change(encoder / "config.json", auto_map=classes, model_type=kind)
    change(
        encoder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}
    )
    refused(
        f"--mode train --epochs 1 --output_dir logs/out --model_path {encoder} {data}", 0 if kind == "roberta" else 4
    )


@pytest.mark.parametrize("form", ["", "model.pt"])
def test_code_that_a_model_brings_is_not_run(model, project, refused, form):
    for path in model.glob("*.py"):
        path.write_text(HOSTILE_CODE)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["reberta.T", "reberta.T"]})
    content = torch.load(model / "model.pt", weights_only=True)
    content["tokenizer"]["tokenizer_config.json"] = (model / "tokenizer_config.json").read_text()
    content["tokenizer"]["reberta.py"] = HOSTILE_CODE
    torch.save(content, model / "model.pt")
    refused(f"--mode evaluate --output_dir out --model_path {model / form} --test_path {project}/data/validation", 0)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors"])
def test_an_index_that_leaves_its_folder(encoder, refused, data, name):
    weights = list(load_file(encoder / "model.safetensors"))
    (encoder / "model.safetensors").rename("outside.safetensors")
    name = str(Path("outside.safetensors").resolve()) if name.startswith("/") else name
    (encoder / "sub").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(
        f"--mode train --output_dir out --model_path {encoder} {data}", 4, "takes weights from outside of its folder"
    )


def test_an_index_and_links_that_stay_are_read(encoder, refused, data):
    weights = list(load_file(encoder / "model.safetensors"))
    (encoder / "model.safetensors").rename("blob")
    (encoder / "part.safetensors").symlink_to(Path("blob").resolve())
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(f"--mode train --epochs 1 --output_dir logs/out --model_path {encoder} {data}", 0)


def test_an_index_in_a_saved_model_is_not_followed(model, project, refused):
    weights = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename("outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../outside.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    paths = f"--model_path {model} --test_path {project}/data/validation"
    refused(f"--mode evaluate --output_dir out {paths}", 4, "model.safetensors missing")


@pytest.mark.parametrize("name", ["../escaped.json", "/tmp/escaped.json", "sub/escaped.json", "..", ""])
def test_a_tokenizer_file_that_leaves_its_folder(model, project, refused, name):
    content = torch.load(model / "model.pt", weights_only=True)
    content["tokenizer"] = {name: "{}"}
    torch.save(content, "evil.pt")
    paths = f"--model_path evil.pt --test_path {project}/data/validation"
    refused(f"--mode evaluate --output_dir out {paths}", 4, "outside of its folder")


@pytest.mark.parametrize("name", ["..", "/", "logs/..", "empty/.."])
def test_a_run_name_that_leaves_models_saved(here, refused, data, name):
    (here / "empty").mkdir()
    (here / "models" / "saved").mkdir(parents=True)
    (here / "models" / "precious").write_text("kept")
    refused(f"--mode train --epochs 1 {data} --output_dir {name}", 2, "--output_dir")
    assert (here / "models" / "precious").read_text() == "kept"


def test_a_bomb_of_a_zip_file(model, project, refused):
    changed_archive(
        model / "model.pt",
        lambda entry, content: b"\0" * 10**8 if entry.filename.endswith("/data/0") else content,
        zipfile.ZIP_DEFLATED,
    )
    assert (model / "model.pt").stat().st_size < 10**6
    paths = f"--model_path {model}/model.pt --test_path {project}/data/validation"
    refused(f"--mode evaluate --output_dir out {paths}", 4, "more than it holds")


SIZES = {
    "hidden_size": 4 * 10**8,
    "num_hidden_layers": 10**9,
    "vocab_size": 10**9,
    "intermediate_size": 10**9,
    "max_position_embeddings": 10**9,
    "num_labels": 10**9,
    "num_attention_heads": 0,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["file", "folder", "encoder"])
def test_sizes_beyond_measure(request, project, refused, data, form, size):
    folder = request.getfixturevalue("encoder" if form == "encoder" else "model")
    config = json.loads((folder / "config.json").read_text())
    part = config if form == "encoder" else config["encoder_config"]
    part[size] = SIZES[size]
    (folder / "config.json").write_text(json.dumps(config))
    if form == "encoder":
        refused(f"--mode train --output_dir out --model_path {folder} {data}", 4)
        return
    content = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**content, "config": config}, folder / "model.pt")
    path = folder / "model.pt" if form == "file" else folder
    paths = f"--model_path {path} --test_path {project}/data/validation"
    refused(f"--mode evaluate --output_dir out {paths}", 4, "its weights do not fit its configuration")


def test_layers_beyond_measure_by_another_name(tmp_path, refused, data):
    """DistilBERT's."""
    folder = tmp_path / "encoder"
    DistilBertConfig(n_layers=10**9).save_pretrained(folder)
    refused(f"--mode train --output_dir out --model_path {folder} {data}", 4, "its n_layers is 1000000000; an encoder")


DECISIONS = {
    "calibration_temperature": [0, -1, float("nan"), float("inf"), 10**400, 1e-320, True, "1", [1.0], None],
    "thresholds": [[0.5], [0.5, float("nan")], [0.5, 2], ["a", "b"], "ab", {"early": 0.5}, 0.5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DECISIONS.items() for value in values])
def test_what_turns_logits_into_labels_is_looked_at(model, project, refused, name, value):
    change(model / "config.json", **{name: value})
    refused(USES["predict"].format(data=project / "data" / "evaluation") + str(model), 4, f"is damaged: its {name}")


FOREIGN = {
    "settings none": lambda content: {**content, "settings": {}},
    "settings wrong": lambda content: {**content, "settings": {**content["settings"], "max_len": "far"}},
    "settings list": lambda content: {**content, "settings": []},
    "config list": lambda content: {**content, "config": []},
    "config none": lambda content: {**content, "config": {}},
    "encoder": lambda content: {**content, "config": {**content["config"], "encoder_config": {"model_type": "t5"}}},
    "tokenizer none": lambda content: {**content, "tokenizer": {}},
    "tokenizer numbers": lambda content: {**content, "tokenizer": {1: 2}},
    "state of lists": lambda content: {**content, "state_dict": {name: [] for name in content["state_dict"]}},
    "labels": lambda content: {**content, "config": {**content["config"], "id2label": {"7": "x", "x": 7}}},
    "texts": lambda content: {**content, "training_texts": [1, 2]},
    "format": lambda content: {**content, "format": 7},
}


@pytest.mark.parametrize("form", FOREIGN)
def test_parts_of_another_kind(model, project, refused, form):
    content = torch.load(model / "model.pt", weights_only=True)
    torch.save(FOREIGN[form](content), "foreign.pt")
    paths = f"--model_path foreign.pt --test_path {project}/data/validation"
    refused(f"--mode evaluate --output_dir out {paths}", 4)


@pytest.mark.parametrize("folder", ["encoder", "model"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x80\x04", b"[" * 10**5], ids=["empty", "object", "list", "pickle", "deep"]
)
def test_files_of_a_folder_that_are_rubbish(request, refused, data, folder, name, content):
    path = request.getfixturevalue(folder)
    (path / name).write_bytes(content)
    refused(f"--mode train --epochs 1 --output_dir logs/out --model_path {path} {data}", 4)
