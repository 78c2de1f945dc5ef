"""A synthetic suite: what decides stands in different windows, a known distance apart; made by seed.

    python -m benchmarks.synthetic_suite [TASK ...] --output_dir FOLDER [--documents 400 --distances 1 2 4 8 16
        --window_size 48 --model_path minilm-l6 --seed 0]

- order: somebody lights the lamp, and D windows later or earlier somebody rings the bell; which came first, `lamp` or
  `bell`? A document's twin has these two windows exchanged: the same bag of words and of windows, the other label.
  Whatever forgets the order of windows (their mean, their maximum) is right half of the time
- retraction: it is reported that the harbour is closed, and elsewhere that this is wrong; which holds at the end?
  `withdrawn` where the denial comes D windows after the report, `stands` where it came as long before it; these two
  are twins as in order. As many documents have only the later of the two sentences. In half of all the same is said of
  another place, the other way round: it takes the place to tell. Half of the twins are right without order
- counting: three windows, the first and last D apart, say that the drum was heard and not the flute, or the flute and
  not the drum; how often the drum, `0` to `3`? Bags of words are equal, and right for a quarter. Windows read one by
  one and then averaged do solve it: it takes a sum over windows, not their order; a maximum tells 0, 3 and the rest
- identity: of three people one speaks in the first window, one in the last, D windows on, and (from D = 2 on) one in
  between; who speaks first and last, or `nobody`? A twin has its last window exchanged with the one in between, so
  that bags of words and of windows are right half of the time there; at D = 1 they can tell
- chronology: real sentences; D windows of one State of the Union address, then D of another, 50 to 60 years older or
  younger; which came first, the `older` or the `newer`? A twin has the two exchanged. Most years are those of the
  older as often as of the newer, so that who knew the year of one half would be right three times of four. What a time
  sounds like must be learned here, too, and no reader would always be right
- question: the first window names a person; D windows on stands what became of two; was the one `convicted` or
  `acquitted`? A twin asks for the other. In half of all documents both met the same end, so that who cannot tell the
  names apart is right three times of four: the window of the verdicts must be read with the question in mind, or keep
  both of them for whoever may be asked for

Every window is full: the tokenizer's tokens of its sentences are exactly those that a window of `--window_size` holds,
so that train and evaluate with the same `--window_size`, no overlap, and `--max_windows` of D + 17 or more (chronology:
2 D). In order, retraction and counting up to 16 windows of filler stand before and after what decides, in question
after it, as many in all as often as any other number: where the last event decides alone, it must be remembered for as
long. Alone, no window tells order, the twins of retraction and question, nor who speaks first and last in identity; in
counting one of three leaves at best every second guess right, and at distance 1 two of them share a window.

- FOLDER/TASK/{train,validation,test}.jsonl: {"id", "text", "label", "task", "distance"} a line, distances mixed, as
  many documents of each label and distance (in identity, half of them `nobody`); twins are in the same split
- `--documents` for training a distance, a quarter as many each for validation and test
- splits share no sentence of filler, no place but the harbour, no name but those of identity, and no address: those of
  the bundled corpus are split as there
- FOLDER/TASK/about.json: the options; a folder of the same options is left alone
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import tqdm
from transformers import PreTrainedTokenizerBase

from benchmarks.addresses import Addresses
from benchmarks.corpora import ABOUT, ENCODER, SPLITS
from benchmarks.synthetic_words import (
    ACQUITTED,
    ASKED,
    BELL,
    CAST,
    CONVICTED,
    DENIED,
    HARBOUR,
    HEARD,
    LAMP,
    NAMES,
    NOBODY,
    PLACES,
    REPORTED,
    SPOKE,
    all_fillers,
)
from data_utils.tokenization import load_tokenizer, tokenize
from data_utils.windows import SPECIALS
from download_models import atomic_folder
from utils import ConfigError, ReBertaError, logger, setup_logging

DISTANCES = (1, 2, 4, 8, 16)
DOCUMENTS = 400  # for training, a distance
SMALLER = 4  # validation and test are smaller by this factor
GROUP = 4  # documents that share their filler, or are two pairs of twins
WINDOW_SIZE = 48
OUTSIDE = 16  # windows of filler before and after what decides, together, at most

Window = list[str]  # its sentences
Labelled = tuple[str, list[Window]]


class Example(TypedDict):
    """One line of a split."""

    id: str
    text: str
    label: str
    task: str
    distance: int


class Options(NamedTuple):
    """What the documents depend on."""

    documents: int = DOCUMENTS
    distances: Sequence[int] = DISTANCES
    window_size: int = WINDOW_SIZE
    model_path: str = ENCODER
    seed: int = 0


class Writer:
    """Draws what stands in the documents of one split, and writes windows that are exactly full.

    Raises ConfigError for a window that filler cannot fill.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window_size: int, split: str) -> None:
        self.draw, self._split = random.Random(0), split
        self.names, self.places = share(NAMES.split(), split), share(PLACES.split(), split)
        self._tokenizer = tokenizer
        self._room = window_size - SPECIALS
        self._fillers: dict[int, list[str]] = defaultdict(list)  # by number of tokens
        sentences = share(all_fillers(), split)
        counts = zip(sentences, self._count(sentences), self._count(sentences, start=" "), strict=True)
        for sentence, at_first, later in counts:
            if at_first == later:  # a document may begin with it
                self._fillers[later].append(sentence)
        self._can_fill = [True] + [False] * max(self._room, 0)
        for room in range(1, len(self._can_fill)):
            self._can_fill[room] = any(self._can_fill[room - n] for n in self._fillers if n <= room)

    def _count(self, sentences: Sequence[str], start: str = "") -> list[int]:
        texts = [start + sentence for sentence in sentences]
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def window(self, *sentences: str) -> Window:
        """A full window with these sentences at random places, the first place excepted."""
        room = self._room - (sum(self._count(sentences, start=" ")) if sentences else 0)
        if room < 1 or not self._can_fill[room]:
            needed = self._room - room + SPECIALS
            raise ConfigError(
                f"--window_size {self._room + SPECIALS}: {needed} tokens are taken, and filler cannot fill the rest; "
                f"take {WINDOW_SIZE} or more"
            )
        window: Window = []
        while room:
            tokens = self.draw.choice([n for n in self._fillers if n <= room and self._can_fill[room - n]])
            window.append(self.draw.choice(self._fillers[tokens]))
            room -= tokens
        for sentence in sentences:
            window.insert(self.draw.randint(1, len(window)), sentence)
        return window

    @functools.cached_property
    def addresses(self) -> Addresses:
        """Those of this split."""
        return Addresses(self._split, self._room, self._count)

    def empty(self, windows: int) -> list[Window]:
        """Windows of filler alone."""
        return [self.window() for _ in range(windows)]

    def around(self, between: int) -> tuple[list[Window], list[Window], list[Window]]:
        """Filler before, between (so many windows) and after what decides."""
        outside = self.draw.randint(0, OUTSIDE)
        before = self.draw.randint(0, outside)
        return self.empty(before), self.empty(between), self.empty(outside - before)


