"""COPO inside TRL: its GRPOTrainer, with a causal reward added to the advantage of each reasoning token.

    from integrations.trl import COPOConfig, COPOTrainer

    args = COPOConfig(output_dir="run", lambda_s=0.35, lambda_n=0.35)
    COPOTrainer("model", reward_funcs=correct, args=args, train_dataset=dataset).train()

TRL does everything it does for GRPO: it samples, pays, batches and updates. It accepts advantages of one
per token (n, C) where it makes one per completion (n,), and that is all that is changed here. Legend: n
completions of this process, C completion tokens, F reward functions; the rest as in copo.py.

The scorer draws from the law that TRL samples from: its temperature, its end tokens, its suppressed ones.
What would change that law, or leaves no single outcome to ask about, is refused (`objections`).
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer
from trl.data_utils import is_conversational, prepare_multimodal_messages
from trl.models import unwrap_model_for_generation

from copo import inject
from data import DataError
from gpu.long import ways_of_asking
from integrations.trl_config import COPOConfig, objections
from interventions import causal_rewards
from model import TOLERANCE, Policy, prove_exact
from rollouts import Causal, Rollouts
from runs import Limit

logger = get_logger(__name__)
# What a reward function gets under other names than those of the columns.
NOT_COLUMNS = ("prompt", "completion", "completion_ids")


class COPOTrainer(GRPOTrainer):
    """GRPOTrainer with COPO's advantages.  Raises DataError for what it cannot score."""

    _tag_names = ["trl", "copo"]  # noqa: RUF012  TRL's own form
    _name = "COPO"
    _paper = {"title": "Causal-Oriented Policy Optimization", "id": "2508.04182"}  # noqa: RUF012

    def __init__(self, model, reward_funcs, args: COPOConfig, train_dataset=None, **given):
        if not isinstance(args, COPOConfig):
            raise DataError("args must be a COPOConfig: a GRPOConfig has no lambda_s and lambda_n")
        self._scores = bool(args.lambda_s or args.lambda_n)
        refused = objections(args, reward_funcs, model, **given) if self._scores else []
        if refused:
            raise DataError("\n".join(refused))
        super().__init__(model, reward_funcs, args, train_dataset, **given)
        self._sampled, self._rows = None, Limit("max_rows", None)
        if self._scores:
            self._check_model()

    def _check_model(self) -> None:
        """Raise DataError for a model, or a way to spread it, that cannot be scored."""
        if self._dist.is_fsdp:
            raise DataError("FSDP: layers give up their weights while scoring: use ZeRO or DDP")
        if any(getattr(self._tokenizer, f"response_{x}", None) for x in ("template", "schema")):
            raise DataError("a tokenizer that parses responses: unset its response_template")
        if self.args.outcome_reward not in (None, *self.reward_func_names):
            raise DataError(
                f"outcome_reward = {self.args.outcome_reward!r}: the reward functions are "
                f"{', '.join(self.reward_func_names)}"
            )
        if self.model.dtype not in TOLERANCE:
            raise DataError(f"weights in {self.model.dtype}: load them as float32 or bfloat16")
        if self._is_vlm and not self._dist.is_zero3:  # whose weights are in parts before training
            policy = self._policy_of(self.model)
            with policy.evaluating():
                prove_exact(policy)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's rewards (of all processes); what they were paid for is kept for scoring."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._sampled = inputs, prompts, completion_ids_list, rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        """TRL's batch; in training, its advantages (n,) become those of equation 5, (n, C)."""
        output = super()._generate_and_score_completions(inputs)
        if self._scores and self.model.training:
            with self._policy() as policy:
                causal, rollouts = self._score(policy)
            width = output["completion_ids"].shape[1] - rollouts.completion_ids.shape[1]
            paid, mask = (F.pad(x, (0, width)) for x in (causal.rewards, rollouts.reasoning_mask))
            output["advantages"] = inject(output["advantages"], paid, mask)
            self._log_scores(causal, rollouts)
        self._sampled = None
        return output

    def _policy_of(self, model: nn.Module) -> Policy:
        """The model as the scorer asks it."""
        processor = self.processing_class
        if not self._is_vlm:
            processor = SimpleNamespace(tokenizer=processor, chat_template=None)
        return Policy(model.get_base_model() if is_peft_model(model) else model, processor)

    @contextlib.contextmanager
    def _policy(self) -> Iterator[Policy]:
        """The policy with whole weights, TRL's law and precision, and no dropout."""
        whole = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with whole as model, torch.no_grad(), self.accelerator.autocast():
            policy = self._policy_of(model)
            policy.eos_ids = policy.eos_ids.new_tensor(sorted(self.eos_token_ids))
            policy.forbidden = torch.zeros_like(policy.forbidden)
            # vLLM suppresses nothing, and leaves these settings unmade.
            suppressed = getattr(self, "generation_kwargs", {}).get("suppress_tokens")
            policy.forbidden[suppressed or []] = True
            with policy.evaluating():
                yield policy

    def _score(self, policy: Policy) -> tuple[Causal, Rollouts]:
        """Equations 2 to 4 for the completions of this process."""
        _, prompts, ids, _ = self._sampled
        n, first = len(ids), self.accelerator.process_index * len(ids)
        # TRL's groups are G rows in the order of the processes; one may lie on two of them.
        groups = torch.arange(first, first + n, device=policy.device) // self.num_generations
        number, prompt_index = groups.unique(return_inverse=True)
        asked = [prompts[int((prompt_index == b).nonzero()[0])] for b in range(len(number))]
        inputs = self._encode(asked)
        texts = policy.tokenizer.batch_decode(inputs["input_ids"])
        completion_ids = pad_sequence([torch.tensor(x) for x in ids], True, policy.pad_id)
        rollouts = Rollouts.of(
            policy,
            prompt_index,
            completion_ids.to(policy.device),
            torch.tensor([len(x) for x in ids], device=policy.device),
            self.max_completion_length,
            self._outcomes,
            opened=["<think>" if text.rstrip().endswith("<think>") else "" for text in texts],
            rewards=self._own_outcomes(first, n),
        )
        prefix = policy.prefill(inputs)
        args, rows = self.args, policy.rows_that_fit(prefix.mask.shape[1], rollouts.longest)
        ways = ways_of_asking(rollouts, args.unit, args.num_continuations)

        def questions(max_rows: int) -> Causal:
            return causal_rewards(
                policy, prefix, rollouts, self._seed(), args.lambda_s, args.lambda_n,
                pairing=args.pairing, temperature=self.temperature, max_rows=max_rows,
                max_scored_tokens=args.max_scored_tokens, prompt_number=number, **ways,
            )  # fmt: skip

        most = rollouts.completion_ids.numel() * (args.num_continuations + 1)
        return self._rows.fit(min(rows, most), "scoring", questions), rollouts

    def _encode(self, prompts: list) -> dict[str, Tensor]:
        """Prompts as TRL's own tokens, padded on the left, with their images."""
        if not is_conversational({"prompt": prompts[0]}):
            return dict(self.processing_class(text=prompts, padding=True, return_tensors="pt"))
        padding = {"padding": True}
        if self._is_vlm:
            prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
            padding = {"processor_kwargs": padding}
        return dict(
            self.processing_class.apply_chat_template(
                conversation=prompts,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **padding,
                **self.chat_template_kwargs,
            )
        )

    def _seed(self) -> int:
        """The same on every process, another for every batch of completions."""
        batch = self._step // (self.args.steps_per_generation * self.num_iterations)
        text = f"score {self.args.seed} {self.state.global_step} {batch}"
        return random.Random(text).getrandbits(62)

    # -- outcomes ----------------------------------------------------------------------------
    def _weights(self) -> list[float]:
        """Weight of each reward function in the outcome that is asked about, (F,)."""
        if self.args.outcome_reward is None:
            return self.reward_weights.tolist()
        return [float(name == self.args.outcome_reward) for name in self.reward_func_names]

    def _own_outcomes(self, first: int, n: int) -> Tensor:
        """(n,) outcomes that TRL has paid already; a reward function that returned None counts 0."""
        rewards = self._sampled[-1][first : first + n]  # (n, F)
        # No matrix product: autocast would round it to bfloat16.
        return (rewards.nan_to_num(0.0) * rewards.new_tensor(self._weights())).sum(1)

    def _outcomes(self, which: Sequence[int], completions: Sequence[Tensor]) -> list[float]:
        """Outcomes of other completions in the place of rows `which`, paid as TRL pays; nothing is logged."""
        inputs, prompts, _, _ = self._sampled
        ids = [x.tolist() for x in completions]
        texts = said = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            said = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {
            key: [inputs[n][key] for n in which] for key in inputs[0] if key not in NOT_COLUMNS
        }
        total = torch.zeros(len(ids))
        for reward, weight in zip(self.reward_funcs, self._weights(), strict=True):
            if weight:
                paid = reward(
                    prompts=[prompts[n] for n in which],
                    completions=said,
                    completion_ids=ids,
                    trainer_state=self.state,
                    log_extra=lambda *_: None,
                    log_metric=lambda *_: None,
                    **columns,
                )
                total += weight * torch.tensor([0.0 if x is None else float(x) for x in paid])
        return total.tolist()

    # -- what is said ------------------------------------------------------------------------
    def _log_scores(self, causal: Causal, rollouts: Rollouts) -> None:
        """Means over the reasoning tokens of all processes, beside TRL's metrics."""
        mask, cost = rollouts.reasoning_mask, causal.evidence.cost
        sums = [
            causal.rewards.sum(),
            causal.sufficiency[mask].sum(),
            causal.necessity[mask].clamp(0, 1).sum(),
            mask.sum(),
            (~mask.any(1)).sum(),
            torch.tensor(len(mask), device=mask.device),
            torch.tensor(cost.rows, device=mask.device),
        ]
        *scores, tokens, without, rows, decoded = (
            self.accelerator.gather(torch.stack([x.double() for x in sums])[None]).sum(0).tolist()
        )
        names = ("causal_reward", "sufficiency", "necessity")
        log = {name: score / max(tokens, 1) for name, score in zip(names, scores, strict=True)}
        log |= {"without_reasoning": without / rows, "rows_scored": decoded}
        for name, value in log.items():
            self._metrics["train"][f"copo/{name}"].append(value)
        if without > rows / 2:
            logger.warning_once(
                "most completions have no reasoning between <think> and </think>, so they get no causal "
                "reward, as in GRPO: ask for the tags in the prompt, or raise max_completion_length"
            )
