"""Folders of .txt files, laid out as IMDB's: the label is the folder's name."""

from __future__ import annotations

import json
import logging

import pytest

from data_utils.dataset import LongTextDataset
from data_utils.paths import expand_paths, tell_of_others
from data_utils.readers import read_records
from data_utils.records import Record
from tests.data_utils.conftest import write_jsonl
from utils import DataFormatError, DataLoadError


@pytest.fixture
def train(tmp_path):
    """`aclImdb/train` with all that the original holds beside the reviews."""
    folder = tmp_path / "aclImdb" / "train"
    for name, text in {
        "pos/1_9.txt": "A <i>great</i> film.<br /><br />Don&#39;t miss it &amp; stay.",
        "pos/0_7.txt": "Good.",
        "neg/2_1.txt": "Bad <3 and 2 < 3.",
        "unsup/0_0.txt": "Who knows?",
        "unsup/1_0.txt": "Nobody.",
        "urls_pos.txt": "http://www.imdb.com/title/tt0453418",
        "labeledBow.feat": "9 0:9 1:1",
        "pos/.hidden.txt": "",
        "pos/notes.md": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read(path, **options):
    return list(read_records(path, **options))


def test_label_is_the_folder_and_id_the_path(train):
    records = read(train)
    paths = [str(train / name) for name in ("neg/2_1.txt", "pos/0_7.txt", "pos/1_9.txt")]
    texts = ["Bad <3 and 2 < 3.", "Good.", "A great film.\n\nDon't miss it & stay."]
    assert records == [
        Record(text, label, path, f"{path}:1")
        for text, label, path in zip(texts, ("neg", "pos", "pos"), paths, strict=True)
    ]


def test_texts_beside_folders_of_texts_are_ambiguous_in_prediction(train):
    with pytest.raises(
        DataLoadError, match=r"train: holds 1 texts \(urls_pos.txt\) beside folders of texts \(neg\); name"
    ):
        expand_paths(train, unlabelled=True)


def test_texts_without_labels_are_for_prediction(train):
    (train / "urls_pos.txt").unlink()
    names = [str(path.relative_to(train)) for path in expand_paths(train, unlabelled=True)]
    assert names == ["neg/2_1.txt", "pos/0_7.txt", "pos/1_9.txt", "unsup/0_0.txt", "unsup/1_0.txt"]


def test_texts_that_are_to_be_predicted_need_no_folder_of_a_label(train):
    text = train / "pos" / "0_7.txt"
    assert text in expand_paths(train / "pos", unlabelled=True)
    assert expand_paths(text, unlabelled=True) == [text]
    (train / "none").mkdir()
    with pytest.raises(DataLoadError, match=r"parquet file, nor \*.txt files$"):
        expand_paths(train / "none", unlabelled=True)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("one<br>two<br/>three<BR />four<br\n/>five", "one\ntwo\nthree\nfour\nfive"),
        ("<p>one</p><p class='x'>two</p>three<hr>four", "\none\n\ntwo\nthree\nfour"),
        ("a <b>bold</b> <a href='http://x.org/?a=1&amp;b'>li</a>nk<!-- no word -->.", "a bold link."),
        ("<input disabled=''><br class=x><img\nsrc='a.png' /><!DOCTYPE html>y<!-- a <b> -->", "\ny"),
        ("John <john@doe.com>, #include <stdio.h>, <a and b>", "John <john@doe.com>, #include <stdio.h>, <a and b>"),
        ("?a=1&copy=2 &copy; &amp;lt;", "?a=1&copy=2 © &lt;"),
        ("<brave> <pre>x</pre>", " x"),  # no tags that break a line, though they begin so
        ("&lt;b&gt; &quot;&eacute;&#233;&#xe9;&hellip; AT&T; &nosuch;", '<b> "ééé… AT&T; &nosuch;'),
        ("1 < 2 > 0, <3, <- and an <open end", "1 < 2 > 0, <3, <- and an <open end"),
    ],
)
def test_html_is_removed(tmp_path, written, text):
    (tmp_path / "pos").mkdir()
    (tmp_path / "pos" / "0.txt").write_text(written, encoding="utf-8")
    assert [record.text for record in read(tmp_path)] == [text]


