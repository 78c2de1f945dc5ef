"""benchmarks/synthetic_suite.py: what its documents say and where, and that no cheap reading of them does."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import tfidf_svm
from benchmarks.corpora import SPLITS, load_split
from benchmarks.quality import by_distance
from benchmarks.synthetic_suite import TASKS, Example, Options, main, make_split, share
from benchmarks.synthetic_words import CAST, NAMES, NOBODY, PLACES, all_fillers
from data import make_sotu
from data_utils.analysis import analyze
from data_utils.readers import read_records
from data_utils.tokenization import tokenize
from data_utils.windows import cut_windows
from utils import ConfigError

SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
LABELS = {
    "order": {"lamp", "bell"},
    "retraction": {"stands", "withdrawn"},
    "counting": {"0", "1", "2", "3"},
    "identity": {*CAST, NOBODY},
    "chronology": {"older", "newer"},
    "question": {"convicted", "acquitted"},
}
MADE_UP = [task for task in TASKS if task != "chronology"]
SIZES = {"train": 320, "validation": 320, "test": 800}  # --documents that a split is taken of
CONVICTED = "guilty|convicted|to jail"
DECIDES = re.compile(
    rf"lamp|bell|closed|\blie\b|false|drum|spoke|listened|asked|story|{CONVICTED}|innocent|acquitted|went free"
)
DRUM = re.compile(r"heard the drum|The drum was heard|heard was the drum")
SPEAKER = re.compile("|".join(CAST))
SENTENCE = re.compile(r"[^.]+\.")


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """BERT's or RoBERTa's format, of so few tokens that most words take several."""
    special = list(SPECIAL.values())
    sentences = [*all_fillers(), *NAMES.split(), *PLACES.split()]
    if kind == "bert":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(sentences, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        sentences += [f" {sentence}" for sentence in sentences]
        backend.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer as `--model_path` takes it."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of("bert").save_pretrained(path)
    return path


@cache
def fold(task: str) -> dict[str, list[Example]]:
    """Splits of distances 1 and 3; 400 test documents."""
    return {
        split: make_split(task, split, Options(size, (1, 3), 100), tokenizer_of("bert"))
        for split, size in SIZES.items()
    }


def windows_of(text: str, window_size: int, kind: str = "bert") -> list[str]:
    """The text of each window that the project cuts, by the places of its tokens in the text."""
    tokenizer = tokenizer_of(kind)
    ((_, tokens),) = tokenize(tokenizer, [(None, text)])
    ids_NW, mask_NW = cut_windows(tokens.ids, window_size, 2, 3, 1)
    assert mask_NW.all()
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids_NW[:, 1:-1].ravel().tolist() == encoding["input_ids"]
    starts = [start for start, _ in encoding["offset_mapping"]][:: window_size - 2]
    return [text[start:end].strip() for start, end in pairwise([*starts, len(text)])]


def said(text: str) -> list[str]:
    """The sentences that are no filler."""
    return [sentence.strip() for sentence in SENTENCE.findall(text) if DECIDES.search(sentence)]


def oracle(task: str, text: str) -> str:
    """The rule of the task, read from the text."""
    sentences = said(text)
    if task == "order":
        return "lamp" if "lamp" in sentences[0] else "bell"
    if task == "retraction":
        last = [sentence for sentence in sentences if "harbour" in sentence][-1]
        return "withdrawn" if re.search("lie|false", last) else "stands"
    if task == "counting":
        return str(sum(bool(DRUM.search(sentence)) for sentence in sentences))
    if task == "question":
        asked, *verdicts = sentences
        [name] = set(NAMES.split()) & set(re.findall(r"\w+", asked))
        [told] = [verdict for verdict in verdicts if re.search(rf"\b{name}\b", verdict)]
        return verdict_of(told)
    first, *_, last = [name for sentence in sentences for name in SPEAKER.findall(sentence)]
    return first if first == last else NOBODY


def verdict_of(sentence: str) -> str:
    return "convicted" if re.search(CONVICTED, sentence) else "acquitted"


def beyond_words(item: Example) -> bool:
    """Neither speech alone in the first and last window, nor the report or its denial alone, nor the same verdicts."""
    if item["task"] == "identity":
        return item["distance"] > 1
    if item["task"] == "question":
        return len(set(map(verdict_of, said(item["text"])[1:]))) == 2
    return item["task"] != "retraction" or sum("harbour" in sentence for sentence in said(item["text"])) == 2


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("task", MADE_UP)
def test_windows_are_full_and_what_decides_is_as_far_apart_as_said(task, kind):
    examples = make_split(task, "test", Options(32, (1, 2, 4, 16), 120), tokenizer_of(kind))
    assert len(examples) == 4 * 8
    outside = []  # windows before and after what decides
    for example in examples:
        windows = windows_of(example["text"], 120, kind)
        assert all(window.endswith(".") for window in windows)
        places = [place for place, window in enumerate(windows) for _ in said(window)]
        distance = example["distance"]
        harbours = sum("harbour" in sentence for sentence in said(example["text"]))
        numbers = {
            "order": {2},
            "retraction": {harbours, harbours + 2},
            "counting": {3},
            "identity": {2 if distance == 1 else 3},
            "question": {3},
        }
        assert len(places) in numbers[task]
        if len(places) == 1:  # a report or a denial alone, where the later one would be
            outside.append((places[0] - distance, len(windows) - 1 - places[0]))
            continue
        assert places[-1] - places[0] == distance
        outside.append((places[0], len(windows) - 1 - places[-1]))
        if task == "retraction":  # the later window has all that is said of it, the earlier one may lack the harbour
            first, last = places.count(places[0]), places.count(places[-1])
            assert (first, last) in {(1, 1), (2, 2), (1, 2)}
            assert first + last == len(places)
            assert (first == last) == (harbours == 2)
    if task == "identity":
        assert set(outside) == {(0, 0)}
    else:
        assert all(before >= 0 and after >= 0 and before + after <= 16 for before, after in outside)
        before, after = map(max, zip(*outside, strict=True))
        assert after > 4
        assert before == 0 if task == "question" else before > 4


@cache
def addresses(split: str) -> list[tuple[int, str]]:
    """Year and words."""
    folder = {"train": "train", "validation": "evaluation", "test": "validation"}[split]
    records = read_records(make_sotu.DATA / folder)
    return [(int(record.id.split("-")[0]), " ".join(record.text.split())) for record in records]


@pytest.mark.parametrize(("kind", "split"), [("bert", "train"), ("bert", "test"), ("roberta", "validation")])
def test_chronology_is_of_two_addresses_in_the_order_that_its_label_says(kind, split):
    examples = make_split("chronology", split, Options(32 if split == "train" else 128, (1, 4), 60), tokenizer_of(kind))
    assert len(examples) == 64
    for example in examples:
        windows, distance = windows_of(example["text"], 60, kind), example["distance"]
        assert len(windows) == 2 * distance
        years = []
        for half in (windows[:distance], windows[distance:]):
            [year] = {year for year, text in addresses(split) if all(window in text for window in half)}
            [text] = [text for its_year, text in addresses(split) if its_year == year and half[0] in text]
            places = [text.index(window) for window in half]
            assert places == sorted(places)
            years.append(year)
        assert 50 <= abs(years[0] - years[1]) <= 60
        assert example["label"] == ("older" if years[0] < years[1] else "newer")


def test_distances_that_no_address_is_long_enough_for(folder, tmp_path, capsys):
    assert make(folder, tmp_path, "chronology", "--distances", "9999", "--window_size", "100") == 2
    assert "--distances 9999: the addresses are shorter than so many windows" in capsys.readouterr().err


@pytest.mark.parametrize("task", MADE_UP)
def test_an_oracle_is_always_right_and_labels_are_balanced(task):
    for examples in fold(task).values():
        assert all(oracle(task, item["text"]) == item["label"] for item in examples)
        counts = Counter((item["label"], item["distance"]) for item in examples)
        assert {label for label, _ in counts} == LABELS[task]
        if task == "identity":
            assert [counts[NOBODY, distance] for distance in (1, 3)] == [len(examples) // 4] * 2
        else:
            assert set(counts.values()) == {len(examples) // 2 // len(LABELS[task])}
    assert [len(examples) for examples in fold(task).values()] == [640, 160, 400]


@pytest.mark.parametrize("task", MADE_UP)
def test_words_do_not_tell(task):
    """TF-IDF and a linear SVM."""
    documents = fold(task)
    pairs = zip(documents["test"], tfidf_svm.fit(documents, None).predictions, strict=True)
    said = [(item, predicted) for item, predicted in pairs if beyond_words(item)]
    right = "".join(str(int(predicted == item["label"])) for item, predicted in said)
    scores = by_distance([item for item, _ in said], right)
    assert max(scores.values()) < (0.4 if task == "counting" else 0.65)


def mean_window(examples: list[Example]) -> np.ndarray:
    """Words and runs of them, to four, window by window; then their mean: [documents, features]."""
    vectorizer = HashingVectorizer(ngram_range=(1, 4), n_features=2**13, norm=None)
    means = [vectorizer.transform(windows_of(item["text"], 100)).mean(axis=0) for item in examples]
    return np.asarray(np.concatenate(means))


@pytest.mark.parametrize("task", MADE_UP)
def test_a_bag_of_windows_tells_counting_alone(task):
    train, test = fold(task)["train"], fold(task)["test"]
    machine = LogisticRegression(C=10, tol=0.01, max_iter=500).fit(
        mean_window(train), [item["label"] for item in train]
    )
    predicted = machine.predict(mean_window(test)).tolist()
    right = np.mean([one == item["label"] for one, item in zip(predicted, test, strict=True) if beyond_words(item)])
    assert right > 0.9 if task == "counting" else right < 0.65


@pytest.mark.parametrize("task", ["order", "retraction", "identity", "chronology"])
def test_each_bag_of_windows_stands_once_under_either_label(task):
    bags = defaultdict(list)
    examples = list(filter(beyond_words, fold(task)["test"]))
    for item in examples:
        bags[frozenset(Counter(windows_of(item["text"], 100)).items())].append(item["label"])
    assert len(bags) == len(examples) // 2
    pairs = {frozenset({name, NOBODY}) for name in CAST} if task == "identity" else {frozenset(LABELS[task])}
    assert {frozenset(labels) for labels in bags.values()} == pairs


def test_each_bag_of_words_of_counting_stands_under_all_labels():
    bags = defaultdict(list)
    for item in fold("counting")["test"]:
        bags[frozenset(Counter(re.findall(r"\w+", item["text"].lower())).items())].append(item["label"])
    assert len(bags) == 100
    assert {(len(labels), frozenset(labels)) for labels in bags.values()} == {(4, frozenset(LABELS["counting"]))}


def test_splits_share_no_filler_no_name_and_no_place():
    for items in (NAMES.split(), PLACES.split(), all_fillers()):
        parts = [set(share(items, split)) for split in SPLITS]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(items)
    own = {*NAMES.split(), *PLACES.split()}
    for task in MADE_UP:
        texts = [" ".join(item["text"] for item in examples) for examples in fold(task).values()]
        fillers = [{s.strip() for s in SENTENCE.findall(text) if not DECIDES.search(s)} for text in texts]
        names = [own & set(re.findall(r"\w+", text)) for text in texts]
        for parts, least in ((fillers, 300), (names, 0 if task == "identity" else 5)):
            assert min(map(len, parts)) >= least
            assert sum(map(len, parts)) == len(set().union(*parts))


def make(folder: Path, output: Path, *options: str) -> int:
    return main(["--output_dir", str(output), "--model_path", str(folder), "--documents", "16", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_command_makes_the_same_bytes_of_the_same_seed(folder, tmp_path, capsys):
    options = ["--distances", "1", "2", "--window_size", "100"]
    assert make(folder, tmp_path / "one", *options) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "one" / task) for task in TASKS]
    assert make(folder, tmp_path / "two", "identity", "order", *options) == 0
    made, again = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert set(made) == {f"{task}/{name}" for task in TASKS for name in ("about.json", *(f"{s}.jsonl" for s in SPLITS))}
    assert set(again) == {name for name in made if name.startswith(("identity", "order"))}
    assert all(made[name] == content for name, content in again.items())
    assert make(folder, tmp_path / "three", "order", "--seed", "1", *options) == 0
    assert contents(tmp_path / "three")["order/train.jsonl"] != made["order/train.jsonl"]


def test_files_are_read_by_the_project_and_leak_nothing(folder, tmp_path):
    assert make(folder, tmp_path, "--distances", "1", "2", "--window_size", "100") == 0
    for task in TASKS:
        paths = {split: tmp_path / task / f"{split}.jsonl" for split in SPLITS}
        report = analyze(paths, tokenizer_of("bert"), window_size=100)
        assert report["leaks"] == report["duplicates"] == []
        assert [report["splits"][split]["documents"] for split in SPLITS] == [32, 8, 8]
        examples = load_split(tmp_path / task, "train")
        assert [tuple(item) for item in examples] == [("id", "text", "label", "task", "distance")] * 32
        records = list(read_records(paths["train"]))
        assert [(r.id, r.label) for r in records] == [(item["id"], item["label"]) for item in examples]


def test_folder_of_other_options_is_refused(folder, tmp_path, capsys):
    options = ["order", "--distances", "1", "--window_size", "100"]
    assert make(folder, tmp_path, *options) == 0
    before = contents(tmp_path)
    assert make(folder, tmp_path, *options) == 0
    assert make(folder, tmp_path, *options, "--seed", "1") == 2
    assert f"{tmp_path}/order holds documents of other options" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["orders"], "no task is called 'orders', only order, retraction, counting, identity, "),
        (["order", "--documents", "24"], "--documents 24 is not a multiple of 16"),
        (["order", "--distances", "0"], "--distances 0: each once, none below 1"),
        (["order", "--distances", "2", "2"], "--distances 2 2: each once, none below 1"),
        (["order", "--window_size", "20"], "--window_size 20: "),
    ],
)
def test_options_that_do_not_go(folder, tmp_path, capsys, options, message):
    assert make(folder, tmp_path / "made", *options) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.glob("made/*"))


def test_tokenizer_that_joins_sentences():
    """Its tokens would not end where windows do."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")), **SPECIAL)
    with pytest.raises(ConfigError, match="the tokenizer joins sentences, choose another encoder"):
        make_split("order", "test", Options(16, (1,), 10), tokenizer)
