"""Names, places, events and filler of the synthetic suite. Every sentence is a template with its slots filled."""

from __future__ import annotations

import functools
import random
from itertools import product

NAMES = """
    Adam Agnes Albert Alice Amos Anna Arthur Barbara Ben Bertha Bridget Carl Caroline Catherine Charles Clara Daniel
    David Dora Edgar Edith Edmund Edward Eleanor Elizabeth Ella Emma Ernest Esther Eva Felix Florence Frances Frank
    Frederick George Gerald Grace Hannah Harold Harriet Harry Helen Henry Herbert Hugh Ida Irene Isaac Jack Jacob James
    Jane Jessie Joan John Joseph Judith Julia Kate Laura Leo Leonard Lewis Louis Louise Lucy Margaret Maria Martha
    Martin Mary Matthew Michael Nancy Nathan Nicholas Oliver Oscar Patrick Paul Peter Philip Rachel Ralph Richard Robert
    Rose Ruth Samuel Sarah Simon Sophia Stephen Susan Thomas Victor Walter William
"""
CAST = "Gilbert", "Miriam", "Theodore"
NOBODY = "nobody"
HARBOUR = "harbour"
PLACES = """
    academy airport bakery bank bridge brewery canal castle cathedral chapel cinema college factory ferry gallery
    hospital hotel library market museum office palace prison school station theatre tunnel university
"""

LAMP = ("{} lit the lamp.", "The lamp was lit by {}.", "It was {} who lit the lamp.", "Then {} went and lit the lamp.")
BELL = (
    "{} rang the bell.",
    "The bell was rung by {}.",
    "It was {} who rang the bell.",
    "Then {} came and rang the bell.",
)
REPORTED = (
    "It was reported that the {} was closed.",
    "Word came that soldiers had closed the {}.",
    "The {} was closed by order of the king.",
)
DENIED = (
    "The story about the {} was a lie.",
    "What they had told of the {} proved false.",
    "All the rumours about the {} were false.",
)
HEARD = (
    "{0} heard the {1}, but not the {2}.",
    "The {1} was heard by {0}, and the {2} was not.",
    "What {0} heard was the {1} and never the {2}.",
)
SPOKE = (
    "{} spoke to the people.",
    "It was {} who spoke to them.",
    "The people listened to {}.",
    "Then {} rose and spoke.",
)
ASKED = ("People asked what became of {}.", "This is the story of {}.", "They all asked about {}.")
CONVICTED = ("{} was found guilty.", "They convicted {}.", "{} went to jail.")
ACQUITTED = ("{} was found innocent.", "They acquitted {}.", "{} went free.")

FILLERS = (
    "Rain fell on the {place}.",
    "The {place} lay {state} in {season}.",
    "In {season} the {place} was {state}.",
    "Carts of {goods} went by.",
    "People bought {goods} at the fair.",
    "There was {weather} over the {place} all day long.",
    "The price of {goods} did not change that {season}.",
    "Children played near the {place} until it was dark.",
    "Nobody could remember such a {state} {season} before.",
    "From the {place} to the next one the way was long and {state}.",
    "In {season} they carried {goods} from the {place} to the town.",
    "After days of {weather} the {place} looked {state} once more.",
)
SLOTS = {
    "place": "barn farm field forest garden hill lake meadow mill mountain orchard pond river road shore valley",
    "state": "bare beautiful cold dark dry green grey lonely quiet strange warm wet white wild",
    "season": "spring summer autumn winter",
    "goods": "apples barley bread butter cheese cloth coal corn flour fruit hay honey milk salt timber wheat wool",
    "weather": "fog frost haze mist rain smoke snow storm sunshine thunder wind",
}


@functools.cache
def all_fillers() -> list[str]:
    """Every sentence that the templates make, in an order that is always the same."""
    sentences = []
    for template in FILLERS:
        names = [name for name in SLOTS if f"{{{name}}}" in template]
        words = product(*(SLOTS[name].split() for name in names))
        sentences += [template.format(**dict(zip(names, chosen, strict=True))) for chosen in words]
    random.Random(0).shuffle(sentences)
    return sentences
