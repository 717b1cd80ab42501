"""Text -> [0, 1], case by case."""

import random
import unicodedata

import pytest
from PIL import Image

from data import Example
from rewards import (
    KINDS,
    extract_answer,
    final_answer,
    first_number,
    format_reward,
    guess_kind,
    normalize,
    object_f1,
    objects_named,
    outcome_reward,
    reasoning_span,
    truth_problem,
    well_formed,
)
from runs import load_reward


def completion(answer: str, thought: str = " I see a boat. ") -> str:
    return f"<think>{thought}</think> <answer> {answer} </answer>"


def example(kind: str, answer: str, objects=(), vocabulary=()) -> Example:
    return Example(Image.new("RGB", (1, 1)), "?", answer, kind, objects, vocabulary)


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "reward"),
    [
        ("yesno", "yes", "yes", 1),
        ("yesno", "yes", "Yes.", 1),
        ("yesno", "yes", "no", 0),
        ("yesno", "no", "not sure", 0),
        ("yesno", "yes", "", 0),
        ("yesno", "yes", "Yes, there is a boat.", 1),
        ("yesno", "no", "There is no boat.", 1),
        ("yesno", "yes", "yes and no", 0),
        ("yesno", "no", "I do not know", 0),
        ("yesno", "yes", "Yes.It is red", 1),
        ("yesno", "yes", "Yes.No", 0),
        ("yesno", "Yes, there is a dog.", "yes", 1),
        ("number", "3", "3", 1),
        ("number", "3", "three", 1),
        ("number", "3", "There are 3 things.", 1),
        ("number", "3", "13", 0),
        ("number", "-2.5", "-2.5", 1),
        ("number", "3", "many", 0),
        ("choice", "red", "Red", 1),
        ("choice", "red", "blue", 0),
        ("choice", "B", "B", 1),
        ("choice", "(B)", "b. red", 1),
        ("choice", "B", "(B) red", 1),
        ("choice", "B", "The answer is B.", 1),
        ("choice", "B", "Option A", 0),
        ("choice", "A", "a", 1),
        ("choice", "A", "a) boat", 1),
        ("choice", "A", "a boat", 0),
        ("choice", "A", "An orange boat", 0),
        ("choice", "A", "A dog", 0),
        ("choice", "A", "A, B, C or D", 0),
        ("choice", "A", "I choose A", 1),
        ("choice", "C", "The correct option is (C).", 1),
        ("choice", "B", "a boat", 0),
        ("choice", "B", "Because it is red", 0),
        ("text", "the Eiffel Tower", "Eiffel tower.", 1),
        ("text", "St. John's", "st. john's", 1),
        ("text", "a cat", "a dog", 0),
    ],
)
def test_outcome_reward_by_kind(kind, truth, answer, reward):
    assert outcome_reward(completion(answer), example(kind, truth)) == reward


def test_a_caption_earns_the_f1_of_the_objects_it_names():
    scene = example("caption", "", ("boat", "car"), ("boat", "car", "fish"))
    assert outcome_reward(completion("a red boat and a blue car"), scene) == 1
    assert outcome_reward(completion("a boat"), scene) == pytest.approx(2 / 3)  # P 1, R 1/2
    assert outcome_reward(completion("a boat and a fish"), scene) == 0.5  # P 1/2, R 1/2
    assert outcome_reward(completion("a boat, a boat, a boat"), scene) == pytest.approx(2 / 3)
    assert outcome_reward(completion("nothing"), scene) == 0


def test_the_format_reward_looks_at_the_tags_alone():
    right = example("yesno", "yes")
    assert format_reward(completion("whatever"), right) == 1
    assert format_reward("<answer> yes </answer>", right) == 0
    assert load_reward("rewards:format_reward")(completion("no"), right) == 1


def test_f1_of_nothing_named_where_nothing_is_there_is_1():
    assert object_f1("an empty sea", (), ("boat",)) == 1


