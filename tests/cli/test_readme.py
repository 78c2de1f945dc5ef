"""Each command and each piece of Python in the Readme runs, and the Chinese Readme shows the same ones."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from config import Settings
from tests.cli.conftest import ROOT, TORCHRUN
from tests.conftest import tiny_encoder, word_tokenizer, write_corpus

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("Readme.md", "Readme.zh-CN.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small project folder: data where the defaults look, and tiny encoders in place of the downloaded ones."""
    folder = tmp_path_factory.mktemp("readme")
    for seed, (name, documents) in enumerate((("train", 40), ("evaluation", 8), ("validation", 9))):
        (folder / "data" / name).mkdir(parents=True)
        write_corpus(folder / "data" / name / f"{name}.jsonl", documents, seed, words=(100, 600))
    (folder / "my").mkdir()
    for seed, name in enumerate(("train", "validation", "test"), 3):
        write_corpus(folder / "my" / f"{name}.jsonl", 8, seed)
    shutil.copytree(ROOT / "configs", folder / "configs")
    config = tiny_encoder("roberta")
    config.max_position_embeddings = 514
    torch.manual_seed(0)
    for name in ("minilm-l6", "roberta-base"):
        encoder = folder / "models" / "pretrained" / name
        AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(encoder)
        word_tokenizer().save_pretrained(encoder)
    return folder


def test_the_readmes_show_the_same_commands_and_options():
    assert commands(README) == commands(CHINESE)
    assert blocks(README, "python") == blocks(CHINESE, "python")
    assert len(commands(README)) == 14
    for text in (README, CHINESE):
        rows = [line for line in text.splitlines() if line.startswith("| `--")]
        table = {name for row in rows for name in re.findall(r"`--(\w+)`", row.split("|")[1])}
        assert table == {*Settings.model_fields, "config"}


def test_every_command_runs_and_the_python_after_them(folder, command):
    ran = 0
    for line in commands(README):
        words = shlex.split(line)
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert "main.py --config configs/sotu.yaml" in done.stdout
        elif words[0] == "torchrun":
            launcher = (*TORCHRUN, *words[1:3])
            done = command(folder, shlex.join(words[4:]) + " --device cpu", script=words[3], launcher=launcher)
        else:
            assert words[0] == "python"
            extra = " --output_dir models/pretrained" if words[1] == "download_models.py" else " --device cpu"
            done = command(folder, shlex.join(words[2:]) + extra, script=words[1])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran += 1
    assert ran == 14
    for name in ("first", "by-steps", "sotu", "two", "mine"):
        assert (folder / "models" / "saved" / name / "model.pt").is_file()
    [block] = blocks(README, "python")
    script = folder / "snippet.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}")
    done = command(folder, "", script=str(script))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(early|late) \[\[0\.\d+, 0\.\d+\]\] torch.Size\(\[1, 1, 1\]\)\n", done.stdout)