@pytest.mark.parametrize("written", ["<!--" * 500_000, "<a b=" + " " * 1_000_000, ("<a" + " b" * 1000) * 500])
def test_tags_that_do_not_end_are_text(tmp_path, written):
    """Looked for up to the end of the document each, or in all ways to share out blanks, they would take hours."""
    (tmp_path / "pos").mkdir()
    (tmp_path / "pos" / "0.txt").write_text(written + " x <!-- y -->", encoding="utf-8")
    assert [record.text for record in read(tmp_path)] == [written + " x "]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "'text' is empty"),
        (b"<br /><i></i>&nbsp;", "'text' is empty"),
        (b"caf\xe9 noir", "byte 0xe9 at position 4 is not UTF-8; save the file as UTF-8"),
        (b"a\0b", "NUL byte at position 2"),
        (b"a &#0; b &#xd800;", None),  # HTML makes U+FFFD of both
    ],
)
def test_faults_name_the_file(train, raw, message):
    bad = train / "pos" / "1_9.txt"
    bad.write_bytes(raw)
    if message is None:
        assert read(train)[-1].text == "a \ufffd b \ufffd"
        return
    with pytest.raises(DataFormatError) as error:
        read(train)
    assert str(error.value).startswith(f"{bad}:1: {message}; ")
    kept = read(train, on_bad_lines="skip", quarantine_path=train / "q.log")
    assert [record.text for record in kept] == ["Bad <3 and 2 < 3.", "Good."]
    quarantined = [json.loads(line) for line in (train / "q.log").read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["reason"]) for row in quarantined] == [(f"{bad}:1", message)]


def test_columns_of_other_names_and_no_labels(train):
    named = read(train, text_column="review", label_column="sentiment")
    assert [(record.text, record.label) for record in named][1] == ("Good.", "pos")
    with pytest.raises(
        DataFormatError, match=r"2_1\.txt:1: label is a string; --problem_type multi_label needs a list"
    ):
        read(train, problem_type="multi_label")


def test_data_files_go_before_folders_of_texts(train, caplog):
    write_jsonl(train / "x.jsonl", [{"text": "war", "label": "pos"}])
    files = expand_paths(train)
    assert [file.name for file in files] == ["x.jsonl"]
    with caplog.at_level(logging.INFO, logger="reberta"):
        tell_of_others(train, files)
    assert caplog.messages == [f"{train}: not read as data: labeledBow.feat, neg, pos, unsup, urls_pos.txt"]


def test_what_is_not_read_is_named(train, caplog):
    """A label all of whose texts have another ending would vanish; so would some of the texts of one."""
    (train / "mixed").mkdir()
    (train / "mixed" / "0.html").touch()
    for number in range(6):
        (train / "neg" / f"{number}.text").touch()
    with caplog.at_level(logging.INFO, logger="reberta"):
        tell_of_others(str(train), expand_paths(train))
    assert caplog.messages == [
        f"{train}: not read as data: labeledBow.feat, mixed, unsup, urls_pos.txt",
        f"{train / 'neg'}: not read as data: 0.text, 1.text, 2.text, 3.text, 4.text and 1 more",
        f"{train / 'pos'}: not read as data: notes.md",
    ]


def test_texts_are_found_through_the_folder_of_labels_only(train):
    with pytest.raises(DataLoadError, match=r"unknown ending '\.txt'; data files end in \.jsonl"):
        expand_paths(train / "pos" / "0_7.txt")
    with pytest.raises(DataLoadError, match=r"nor folders of \*\.txt files that are named after labels"):
        expand_paths(train / "pos")
    with pytest.raises(DataLoadError, match=r"aclImdb/train: holds folders beside its texts, so it is no label; name"):
        expand_paths(train.parent)


def test_of_a_misspelt_file_the_nearest_is_named(train):
    with pytest.raises(DataLoadError, match=r"labeldBow\.feat: no such file; did you mean .*/labeledBow\.feat\?$"):
        expand_paths(train / "labeldBow.feat")
    with pytest.raises(DataLoadError, match=r"x\.csv: no such file; check the path$"):
        expand_paths(train / "none" / "x.csv")


def test_data_set_of_texts(train, encoder_folder, tmp_path):
    documents = LongTextDataset(train, None, str(encoder_folder), cache_dir=tmp_path / "cache")
    assert documents.label_names == ["neg", "pos"]
    assert documents.ids[1] == str(train / "pos" / "0_7.txt")


def test_the_log_does_not_name_each_of_many_files(train, encoder_folder, tmp_path, caplog):
    for number in range(4):
        (train / "neg" / f"{number}_1.txt").write_text("Bad.")
    with caplog.at_level(logging.INFO):
        LongTextDataset(train, model_name=encoder_folder, cache_dir=tmp_path / "cache", window_size=12)
    first = [str(train / "neg" / f"{number}_1.txt") for number in range(3)]
    assert any(message.startswith(f"{', '.join(first)} and 3 more files: 6 documents") for message in caplog.messages)
