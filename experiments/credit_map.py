"""The map: where credit on words pays, and where more completions pay more, in a world of coin flips.

    python -m experiments.credit_map    a table, results/credit_map.csv, figures/credit_map.png

**The world.** A completion is T words. Each is right or wrong, by a coin of its own: one logit per place,
which the policy learns. Some places *decide*: the answer is right if all their words are. The others are
*idle*: a wrong word there is a hallucination, and costs the answer nothing. Every chance is known, and what
a method does is seen without a network around it.

**The methods** differ in what a word earns besides its completion's advantage (equation 5):

    GRPO            nothing
    COPO            equation 4: coupled sufficiency from H continuations, and a necessity that never errs
    exact change    p_t - p_(t-1), the true change in the chance of a right answer: credit without noise
    truth           1 for a right word, -1 for a wrong one, idle or not: more than any outcome can tell

**What is counted**, when the chance of a right answer first reaches 0.9: the steps; the words drawn, where
a continuation that leaves its completion pays for the words from there on; how often idle words are wrong.

**What the map assumes.** Words are independent. All prompts of a step share the same words: B prompts are
B groups of one problem, and never pull against each other. Every word is in doubt: where most are sure, as
in a trained network, fewer continuations leave, and COPO draws less. Equation 3's mask is perfect, and
asking it is free, as all reading is: that flatters COPO. There is no KL.

**What it cannot say.** Which learning rate is safe: here hardly any is too large (in a network, places
share weights), so rates stand side by side and none is called the best. How words that hang together share
credit. What an error earns that repairs an answer: here none does. And Adam has a say: its steps cannot
outgrow one size, however sure the gradient, so that where there is little noise nothing is left to gain; and
its long memory holds back what starts with large gradients, as the truth does there.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from copo import causal_completeness, group_advantages, inject, necessity, sufficiency
from experiments.records import commit, write_csv
from experiments.statistics import interval
from interventions import rewards_of_sets

HERE = Path(__file__).parent
START, LEVEL, LIMIT = 0.8, 0.9, 1000  # chance of a right word at first; where a training ends
Numbers = Callable[..., Tensor]  # numbers(T, ...): uniform, of shape (N, T, ...)


# -- the world ------------------------------------------------------------------------------------
def deciding(T: int, share: float) -> Tensor:
    """(T,) bool: the places that decide the answer, spread evenly."""
    return torch.tensor([int((t + 1) * share) > int(t * share) for t in range(T)])


@dataclass(frozen=True)
class Step:
    """N completions of T words, and the chances behind them."""

    chance: Tensor  # (N, T) of a right word
    right: Tensor  # (N, T) bool
    decides: Tensor  # (T,) bool

    @functools.cached_property
    def kept(self) -> Tensor:
        """(N, T + 1): 1 as long as no deciding word before place t is wrong; at T, the reward."""
        return _from_one((self.right | ~self.decides).float())

    @functools.cached_property
    def ahead(self) -> Tensor:
        """(N, T + 1): the chance that all deciding words from place t on will be right."""
        return _from_one(torch.where(self.decides, self.chance, 1.0).flip(1)).flip(1)


def _from_one(factors: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(factors), 1), factors.cumprod(1)], 1)


# -- what words earn (N, T), and how many were drawn to know it (N,) ----------------------------------
Earned = tuple[Tensor, Tensor]


def nothing(step: Step, numbers: Numbers) -> Earned:
    """GRPO: words earn their completion's advantage alone."""
    return torch.zeros_like(step.chance), torch.zeros(len(step.chance))


def copo(
    step: Step, numbers: Numbers, lambda_s: float = 0.35, lambda_n: float = 0.35, H: int = 4
) -> Earned:
    """Equation 4, from H coupled continuations of every prefix.

    Of an idle word, said with chance pi where the answer is right with chance p, the coupled sufficiency
    expects (1 - pi) p (1 - p): more for the rarer word. So it pulls idle words towards a coin flip.
    """
    T, rewards = len(step.decides), step.kept[:, -1]
    drawn = numbers(T, H) < step.chance[..., None]
    leaves = drawn != step.right[..., None]  # as in interventions.py: one row to decode for each
    hopes = step.kept[:, :-1, None] * (drawn | ~step.decides[:, None]) * step.ahead[:, 1:, None]
    values = leaves & (numbers(T, H) < hopes)
    sets = rewards_of_sets(values.float(), leaves, rewards)  # (N, T + 1, H)
    masked = rewards[:, None] * ~step.decides  # a right answer breaks without a word that decides
    scores = sufficiency(sets[:, 1:], sets[:, :-1]), necessity(rewards[:, None], masked)
    asked = leaves.sum(2) * torch.arange(T, 0, -1) if lambda_s else torch.zeros(len(rewards), T)
    return causal_completeness(*scores, lambda_s, lambda_n), asked.sum(1)


