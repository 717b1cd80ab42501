"""Learning from pairs of answers, one preferred: the DPO loss that HA-DPO, POVID and CSR share.

They differ in where the pairs come from. P pairs; a log-probability of an answer is the SUM over its
tokens, EOS included, prompt and image left out, at temperature 1 and without dropout.
"""

from torch import Tensor
from torch.nn import functional as F


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7), per pair.

        r(y) = log pi(y) - log pi_ref(y),   loss = -log sigmoid(beta (r(chosen) - r(rejected)))

    policy_chosen, policy_rejected: (P,) log pi of the two answers, with gradient.
    reference_chosen, reference_rejected: (P,) log pi_ref; no gradient flows into them.
    Returns (P,).  log 2 at the reference, whatever the lengths.  beta 0.1 is the three methods' own.
    ValueError where the four are not of one shape (P,).

    >>> import torch
    >>> dpo_loss(*torch.tensor([[-42.0], [-50.5], [-44.0], [-47.5]]))  # margin 0.1 (2.0 + 3.0)
    tensor([0.4741])
    """
    shapes = [
        tuple(x.shape)
        for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    ]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(f"all four log-probabilities must be (P,), got {shapes}")
    # Differences before the sum: each is small, and the sums over long answers are not.
    chosen = policy_chosen - reference_chosen.detach()
    rejected = policy_rejected - reference_rejected.detach()
    return -F.logsigmoid(beta * (chosen - rejected))
