"""AdamW that keeps its weights in float32 while the model computes in bfloat16.

A bfloat16 weight near 1 cannot move by less than 0.004: at a learning rate of 1e-6 most steps would
round to nothing. So the steps are taken on a float32 copy, and the model gets the copy, rounded.
"""

from collections.abc import Iterable

import torch
from torch import nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of weights of another type; saved and restored with the copies."""

    def __init__(self, weights: Iterable[nn.Parameter], **settings):
        self.weights = list(weights)
        super().__init__([w.detach().float().clone() for w in self.weights], **settings)
        self.masters = self.param_groups[0]["params"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's weights."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of the copies, from the gradients of the model's weights, which then follow."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        super().step(closure)
        for master in self.masters:
            master.grad = None
        self._round()

    def state_dict(self) -> dict:
        """AdamW's, with each copy beside its moments."""
        saved = super().state_dict()
        state = {
            index: {**saved["state"].get(index, {}), "master": master}
            for index, master in enumerate(self.masters)
        }
        return {**saved, "state": state}

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Put moments and copies back, and the model's weights with them."""
        state = {index: dict(values) for index, values in saved["state"].items()}
        for index, master in enumerate(self.masters):
            master.copy_(state[index].pop("master"))
        super().load_state_dict({**saved, "state": {i: v for i, v in state.items() if v}})
        self._round()

    def _round(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)
