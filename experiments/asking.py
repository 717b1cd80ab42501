"""Which way of asking pays: agreement with the truth against the tokens that it takes, short and long.

    python -m experiments.asking             two policies, each way of asking     -> asking.csv

The truth of sufficiency is what very many draws of equation 2 would say of a word, without its noise: how
much the chance of a right answer rises from the word's beginning to its end, and 0 where it falls. The
truth of necessity is the mean of equation 3 over many masked answers. A way that scores smaller units than
words is summed over each word; one that scores larger ones gives a word its mean. Where every 4th token
alone is asked about, what stands between two of them is given what lies between their scores.

"short": the policy in crowds, a word a token. "long": the same world, spelled out letter by letter.
"""

import argparse
import functools
import random
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from copo import necessity, sufficiency
from data import DataError, collate
from experiments.jobs import ELSEWHERE, hash_of
from experiments.records import commit, read_csv, write_csv
from experiments.tokens import auc, correlation, seed_of
from gpu.long import Brief
from interventions import Interventions
from model import Policy, Prefix, load_policy
from rollouts import Rollouts, rollout
from scm import CROWDED, World, sample_of_kinds
from tiny import IN_CROWDS, warm_start


class Spaced(Interventions):
    """The paper's questions about every so many-th token of a reasoning, the first among them."""

    def __init__(self, *given, every: int, **how):
        super().__init__(*given, **how)
        self.every = every

    @functools.cached_property
    def heads(self) -> Tensor:
        """(N, C) bool: the tokens that are asked about."""
        heads = super().heads
        return heads & (heads.cumsum(1) % self.every == 1)


STARTS = {
    "short": IN_CROWDS,
    "long": replace(IN_CROWDS, questions=6, spelled=True, batch_size=16, speech_steps=500),
}
WORLDS = {"short": CROWDED, "long": replace(CROWDED, fewest=5)}  # of the questions
LONGEST = {"short": 64, "long": 300}  # tokens of a completion
PROMPTS = {"short": 12, "long": 6}  # of a seed
DRAWS = {"short": (64, 8), "long": (16, 4)}  # that make the truth: continuations, masked answers
MATTERS, NOTHING = 0.1, 0.01  # a word that raises the chance by as much, and by next to nothing
BRIEF = {"way": Brief}
SPACED = {f"every {k}th": functools.partial(Spaced, every=k) for k in (4, 8)}
UNITS = {"tokens": "token", "words": "word", "runs of 8": 8, "runs of 16": 16}
WAYS: dict[str, dict[str, dict]] = {
    "sufficiency": {
        **{f"{name}, H {H}": {"unit": unit, "num_continuations": H}
           for name, unit in UNITS.items() for H in (1, 4)},
        **{f"{name}, brief, H {H}": {"unit": unit, "num_continuations": H, **BRIEF}
           for name, unit in UNITS.items() for H in (1, 4)},
        **{f"the {k} least sure, H 4": {"max_scored_tokens": k} for k in (4, 8)},
        **{f"{name}, H 4": {"way": way} for name, way in SPACED.items()},
    },
    "necessity": {
        **{name: {"unit": unit} for name, unit in UNITS.items()},
        **{f"{name}, brief": {"unit": unit, **BRIEF} for name, unit in UNITS.items()},
        **{f"the {k} least sure": {"max_scored_tokens": k} for k in (4, 8)},
        **{name: {"way": way} for name, way in SPACED.items()},
    },
}  # fmt: skip
COLUMNS = (
    "policy", "seed", "question", "way", "tokens", "words", "token_forwards", "per_grpo_step",
    "correlation", "auc", "start", "commit", "command",
)  # fmt: skip


@dataclass
class Asked:
    """Completions of one policy, and the words of their reasoning."""

    policy: Policy
    prefix: Prefix
    rollouts: Rollouts
    seed: int
    word: Tensor  # (N, C) which word a token belongs to, counted over all completions; -1 outside
    first: Tensor  # (W,) of each word, the first token, as a flat index into (N, C)

    def interventions(self, purpose: str, way=Interventions, **how) -> Interventions:
        """With random numbers of their own."""
        numbers = seed_of(purpose, self.seed)
        return way(self.policy, self.prefix, self.rollouts, numbers, **how)

    def of_words(self, scores: Tensor, unit: str | int) -> Tensor:
        """(W,) from (N, C): sums of tokens, means of larger units."""
        inside = self.word >= 0
        word, count = self.word[inside], len(self.first)
        sums = torch.zeros(count).index_add_(0, word, scores[inside].float())
        return sums if unit == "token" else sums / word.bincount(minlength=count)


