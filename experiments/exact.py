"""The engine against reference.py, token by token, on any model: also one whose tags are no tokens.

    python -m experiments.real exact --model runs/real

Completions are compared as texts: the reward of one is its number, and equal numbers mean equal tokens.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import reference
from data import DataError, Example, collate
from interventions import Interventions
from model import Policy, load_policy
from rollouts import Rollouts
from scm import CLEAR, sample_of_kinds


class Compared(NamedTuple):
    """What was compared."""

    reasoning: int  # tokens asked about
    completions: int  # drawn by reference.py, for both questions
    others: int  # of these, not the trajectory itself
    tokens: int  # drawn in them, one by one
    different: int  # completions in which the engine's text is another
    ties: int  # of these, those that part where rounding decides


# Distribution functions over 49,153 words in float32 are off by up to 4e-6 (measured on this model).
ROUNDING = 1e-5


class Texts(dict):
    """Completions by number. As the reward of a completion, its number is equal where every token is."""

    def number(self, tokens: Tensor) -> float:
        """The number of these token ids (C,)."""
        return float(self.setdefault(tuple(tokens.tolist()), len(self)))


def in_tags(
    policy: Policy, prompt: dict[str, Tensor], reasoning: int, numbers: Tensor, temperature: float
) -> Tensor:
    """(C,) a completion in the form of a trained model's: the policy's own words, in tags put around them.

    reasoning: tokens between the <think> tags.  numbers: (L,) uniform, that draw the words.
    """

    def spell(text: str) -> Tensor:
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=policy.device)

    def with_words(tokens: Tensor, how_many: int) -> Tensor:
        for _ in range(how_many):
            number = float(numbers[len(tokens)])
            token = reference.next_token(policy, prompt, tokens, number, temperature)
            if token in policy.eos_ids:
                break
            tokens = torch.cat([tokens, token[None]])
        return tokens

    tokens = with_words(spell("<think>"), reasoning)
    tokens = with_words(torch.cat([tokens, spell(" </think> <answer>")]), 1)
    return torch.cat([tokens, spell(" </answer>"), policy.eos_ids[:1]])


def compare(
    policy: Policy, example: Example, seed: int, reasoning: int = 12, temperature: float = 0.7
) -> Compared:
    """Ask both questions about one completion, fast and word for word (H = 1), and count what agrees.

    Raises DataError where the tags of the completion are not found.
    """
    texts, longest_frame, device = Texts(), 32, policy.device
    prompt = collate([example], policy.processor, think=False)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(reasoning + longest_frame, generator=generator)
    ids = in_tags(policy, prompt, reasoning, numbers, temperature)
    with torch.no_grad():
        prefix = policy.prefill(prompt)
    rollouts = Rollouts.of(
        policy, torch.zeros(1, dtype=torch.long, device=device), ids[None],
        torch.tensor([len(ids)], device=device), len(ids) + 2,
        lambda _, completions: [texts.number(tokens) for tokens in completions],
    )  # fmt: skip
    start, end = int(rollouts.reasoning_start), int(rollouts.reasoning_end)
    if start == end:
        raise DataError(f"no reasoning was found in {policy.text(ids)!r}")
    asked = Interventions(policy, prefix, rollouts, seed, 1, temperature=temperature)
    with_, without, masked = asked.rewards()
    fast = torch.cat([without[0, start], with_[0, start:end, 0], masked[0, start:end]]).cpu()
    slow, numbers = word_for_word(asked, prompt, texts)
    # What each completion kept of the trajectory: the rest of it was drawn.
    kept = [*range(start, end + 1), *[int(rollouts.answer_start)] * (end - start)]
    masks = [*[None] * (end - start + 1), *range(start, end)]
    text = [torch.tensor(tokens, device=device) for tokens in texts]
    drawn = [len(text[int(told)]) - place for told, place in zip(slow, kept, strict=True)]
    ties = [
        is_tie(asked, prompt, text[int(fast[i])], text[int(slow[i])], numbers[i], masks[i])
        for i in (fast != slow).nonzero()[:, 0].tolist()
    ]
    others = int((slow != texts.number(ids)).sum())
    return Compared(end - start, len(slow), others, sum(drawn), len(ties), sum(ties))


def word_for_word(
    asked: Interventions, prompt: dict[str, Tensor], texts: Texts
) -> tuple[Tensor, list[Tensor]]:
    """reference.py's answers: of the T + 1 sets (H = 1), then of the T masked answers: (2 T + 1,).

    And the numbers that each draws with: of a set (C, L), by where it leaves; of an answer (1, L).
    """
    rollouts, policy, temperature = asked.rollouts, asked.policy, asked.temperature
    device, ids = policy.device, rollouts.completion_ids[0]
    first = torch.tensor(0, device=device)
    span = int(rollouts.reasoning_start), int(rollouts.reasoning_end)
    steps, places = (torch.arange(n, device=device) for n in (rollouts.longest, len(ids)))
    # By step in the engine, by place in reference.py.
    uniforms = torch.stack([asked.numbers(first, j, 0, steps).roll(int(j)) for j in places])
    sets = reference.beginnings(
        policy, prompt, ids, span, texts.number, uniforms[:, None], temperature=temperature
    )
    answers, numbers = [], [uniforms] * len(sets)
    for t in range(*span):
        numbers.append(asked.masked_numbers(first[None], torch.tensor([t], device=device)))
        answer = int(rollouts.answer_start)
        done = reference.masked_answer(policy, prompt, ids, answer, t, numbers[-1][0], temperature)
        answers.append(texts.number(done))
    return torch.cat([sets.flatten(), torch.tensor(answers)]), numbers


def parting(one: Tensor, other: Tensor) -> int:
    """The first place at which two texts differ."""
    both = min(len(one), len(other))
    return int((one[:both] == other[:both]).long().cumprod(0).sum())


def is_tie(
    asked: Interventions,
    prompt: dict[str, Tensor],
    quick: Tensor,
    told: Tensor,
    numbers: Tensor,
    masked: int | None,
) -> bool:
    """Whether the engine's text and reference.py's part at a number that rounding decides.

    A little below and a little above it (`ROUNDING`), reference.py draws tokens between which both stand,
    in the order of their ids. Above 1 there is no border: every token up to the last is near enough.
    """
    place = parting(quick, told)
    left = min(parting(told, asked.rollouts.completion_ids[0]), place)
    number = float(numbers[min(left, len(numbers) - 1), place])
    policy, temperature = asked.policy, asked.temperature
    low, high = (
        reference.next_token(policy, prompt, told[:place], number + off, temperature, masked)
        for off in (-ROUNDING, ROUNDING)
    )
    if number + ROUNDING >= 1:
        high = torch.inf
    return all(bool(low <= text[place] <= high) for text in (quick, told))


def exact(folder: Path, completions: int, seed: int, device: str = "cpu") -> int:
    """Compare some completions about scenes.  Returns the exit code: 1 where more than rounding differs."""
    policy, rng, found = load_policy(folder, device), random.Random(seed), []
    for i in tqdm(range(completions), desc="reference.py", unit="completion"):
        example = sample_of_kinds(rng, 0.9, CLEAR, ("yesno",))
        found.append(compare(policy, example, seed + i))
        last = found[-1]
        tqdm.write(f"{last.tokens} tokens, {last.different} texts differ, {last.ties} by rounding")
    total = Compared(*(sum(column) for column in zip(*found, strict=True)))
    print(
        f"{completions} trajectories, {total.reasoning} reasoning tokens; {total.completions} "
        f"completions for both questions, {total.others} of them not the trajectory itself; "
        f"{total.tokens} tokens drawn one by one. The engine's text differs in {total.different}, in "
        f"{total.ties} of these by rounding (a number within {ROUNDING} of the border of two tokens)"
    )
    return int(total.different > total.ties)
