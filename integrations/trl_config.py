"""Settings of COPO in TRL, and what cannot be scored there."""

import dataclasses
import re

from torch import nn
from trl import GRPOConfig
from trl.trainer.utils import is_async_callable

from interventions import PAIRINGS, UNITS


def option(default, help_text: str):
    """A field with the text that TRL's command line shows for it."""
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass
class COPOConfig(GRPOConfig):
    """GRPOConfig and COPO's own settings.  Three of TRL's defaults become those of equation 6."""

    loss_type: str = option("grpo", "The loss: 'grpo' is equation 6.")
    beta: float = option(0.04, "Weight of the KL to the reference.")
    use_bias_correction_kl: bool = option(False, "Weight the KL by the ratio; equation 6 does not.")
    lambda_s: float = option(0.35, "Weight of sufficiency; both weights at 0 are plain GRPO.")
    lambda_n: float = option(0.35, "Weight of necessity.")
    num_continuations: int = option(4, "Continuations per set, H of equation 2.")
    pairing: str = option("coupled", "How continuations are paired: coupled or independent.")
    max_scored_tokens: int | None = option(
        None, "Score so many tokens of each completion, those the policy was least sure of."
    )
    unit: str = option(
        "auto",
        "What is scored at a time: token, word, or so many; auto: runs where reasoning is long.",
    )
    outcome_reward: str | None = option(
        None,
        "Name of the reward function that is asked about; without it, the weighted sum of all.",
    )


LAW = "continuations are drawn from the model's whole distribution, as completions must be"
TOKEN = "a causal reward belongs to one token, and this weighs whole completions"
WHOLE = {  # settings that leave the distribution as it is
    "top_p": (1.0,),
    "top_k": (0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0,),
    "vllm_structured_outputs_regex": (None,),
}


def objections(args: COPOConfig, reward_funcs, model=None, **given) -> list[str]:
    """What cannot be scored, a line each.  given: the trainer's other arguments."""
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    adapter = given.get("peft_config") or getattr(model, "active_peft_config", None)
    changed = [name for name, whole in WHOLE.items() if getattr(args, name) not in whole]
    found = [f"{name} = {getattr(args, name)!r}: {LAW}: unset it" for name in changed]
    extra = sorted({*(args.generation_kwargs or {})} - {"suppress_tokens"})
    found += [f"generation_kwargs: {name}: {LAW}: take it out" for name in extra]
    found += [
        f"{name}: a completion must be what the model itself says to its prompt: unset it"
        for name in ("tools", "environment_factory", "rollout_func")
        if given.get(name)
    ]
    tests = [
        (args.loss_type in ("luspo", "vespo"), f"loss_type: {TOKEN}: use 'grpo' or 'dapo'"),
        (
            args.importance_sampling_level != "token",
            f"importance_sampling_level: {TOKEN}: use 'token'",
        ),
        (
            args.off_policy_mask_threshold is not None,
            "off_policy_mask_threshold: its test of a completion's sign becomes one of tokens: unset it",
        ),
        (
            args.multi_objective_aggregation != "sum_then_normalize",
            "multi_objective_aggregation: no one outcome to ask about: use 'sum_then_normalize'",
        ),
        (
            any(isinstance(function, str | nn.Module) for function in functions),
            "reward_funcs: reward models are not asked about continuations: use a function",
        ),
        (
            any(callable(f) and is_async_callable(f) for f in functions),
            "reward_funcs: async functions are not asked about continuations: use plain ones",
        ),
        (
            getattr(adapter, "is_prompt_learning", False),
            "peft_config: prompt tuning adds tokens that the scorer does not see: use LoRA",
        ),
    ]
    return found + [line for holds, line in tests if holds] + _bad_values(args)


def _bad_values(args: COPOConfig) -> list[str]:
    given = {name: getattr(args, name) for name in ("num_continuations", "max_scored_tokens")}
    found = [
        f"{name} = {value}: must be at least 1"
        for name, value in given.items()
        if value is not None and value < 1
    ]
    found += [
        f"{name} = {value}: must be between 0 and 1"
        for name, value in (("lambda_s", args.lambda_s), ("lambda_n", args.lambda_n))
        if not 0 <= value <= 1
    ]
    if not re.fullmatch(UNITS, str(args.unit)):
        found.append(f"unit = {args.unit!r}: must be auto, token, word, or how many tokens")
    if args.pairing not in PAIRINGS:
        found.append(f"pairing = {args.pairing!r}: must be one of {', '.join(PAIRINGS)}")
    return found
