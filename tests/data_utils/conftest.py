"""Two tiny fast tokenizers, of BERT's and RoBERTa's shape, and small data files."""

from __future__ import annotations

import csv
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

WORDS = [
    "the",
    "union",
    "of",
    "states",
    "and",
    "people",
    "congress",
    "shall",
    "war",
    "peace",
    "commerce",
    "treaty",
    "nation",
    "law",
    "public",
    "government",
    "great",
    "power",
    "year",
    "act",
    "duty",
    "foreign",
    "citizens",
    "country",
    "general",
    "department",
    "revenue",
    "public",
    "land",
    "army",
    "navy",
    "bank",
    "mexico",
    "spain",
    "britain",
]
SAMPLE = [
    'The Union, of States; and people! It\'s 1861 -- "war" (and peace).\n\nNew  paragraph:\twith  spaces.',
    "naïve café — Ünïcode, emoji 😀 and 中国人民站起来了，今天天气很好。",
]


def random_text(words: int, seed: int) -> str:
    """A text of so many words, some of them joined by punctuation or line breaks."""
    draw = random.Random(seed)
    glue = [" ", " ", " ", " ", ", ", ". ", "\n", "  ", " - "]
    return "".join(draw.choice(WORDS) + draw.choice(glue) for _ in range(words)).strip()


def write_jsonl(path, rows):
    """Write rows (dicts, or strings as they are) as lines."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def _roberta() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(2000, 0)], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(["cls_token", "pad_token", "sep_token", "unk_token", "mask_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _bert() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([random_text(500, 0), *SAMPLE], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """Folders with a saved tokenizer, by shape."""
    folders = {}
    for name, make in (("roberta", _roberta), ("bert", _bert)):
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
    return folders


@pytest.fixture(params=["roberta", "bert"])
def tokenizer(request, tokenizer_folders):
    return AutoTokenizer.from_pretrained(tokenizer_folders[request.param])


@pytest.fixture
def roberta(tokenizer_folders):
    return AutoTokenizer.from_pretrained(tokenizer_folders["roberta"])


@pytest.fixture
def bert(tokenizer_folders):
    return AutoTokenizer.from_pretrained(tokenizer_folders["bert"])


@pytest.fixture
def corpus(tmp_path):
    """40 documents of 1 to 400 words in a JSONL file, with labels a, b and c."""
    rows = [
        {"id": f"d{number}", "text": random_text(1 + number * 10, number), "label": "abc"[number % 3]}
        for number in range(40)
    ]
    return write_jsonl(tmp_path / "corpus.jsonl", rows)
