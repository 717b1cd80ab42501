"""Pairs of answers to learn from, after HA-DPO (Zhao et al., arXiv 2311.16839), in the scene world.

HA-DPO has the model describe images, lets GPT-4 correct what their annotations contradict, and adds yes/no
questions that the model got wrong. The rejected text is the model's own; the chosen one says the same, in
the same style, but true. Here the truth is known, and a rule stands in for GPT-4:

    rejected   I see a red boat and a green fish.      chosen   I see a blue boat.

 1. An absent thing is left out, a wrong colour is put right, a thing named twice is named once. What is
    there and goes unsaid stays unsaid, as in HA-DPO; but a "yes" is given the thing that it is about.
 2. The original rewrites both texts by GPT, so that they share a style. A rule keeps the model's own words:
    there is nothing to align, and rejected texts stay the model's own.
 3. A text of which nothing true would be left makes no pair, and neither does an answer that is no yes or
    no: those would not be small edits.

It reads texts in the words of scm.py ("a red boat", "a boat"), of which the tiny model's are made; texts
about photographs are corrected by photos.py.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from baselines.photos import without_false
from data import Example
from rewards import answer_span
from scm import CATEGORIES, COLORS, Thing

# "A fish?" is what the model asks itself, and claims nothing.
_CLAIM = re.compile(rf"\ban? (?:({'|'.join(COLORS)}) )?({'|'.join(CATEGORIES)})\b(?!\?)")
_LIST = re.compile(rf"{_CLAIM.pattern}(?: and {_CLAIM.pattern})*")


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the first preferred."""

    example: Example
    chosen: str
    rejected: str


def corrected(text: str, things: Sequence[Thing], asked: str | None = None) -> str | None:
    """The text with every claim that these things contradict left out or put right; None: nothing is left.

    asked: a category that is there; the first list names it, too.

    >>> boat = Thing("boat", "blue", 0.3, 0.3, 0.4)
    >>> corrected("I see a red boat and a green fish. A fish?", [boat])
    'I see a blue boat. A fish?'
    """
    there = {thing.category: thing for thing in things}
    parts, end, wanted = [], 0, asked
    for found in _LIST.finditer(text):
        said: dict[str, str] = {}  # category -> claim
        for claim in _CLAIM.finditer(found[0]):
            color, category = claim.groups()
            if category in there:
                right = color in (None, there[category].color)
                said.setdefault(category, claim[0] if right else str(there[category]))
        if wanted is not None:
            said.setdefault(wanted, str(there[wanted]))
            wanted = None
        if not said:
            return None
        parts += [text[end : found.start()], " and ".join(said.values())]
        end = found.end()
    return "".join([*parts, text[end:]])


def description_pair(example: Example, completion: str) -> Pair | None:
    """A description and its correction; None where there is nothing to correct, or nothing left.

    Without a scene the example's objects are what is there: see photos.py.
    """
    if example.scene is None and example.objects:
        chosen = without_false(example, completion)
    else:
        chosen = corrected(completion, _things(example))
    return None if chosen in (None, completion) else Pair(example, chosen, completion)


def yes_no_pair(example: Example, completion: str) -> Pair | None:
    """A wrong yes or no and the same text made right; None for any other answer."""
    span = answer_span(completion)
    given = completion[slice(*span)] if span else ""
    if given.strip() != {"yes": "no", "no": "yes"}[example.answer]:
        return None
    asked = example.topic if example.answer == "yes" else None
    reasoning = corrected(completion[: span[0]], _things(example), asked)
    if reasoning is None:
        return None
    answer = given.replace(given.strip(), example.answer)
    return Pair(example, reasoning + answer + completion[span[1] :], completion)


def ha_dpo_pairs(
    examples: Sequence[Example], completions: Sequence[str], rng: random.Random
) -> list[Pair]:
    """One epoch: pairs of wrong yes/no answers once, pairs of descriptions twice, shuffled.

    examples, completions: prompts of the scene world and what the model said; kinds other than "yesno" and
    "caption" are passed over, as HA-DPO has none.  ValueError for an example without its scene.
    """
    pairs = []
    for example, completion in zip(examples, completions, strict=True):
        if example.kind == "caption":
            pairs += 2 * [description_pair(example, completion)]
        elif example.kind == "yesno":
            pairs.append(yes_no_pair(example, completion))
    pairs = [pair for pair in pairs if pair is not None]
    rng.shuffle(pairs)
    return pairs


def _things(example: Example) -> tuple[Thing, ...]:
    if example.scene is None:
        raise ValueError(f"{example.question!r} has no scene: what it shows is not known")
    return example.scene.things
