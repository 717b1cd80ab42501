"""LoRA through peft (an optional extra): a low-rank update of the decoder, and no second copy of it.

    pip install peft
    python train.py --model DIR --lora-rank 16

Only the adapters are trained; the policy before training, which the KL is taken to, is the same
weights with the adapters off. A checkpoint is an ordinary folder with the update added in, and in it
the adapters, from which a run is resumed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import DataError
from model import Policy

FILE = "adapters.safetensors"
_NAME = "copo"


class AdaptedPolicy(Policy):
    """A policy with an adapter beside every linear layer of its decoder, and all else frozen.

    The update is 2 B A x (alpha = 2 rank); B begins at 0, so that nothing changes yet.
    """

    def __init__(self, policy: Policy, rank: int):
        from peft import LoraConfig, inject_adapter_in_model

        self.__dict__ = policy.__dict__
        self.model.requires_grad_(False)
        layers = [
            name
            for name, module in self.decoder.named_modules()
            if isinstance(module, nn.Linear) and module is not self.head
        ]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # In place: the decoder stays the object that the policy runs.
            inject_adapter_in_model(config, self.decoder, adapter_name=_NAME)
        modules = self.model.named_modules()
        self.adapted = {name: module for name, module in modules if hasattr(module, "lora_A")}

    def before_training(self) -> "BeforeTraining":
        """The frozen reference of equation 6."""
        return BeforeTraining(self)

    @torch.no_grad()
    def save(self, folder: Path | str) -> None:
        """An ordinary folder with the update added to the weights; and the adapters.

        In bfloat16 the sum is rounded: the adapters alone are exact.
        """
        state, merged = self.model.state_dict(), {}
        for name, tensor in state.items():
            owner, _, rest = name.partition(".base_layer.")
            if rest:
                update = self.adapted[owner].get_delta_weight(_NAME) if rest == "weight" else 0
                merged[f"{owner}.{rest}"] = (tensor.float() + update).to("cpu", tensor.dtype)
            elif ".lora_" not in name:
                merged[name] = tensor
        self.model.save_pretrained(folder, state_dict=merged)
        self.processor.save_pretrained(folder)
        adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        save_file(adapters, Path(folder) / FILE)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Put the adapters of a checkpoint back.  Raises DataError where it has none, or others."""
        try:
            adapters = load_file(folder / FILE)
        except FileNotFoundError:
            raise DataError(f"{folder}: holds no {FILE}: it was not trained with LoRA") from None
        own = {k: v.shape for k, v in self.model.state_dict().items() if ".lora_" in k}
        if own != {name: tensor.shape for name, tensor in adapters.items()}:
            raise DataError(f"{folder / FILE}: holds adapters of another rank or model")
        self.model.load_state_dict(adapters, strict=False)


class BeforeTraining(Policy):
    """A policy that computes log-probabilities with its adapters off, in no memory of its own."""

    def __init__(self, policy: AdaptedPolicy):
        self.__dict__ = policy.__dict__

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        for layer in self.adapted.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.adapted.values():
                layer.enable_adapters(True)

    def prefill(self, inputs: dict[str, Tensor]):
        """As `Policy.prefill`."""
        with self._off():
            return super().prefill(inputs)

    def per_token_logps(self, *given, **named) -> tuple[Tensor, Tensor]:
        """As `Policy.per_token_logps`."""
        with self._off():
            return super().per_token_logps(*given, **named)

    def full_per_token_logps(self, *given, **named) -> tuple[Tensor, Tensor]:
        """As `Policy.full_per_token_logps`."""
        with self._off():
            return super().full_per_token_logps(*given, **named)
