"""Files from strangers on every path that loads: no code of theirs runs, none leads out of its folder, no bombs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import DistilBertConfig

from data_utils.cache import DOCUMENTS, MANIFEST
from engine.run_checkpoints import fault
from engine.run_checkpoints import seal as sealed
from main import main

CANARY = "canary"
HOSTILE_CODE = f"open({CANARY!r}, 'w')\nraise SystemExit\n"


class Payload:
    """Makes the canary when it is unpickled, in the folder where the command runs."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(project, here, capsys, blank_curves):
    """Run the command: this exit code, one message with this part, no traceback, and no canary."""

    def run(arguments: str, code: int, part: str = "") -> None:
        got = main(f"--config {project}/tiny.yaml --cache_dir {here}/cache {arguments}".split())
        console = capsys.readouterr().err
        assert not list(here.rglob(CANARY)), console
        assert got == code, console
        assert console.count(" ERROR ") == (code > 0), console
        assert "Traceback" not in console
        assert part in console

    return run


@pytest.fixture
def data(project) -> str:
    return f"--train_path {project}/data/train --val_path {project}/data/evaluation"


@pytest.fixture
def model(trained, here) -> Path:
    return Path(shutil.copytree(trained, here / "model"))


@pytest.fixture
def encoder(encoder_folder, here) -> Path:
    return Path(shutil.copytree(encoder_folder, here / "encoder"))


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


def test_the_payload_works(here):
    """What all other tests rest on."""
    pickle.loads(pickle.dumps(Payload()))
    assert (here / CANARY).exists()


FORMS = {
    "all": lambda content: Payload(),
    "state": lambda content: {**content, "state_dict": Payload()},
    "settings": lambda content: {**content, "settings": {**content["settings"], "seed": Payload()}},
    "config": lambda content: {**content, "config": {**content["config"], "max_len": Payload()}},
    "tokenizer": lambda content: {**content, "tokenizer": {"tokenizer.json": Payload()}},
    "texts": lambda content: {**content, "training_texts": Payload()},
}
USES = {
    "evaluate": "--mode evaluate --output_dir out --test_path {data} --model_path ",
    "export": "--mode export --output_dir out --model_path ",
    "predict": "--mode predict --input_path {data} --output_path out.csv --model_path ",
    "train": "--mode train --output_dir out --train_path {data} --val_path {data} --model_path ",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", USES)
def test_a_pickle_in_model_pt(model, project, refused, form, use):
    content = torch.load(model / "model.pt", weights_only=True)
    torch.save(FORMS[form](content), "evil.pt")
    refused(USES[use].format(data=project / "data" / "evaluation") + "evil.pt", 4, "evil.pt: refused, since")


@pytest.mark.parametrize(
    "write", [pickle.dump, lambda payload, file: torch.save(payload, file, _use_new_zipfile_serialization=False)]
)
def test_a_pickle_in_place_of_model_pt(refused, data, write):
    with open("evil.pt", "wb") as file:
        write(Payload(), file)
    refused(f"--mode train --output_dir out --model_path evil.pt {data}", 4, "evil.pt: refused, since")


@pytest.mark.parametrize("folder", ["encoder", "model"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_as_weights_of_a_folder(request, refused, data, folder, name):
    path = request.getfixturevalue(folder)
    (path / "model.safetensors").unlink()
    torch.save(Payload(), path / name)
    refused(
        f"--mode train --output_dir out --model_path {path} {data}", 4, "model.safetensors" if folder == "model" else ""
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt"])
def test_a_pickle_beside_the_weights_of_a_folder_is_left_alone(encoder, refused, data, name):
    torch.save(Payload(), encoder / name)
    refused(f"--mode train --epochs 1 --output_dir logs/out --model_path {encoder} {data}", 0)


@pytest.fixture(scope="module")
def lost(project, tmp_path_factory) -> Path:
    """The folder of a run of two epochs that lost its second checkpoint."""
    folder = tmp_path_factory.mktemp("lost")
    data = f"--train_path {project}/data/train --val_path {project}/data/evaluation"
    flags = f"--mode train --epochs 2 --output_dir logs/run --cache_dir {folder}/cache"
    with contextlib.chdir(folder):
        assert main(f"--config {project}/tiny.yaml {flags} {data}".split()) == 0
    shutil.rmtree(folder / "logs" / "run" / "checkpoint-6")
    return folder


@pytest.fixture
def stopped(lost, here) -> Path:
    """The first checkpoint of that run, which is copied to where the command runs."""
    shutil.copytree(lost, here, dirs_exist_ok=True)
    return Path("logs/run/checkpoint-3")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "training_args.bin"]
)
@pytest.mark.parametrize("forged", [True, False], ids=["manifest forged", "manifest true"])
def test_a_pickle_in_a_checkpoint(stopped, refused, data, name, forged):
    """Refused by the manifest; and, where that was forged to fit, by the loader."""
    torch.save(Payload(), stopped / name)
    if forged:
        (stopped / "manifest.json").unlink()
        sealed(stopped, stopped.with_name("new"))
        stopped.with_name("new").rename(stopped)
        assert fault(stopped) is None
    known = (stopped / name).name in json.loads((stopped / "manifest.json").read_text())["files"]
    code = 0 if name == "training_args.bin" else 4
    refused(
        f"--mode train --epochs 2 --output_dir logs/run {data}", code, "" if known and forged else name if code else ""
    )


def _extension(table: pa.Table) -> pa.Table:
    """The table with a column whose type is a pickle, as pyarrow < 14.0.1 ran it (CVE-2023-47248)."""
    payload = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload())}
    fields = [field.with_metadata(payload) for field in table.schema]
    return table.cast(
        pa.schema(fields, metadata={"pandas": pickle.dumps(Payload()), "huggingface": pickle.dumps(Payload())})
    )


def test_a_pickle_in_parquet(refused, data):
    pq.write_table(_extension(pa.table({"text": ["w7 w8", "w9"], "label": ["early", "late"]})), "evil.parquet")
    refused(f"--mode train --epochs 1 --output_dir logs/out {data} --train_path evil.parquet", 0)


@pytest.mark.parametrize("how", ["schema", "bytes"])
def test_a_pickle_in_the_cache(here, refused, data, how):
    refused(f"--mode analyze --output_dir analysis {data}", 0)
    refused(f"--mode train --epochs 1 --output_dir logs/first {data}", 0)
    caches = list((here / "cache").glob(f"*/{DOCUMENTS}"))
    assert len(caches) == 2
    for path in caches:
        if how == "schema":
            with pa.memory_map(str(path)) as file:
                table = _extension(pa.ipc.open_stream(file).read_all())
            with pa.OSFile(str(path) + ".new", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            os.replace(str(path) + ".new", path)
        else:
            path.write_bytes(pickle.dumps(Payload()).ljust(path.stat().st_size, b"."))
        sizes = json.loads((path.parent / MANIFEST).read_text())
        (path.parent / MANIFEST).write_text(json.dumps({**sizes, DOCUMENTS: path.stat().st_size}))
    refused(f"--mode train --epochs 1 --output_dir logs/second {data}", 3)


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
