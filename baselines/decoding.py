"""Decoding rules that the paper compares with: VCD, DoLa, DeCo and OPERA, as functions of logits.

Nothing here knows a model, a text or a file. At every step a rule turns the logits of R rows, and what
else it asked the model for, into scores (R, V): -inf where a token is ruled out. A caller then takes the
largest score, or draws from softmax(scores).

    rule    what it reads besides the final logits        its null control
    VCD     the logits under a noised image               alpha = 0: the plausible tokens alone
    DoLa    logits of earlier layers, final norm left out plain decoding with its repetition penalty
    DeCo    logits of earlier layers, final norm applied  alpha = 0: the candidates alone
    OPERA   attention of the last layer, per candidate    alpha = 0 and no rollback: beams alone

R, V as in copo.py; J earlier layers; c candidates per beam; k response tokens, the candidate included.
Logits are raw outputs of the head, of any float type; the work is done, and returned, in float32. Tokens
that must never be chosen may be -inf in the final logits: they are left out from the start, so every row
keeps a token. Rows never meet. A wrong shape or setting is a ValueError.

Sources are the papers and, for constants and order, the authors' code, read at these commits:
DAMO-NLP-SG/VCD d6568ff, voidism/DoLa 805230e, zjunlp/Deco fee8d75, shikiw/OPERA 61426ef. We depart from
that code in this:
 1. DoLa and DeCo choose a layer for each row; the code averages over the batch, or takes one row.
 2. The product of OPERA is taken in log space, and a penalty ends at e^80: float16 overflows at 11
    factors of 3.
 3. Off its candidates OPERA's code writes -999, and a penalty can pass 1,000 (15 tokens that pay 0.1 to
    one column): then a token that is no candidate wins. Here it is -inf. Below that nothing differs.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DIVERGENCES = ("official", "jensen_shannon")
NOISE_STEPS = 1000


def diffuse(pixel_values: Tensor, step: int, noise: Tensor) -> Tensor:
    """VCD's noised image: sqrt(abar_t) v + sqrt(1 - abar_t) noise, of a diffusion that ends at t = 999.

    beta_s = sigmoid(6 (2 s / 999 - 1)) (0.005 - 0.00001) + 0.00001, abar_t = prod_(s <= t) (1 - beta_s).

    pixel_values: normalised pixels, any shape, float.  step: t, 0 to 999.  noise: N(0, 1) of that shape,
    drawn once per image.  Returns that shape and type; not clipped.
    The paper's text has a constant beta of 0.1; this schedule is the code's (vcd_utils/vcd_add_noise.py).
    The paper takes t = 999 for POPE and 500 for MME, the code's scripts take 500 for POPE too.
    """
    if not 0 <= step < NOISE_STEPS:
        raise ValueError(f"the noise step must be 0 to {NOISE_STEPS - 1}, got {step}")
    if noise.shape != pixel_values.shape or not pixel_values.is_floating_point():
        raise ValueError(
            f"noise {tuple(noise.shape)} must have the shape of the pixels "
            f"{tuple(pixel_values.shape)}, and these must be floats, not {pixel_values.dtype}"
        )
    ramp = torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64).sigmoid()
    betas = ramp * (0.005 - 0.00001) + 0.00001
    abar = (1 - betas[: step + 1]).prod().item()
    noised = math.sqrt(abar) * pixel_values.float() + math.sqrt(1 - abar) * noise.float()
    return noised.to(pixel_values.dtype)


def vcd_scores(
    logits: Tensor, distorted_logits: Tensor, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Visual contrastive decoding (Leng et al., arXiv 2311.16922): what the image adds, counted twice.

        s(y) = (1 + alpha) l(y) - alpha l'(y)   where l(y) >= ln(beta) + max l,   -inf elsewhere

    logits: (R, V) l, given the image.  distorted_logits: (R, V) l', same text, given the noised image.
    Returns (R, V).  The bound says p(y) >= beta max p: without it a token that both find absurd can win.
    alpha 1 and beta 0.1 are the paper's; the code's POPE script has beta 0.2, and its fallback for alpha
    (the one that InstructBLIP gets) is 0.5. The paper draws at temperature 1.

    >>> vcd_scores(torch.tensor([[2.0, 1.5, 0.0, -1.0]]), torch.tensor([[1.0, 2.0, 0.5, -1.0]]))
    tensor([[ 3.0000,  1.0000, -0.5000,    -inf]])
    """
    logits = _checked("logits", logits, (None, None))
    distorted = _checked("distorted logits", distorted_logits, logits.shape)
    contrast = (1 + alpha) * logits - alpha * distorted
    return contrast.masked_fill(~_plausible(logits, beta), -torch.inf)


