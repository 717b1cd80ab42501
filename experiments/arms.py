"""The arms: every way to train that the claims compare.

An arm is one way to train. All arms of a seed see the same scenes and start from the same warm start, so
that they can be compared in pairs. Unless an arm says otherwise it trains in fog. Where a thing may be
invisible, the background is worth knowing, as it is to a model of photographs; in clear air the tiny
policy sees so well that the background tells it nothing new.

Counting in crowded scenes is a world of its own, in which an outcome reward breeds hallucination: a thing
left out and a thing made up cancel in the count, and the answer is paid. There each seed has a warm start
of its own, so that an interval over seeds covers the starting point, too.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import Example
from experiments.credits import Paid, agreement, asked, contrast, truth, unmoved, voted
from experiments.tables import CREDITS, RHOS
from experiments.variants import SecondBest, centred, difference, score_as, signed
from hallucination.scenes import HELD_OUT
from runs import Settings
from scm import CLEAR, KINDS, World, in_words, sample_of_kinds
from tiny import IN_CROWDS, WarmStart
from train import Scores

IN_FOG = WarmStart(World(0.9))
IN_WORDS = WarmStart(World(0.9), in_words=True)  # a description in place of the image
IN_CLEAR_AIR = WarmStart(CLEAR)


@dataclass(frozen=True)
class Arm:
    """One way to train: what differs from the default settings, questions and causal reward."""

    changes: dict[str, object] = field(default_factory=dict)  # of Settings
    steps: tuple[int, ...] = (40,)  # after which the policy is measured
    start: WarmStart = IN_FOG
    seeds: int = 5
    kinds: tuple[str, ...] = KINDS  # of questions
    scoring: Callable[..., Scores] | None = None  # without it, equations 1 to 5
    own_start: bool = False  # each seed has its own warm start
    measured_on: tuple[str, ...] = tuple(HELD_OUT)  # kinds of held-out scenes

    def settings(self, seed: int, folder: Path) -> Settings:
        """The settings of its run with one seed, which is resumed where it has begun."""
        every = self.steps[0]
        return Settings(
            **self.changes, unit="token", fog=self.start.world.fog, seed=seed, steps=self.steps[-1],
            save_steps=every, keep_checkpoints=self.steps[-1] // every, eval_scenes=0, device="cpu",
            dtype="float32", output=folder, resume=True,
        )  # fmt: skip

    def start_of(self, seed: int | str) -> WarmStart:
        """The settings of the warm start that its run with this seed begins at."""
        return replace(self.start, seed=int(seed)) if self.own_start else self.start

    @property
    def confounding(self) -> float:
        """The chance, in its training scenes, of a background's home category."""
        return self.changes.get("confounding", Settings.confounding)

    def sample(self, rng: random.Random) -> Example:
        """A question of its kinds about a fresh scene."""
        example = sample_of_kinds(rng, self.confounding, self.start.world, self.kinds)
        return in_words(example) if self.start.in_words else example


GRPO = {"lambda_s": 0.0, "lambda_n": 0.0}
ONES = {"lambda_s": 1.0, "lambda_n": 1.0}
PAID = {"lambda_s": 1.0, "lambda_n": 0.0}  # where lambda_s weighs another credit
SECOND_BEST = score_as(difference, SecondBest)
QUESTIONS = ("yesno", "number", "choice")
METHODS = {  # name -> its settings and its scoring
    "grpo": (GRPO, None),
    "copo": ({}, None),
    "second best, lambda 1": (ONES, SECOND_BEST),
    "truth": (PAID, Paid(truth)),
}
BETAS = (0.0, 0.01, 0.04)


def counting(name: str, beta: float, B: int = 4) -> Arm:
    """An arm of COUNTING in the crowded world, asked for the count alone: B prompts per step."""
    changes, scoring = COUNTING[name]
    steps = (40, 80) if name in ("grpo", "grpo, G 16", "copo") and B == 4 else (80,)
    seeds = 10 if name in TOLD_APART and (beta, B) == (0, 4) else 5
    return Arm(
        {"batch_size": B, "beta": beta} | changes, steps, IN_CROWDS, seeds, ("number",), scoring,
        own_start=True, measured_on=("independent",),
    )  # fmt: skip


