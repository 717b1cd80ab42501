"""Names of things in a text: several words, any script, any plural, and compounds that are no such thing."""

import random
import re
import unicodedata

import pytest

from hallucination.words import PARTED, objects_named, singular, split
from scm import CATEGORIES, COLORS, describe, sample_scene


@pytest.mark.parametrize(
    ("text", "vocabulary", "named"),
    [
        # several words
        ("a Traffic Light", ["traffic light"], ["traffic light"]),
        ("two traffic-lights", ["traffic light", "light"], ["traffic light"]),
        ("a fire\nhydrant", ["fire hydrant"], ["fire hydrant"]),
        ("a fire, hydrant", ["fire hydrant"], []),
        ("sports balls", ["sports ball"], ["sports ball"]),
        ("a St Bernard, a St. Bernard", ["St. Bernard"], ["St. Bernard"] * 2),
        ("a man in black, men in black", ["man in black"], ["man in black"] * 2),
        ("a rubik\u2019s cube", ["Rubik's cube"], ["Rubik's cube"]),
        ("- hot\n- dog", ["hot dog", "dog"], ["dog"]),
        ("a **hot** dog", ["hot dog"], ["hot dog"]),
        ("a cup/mug", ["cup", "mug"], ["cup", "mug"]),
        # hyphens
        ("a t-shirt, a T shirt, tshirts", ["t-shirt"], ["t-shirt"] * 3),
        ("a pick\u2011up", ["pick-up"], ["pick-up"]),
        # accents and widths
        ("Cafe\u0301s", ["caf\u00e9"], ["caf\u00e9"]),
        ("a CAF\u00c9", ["cafe\u0301"], ["cafe\u0301"]),
        ("\uff44\uff4f\uff47", ["dog"], ["dog"]),
        # other scripts
        ("\u4e00\u53ea\u72d7\u5728\u8dd1\u3002", ["\u72d7", "\u732b"], ["\u72d7"]),
        ("\u70ed\u72d7", ["\u72d7", "\u70ed\u72d7"], ["\u70ed\u72d7"]),
        ("\u72ac\u3068\u30dc\u30fc\u30eb", ["\u30dc\u30fc\u30eb"], ["\u30dc\u30fc\u30eb"]),
        ("\u30ab\u30fc\u30c9", ["\u30ab\u30fc"], []),  # a card is no car
        ("\u0e41\u0e21\u0e27\u0e15\u0e31\u0e27", ["\u0e41\u0e21\u0e27"], ["\u0e41\u0e21\u0e27"]),
        (
            "\u0926\u094b \u0915\u0941\u0924\u094d\u0924\u0947",
            ["\u0915\u0941\u0924\u094d\u0924\u0947", "\u0915\u0941"],
            ["\u0915\u0941\u0924\u094d\u0924\u0947"],
        ),
        ("\uac1c\uac00 \uc788\ub2e4", ["\uac1c"], ["\uac1c"]),
        ("\ubb34\uc9c0\uac1c", ["\uac1c"], []),  # a rainbow ends in the word for dog
        ("\U0001f436!", ["\U0001f436"], ["\U0001f436"]),
        # compounds whose last word is no such thing, whether or not they have a name of their own
        ("a hot dog, a dog", ["dog", "hot dog"], ["hot dog", "dog"]),
        ("a hot dog, a dog", ["dog"], ["dog"]),
        ("a teddy bear", ["bear"], []),
        ("an orange cat", ["orange", "cat"], ["cat"]),
        ("a baby elephant", ["baby", "elephant"], ["elephant"]),
        ("five o'clock", ["clock"], []),
        ("a bus driver", ["bus", "driver"], ["driver"]),
        ("a stop sign", ["sign"], ["sign"]),
        # what is there in several ways
        ("a person", ["people"], ["people"]),
        ("his glasses, a glass", ["glasses", "glass"], ["glasses", "glass"]),
        ("two glasses", ["glass"], ["glass"]),
        ("a glass", ["glasses"], []),
        ("a short man", ["shorts"], []),
        ("blue skies", ["skis"], []),
        ("a dog's bowl", ["dog", "bowl"], ["dog", "bowl"]),
        # nothing
        ("", ["dog"], []),
        ("a dog", [], []),
        ("a carpet", ["car", ""], []),
    ],
)
def test_names_are_found_as_they_are_spelled_anywhere_in_a_text(text, vocabulary, named):
    assert objects_named(text, vocabulary) == named
    assert objects_named(unicodedata.normalize("NFD", text), tuple(vocabulary)) == named


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("knife", "knives"), ("child", "children"), ("person", "people"), ("man", "men"),
        ("fireman", "firemen"), ("salesperson", "salespeople"), ("goose", "geese"), ("mouse", "mice"),
        ("foot", "feet"), ("tooth", "teeth"), ("ox", "oxen"), ("sheep", "sheep"), ("fish", "fish"),
        ("fish", "fishes"), ("bus", "buses"), ("bus", "busses"), ("airbus", "airbuses"),
        ("box", "boxes"), ("boat", "boats"), ("fly", "flies"), ("tie", "ties"), ("toe", "toes"),
        ("shoe", "shoes"), ("canoe", "canoes"), ("tomato", "tomatoes"), ("zebu", "zebus"),
        ("gnu", "gnus"), ("lens", "lenses"), ("vase", "vases"), ("horse", "horses"),
        ("cup", "cups"), ("cactus", "cactuses"), ("cactus", "cacti"), ("penknife", "penknives"),
        ("glove", "gloves"), ("hoof", "hooves"), ("quiz", "quizzes"), ("quiche", "quiches"),
        ("watch", "watches"), ("scissors", "scissors"), ("cookie", "cookies"), ("key", "keys"),
    ],
)  # fmt: skip
def test_every_plural_names_its_singular(one, many):
    assert objects_named(f"Two {many}.", [one]) == [one]
    assert objects_named(f"One {one}.", [many]) == [many]