def dola_scores(
    final_logits: Tensor,
    early_logits: Tensor,
    relative_top: float = 0.1,
    divergence: str = "official",
) -> tuple[Tensor, Tensor]:
    """DoLa (Chuang et al., arXiv 2309.03883): what the last layers add to the earlier one least like them.

        s(y) = log p(y) - log q_j*(y)   where p(y) >= relative_top max p,   -inf elsewhere
        j*   = argmax_j d(p, q_j),   M = (p + q_j) / 2
        d    = (KL(M || p) + KL(M || q_j)) / 2     "official": the code
        d    = (KL(p || M) + KL(q_j || M)) / 2     "jensen_shannon": the paper

    final_logits: (R, V), of p.  early_logits: (J, R, V), of the q_j: the head applied to the hidden
    states of J layers, WITHOUT the final norm.  Returns the scores (R, V) and the layers chosen (R,),
    counted from 0 in the order given.
    The code hands kl_div its arguments in the other order than the paper's formula needs, so it has
    the reverse divergences, which are not bounded; the two can choose different layers. It takes their
    mean over the vocabulary, we the sum: the same choice. Its commands add `repetition_penalty` 1.2.

    >>> early = torch.tensor([[[2.0, 1.5, 0.0, -2.0]], [[2.5, -0.5, 1.0, 0.5]]])
    >>> dola_scores(torch.tensor([[2.0, 1.6, 0.0, -2.0]]), early)
    (tensor([[-0.2587,  2.3413, -0.7587,    -inf]]), tensor([1]))
    """
    final = _checked("final logits", final_logits, (None, None))
    early = _checked("early logits", early_logits, (None, *final.shape))
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    forbidden = final == -torch.inf
    log_p = final.log_softmax(-1)
    log_q = early.masked_fill(forbidden, -torch.inf).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # (J, R, V)
    if divergence == "official":
        terms = log_m.exp() * (2 * log_m - log_p - log_q)
    else:
        terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    layer = (terms.masked_fill(forbidden, 0).sum(-1) / 2).argmax(0)  # (R,)
    contrast = log_p - log_q[layer, torch.arange(len(layer), device=layer.device)]
    return contrast.masked_fill(~_plausible(log_p, relative_top), -torch.inf), layer


def deco_scores(
    final_logits: Tensor,
    layer_logits: Tensor,
    alpha: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 20,
) -> Tensor:
    """DeCo (Wang et al., arXiv 2410.11779): the earlier layer surest of a candidate corrects the last.

        C      = the fewest likeliest tokens of p whose mass reaches top_p, at most top_k
        j*, y* = argmax over layers j and y in C of q_j(y)
        s(y)   = l(y) + alpha q_j*(y*) m_j*(y)   for y in C,   -inf elsewhere

    final_logits: (R, V) l, of p = softmax(l).  layer_logits: (J, R, V) m_j, of q_j = softmax(m_j): the
    head applied to the hidden states of J layers, WITH the final norm.  Returns (R, V).
    The correction adds raw logits, not log-probabilities. With a single candidate it changes nothing.
    alpha 0.6 is the scripts' value; the code's README says 0.5. Layers 20 to 28 of 32 there.

    >>> layers = torch.tensor([[[0.5, 4.0, 1.0, 0.0, -1.0]]])
    >>> deco_scores(torch.tensor([[3.0, 2.6, 1.0, -1.0, -2.0]]), layers, top_k=4)
    tensor([[3.2715, 4.7719,   -inf,   -inf,   -inf]])
    """
    final = _checked("final logits", final_logits, (None, None))
    layers = _checked("layer logits", layer_logits, (None, *final.shape))
    if not 0 < top_p <= 1 or top_k < 1:
        raise ValueError(f"top_p must be above 0 and up to 1, top_k at least 1: {top_p}, {top_k}")
    p, ids = final.softmax(-1).topk(min(top_k, final.shape[1]))  # (R, K), the likeliest first
    mass_before = F.pad(p.cumsum(-1)[:, :-1], (1, 0))
    candidate = (mass_before < top_p) & (p > 0)
    m = layers.gather(-1, ids.expand(len(layers), -1, -1))  # (J, R, K)
    q = (m - layers.logsumexp(-1, keepdim=True)).exp()
    surest, layer = q.masked_fill(~candidate, 0).amax(-1).max(0)  # (R,), (R,)
    correction = m[layer, torch.arange(len(layer), device=layer.device)]  # (R, K)
    scores = final.gather(-1, ids) + alpha * surest[:, None] * correction
    nowhere = torch.full_like(final, -torch.inf)
    return nowhere.scatter(-1, ids, scores.masked_fill(~candidate, -torch.inf))