def exact_change(step: Step, numbers: Numbers) -> Earned:
    """p_t - p_(t-1), known without a draw."""
    return (step.kept * step.ahead).diff(dim=1), torch.zeros(len(step.chance))


def truth(step: Step, numbers: Numbers) -> Earned:
    """1 for a right word, -1 for a wrong one, known without a draw."""
    return 2.0 * step.right - 1, torch.zeros(len(step.chance))


class Method(NamedTuple):
    """What words earn, in groups of G completions."""

    earn: Callable[[Step, Numbers], Earned] = nothing
    G: int = 8

    @classmethod
    def copo(cls, **settings: float) -> "Method":
        """COPO with other weights, or another H."""
        return cls(functools.partial(copo, **settings))


METHODS = {
    "GRPO": Method(),
    "GRPO, G = 16": Method(G=16),
    "COPO, λ = 0.35, H = 4": Method(copo),
    "COPO, λ = 1, H = 1": Method.copo(lambda_s=1, lambda_n=1, H=1),
    "exact change": Method(exact_change),
    "truth": Method(truth),
}
MORE = {  # in the table, not in the figure
    "GRPO, G = 32": Method(G=32),
    "GRPO, G = 64": Method(G=64),
    "COPO, λ = 1, H = 4": Method.copo(lambda_s=1, lambda_n=1),
    "COPO, λ = 1, H = 16": Method.copo(lambda_s=1, lambda_n=1, H=16),
    "sufficiency alone, λ = 1": Method.copo(lambda_s=1, lambda_n=0),
    "necessity alone, λ = 1": Method.copo(lambda_s=0, lambda_n=1, H=1),
}


# -- the training ---------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What it took to reach LEVEL: one value per seed, (S,)."""

    steps: Tensor  # LIMIT where it was not reached
    words: Tensor
    wrong: Tensor  # chance of a wrong word at an idle place; NaN where none is idle


def streams(seeds: Sequence[int], rows: int) -> Numbers:
    """Uniform numbers for `rows` completions per seed; no seed's numbers depend on another's."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda *shape: torch.cat([torch.rand(rows, *shape, generator=g) for g in generators])


def gradient(step: Step, earned: Tensor, G: int, S: int) -> Tensor:
    """(S, T): equation 6's, with fresh completions and no KL: the mean of A_(i,t) d log pi / d logit."""
    advantages = group_advantages(step.kept[:, -1].view(-1, G)).flatten()
    token_advantages = inject(advantages, earned, torch.ones_like(earned))
    per_word = token_advantages * (step.right.float() - step.chance)
    return per_word.view(S, -1, per_word.shape[1]).mean(1)


@functools.cache
def train(
    method: Method, prompts: int = 1, length: int = 32, share: float = 0.5, rate: float = 0.1,
    optimizer: str = "Adam", seeds: int = 16,
) -> Outcome:  # fmt: skip
    """Seeds 0, 1, ... side by side.  Of one seed, methods with one G draw by the same numbers."""
    rows, decides = prompts * method.G, deciding(length, share)
    logits = torch.full((seeds, length), math.log(START / (1 - START)))
    ascent = getattr(torch.optim, optimizer)([logits], lr=rate, maximize=True)
    sampling, asking = streams(range(seeds), rows), streams(range(1000, 1000 + seeds), rows)
    outcome = Outcome(torch.full((seeds,), LIMIT), torch.zeros(seeds), torch.zeros(seeds))
    words, running = torch.zeros(seeds), torch.ones(seeds, dtype=torch.bool)
    for done in range(LIMIT + 1):
        chance = logits.sigmoid()
        now = Outcome(torch.tensor(done), words, 1 - chance[:, ~decides].mean(1))
        outcome = Outcome(*map(functools.partial(torch.where, running), now, outcome))
        running = running & (torch.where(decides, chance, 1.0).prod(1) < LEVEL)
        if not running.any():
            break
        chance = chance.repeat_interleave(rows, 0)  # (N, T), N = seeds * rows
        step = Step(chance, sampling(length) < chance, decides)
        earned, asked = method.earn(step, asking)
        words = words + (length + asked).view(seeds, rows).sum(1)
        logits.grad = gradient(step, earned, method.G, seeds)
        ascent.step()
    return outcome