@torch.no_grad()
def sample(policy: Policy, seed: int, prompts: int, longest: int, world: World) -> Asked:
    """Four completions of each of some counting questions about scenes of a world."""
    rng = random.Random(f"asking {seed}")
    examples = [sample_of_kinds(rng, 0.9, world, ("number",)) for _ in range(prompts)]
    prefix = policy.prefill(collate(examples, policy.processor))
    generator = torch.Generator().manual_seed(seed_of("rollout", seed))
    rollouts = rollout(policy, prefix, examples, 4, longest, generator)
    heads = Interventions(policy, prefix, rollouts, 0, unit="word").heads
    word = heads.flatten().long().cumsum(0).view(heads.shape) - 1
    word = torch.where(rollouts.reasoning_mask, word, -1)
    return Asked(policy, prefix, rollouts, seed, word, heads.flatten().nonzero()[:, 0])


def truths(asked: Asked, draws: int, masked_draws: int) -> dict[str, Tensor]:
    """What each question should say of each word, (W,)."""
    many = asked.interventions("truth", unit="word", num_continuations=draws)
    with_, without = (x.mean(-1).flatten()[asked.first] for x in many.continuation_rewards())
    lost = torch.zeros(len(asked.first))
    for draw in range(masked_draws):
        masks = asked.interventions(f"truth {draw}", unit="word", pairing="independent")
        lost += (1 - masks.masked_rewards()).flatten()[asked.first] / masked_draws
    own = asked.rollouts.rewards[:, None].expand(asked.word.shape).flatten()[asked.first]
    return {
        "sufficiency": (with_ - without).clamp(min=0),
        "necessity": torch.where(own > 0, lost, 0.0),
    }


def between(scores: Tensor, scored: Tensor, inside: Tensor) -> Tensor:
    """Scores of all tokens inside, (N, C) each: those that are known, between two of them a straight line.

    >>> every_other = torch.tensor([[True, False, True, False]])
    >>> between(torch.tensor([[1.0, 0, 2, 0]]), every_other, torch.ones(1, 4).bool())
    tensor([[1.0000, 1.5000, 2.0000, 2.0000]])
    """
    filled = torch.zeros(scores.shape)
    for n in scored.any(1).nonzero()[:, 0].tolist():
        places, known = (x[n].nonzero()[:, 0] for x in (inside, scored))
        filled[n, places] = torch.from_numpy(np.interp(places, known, scores[n, known])).float()
    return filled


def asking_rows(
    asked: Asked, draws: int, masked_draws: int, done: Container[tuple[str, str]] = ()
) -> list[dict]:
    """One row per question and way that is not done: agreement with the truth, and the tokens run for it.

    per_grpo_step: those tokens over what GRPO runs for the same completions: drawn, updated, under the
    reference.  auc: the chance that a word that MATTERS scores above one that does NOTHING.
    """
    truth, rows = truths(asked, draws, masked_draws), []
    drawn = int(asked.rollouts.lengths.sum())
    for question, ways in WAYS.items():
        missing = {way: how for way, how in ways.items() if (question, way) not in done}
        for way, how in tqdm(missing.items(), question, unit="way", leave=False, disable=None):
            found = asked.interventions(way, **how)
            if question == "sufficiency":
                scores = sufficiency(*found.continuation_rewards())
            else:
                own = asked.rollouts.rewards[:, None]
                scores = necessity(own, found.masked_rewards()).clamp(0, 1)
            if isinstance(found, Spaced):
                scores = between(scores, found.scored, asked.rollouts.reasoning_mask)
            of_words = asked.of_words(scores, how.get("unit", "token"))
            matters, nothing = truth[question] >= MATTERS, truth[question] <= NOTHING
            rows.append({
                "question": question, "way": way, "tokens": int((asked.word >= 0).sum()),
                "words": len(of_words), "token_forwards": found.cost.token_forwards,
                "per_grpo_step": found.cost.token_forwards / (3 * drawn),
                "correlation": correlation(of_words, truth[question]),
                "auc": auc(of_words[matters], of_words[nothing], matters[matters][:, None] & nothing[nothing])
                if matters.any() else "",
            })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Ask every way.  Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asking",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/asking.csv"))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/results"), help="of the warm starts"
    )
    args = parser.parse_args(argv)
    try:
        if args.seeds < 1:
            raise DataError("--seeds must be at least 1")
        rows = read_csv(args.output)
        for name in args.policies:
            start = warm_start(args.work, STARTS[name])
            if {row["start"] for row in rows if row["policy"] == name} - {hash_of(start)}:
                raise DataError(f"{args.output}: of another warm start: {ELSEWHERE}")
            policy = load_policy(start)
            for seed in map(str, range(args.seeds)):
                done = {
                    (row["question"], row["way"])
                    for row in rows
                    if (row["policy"], row["seed"]) == (name, seed)
                }
                if all((question, way) in done for question, ways in WAYS.items() for way in ways):
                    continue
                asked = sample(policy, int(seed), PROMPTS[name], LONGEST[name], WORLDS[name])
                facts = {
                    "policy": name,
                    "seed": seed,
                    "start": hash_of(start),
                    "commit": commit(),
                }
                facts["command"] = "python -m experiments.asking"
                rows += [facts | row for row in asking_rows(asked, *DRAWS[name], done)]
                write_csv(args.output, rows, COLUMNS)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