COUNTING = {  # what is compared where counting breeds hallucination
    "grpo": (GRPO, None),
    "truth": (PAID, Paid(truth)),
    "copo": ({}, None),
    "grpo, G 16": (GRPO | {"num_generations": 16}, None),
    "copo, lambda 1": (ONES, None),
    "copo, independent": ({"pairing": "independent"}, None),
    "without S_suff": ({"lambda_s": 0.0}, None),
    "without S_nec": ({"lambda_n": 0.0}, None),
    "difference, lambda 1": (ONES, score_as(difference)),
    "agreement": (PAID, Paid(agreement)),
    "contrast": (PAID, Paid(contrast)),
    "voted": (PAID, Paid(voted)),
    "voted, lambda 0.35": (PAID | {"lambda_s": 0.35}, Paid(voted)),
    "truth, lambda 0.35": (PAID | {"lambda_s": 0.35}, Paid(truth)),
    "asked": (PAID, Paid(asked)),
    "unmoved": (PAID, Paid(unmoved)),
}
TOLD_APART = ("grpo", "copo", "truth", "voted, lambda 0.35")  # where five seeds could not tell
ARMS = {
    "grpo": Arm(GRPO, (20, 40, 60, 80, 100)),  # COPO's 40 steps take as long as about 90 of these
    "copo": Arm(steps=(20, 40, 80)),
    "without S_suff": Arm({"lambda_s": 0.0}),
    "without S_nec": Arm({"lambda_n": 0.0}),
    # what follows from the causes found: variants.py, and the paper's pairing
    "centred": Arm(scoring=score_as(centred)),
    "signed": Arm(scoring=score_as(signed)),
    "difference": Arm(scoring=score_as(difference)),
    "second best": Arm(scoring=SECOND_BEST),
    "second best, lambda 1": Arm(ONES, scoring=SECOND_BEST),
    "independent": Arm({"pairing": "independent"}),
    # the language-model control
    "grpo, in words": Arm(GRPO, start=IN_WORDS),
    # clear air
    "grpo, clear": Arm(GRPO, start=IN_CLEAR_AIR),
    "copo, clear": Arm(start=IN_CLEAR_AIR),
    # trained without captions: no outcome depends on all that is named
    **{
        f"{name}, questions": Arm(changes, kinds=QUESTIONS, scoring=scoring)
        for name, (changes, scoring) in METHODS.items()
        if name != "truth"
    },
    # confounding
    **{f"grpo, rho {rho}": Arm(GRPO | {"confounding": float(rho)}) for rho in RHOS},
    **{f"copo, rho {rho}": Arm({"confounding": float(rho)}) for rho in RHOS},
    # sensitivity; 0.35 and 0 are above
    **{
        f"lambda {s} {n}": Arm({"lambda_s": s, "lambda_n": n})
        for s, n in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.35, 1.0), (1.0, 0.35))
    },
    **{f"H {h}": Arm({"num_continuations": h}) for h in (1, 2, 8)},
    **{f"beta {beta}": Arm({"beta": beta}) for beta in (0.0, 0.01, 0.16)},
    **{f"zero variance {way}": Arm({"zero_variance": way}) for way in ("gate", "drop")},
    # what a right causal reward would do (credits.py)
    "truth": Arm(PAID, scoring=Paid(truth)),
    # clear air and questions of colour alone: naming things that are not there costs no answer
    **{
        f"{name}, colours": Arm(changes, (20, 40, 80), IN_CLEAR_AIR, 10, ("choice",), scoring)
        for name, (changes, scoring) in METHODS.items()
        if name in ("grpo", "copo", "truth")
    },
    **{  # the same at other weights of the KL
        f"{name}, colours, beta {beta:g}": Arm(
            changes | {"beta": beta}, (20, 40, 80), IN_CLEAR_AIR, 5, ("choice",), scoring
        )
        for beta in BETAS[:2]
        for name, (changes, scoring) in METHODS.items()
        if name in ("grpo", "copo", "truth")
    },
    # crowded scenes, and the count alone: an omission and an invention cancel
    **{
        f"{name}, counting, beta {beta:g}": counting(name, beta)
        for beta in (0.0, 0.04)
        for name in COUNTING
        if beta == 0 or name not in CREDITS
    },
    **{  # few prompts per step
        f"{name}, counting, B {B}": counting(name, 0.0, B)
        for B in (1, 2)
        for name in ("grpo", "grpo, G 16", "copo", "copo, lambda 1", "truth")
    },
    # no question asks for what the background suggests
    "grpo, no existence": Arm(GRPO, kinds=("number", "choice", "caption")),
}
QUICK = {  # arm -> steps; the crowds' warm start takes longest, and what begins elsewhere is done beside it
    "grpo, counting, beta 0": 40, "truth, counting, beta 0": 80, "grpo, counting, B 1": 80,
    "grpo": 40, "copo": 20, "grpo, colours, beta 0": 20,
}  # fmt: skip
BEFORE = {
    "warm start": Arm(steps=(0,)),
    "warm start, in words": Arm(steps=(0,), start=IN_WORDS),
    "warm start, clear": Arm(steps=(0,), start=IN_CLEAR_AIR),
    "warm start, crowded": Arm(
        steps=(0,), start=IN_CROWDS, kinds=("number",), own_start=True, measured_on=("independent",)
    ),
}
