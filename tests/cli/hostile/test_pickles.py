"""Pickles from strangers on every path that loads: none is run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_utils.cache import DOCUMENTS, MANIFEST
from engine.run_checkpoints import fault
from engine.run_checkpoints import seal as sealed
from main import main
from tests.cli.hostile.conftest import CANARY, USES, Payload


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
