"""Lengths, coverage, labels, duplicates and leaks, with their numbers and places."""

from __future__ import annotations

import json

import pytest

from data_utils import analysis
from data_utils.analysis import analyze, format_analysis, write_analysis
from tests.data_utils.conftest import write_csv, write_jsonl
from utils import ConfigError, DataFormatError


@pytest.fixture
def splits(tmp_path):
    """100 training documents of 1 to 100 tokens, with a duplicate, and a test file with a leak."""
    rows = [{"text": "war " * (number + 1), "label": [10, 9][number % 2], "id": number} for number in range(100)]
    rows.append({"text": "WAR\u3000war\nｗａｒ", "label": 9, "id": "again"})
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_csv(tmp_path / "test.csv", [["peace", "9"], ["War WAR", "10"]])
    return {"train": train, "test": test}


def test_the_numbers(splits, bert):
    bert.add_tokens(["war", "peace"])
    report = analyze(splits, bert, window_size=12, window_overlap=2)
    train = report["splits"]["train"]
    assert (train["documents"], train["bad_lines"], train["unlabelled"]) == (101, 0, 0)
    assert list(train["labels"].items()) == [("9", 51), ("10", 50)]
    total = 5050 + report["token_counts"]["train"][-1]
    assert train["lengths"]["total"] == report["token_counts"]["train"].sum() == total
    assert (train["lengths"]["min"], train["lengths"]["median"], train["lengths"]["max"]) == (1, 50, 100)
    assert train["lengths"]["mean"] == pytest.approx(total / 101)
    assert [row["windows"] for row in train["coverage"]] == [4, 8, 16, 32, 64]
    assert [row["tokens"] for row in train["coverage"]] == [34, 66, 130, 258, 514]
    assert [row["documents"] for row in train["coverage"]] == [35, 67, 101, 101, 101]
    assert train["coverage"][0]["documents_share"] == pytest.approx(35 / 101)
    read = sum(min(number, 34) for number in range(1, 101)) + total - 5050
    assert train["coverage"][0]["tokens_share"] == pytest.approx(read / total)
    assert train["coverage"][2]["tokens_share"] == 1
    assert report["splits"]["test"]["documents"] == 2


def test_duplicates_and_leaks(splits, bert):
    report = analyze(splits, bert)
    assert report["duplicates"] == [
        [
            {"split": "train", "id": "2", "source": f"{splits['train']}:3", "label": "10"},
            {"split": "train", "id": "again", "source": f"{splits['train']}:101", "label": "9"},
        ]
    ]
    assert report["leaks"] == [
        [
            {"split": "train", "id": "1", "source": f"{splits['train']}:2", "label": "9"},
            {"split": "test", "id": "test.csv:3", "source": f"{splits['test']}:3", "label": "10"},
        ]
    ]


def test_files_are_read_again_only_for_duplicates(tmp_path, bert, monkeypatch):
    reader, reads = analysis.checked_records, []
    monkeypatch.setattr(analysis, "checked_records", lambda *arguments: reads.append(1) or reader(*arguments))
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "war", "label": "a"}, {"text": "peace", "label": "a"}])
    report = analyze({"train": path}, bert)
    assert (report["duplicates"], report["leaks"], len(reads)) == ([], [], 1)


def test_the_report_is_written(splits, bert, tmp_path):
    report = analyze(splits, bert, window_size=12)
    write_analysis(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "analysis.json",
        "analysis.txt",
        "token_lengths.png",
    ]
    written = json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8"))
    assert written == {name: value for name, value in report.items() if name != "token_counts"}
    assert (tmp_path / "out" / "token_lengths.png").stat().st_size > 5_000
    text = (tmp_path / "out" / "analysis.txt").read_text(encoding="utf-8")
    assert text == format_analysis(report)
    assert "train: 101 documents, " in text
    assert "Duplicates within a split: 1\n" in text
    assert f"train 1 ({splits['train']}:2)  =  test test.csv:3 ({splits['test']}:3)" in text


def test_many_groups_are_cut_short_in_the_text_only(tmp_path, bert):
    rows = [{"text": f"war {number % 30}", "label": "a"} for number in range(60)]
    report = analyze({"train": write_jsonl(tmp_path / "x.jsonl", rows)}, bert)
    assert len(report["duplicates"]) == 30
    text = format_analysis(report)
    assert text.count("  =  ") == 20
    assert "... and 10 more in analysis.json" in text
    assert "Documents that stand in two splits: none" in text


def test_bad_lines_and_missing_labels(tmp_path, bert):
    rows = [{"text": "war", "label": ["a", "b"]}, "rubbish", {"text": "war"}, {"text": "peace", "label": ["b"]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataFormatError, match=f"{path}:2: malformed JSON"):
        analyze({"train": path}, bert, problem_type="multi_label")
    report = analyze(
        {"train": path},
        bert,
        problem_type="multi_label",
        require_labels=False,
        on_bad_lines="skip",
        quarantine_dir=tmp_path / "out",
    )
    train = report["splits"]["train"]
    assert (train["documents"], train["bad_lines"], train["unlabelled"]) == (3, 1, 1)
    assert train["labels"] == {"a": 1, "b": 2}
    assert len((tmp_path / "out" / "quarantine-train.jsonl").read_text().splitlines()) == 1
    assert len(report["duplicates"]) == 1


def test_windows_that_cannot_be_cut(splits, bert):
    with pytest.raises(ConfigError, match="--window_size 1"):
        analyze(splits, bert, window_size=1)