def test_on_captions_of_scenes_it_reads_runs_of_letters():
    """What the figures of the scene world have been made with, word for word."""
    rng = random.Random(0)
    words = [*CATEGORIES, *(f"{name}s" for name in CATEGORIES), *COLORS, "a", "and", "sea", "."]
    captions = [describe(sample_scene(rng, 0.5).things) for _ in range(2000)]
    captions += [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(2000)]
    for caption in captions:
        found = re.findall("[a-z]+", caption)
        plain = [next((w for w in (f, f[:-1]) if w in CATEGORIES), None) for f in found]
        assert objects_named(caption, CATEGORIES) == [name for name in plain if name]


def test_punctuation_parts_words_and_white_space_does_not():
    assert split("Pizza, cutter") == ["pizza", PARTED, "cutter"]
    assert split("hot\ndog - o'clock") == ["hot", "dog", PARTED, "o", "clock"]


@pytest.mark.parametrize(
    ("word", "one"),
    [
        ("scissors", "scissors"), ("skis", "ski"), ("knives", "knife"), ("people", "person"),
        ("children", "child"), ("mice", "mouse"), ("sheep", "sheep"), ("glasses", "glass"),
        ("glass", "glass"), ("buses", "bus"), ("bus", "bus"), ("oxen", "ox"), ("geese", "goose"),
        ("women", "woman"), ("policemen", "policeman"), ("couches", "couch"), ("dishes", "dish"),
        ("potatoes", "potato"), ("sandwiches", "sandwich"), ("ties", "tie"), ("skies", "sky"),
        ("cookies", "cookie"), ("boxes", "box"), ("zebras", "zebra"), ("horses", "horse"),
        ("calves", "calf"), ("toothbrushes", "toothbrush"), ("benches", "bench"),
    ],
)  # fmt: skip
def test_plurals_are_undone(word, one):
    assert singular(word) == one
