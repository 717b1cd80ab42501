"""What tokens say of an image, against truths written by hand."""

import doctest

from hallucination import said


def kinds(text, colors=None, **named):
    tokens = [("" if i == 0 else " ") + word for i, word in enumerate(text.split())]
    colors = {"car": "red", "boat": "blue"} if colors is None else colors
    return said.kinds_of(tokens, colors, **named)


def test_the_example_of_the_docstring_holds():
    assert doctest.testmod(said) == (0, 2)


def test_a_colour_is_judged_by_the_thing_it_stands_before():
    assert kinds("a blue boat and red boats") == [
        "other", "attribute", "there", "other", "wrong attribute", "there",
    ]  # fmt: skip
    assert kinds("blue. a tree") == ["other", "other", "absent"]
    assert kinds("a red tree")[1] == "wrong attribute"


def test_what_a_question_repeats_claims_nothing():
    assert kinds("A tree? </think>")[:2] == ["other", "other"]
    assert kinds("a tree </think>")[1] == "absent"


def test_pieces_of_a_word_say_what_the_word_does():
    found = said.kinds_of([" sn", "ow", "man", ".", "\n", ""], {"car": None})
    assert found == ["absent"] * 3 + ["punctuation"] * 3


def test_where_colours_are_not_known_they_are_not_judged():
    assert kinds("a red dog on a cat", {"dog": None}, vocabulary=("dog", "cat", "hot dog")) == [
        "other", "other", "there", "other", "other", "absent",
    ]  # fmt: skip
    assert kinds("a hot dog", {}, vocabulary=("dog", "hot dog"))[2] != "absent"