def test_objects_are_whole_words_in_order_and_plurals_count():
    vocabulary = ("boat", "fish", "bus", "car")
    assert objects_named("Boats, a buses lane, two fish; a carpet.", vocabulary) == [
        "boat",
        "bus",
        "fish",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "<think> no end <answer> yes </answer>",
        "<think> a </think> yes",
        "<think> a </think> <answer> yes",
        "<think> <answer> yes </answer> </think>",
        "",
    ],
)
def test_a_completion_without_its_tags_earns_nothing_and_is_malformed(text):
    assert not well_formed(text)
    if "<think> no end" not in text:
        assert outcome_reward(text, example("yesno", "yes")) == 0


def test_the_reasoning_span_is_the_text_between_the_first_tags():
    text = "<think>ab</think> <think>cd</think>"
    assert reasoning_span(text) == (7, 9)
    assert reasoning_span("<think>ab") is None


def test_the_answer_is_the_last_one_after_the_reasoning():
    text = "<think> <answer> no </answer> </think> <answer> a </answer> <answer> b </answer>"
    assert extract_answer(text) == "b"


def test_normalize():
    assert normalize("  The  Cat. ") == "cat"


# -- other people's truths and answers, kind by kind ------------------------------------------------
SAME = {  # truth -> what is the same, and what is not
    "A": ("A", ["", "the", "B", "an"]),
    "+": ("+", ["-", "", "."]),
    "C++": ("c++|C++.", ["C#", "C", "C+"]),
    "x+1": ("x+1|x + 1", ["x-1", "x 1", "x1"]),
    "x>3": ("x > 3", ["x<3", "x 3"]),
    "50%": ("50 %", ["50"]),
    "\U0001f44d": ("\U0001f44d", ["\U0001f44e", ""]),
    "line A": ("Line A.", ["line", "line B"]),
    "the cat": ("The  Cat.|cat|a cat", ["cats", "the"]),
    "\u0915\u0940": ("\u0915\u0940", ["\u0915\u093e", "\u0915"]),
    "caf\u00e9": ("cafe\u0301|a caf\u00e9", ["cafe"]),
    "don't": ("don\u2019t", ["don"]),
    "-5\u00b0C": ("\u22125\u00b0C|\u20135 \u00b0C", ["5\u00b0C"]),
    "\u00b2": ("\u00b2", ["2"]),
    "t-shirt": ("T-shirt|t shirt|t\u2011shirt", ["shirt"]),
    "?": ("?", ["!", ""]),
    "...": ("...", ["", "!"]),
    "A-": ("a\u2212|A -", ["A", "A+"]),
    "x-1": ("x\u22121|x - 1", ["x+1", "x1"]),
    "2*3": ("2 * 3", ["2+3", "23"]),
    "x!=3": ("x != 3", ["x=3"]),
    "5\u2032": ("5\u2032", ["5\u2033"]),
    "A, B": ("a, b", ["B", "A"]),
    "A and C": ("A and C.", ["and C", "C"]),
    "the A": ("the A|A", ["the"]),
    "A.M.": ("a.m.|AM", ["P.M.", "M"]),
    "U.S.A.": ("USA|U.S.A", ["U.S.", "us"]),
    "1,000 m": ("1000 m", ["1 m"]),
    "red. Green": ("red.green", ["red"]),
    "cat": ("**cat**|_cat_|`cat`|# cat|- cat|* cat|<b>cat</b>|\\textbf{cat}|\u201ecat\u201c",
            ["cats", "-"]),
    "fish": ("\ufb01sh", ["ish"]),
    "Stra\u00dfe": ("STRASSE", ["Strase"]),
    "don\u2019t": ("don\u00b4t|don't", ["dont"]),
    "\u2764\ufe0f": ("\u2764", ["\U0001f494"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("truth", "answer", "reward"),
    [(truth, same, 1.0) for truth, (all_same, _) in SAME.items() for same in all_same.split("|")]
    + [(truth, other, 0.0) for truth, (_, others) in SAME.items() for other in others],
)  # fmt: skip
def test_normalisation_keeps_what_distinguishes(truth, answer, reward):
    assert outcome_reward(completion(answer), example("text", truth)) == reward


NUMBERS = {
    "1000": ["1,000", "1 000", "1\u202f000", "1e3", "1E+3", "10^3", "1 \u00d7 10^3", "1000.0", "$1{,}000$",
             "\\boxed{1000}", "one thousand", "1 thousand", "10\u00b3", "1\u00b710\u00b3", "1 \\times 10^{3}",
             "1\\times10^3", "\u0661\u0660\u0660\u0660", "At 10:30, 1000 of them", "1\u2019000"],
    "100000": ["1,00,000", "100,000"],
    "1234567.5": ["1,234,567.5", "1'234'567.5"],
    "1/2": [".5", "0.5", "\u00bd", "\\frac{1}{2}", "\\frac12", "2/4", "5e-1", "half",
            "one half"],
    "3/4": ["three quarters", "\u00be", "0.75"],
    "2.5": ["2 1/2", "2\u00bd", "2.50", "2\\frac{1}{2}", "2-1/2", "two and a half"],
    "-5": ["\u22125", "\u20135", "- 5", "\u2212 5", "It is -5.", "minus five", "negative 5"],
    "0.015": ["1.5E-2", "1.5 \u00d7 10\u207b\u00b2", "1.5*10^-2"],
    "24": ["two dozen", "twenty four"],
    "21": ["twenty-one", "Twenty one", "21.0", "\uff12\uff11", "\u0662\u0661"],
    "100": ["a hundred", "one hundred", "hundred"],
    "120": ["one hundred and twenty", "120 people"],
    "10": ["There are 10 objects: 1 cylinder and 9 spheres", "ten", "**10**"],
    "0": ["zero", "0", "-0"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("truth", "answer"), [(truth, form) for truth, forms in NUMBERS.items() for form in forms]
)
def test_a_number_is_the_same_in_every_common_form(truth, answer):
    assert outcome_reward(completion(answer), example("number", truth)) == 1
    assert outcome_reward(completion(truth), example("number", answer)) == 1
    assert outcome_reward(completion(answer), example("number", "77")) == 0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [("1,000", "1"), ("1/2", "1"), (".5", "5"), ("5", "\u22125"), ("-5", "5"), ("1", "twenty-one"),
     ("100", "120"), ("3", ""), ("380", "A380"), ("3", "many"), ("1000", "1e4"), ("1", "1e999999999"),
     ("3", "3-4"), ("3", "3\u20134"), ("3", "3,5"), ("5", "5:30"), ("1", "1/1/2020"), ("1", "1.2.3"),
     ("1", "one half"), ("1", "one point five"), ("2", "two dozen"), ("5", "five and a half"),
     ("-5", "Answer - 5"), ("7", "7" * 5000), ("1", "1/0")],
)  # fmt: skip
def test_another_number_earns_nothing(truth, answer):
    assert outcome_reward(completion(answer), example("number", truth)) == 0


@pytest.mark.parametrize(
    ("kind", "truths"),
    [
        (
            "number",
            [
                "3",
                "-5",
                "3.50",
                ".5",
                "1/2",
                "1,000",
                "1e3",
                "\u00bd",
                "\u22125",
                "50%",
                "twenty-one",
                "10\u00b3",
                "**3**",
                "\u201c3\u201d",
                "(3)",
                "minus five",
            ],
        ),
        (
            "text",
            [
                "\u00b2",
                "10:30",
                "1/2/2020",
                "3D",
                "A",
                "+",
                "007",
                "3 dogs",
                "1.2.3",
                "red",
                "1-2",
                "1e9999",
                "1/0",
                "5'",
                "one two",
                "3,5",
                "3 4",
                "2020-01-02",
            ],
        ),
        ("yesno", ["yes", "No", "YES.", " no ", "yes!", "**yes**"]),
    ],
)
def test_the_kind_is_guessed_from_the_truth(kind, truths):
    assert {truth: guess_kind(truth) for truth in truths} == dict.fromkeys(truths, kind)


DRESSES = r"""
**B**|\boxed{B}|$B$|\text{B}|"B"|'B'|[B]|(B)|{B}|<B>|B)|B.|B:|b|B, because it is red|B - red|B — red
B。|Ｂ|Final answer: B|Answer: $B|The answer is B.|Option B is correct|Option B|(B) red|B. red|B) red
The correct option is (B)|I choose B|The answer is: **B**|\boxed{\text{B}}|The best answer is B because
It is B|It's B.|【B】|「B」|\(B\)|\[B\]|<b>B</b>|B</s>|𝐁|Ans: B|I would choose B|I'll go with option B
That is B|B (red)|Letter B|Select B|B ✅|B (B)|答案：B|答案是B|**B.** red|**Answer:** B|[Option B]|B.red
B. I see it|B, I think|B is the best|\boxed{B. red}|{"answer": "B"}|B. It is not (A)
"""


@pytest.mark.parametrize("answer", [*DRESSES.strip().replace("\n", "|").split("|"), "B\nred"])
@pytest.mark.parametrize("truth", ["B", "(B)", "B. red"])
def test_an_option_counts_in_any_common_dress(answer, truth):
    assert outcome_reward(completion(answer), example("choice", truth)) == 1
    assert outcome_reward(completion(answer), example("choice", "C. blue")) == 0


@pytest.mark.parametrize(
    ("truth", "answer", "reward"),
    [
        ("J", "(J) red", 1), ("B. red", "red", 1), ("B. red", "C", 0), ("red", "B. red", 1),
        ("red", "Red.", 1), ("A, C", "C", 0), ("A, C", "C and A", 1), ("A, C", "AC", 1),
        ("AC", "(A) (C)", 1), ("A, C", "A, B, C", 0),
        ("A", "A or B or C", 0), ("A", "(A) (B) (C)", 0), ("A", "A, B, C", 0), ("A", "A red car", 0),
        ("A", "A/C", 0), ("A", "A-frame", 0), ("B", "B-52 bomber", 0), ("B", "B&W", 0), ("C", "C++", 0),
        ("B", "B. blue\nC. green", 0), ("B", "B-C", 0), ("B", "B. C.", 0), ("B", "B and D are correct", 0),
        ("A", "A\nB\nC", 0), ("A", "A. red B. blue", 0), ("A", "Option A, option B", 0),
        ("A", "A and a dog", 0), ("A", "a, b, c", 0), ("A", "A 'red' car", 0), ("I", "The answer is I", 1),
        ("I", "I choose B", 0), ("I", "I'm sure", 0), ("B - red", "red", 1), ("**B.** red", "red", 1),
        ("B.red", "red", 1), ("DOG", "GOD", 0), ("DOG", "dog", 1), ("TV", "tv", 1), ("A red car", "A", 0),
        ("A", "a boat", 0), ("I", "I see a dog", 0), ("A", "", 0), ("A", "A and B", 0), ("B", "A/B", 0),
    ],
)  # fmt: skip
def test_options_are_read_as_they_are_meant(truth, answer, reward):
    assert outcome_reward(completion(answer), example("choice", truth)) == reward


SEVERAL = (
    "A, C|AC|A and C|A;C|(A) (C)|A/C|A & C|C, A|A C|[A, C]|A. C.|a, c|A\u3001C|['A', 'C']|A\nC"
)


@pytest.mark.parametrize("truth", SEVERAL.split("|"))
def test_several_options_are_met_by_the_same_set_in_any_dress_and_by_no_other(truth):
    asked = example("choice", truth)
    dressed = "A and C are correct|Both A and C|A. red, C. blue|The answers are A and C|\\boxed{AC}"
    for answer in f"{SEVERAL}|{dressed}".split("|"):
        assert outcome_reward(completion(answer), asked) == 1, answer
    for answer in ("A", "C", "(A)", "A, B", "ABC", "A, B, C", "A or C", "D"):
        assert outcome_reward(completion(answer), asked) == 0, answer


@pytest.mark.parametrize("kind", ["yesno", "number", "choice", "text", "caption"])
@pytest.mark.parametrize("answer", ["", " ", "\n", "\u200b", "\u3000"])
def test_an_empty_answer_earns_nothing(kind, answer):
    for truth in ("yes", "3", "A", "the", "+", "dog", "\u00b2"):
        asked = example(kind, truth, ("dog",), ("dog",))
        assert outcome_reward(completion(answer), asked) == 0


@pytest.mark.parametrize(
    ("kind", "truth", "objects"),
    [("yesno", "true", ()), ("number", "many", ()), ("caption", "x", ("",)), ("caption", "x", ()),
     ("caption", "x", ("...",)), ("text", "\u200b", ()), ("number", "10:30", ()), ("number", "1/0", ()),
     ("text", "red </answer> blue", ())],
)  # fmt: skip
def test_a_truth_that_nobody_can_meet_is_named(kind, truth, objects):
    assert truth_problem(kind, truth, objects)


@pytest.mark.parametrize(
    "name", ["traffic light", "knife", "caf\u00e9", "t-shirt", "\u72d7", "goose", "bus"]
)
def test_an_object_of_any_name_can_be_named(name):
    assert truth_problem("caption", "x", (name,)) is None


def test_an_answer_tag_that_was_never_closed_holds_the_final_answer_but_earns_nothing():
    text = "<think> I look. </think> <answer> no"
    assert final_answer(text) == "no" and outcome_reward(text, example("yesno", "no")) == 0


def random_text(rng: random.Random) -> str:
    alphabet = (
        "aA bB3.5,-+/<>(){}[]$*\\'\"%^e10_ \u2212\u00bd\u0301\u0915\u0940\ud800\x00\u2028\u72d7"
        "\u00b2\u0663\u00e9\u200b\u2163!#"
    )
    words = [
        "twenty",
        "one",
        "half",
        "hundred",
        "a",
        "the",
        "and",
        "or",
        "B",
        "(C)",
        "1,000",
        "\\frac",
    ]
    words += ["{1}", "10^", "minus", "third", "I", "is", "**", ".5"]
    parts = [rng.choice(alphabet) for _ in range(rng.randrange(12))]
    parts += rng.sample(words, rng.randrange(3))
    rng.shuffle(parts)
    return "".join(parts)


def test_said_back_a_truth_earns_1_silence_earns_0_and_nothing_raises():
    rng = random.Random(0)
    for _ in range(3000):
        kind, truth, other = rng.choice(KINDS[:-1]), random_text(rng).strip(), random_text(rng)
        guess_kind(truth)
        asked = example(kind, truth)
        assert 0 <= outcome_reward(completion(other), asked) <= 1
        assert outcome_reward(completion(""), asked) == 0
        if truth_problem(kind, truth) is None:
            assert outcome_reward(completion(truth), asked) == 1


def test_any_number_is_read_in_digits_with_separators_exponents_and_signs():
    rng = random.Random(1)
    for _ in range(500):
        value = rng.randrange(-(10**7), 10**7)
        forms = [f"{value}", f"{value:,}", f"{value:e}", f"{value:,}".replace("-", "\u2212")]
        for form in forms:
            assert abs(first_number(form) - value) <= abs(value) / 10**6, form  # :e rounds


def test_two_ways_to_write_an_accent_are_one():
    rng = random.Random(2)
    letters = "e\u0301\u0327\u00e9\u1ea5 a\u0302 \u0915\u0940\u0929\uac00\u3070\u30ab\u3099x-1."
    for _ in range(1000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 9)))
        composed, parted = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert normalize(composed) == normalize(parted)
        assert guess_kind(composed) == guess_kind(parted)
