"""The paper's worked example: what each word of a caption earns, to the two decimals that it prints.

A brown dog jumps quickly to catch a red frisbee during sunset on the grass

pytest -v tests/test_worked_example.py          prints a line per word
"""

import pytest
import torch

from copo import causal_completeness, inject

CAPTION = "A brown dog jumps quickly to catch a red frisbee during sunset on the grass"
ROWS = [  # word, S_suff, S_nec, r_causal with lambda_s = lambda_n = 0.35, as printed
    ("dog", 0.87, 0.81, 0.59),
    ("grass", 0.71, 0.61, 0.46),
    ("brown", 0.68, 0.54, 0.43),
    ("frisbee", 0.65, 0.63, 0.45),
    ("quickly", 0.11, 0.03, 0.05),
    ("sunset", 0.09, 0.03, 0.04),
]
ROUNDING = 0.005 + 1e-6  # of a number that is printed with two decimals


def r_causal(s_suff, s_nec):
    return causal_completeness(torch.tensor(s_suff), torch.tensor(s_nec), 0.35, 0.35)


@pytest.mark.parametrize(
    ("word", "s_suff", "s_nec", "printed"),
    ROWS,
    ids=[f"{w}: 0.35 x ({s:.2f} + {n:.2f}) = {r:.2f}" for w, s, n, r in ROWS],
)
def test_r_causal_is_the_printed_one(word, s_suff, s_nec, printed):
    assert word in CAPTION.split()
    assert abs(r_causal(s_suff, s_nec).item() - printed) <= ROUNDING


def test_a_the_and_to_at_about_001_to_002_earn_next_to_nothing():
    # The paper gives these words as "about 0.01 to 0.02": between 0.7 x 0.01 and 0.7 x 0.02.
    low, high = r_causal([0.01], [0.01]), r_causal([0.02], [0.02])
    assert low.item() == pytest.approx(0.007) and high.item() == pytest.approx(0.014)


def test_words_that_carry_the_meaning_earn_most_and_in_the_paper_s_order():
    earned = {word: r_causal(s, n).item() for word, s, n, _ in ROWS}
    order = sorted(earned, key=earned.get, reverse=True)
    assert order == ["dog", "grass", "frisbee", "brown", "quickly", "sunset"]


def test_the_words_are_paid_on_top_of_the_outcome_and_the_answer_is_not():
    # "brown dog" as reasoning of a trajectory whose advantage is -0.5, then one answer token
    causal = r_causal([0.68, 0.87, 0.0], [0.54, 0.81, 0.0])[None]
    reasoning = torch.tensor([[True, True, False]])
    paid = inject(torch.tensor([-0.5]), causal, reasoning)
    assert torch.allclose(paid, torch.tensor([[-0.073, 0.088, -0.5]]), atol=1e-4)
