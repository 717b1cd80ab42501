"""Equations 2 and 3 word for word: one completion at a time, every token through the whole model.

Read this before `interventions.py`, which asks the same two questions far faster; the
tests hold it to this file token for token.

    S_suff(o_t) = 1/H sum_k max(0, r(Y^k_t) - r(Y^k_(t-1)))       rewards of `beginnings`  (equation 2)
    S_nec(o_t)  = r(Y) - r(Y^mask_t)                              reward of `masked_answer` (equation 3)

Every token that is drawn has a uniform number of its own, uniforms[place], which the caller supplies.
All tensors here are of one trajectory: its completion tokens (C,), places counted from its first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model import Policy, sample_tokens


@torch.no_grad()
def next_token(
    policy: Policy,
    prompt: dict[str, Tensor],
    tokens: Tensor,
    uniform: float,
    temperature: float = 1.0,
    masked: int | Tensor | None = None,
) -> Tensor:
    """Draw the token that follows a prompt and `tokens` (n,), from one pass over everything.

    prompt: one prompt as `data.collate` makes it.  masked: places in `tokens` whose embeddings are zeroed.
    """

    # One more token, any: none attends to it, and the logits in its place predict what follows `tokens`.
    ids = torch.cat([tokens, policy.eos_ids[:1]])[None]

    def zero(module, arguments, embeddings: Tensor) -> Tensor:
        embeddings = embeddings.clone()
        embeddings[0, masked - ids.shape[1]] = 0  # counted from the end: the prompt comes first
        return embeddings

    hook = policy.embed.register_forward_hook(zero) if masked is not None else None
    try:
        logits = policy.full_logits(prompt, ids, torch.ones_like(ids))[:, -1]
    finally:
        if hook:
            hook.remove()
    uniforms = torch.tensor([[uniform]], device=logits.device)
    return sample_tokens(logits, uniforms, temperature)[0, 0]


def complete(policy: Policy, prompt, tokens: Tensor, uniforms: Tensor, *rest) -> Tensor:
    """Continue `tokens` until the policy ends or the numbers (L,) do; uniforms[j] draws place j."""
    while len(tokens) < len(uniforms) and int(tokens[-1]) not in policy.eos_ids.tolist():
        token = next_token(policy, prompt, tokens, float(uniforms[len(tokens)]), *rest)
        tokens = torch.cat([tokens, token[None]])
    return tokens


def beginnings(
    policy: Policy,
    prompt: dict[str, Tensor],
    ids: Tensor,
    reasoning: tuple[int, int],
    reward: Callable[[Tensor], float],
    uniforms: Tensor,
    coupled: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """r(Y^k) of H completions of every beginning of the reasoning: (T + 1, H).

    Row i keeps the first i reasoning tokens: row t is "with o_t" and row t - 1 is "without" it, so
    S_suff = copo.sufficiency(rewards[1:], rewards[:-1]).

    ids: (C,) the trajectory.  reasoning: [start, end) places.  uniforms: (C, H, L), by the place at which
    a completion leaves the trajectory.
    coupled: the k-th completion of o_<j first draws a token in the place of o_j. If it draws o_j itself,
    it is from there on the k-th completion of o_<=j.  Not coupled: every completion is drawn afresh.
    """
    start, end = reasoning
    rewards = torch.zeros(end - start + 1, uniforms.shape[1])
    for k in range(uniforms.shape[1]):
        for begin in range(start, end + 1):
            j = begin
            while j < len(ids):
                uniform = float(uniforms[j, k, j])
                token = next_token(policy, prompt, ids[:j], uniform, temperature)
                if not (coupled and token == ids[j]):
                    break
                j += 1
            if j == len(ids):  # it never left: it is the trajectory
                rewards[begin - start, k] = reward(ids)
                continue
            left = torch.cat([ids[:j], token[None]])
            done = complete(policy, prompt, left, uniforms[j, k], temperature)
            rewards[begin - start, k] = reward(done)
    return rewards


def masked_answer(
    policy: Policy,
    prompt: dict[str, Tensor],
    ids: Tensor,
    answer_start: int,
    t: int,
    uniforms: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The completion Y^mask_t whose answer is drawn with the embedding of o_t zeroed; all else is kept.

    uniforms: (L,), those that drew the trajectory: what differs, differs because of the mask.
    """
    return complete(policy, prompt, ids[:answer_start], uniforms, temperature, t)