def opera_penalty(
    attention: Tensor,
    image_attention: Tensor,
    sigma: float = 50.0,
    unit: float = 1e-7,
    bonus_until: int = 10,
) -> tuple[Tensor, Tensor]:
    """OPERA's over-trust penalty (Huang et al., arXiv 2311.17911): text that hangs on one earlier token.

        phi_j   = unit prod_(i >= j) sigma a[i, j]         over the rows i of the k response tokens
        penalty = max_j phi_j  for k > bonus_until,   -image_attention  for k <= bonus_until
        column  = argmax_j phi_j, whatever k is

    attention: (..., k, k) a[i, j], what response token i pays to token j, one matrix per candidate, whose
    own row is the last. From the last layer: the largest over heads, then divided by the row's sum over
    ALL keys, prompt and image included. Above the diagonal it is not read.
    image_attention: (...) what the candidate's row so divided pays to the image.
    Returns penalty (...) and column (...), counted from 0.
    The unit and the bonus on the first ten tokens are in the code only.
    """
    if attention.dim() < 2 or attention.shape[-1] != attention.shape[-2] or 0 in attention.shape:
        raise ValueError(f"attention must be (..., k, k), got {tuple(attention.shape)}")
    if sigma <= 0 or unit <= 0:
        raise ValueError(f"sigma and unit must be above 0, got {sigma} and {unit}")
    image = _checked("image attention", image_attention, attention.shape[:-2])
    k = attention.shape[-1]
    above = attention.new_ones(k, k, dtype=torch.bool).triu(1)
    log_factors = (sigma * attention.float()).log().masked_fill(above, 0)
    log_phi, column = (log_factors.sum(-2) + math.log(unit)).max(-1)
    # Past e^88 float32 has only inf, and a beam whose candidates all score -inf has no log_softmax.
    return (-image if k <= bonus_until else log_phi.clamp(max=80).exp()), column


def opera_scores(logits: Tensor, candidates: Tensor, penalty: Tensor, alpha: float = 1.0) -> Tensor:
    """OPERA's scores of a step: l(y) - alpha penalty(y) for a beam's candidates, -inf elsewhere.

    logits: (R, V), one row per beam.  candidates: (R, c) different token ids, those with the largest
    logits.  penalty: (R, c), of `opera_penalty`.  Returns (R, V).
    Beams are compared by log_softmax(scores): log-probabilities among the candidates, not the vocabulary.
    """
    logits = _checked("logits", logits, (None, None))
    penalty = _checked("penalty", penalty, (len(logits), None))
    _checked("candidates", candidates, penalty.shape)
    scores = logits.gather(-1, candidates) - alpha * penalty
    return torch.full_like(logits, -torch.inf).scatter(-1, candidates, scores)


def opera_rollback(
    columns: Tensor, location: int, threshold: int = 15, earliest: int = 10
) -> int | None:
    """Where OPERA steps back to: the response token after `location`, which is chosen anew; None to go on.

    Back if `location` is `earliest` or later and every beam remembers it more than `threshold` times.

    columns: (beams, steps), what each beam remembers: per step, the commonest column of its candidates'
    `opera_penalty`.  location: the commonest column of the beams in this step.  Both count from 0.
    The code asks for more than 15, the paper for 15 or more.
    """
    if columns.dim() != 2:
        raise ValueError(f"columns must be (beams, steps), got {tuple(columns.shape)}")
    trusted = ((columns == location).sum(1) > threshold).all()
    return location + 1 if location >= earliest and trusted else None


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Seen tokens made less likely: s / penalty where s > 0, s penalty elsewhere.

    scores: (R, V).  seen: the tokens of a row's prompt and text, (R, V) bool, or ids (R, S) in which
    repeats do no harm.  penalty: 1 changes nothing; DoLa's commands have 1.2.  Returns (R, V).
    From CTRL (Keskar et al., arXiv 1909.05858), which divides whatever the sign: a score below 0 would rise.
    """
    scores = _checked("scores", scores, (None, None))
    if penalty <= 0:
        raise ValueError(f"a repetition penalty must be above 0, got {penalty}")
    if seen.dtype != torch.bool:
        _checked("seen", seen, (len(scores), None))
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, seen, True)
    _checked("seen", seen, scores.shape)
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _plausible(logits: Tensor, share: float) -> Tensor:
    """Tokens with p(y) >= share max p (contrastive decoding, Li et al., arXiv 2210.15097): (R, V) bool."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the likeliest token must be 0 to 1, got {share}")
    cutoff = logits.amax(-1, keepdim=True) + (math.log(share) if share else -math.inf)
    return (logits >= cutoff) & (logits > -torch.inf)


def _checked(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor in float32, or a ValueError; None in the shape is any size but 0."""
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        have != want if want is not None else have == 0
        for have, want in zip(sizes, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), got {sizes}")
    return tensor.float()
