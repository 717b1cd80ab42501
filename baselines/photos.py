"""Pairs about photographs: a list of what is there stands in for the scene, in sentences of any words.

    --data FILE --images DIR    captions with their `objects`; what any of them names is the vocabulary
    --coco DIR --images DIR     COCO's instances_*.json and captions_*.json: the 80 categories, with their
                                synonyms; what is there is CHAIR's truth, annotated or named by a human

HA-DPO's correction leaves out every sentence that names an absent thing: a coarser edit than GPT-4's, who
mends the phrase. POVID's error adds, to a human's caption, the absent thing that most often stands beside
those that are there; colours and places are not touched, since their words are not annotated.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data import DataError, Example, image_in
from hallucination import coco
from hallucination.files import Bad
from hallucination.synonyms import objects_in
from hallucination.words import own_synonyms
from rewards import objects_named

PROMPT = "Please describe this image in detail."
CATEGORIES = tuple(sorted(coco.COCO_CATEGORIES))
_PARTS = re.compile(r"(</?\w+>)")  # tags, and what stands between them
_SENTENCE = re.compile(r"[^.!?]+[.!?]*|[.!?]+")


def named(example: Example, text: str) -> list[str]:
    """The things of an example's vocabulary that a text names, repeats kept; COCO's by their synonyms, too.

    >>> named(Example(None, PROMPT, "", "caption", vocabulary=CATEGORIES), "Two men and a puppy.")
    ['person', 'dog']
    """
    if example.vocabulary == CATEGORIES:
        return objects_in(text, own_synonyms())
    return objects_named(text, example.vocabulary)


def without_false(example: Example, text: str) -> str | None:
    """The text without the sentences that name an absent thing; None where a part loses all of its own.

    Tags part a text, and stay.

    >>> seen = Example(None, PROMPT, "", "caption", ("dog",), ("cat", "dog"))
    >>> without_false(seen, "<think> A dog. </think> <answer> A dog runs. A cat sleeps. </answer>")
    '<think> A dog. </think> <answer> A dog runs. </answer>'
    """
    parts = _PARTS.split(text)
    for place in range(0, len(parts), 2):  # tags are at the odd places
        kept = [
            sentence
            for sentence in _SENTENCE.findall(parts[place])
            if set(named(example, sentence)) <= set(example.objects)
        ]
        rest = "".join(kept).lstrip()
        if parts[place].strip() and not rest:
            return None
        before = parts[place][: len(parts[place]) - len(parts[place].lstrip())]
        parts[place] = before + rest
    return "".join(parts)


def tempted(examples: Sequence[Example]) -> list[Example]:
    """The examples, each with its topic: the absent thing that most often stands beside those there.

    An example where everything is there, or beside whose things nothing else ever stood, has none.
    """
    beside: dict[str, Counter[str]] = {}
    for example in examples:
        for name in example.objects:
            beside.setdefault(name, Counter()).update(example.objects)
    found = []
    for example in examples:
        often = sum((beside[name] for name in example.objects), Counter())
        absent = sorted(set(often) - set(example.objects), key=lambda name: (-often[name], name))
        found.append(dataclasses.replace(example, topic=absent[0] if absent else ""))
    return found


def injected(example: Example) -> tuple[str, str] | None:
    """POVID's two texts: the caption that is the example's answer, and the same with its topic added.

    None without a topic, or where the caption itself names what is not among the objects.
    """
    if not example.topic or not set(named(example, example.answer)) <= set(example.objects):
        return None
    true = example.answer.strip().rstrip(".")
    article = "an" if example.topic[0] in "aeiou" else "a"
    both = f"{true}.", f"{true} and {article} {example.topic}."
    return tuple(f"<think> {text} </think> <answer> {text} </answer>" for text in both)


@functools.cache
def coco_examples(folder: Path, images: Path, skip_bad: bool) -> list[Example]:
    """A caption to write of every image of COCO's annotation files that a human has captioned.

    The answer is the first human caption.  Raises DataError for files that are missing or unusable, and,
    unless skip_bad, for the first bad entry or missing image.  Pictures are opened when they are asked.
    """
    bad, examples = Bad(skip_bad), []
    for instances_file, captions_file in coco.find_annotations(folder):
        instances = coco.read_instances(instances_file, bad, outlines=False)
        captions = coco.read_captions(captions_file, bad)
        for image_id, (name, _, _) in instances.images.items():
            said = [text for text in captions.get(image_id, ()) if text.strip()]
            there = {one.category for one in instances.objects[image_id]}
            there |= {found for text in said for found in objects_in(text, own_synonyms())}
            try:
                image = image_in(images, name)
            except ValueError as error:
                bad(name, str(error))
                continue
            if said and there:
                examples.append(
                    Example(image, PROMPT, said[0], "caption", tuple(sorted(there)), CATEGORIES)
                )
    if not examples:
        raise DataError(f"{folder}: no image in {images} has a caption and an object")
    return examples