# -- the map: around its centre, one setting at a time ------------------------------------------------
CENTRE = {"prompts": 1, "length": 32, "share": 0.5, "rate": 0.1, "optimizer": "Adam"}
LONG, MANY = {"length": 64}, {"prompts": 16}
BOTH = LONG | MANY | {"rate": 0.4}
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
SWEEPS = {
    "prompts per step": [{"prompts": B} for B in (1, 2, 4, 16)],
    "words per completion, T": [{"length": T} for T in (8, 16, 32, 64)],
    "share of the places that decide": [{"share": share} for share in (0.25, 0.5, 0.75, 1.0)],
    "learning rate (T = 64)": [LONG | {"rate": rate} for rate in RATES],
    "learning rate (16 prompts)": [MANY | {"rate": rate} for rate in RATES],
}
ASIDE = [BOTH, LONG | MANY, *({"rate": rate} for rate in RATES)]
# Adam takes steps of one size. Without it, whatever is added to the advantage lengthens the step.
ASIDE += [MANY | {"rate": rate, "optimizer": "SGD"} for rate in (2.0, 3.0)]
COLUMNS = (
    "method", *CENTRE, "seeds", "unfinished", "steps", "steps_error", "words", "words_error",
    "wrong", "wrong_error", "wrong_low", "wrong_high", "steps_ratio", "steps_low", "steps_high",
    "words_ratio", "words_low", "words_high", "command", "commit",
)  # fmt: skip


def measure(name: str, settings: dict, seeds: int) -> dict:
    """One row of the CSV, from all seeds.

    Means with standard errors; the geometric mean of the ratio to the same seed's GRPO; 95 % intervals.
    """
    settings = CENTRE | settings
    own = train((METHODS | MORE)[name], **settings, seeds=seeds)
    grpo = train(METHODS["GRPO"], **settings, seeds=seeds)
    row = {
        "method": name,
        **settings,
        "seeds": seeds,
        "unfinished": (own.steps == LIMIT).sum().item(),
    }
    for field, values in own._asdict().items():
        error = values.double().std().item() / math.sqrt(seeds)
        row |= {field: values.double().mean().item(), f"{field}_error": error}
    mean, half = interval([x for x in own.wrong.tolist() if not math.isnan(x)])
    row |= {"wrong_low": mean - half, "wrong_high": mean + half}
    for field in ("steps", "words"):
        mean, half = interval((getattr(own, field) / getattr(grpo, field)).log().tolist())
        for end, log in (("ratio", mean), ("low", mean - half), ("high", mean + half)):
            row[f"{field}_{end}"] = math.exp(log)
    return row


def measure_all(seeds: int) -> list[dict]:
    """Every method at every setting, each setting once; more methods at two of them."""
    tried = [CENTRE | settings for sweep in (*SWEEPS.values(), ASIDE) for settings in sweep]
    tried = [settings for i, settings in enumerate(tried) if settings not in tried[:i]]
    rows = [measure(name, settings, seeds) for settings in tried for name in METHODS]
    return rows + [measure(name, settings, seeds) for settings in (CENTRE, LONG) for name in MORE]


def table(rows: Sequence[dict], settings: dict) -> str:
    """What every method took at one setting."""
    wanted = CENTRE | settings
    lines = [", ".join(f"{name} {value}" for name, value in wanted.items())]
    lines.append(f"    {'':26}{'steps':>14}{'words':>22}{'idle wrong':>15}   steps, words / GRPO's")
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            lines.append(
                "    {method:26}{steps:7.1f} ± {steps_error:4.1f}{words:12,.0f} ± {words_error:7,.0f}"
                "{wrong:8.3f} ± {wrong_error:.3f}   {steps_ratio:.2f} ({steps_low:.2f} to "
                "{steps_high:.2f}), {words_ratio:5.2f}".format(**row)
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, folder: Path = HERE, seeds: int = 16) -> int:
    """Measure, print, write, draw.  Returns the exit code."""
    from experiments import plots  # the rest of this file does without matplotlib

    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    torch.set_num_threads(1)
    rows = measure_all(seeds)
    facts = {"command": "python -m experiments.credit_map", "commit": commit()}
    write_csv(folder / "results" / "credit_map.csv", [row | facts for row in rows], COLUMNS)
    print(
        f"Until the answer is right with chance {LEVEL}. Mean ± standard error of seeds 0 to {seeds - 1}."
    )
    for settings in (CENTRE, LONG, MANY, BOTH):
        print(table(rows, settings))
    plots.save(functools.partial(plots.credit_map, rows), folder / "figures" / "credit_map.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