def order(writer: Writer, distance: int) -> Iterator[Labelled]:
    for _ in range(GROUP // 2):
        one, another = writer.draw.sample(writer.names, 2)
        lamp = writer.window(writer.draw.choice(LAMP).format(one))
        bell = writer.window(writer.draw.choice(BELL).format(another))
        before, between, after = writer.around(distance - 1)
        yield "lamp", [*before, lamp, *between, bell, *after]
        yield "bell", [*before, bell, *between, lamp, *after]


def retraction(writer: Writer, distance: int) -> Iterator[Labelled]:
    other = writer.draw.choice(writer.places)
    reported, other_reported = (writer.draw.choice(REPORTED).format(place) for place in (HARBOUR, other))
    denied, other_denied = (writer.draw.choice(DENIED).format(place) for place in (HARBOUR, other))
    beside_report, beside_denial = writer.draw.choice((([], []), ([other_denied], [other_reported])))
    report, denial = writer.window(reported, *beside_report), writer.window(denied, *beside_denial)
    no_report, no_denial = writer.window(*beside_report), writer.window(*beside_denial)
    before, between, after = writer.around(distance - 1)
    yield "withdrawn", [*before, report, *between, denial, *after]
    yield "stands", [*before, denial, *between, report, *after]
    yield "withdrawn", [*before, no_report, *between, denial, *after]
    yield "stands", [*before, no_denial, *between, report, *after]


def counting(writer: Writer, distance: int) -> Iterator[Labelled]:
    frames = [(writer.draw.choice(HEARD), name) for name in writer.draw.sample(writer.names, 3)]
    drums = [frame.format(name, "drum", "flute") for frame, name in frames]
    flutes = [frame.format(name, "flute", "drum") for frame, name in frames]
    places = (0, distance, writer.draw.randint(0, distance))
    span = [
        writer.window(*(drum for drum, at in zip(drums, places, strict=True) if at == place))
        for place in range(distance + 1)
    ]
    before, _, after = writer.around(0)
    for count in range(GROUP):
        silent = writer.draw.sample(range(3), 3 - count)
        exchange = {drums[i]: flutes[i] for i in silent}
        said = [[exchange.get(sentence, sentence) for sentence in window] for window in span]
        yield str(count), [*before, *said, *after]


def identity(writer: Writer, distance: int) -> Iterator[Labelled]:
    pair = writer.draw.sample(CAST, GROUP // 2)
    for one, another in (pair, pair[::-1]):
        opening, again, other = (writer.window(writer.draw.choice(SPOKE).format(name)) for name in (one, one, another))
        if distance == 1:
            yield one, [opening, again]
            yield NOBODY, [opening, other]
            continue
        between = writer.empty(distance - 2)
        place = writer.draw.randint(0, len(between))
        before, after = between[:place], between[place:]
        yield one, [opening, *before, other, *after, again]
        yield NOBODY, [opening, *before, again, *after, other]


def chronology(writer: Writer, distance: int) -> Iterator[Labelled]:
    addresses = writer.addresses
    for pair in writer.draw.sample(addresses.pairs(distance), GROUP // 2):
        older, newer = ([[text] for text in addresses.excerpt(address, distance, writer.draw)] for address in pair)
        yield "older", [*older, *newer]
        yield "newer", [*newer, *older]


def question(writer: Writer, distance: int) -> Iterator[Labelled]:
    names = writer.draw.sample(writer.names, 2)
    asked = [writer.window(writer.draw.choice(ASKED).format(name)) for name in names]
    before, between, after = writer.around(distance - 1)

    def told(*verdicts: tuple[str, ...]) -> Window:
        return writer.window(
            *(writer.draw.choice(ways).format(name) for ways, name in zip(verdicts, names, strict=True))
        )

    of_both = told(CONVICTED, ACQUITTED)
    for label, opening, verdicts in (
        ("convicted", asked[0], of_both),
        ("acquitted", asked[1], of_both),
        ("convicted", asked[1], told(CONVICTED, CONVICTED)),
        ("acquitted", asked[0], told(ACQUITTED, ACQUITTED)),
    ):
        yield label, [opening, *between, verdicts, *before, *after]


TASKS: dict[str, Callable[[Writer, int], Iterator[Labelled]]] = {
    "order": order,
    "retraction": retraction,
    "counting": counting,
    "identity": identity,
    "chronology": chronology,
    "question": question,
}


def share(items: Sequence[str], split: str) -> list[str]:
    """The part of the split: three fifths to train, a fifth each to validate and test."""
    fifths = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return [item for number, item in enumerate(items) if number % 5 in fifths]


def make_split(task: str, split: str, options: Options, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The documents of a split, mixed by seed.

    Raises ConfigError for options that nothing can be made of, and for a tokenizer whose tokens cross sentences.
    """
    documents = options.documents if split == "train" else options.documents // SMALLER
    writer = Writer(tokenizer, options.window_size, split)
    examples = []
    for distance in options.distances:
        writer.draw.seed(f"{options.seed} {task} {split} {distance}")  # whatever the other distances are
        labelled = [item for _ in range(documents // GROUP) for item in TASKS[task](writer, distance)]
        for number, (label, windows) in enumerate(labelled):
            text = " ".join(sentence for window in windows for sentence in window)
            name = f"{task}-{split}-{distance}-{number}"
            examples.append((len(windows), Example(id=name, text=text, label=label, task=task, distance=distance)))
    check_full(examples, tokenizer, options.window_size)
    random.Random(f"{options.seed} {task} {split}").shuffle(examples)
    return [example for _, example in examples]


def check_full(examples: Sequence[tuple[int, Example]], tokenizer: PreTrainedTokenizerBase, window_size: int) -> None:
    """Raises ConfigError for a document that does not fill its number of windows."""
    for (windows, name), tokens in tokenize(tokenizer, (((n, item["id"]), item["text"]) for n, item in examples)):
        if len(tokens.ids) != windows * (window_size - SPECIALS):
            raise ConfigError(
                f"{name}: {len(tokens.ids)} tokens do not fill {windows} windows of {window_size}; the tokenizer joins "
                "sentences, choose another encoder with --model_path"
            )


def check(options: Options) -> None:
    """Raises ConfigError."""
    if options.documents < 1 or options.documents % (GROUP * SMALLER):
        raise ConfigError(f"--documents {options.documents} is not a multiple of {GROUP * SMALLER}")
    if min(options.distances) < 1 or len(set(options.distances)) < len(options.distances):
        raise ConfigError(f"--distances {' '.join(map(str, options.distances))}: each once, none below 1")


def make_task(task: str, folder: Path, options: Options) -> Path:
    """Put the task into `folder/task` and return that folder; one of the same options is left alone.

    Raises ConfigError for an unknown task, wrong options, and a folder of other options.
    """
    if task not in TASKS:
        raise ConfigError(f"no task is called {task!r}, only {', '.join(TASKS)}")
    check(options)
    place = folder / task
    about: dict[str, Any] = {**options._asdict(), "distances": list(options.distances)}
    if place.is_dir():
        if json.loads((place / ABOUT).read_text(encoding="utf-8")) != about:
            raise ConfigError(f"{place} holds documents of other options; remove it, or name another --output_dir")
        logger.info("%s is already there; left alone", place)
        return place
    tokenizer = load_tokenizer(options.model_path)
    with atomic_folder(place) as staging:
        for split in tqdm.tqdm(SPLITS, desc=task, disable=None):
            with (staging / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(item) + "\n" for item in make_split(task, split, options, tokenizer))
        (staging / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return place


def main(argv: Sequence[str] | None = None) -> int:
    """Make tasks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} (default all)")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER")
    for name, value in Options()._asdict().items():
        many = {"nargs": "+", "type": int} if name == "distances" else {"type": type(value)}
        parser.add_argument(f"--{name}", default=value, help="default %(default)s", **many)
    given = vars(parser.parse_args(argv))
    tasks, folder = given.pop("tasks"), given.pop("output_dir")
    setup_logging()
    try:
        for task in tasks or TASKS:
            print(make_task(task, folder, Options(**given)))
    except ReBertaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
