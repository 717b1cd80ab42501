"""The decoding rules give the numbers of their equations, worked by hand, and nothing else."""

import math

import pytest
import torch
from torch.nn import functional as F

from baselines.decoding import (
    deco_scores,
    diffuse,
    dola_scores,
    opera_penalty,
    opera_rollback,
    opera_scores,
    repetition_penalty,
    vcd_scores,
)

INF = math.inf


def row(*numbers):
    return torch.tensor([numbers])  # (1, V)


def layers(*rows):
    return torch.tensor(rows)[:, None]  # (J, 1, V)


def noise(*shape, seed=0, scale=2.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, atol=1e-5):
    want = torch.as_tensor(want, dtype=torch.float32)
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)


def softmax(*logits):
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


# Every rule as rule(final (R, V), other (J, R, V)) -> (R, V), for what must hold of all of them.
RULES = {
    "vcd": lambda final, other: vcd_scores(final, other[0]),
    "dola": lambda final, other: dola_scores(final, other)[0],
    "dola of the paper": lambda final, other: dola_scores(final, other, 0.1, "jensen_shannon")[0],
    "deco": deco_scores,
    # with nothing ruled out but what is forbidden
    "vcd of all": lambda final, other: vcd_scores(final, other[0], beta=0.0),
    "dola of all": lambda final, other: dola_scores(final, other, relative_top=0.0)[0],
    "deco of all": lambda final, other: deco_scores(final, other, top_p=1.0, top_k=1000),
    "opera": lambda final, other: opera_scores(final, final.topk(5).indices, other[0, :, :5]),
    "repetition": lambda final, other: repetition_penalty(final, other[0] > 0, 1.2),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# -- what holds of every rule ------------------------------------------------------------------
@every_rule
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_a_row_alone_is_the_row_in_a_batch(rule, scale):
    final, other = noise(16, 97, scale=scale), noise(4, 16, 97, seed=1, scale=scale)
    batch = rule(final, other)
    for r in range(16):
        assert torch.equal(batch[r], rule(final[r : r + 1], other[:, r : r + 1])[0])


@every_rule
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 10_000.0])
def test_every_row_keeps_a_token_and_no_score_is_nan(rule, scale):
    scores = rule(noise(64, 30, scale=scale), noise(4, 64, 30, seed=1, scale=scale))
    assert (scores > -INF).any(1).all() and not scores.isnan().any() and (scores < INF).all()


@every_rule
@pytest.mark.parametrize("masked_too", [True, False])
def test_forbidden_tokens_stay_forbidden_and_cost_no_row_its_scores(rule, masked_too):
    final, other = noise(8, 30), noise(4, 8, 30, seed=1)
    final[:, :3] += 50  # forbidden tokens may be the likeliest: none of the rules may count on them
    final[:, :3] = -INF
    if masked_too:
        other[:, :, :3] = -INF
    if rule is RULES["opera"]:
        other = other.clamp(min=-10)  # here it stands for penalties, which are finite
    scores = rule(final, other)
    assert (scores[:, :3] == -INF).all() and (scores[:, 3:] > -INF).any(1).all()
    assert not scores.isnan().any() and (scores < INF).all()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_worked_in_float32(rule, dtype):
    final, other = noise(8, 30).to(dtype), noise(4, 8, 30, seed=1).to(dtype)
    scores = rule(final, other)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, rule(final.float(), other.float()))


@every_rule
def test_arguments_are_not_written_into(rule):
    final, other = noise(8, 30), noise(4, 8, 30, seed=1)
    kept = final.clone(), other.clone()
    rule(final, other)
    assert torch.equal(final, kept[0]) and torch.equal(other, kept[1])


# (call, what the message says)
REFUSED = {
    "vcd: one row": (lambda: vcd_scores(noise(5), noise(5)), r"\(any, any\), got \(5,\)"),
    "vcd: rows differ": (lambda: vcd_scores(noise(2, 5), noise(3, 5)), r"distorted.*\(2, 5\)"),
    "vcd: words differ": (lambda: vcd_scores(noise(2, 5), noise(2, 1)), r"distorted.*\(2, 5\)"),
    "vcd: no word": (lambda: vcd_scores(noise(2, 0), noise(2, 0)), r"got \(2, 0\)"),
    "vcd: beta": (lambda: vcd_scores(noise(2, 5), noise(2, 5), 1, 1.1), "0 to 1, got 1.1"),
    "vcd: nan": (lambda: vcd_scores(noise(2, 5), noise(2, 5), 1, math.nan), "got nan"),
    "dola: one layer, no J": (lambda: dola_scores(noise(2, 5), noise(2, 5)), r"\(any, 2, 5\)"),
    "dola: no layer": (lambda: dola_scores(noise(2, 5), noise(0, 2, 5)), r"got \(0, 2, 5\)"),
    "dola: rows": (lambda: dola_scores(noise(2, 5), noise(3, 1, 5)), r"early.*\(3, 1, 5\)"),
    "dola: top": (lambda: dola_scores(noise(2, 5), noise(3, 2, 5), -0.1), "0 to 1, got -0.1"),
    "dola: divergence": (
        lambda: dola_scores(noise(2, 5), noise(3, 2, 5), 0.1, "kl"),
        "official, jensen_shannon, got 'kl'",
    ),
    "deco: no layer": (lambda: deco_scores(noise(2, 5), noise(0, 2, 5)), r"got \(0, 2, 5\)"),
    "deco: words": (lambda: deco_scores(noise(2, 5), noise(3, 2, 4)), r"layer.*\(3, 2, 4\)"),
    "deco: top_p": (lambda: deco_scores(noise(2, 5), noise(3, 2, 5), 0.6, 0.0), "top_p"),
    "deco: top_k": (lambda: deco_scores(noise(2, 5), noise(3, 2, 5), 0.6, 0.9, 0), "top_k"),
    "opera: not square": (lambda: opera_penalty(noise(2, 3, 4), noise(2)), r"\(\.\.\., k, k\)"),
    "opera: no token": (lambda: opera_penalty(noise(2, 0, 0), noise(2)), r"\(2, 0, 0\)"),
    "opera: image": (lambda: opera_penalty(noise(2, 3, 3), noise(3)), r"image.*\(2\).*\(3,\)"),
    "opera: sigma": (lambda: opera_penalty(noise(2, 3, 3), noise(2), -1), "sigma.*-1"),
    "opera: penalties": (
        lambda: opera_scores(noise(2, 5), torch.zeros(2, 3).long(), noise(1, 3)),
        r"penalty.*\(2, any\), got \(1, 3\)",
    ),
    "opera: candidates": (
        lambda: opera_scores(noise(2, 5), torch.zeros(2, 2).long(), noise(2, 3)),
        r"candidates.*\(2, 3\), got \(2, 2\)",
    ),
    "opera: columns": (lambda: opera_rollback(torch.zeros(3).long(), 0), r"got \(3,\)"),
    "repetition: ids": (
        lambda: repetition_penalty(noise(2, 5), torch.zeros(3).long(), 1.2),
        r"seen.*\(2, any\), got \(3,\)",
    ),
    "repetition: mask": (
        lambda: repetition_penalty(noise(2, 5), torch.zeros(2, 4).bool(), 1.2),
        r"seen.*\(2, 5\), got \(2, 4\)",
    ),
    "repetition: 0": (
        lambda: repetition_penalty(noise(2, 5), torch.zeros(2, 1).long(), 0),
        "above 0, got 0",
    ),
    "noise: step": (lambda: diffuse(noise(3), 1000, noise(3)), "0 to 999, got 1000"),
    "noise: before": (lambda: diffuse(noise(3), -1, noise(3)), "0 to 999, got -1"),
    "noise: shape": (lambda: diffuse(noise(2, 3), 5, noise(3)), r"\(3,\).*\(2, 3\)"),
    "noise: bytes": (lambda: diffuse(torch.zeros(3).byte(), 5, noise(3)), "uint8"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_shape_or_setting_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- VCD ---------------------------------------------------------------------------------------
# (l, l', alpha, beta, scores): each score is (1 + alpha) l - alpha l', where l >= ln(beta) + max l
VCD = [
    # cutoff 2 - 2.3026 = -0.3026 rules out the last; 4 - 1, 3 - 2, 0 - 0.5
    ([2, 1.5, 0, -1], [1, 2, 0.5, -1], 1.0, 0.1, [3, 1, -0.5, -INF]),
    # cutoff 2 - 1.6094 = 0.3906 keeps all; greedy's 0 loses to 1
    ([2, 1.8, 1, 0.5], [2.5, 0.5, 1, 0], 1.0, 0.2, [1.5, 3.1, 1, 1]),
    # without the bound token 2 would win with -2 + 8 = 6
    ([3, 0, -1], [3, -1, -8], 1.0, 0.1, [3, -INF, -INF]),
    ([3, 0, -1], [3, -1, -8], 1.0, 0.0, [3, 1, 6]),
    # alpha 0.5: 1.5 * 2 - 0.5 * 1, 1.5 * 1 - 0.5 * 3
    ([2, 1, -9], [1, 3, 0], 0.5, 0.1, [2.5, 0, -INF]),
    # beta 1 keeps the likeliest alone, every one of them
    ([2, 2, 1], [1, 0, 0], 1.0, 1.0, [3, 4, -INF]),
]


@pytest.mark.parametrize(("l", "other", "alpha", "beta", "want"), VCD)
def test_vcd_worked_by_hand(l, other, alpha, beta, want):  # noqa: E741
    scores = vcd_scores(row(*map(float, l)), row(*map(float, other)), alpha, beta)
    close(scores, [want])


def test_vcd_draws_from_the_softmax_of_its_scores():
    scores = vcd_scores(row(2.0, 1.5, 0.0, -1.0), row(1.0, 2.0, 0.5, -1.0))
    close(scores.softmax(-1), [[0.8580, 0.1161, 0.0259, 0.0]], atol=5e-5)
    close(scores.softmax(-1), [[*softmax(3, 1, -0.5), 0.0]])


def test_vcd_null_control_is_plain_decoding_on_the_plausible_tokens():
    l, other = noise(200, 40), noise(200, 40, seed=1)  # noqa: E741
    p = l.softmax(-1)
    plausible = p >= 0.1 * p.amax(-1, keepdim=True)
    assert 200 < plausible.sum() < 200 * 40  # the bound rules some out, and not all but one
    assert torch.equal(vcd_scores(l, other, alpha=0.0), l.masked_fill(~plausible, -INF))
    assert torch.equal(vcd_scores(l, other, alpha=0.0, beta=0.0), l)


def test_vcd_of_two_equal_images_is_plain_decoding():
    l = noise(200, 40)  # noqa: E741
    scores = vcd_scores(l, l)
    kept = scores > -INF
    close(scores[kept], l[kept])
    assert torch.equal(scores.argmax(-1), l.argmax(-1))


# -- the noised image --------------------------------------------------------------------------
# step, sqrt(abar), sqrt(1 - abar), and 0.8 of the one plus -1.5 of the other
SCHEDULE = [
    (0, 0.99999, 0.00473, 0.79290),
    (300, 0.98098, 0.19409, 0.49365),
    (500, 0.86302, 0.50517, -0.06735),
    (700, 0.59268, 0.80544, -0.73402),
    (900, 0.36489, 0.93105, -1.10467),
    (999, 0.28504, 0.95851, -1.20974),
]


@pytest.mark.parametrize(("step", "signal", "share", "mixed"), SCHEDULE)
def test_the_noise_schedule_worked_by_a_loop(step, signal, share, mixed):
    abar = 1.0
    for s in range(step + 1):
        x = -6 + 12 * s / 999
        abar *= 1 - (0.00499 / (1 + math.exp(-x)) + 0.00001)
    one, zero = torch.ones(1), torch.zeros(1)
    assert (math.sqrt(abar), math.sqrt(1 - abar)) == pytest.approx((signal, share), abs=1e-5)
    close(diffuse(one, step, zero), [math.sqrt(abar)], atol=1e-6)
    close(diffuse(zero, step, one), [math.sqrt(1 - abar)], atol=1e-6)
    close(diffuse(0.8 * one, step, -1.5 * one), [mixed])


def test_noised_pixels_leave_the_range_of_pixels_unclipped():
    noised = diffuse(torch.tensor([0.1, 0.5, 0.9, 0.9]), 500, torch.tensor([-1.0, 0.2, -0.5, 1.0]))
    close(noised, [-0.418873, 0.532543, 0.524128, 1.28189])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_noised_image_has_the_shape_and_type_of_the_image(dtype):
    pixels = noise(2, 3, 4, 4).to(dtype)
    noised = diffuse(pixels, 500, noise(2, 3, 4, 4, seed=1))
    assert noised.shape == pixels.shape and noised.dtype == dtype


def test_half_precision_pixels_are_mixed_in_float32_and_rounded_once():
    pixels, drawn = noise(500).half(), noise(500, seed=1).half()
    assert torch.equal(
        diffuse(pixels, 500, drawn), diffuse(pixels.float(), 500, drawn.float()).half()
    )


# -- DoLa --------------------------------------------------------------------------------------
def divergences(final, early):
    """The code's and the paper's, as sums over the vocabulary, by the definitions."""
    p, q = softmax(*final), softmax(*early)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(x, y):
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))

    return (kl(m, p) + kl(m, q)) / 2, (kl(p, m) + kl(q, m)) / 2


# (final, early layers, code's divergences, paper's, layer of the code, of the paper, scores of the code)
DOLA = [
    (
        [2, 1.6, 0, -2],
        [[2, 1.5, 0, -2], [2.5, -0.5, 1, 0.5]],
        [0.0003, 0.1565],
        None,
        (1, 1),
        [-0.2587, 2.3413, -0.7587, -INF],
    ),
    (  # a flat layer is the one least like the last: subtracting it leaves greedy's order
        [2, 1.6, 0, -2],
        [[1, 1, 1, 1], [2.5, 0.2, 0, -1]],
        [0.18791, 0.073567],
        [0.128199, 0.064393],
        (0, 0),
        [0.785278, 0.385278, -1.214722, -INF],
    ),
    (  # the two divergences choose different layers
        [2.7, 2.6, 2.5, -2.7],
        [[1.5, 1.2, 0.9, 1.3], [2.4, 0.8, -0.8, 0.2]],
        [0.257784, 0.196459],
        [0.099501, 0.138646],
        (0, 1),
        [0.130496, 0.330496, 0.530496, -INF],
    ),
]


@pytest.mark.parametrize(("final", "early", "official", "paper", "chosen", "want"), DOLA)
def test_dola_worked_by_hand(final, early, official, paper, chosen, want):
    of_code, of_paper = zip(*[divergences(final, layer) for layer in early], strict=True)
    assert of_code == pytest.approx(official, abs=5e-5)
    assert paper is None or of_paper == pytest.approx(paper, abs=1e-6)
    p, q = softmax(*final), softmax(*early[chosen[0]])
    by_hand = [math.log(a / b) if a >= 0.1 * max(p) else -INF for a, b in zip(p, q, strict=True)]
    logits, early_logits = row(*map(float, final)), layers(*early).float()
    scores, layer = dola_scores(logits, early_logits)
    close(scores, [by_hand])
    close(scores, [want], atol=5e-5)
    assert layer.tolist() == [chosen[0]]
    assert dola_scores(logits, early_logits, 0.1, "jensen_shannon")[1].tolist() == [chosen[1]]


@pytest.mark.parametrize(("name", "place"), [("official", 0), ("jensen_shannon", 1)])
def test_dola_chooses_a_layer_for_every_row_by_the_definition(name, place):
    final, early = noise(60, 12), noise(5, 60, 12, seed=1)
    _, chosen = dola_scores(final, early, 0.1, name)
    by_hand = [
        max(range(5), key=lambda j: divergences(final[r].tolist(), early[j, r].tolist())[place])
        for r in range(60)
    ]
    assert chosen.tolist() == by_hand and len(set(by_hand)) == 5


def test_dolas_official_divergence_is_kl_div_with_its_arguments_exchanged():
    final, early = noise(60, 300), noise(5, 60, 300, seed=1)
    p, q = final.softmax(-1), early.softmax(-1)
    m = (p + q) / 2
    of_p, of_q = (F.kl_div(x.log(), m, reduction="none").mean(-1) for x in (p.expand_as(q), q))
    assert torch.equal(dola_scores(final, early)[1], ((of_p + of_q) / 2).argmax(0))


@pytest.mark.parametrize("name", ["official", "jensen_shannon"])
def test_dola_of_a_layer_equal_to_the_last_scores_zero_and_prefers_any_other_layer(name):
    final = noise(50, 20)
    scores, _ = dola_scores(final, final.expand(3, -1, -1), 0.1, name)
    assert set(scores.unique().tolist()) == {-INF, 0.0}
    other = torch.stack([final, final.roll(1, -1), final])
    assert (dola_scores(final, other, 0.1, name)[1] == 1).all()


def test_dola_of_a_flat_layer_keeps_greedys_order():
    final = noise(50, 20)
    scores, _ = dola_scores(final, torch.zeros(1, 50, 20))
    assert torch.equal(scores.argmax(-1), final.argmax(-1))


def test_dola_bounds_what_it_keeps_by_relative_top_and_at_zero_keeps_all():
    final, early = noise(50, 20), noise(3, 50, 20, seed=1)
    p = final.softmax(-1)
    for top in (0.5, 0.1, 0.01):
        kept = dola_scores(final, early, top)[0] > -INF
        assert torch.equal(kept, p >= top * p.amax(-1, keepdim=True))
    scores, layer = dola_scores(final, early, 0.0)
    close(scores, p.log() - early[layer, torch.arange(50)].log_softmax(-1))


def test_dola_never_counts_forbidden_tokens():
    final, early = noise(30, 10), noise(4, 30, 10, seed=1)
    wide = torch.cat([torch.full((30, 3), -INF), final], -1)
    early_wide = torch.cat([noise(4, 30, 3, seed=2) + 20, early], -1)
    scores, layer = dola_scores(final, early)
    wide_scores, wide_layer = dola_scores(wide, early_wide)
    assert torch.equal(wide_layer, layer)
    close(wide_scores[:, 3:], scores)


# -- DeCo --------------------------------------------------------------------------------------
def test_deco_worked_by_hand():
    final = row(3.0, 2.6, 1.0, -1.0, -2.0)
    sure = [0.5, 4.0, 1.0, 0.0, -1.0]
    early = layers([1.0, 2.0, 0.5, 0.0, -1.0], sure, [2.5, 2.4, 1.0, -1.0, -2.0])
    # masses .5457 and .3658 pass .9; the middle layer is surest of one of the two: of token 1
    p, q = softmax(*final[0].tolist()), softmax(*sure)
    assert p[0] < 0.9 <= p[0] + p[1] and q[1] == pytest.approx(0.904946, abs=1e-6)
    by_hand = [3 + 0.6 * q[1] * 0.5, 2.6 + 0.6 * q[1] * 4.0, -INF, -INF, -INF]
    scores = deco_scores(final, early, 0.6, 0.9, 4)
    close(scores, [by_hand])
    close(scores, [[3.271484, 4.771871, -INF, -INF, -INF]])
    close(scores.softmax(-1), [[0.182368, 0.817632, 0.0, 0.0, 0.0]])


def test_deco_changes_nothing_where_one_token_is_the_only_candidate():
    final = row(6.0, 1.0, 0.5, 0.0, -1.0)
    early = layers([0.0, 5.0, 0.0, 0.0, 0.0], [1.0, 4.0, 0.0, 0.0, 0.0])
    # both layers are sure of token 1, which is no candidate; the second is surer of token 0
    q = softmax(1, 4, 0, 0, 0)[0]
    assert q == pytest.approx(0.045067, abs=1e-6) and q > softmax(0, 5, 0, 0, 0)[0]
    scores = deco_scores(final, early, 0.6, 0.9, 4)
    close(scores, [[6 + 0.6 * q * 1.0, -INF, -INF, -INF, -INF]])
    close(scores, [[6.02704, -INF, -INF, -INF, -INF]])


def plain_deco(final, early, alpha, top_p, top_k):
    """One row, by loops: (V,) and (J, V) lists."""
    p = softmax(*final)
    order = sorted(range(len(p)), key=lambda y: -p[y])
    candidates, mass = [], 0.0
    for y in order[:top_k]:
        candidates.append(y)
        mass += p[y]
        if mass >= top_p:
            break
    surest, layer = max((max(softmax(*m)[y] for y in candidates), -j) for j, m in enumerate(early))
    m = early[-layer]
    return [
        final[y] + alpha * surest * m[y] if y in candidates else -INF for y in range(len(final))
    ]


@pytest.mark.parametrize("alpha", [0.6, 0.0, -0.3])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 20), (0.9, 3), (0.3, 20), (1.0, 5), (0.01, 1)])
def test_deco_is_the_loop_over_tokens_and_layers(alpha, top_p, top_k):
    final, early = noise(40, 30, scale=1.0), noise(4, 40, 30, seed=1)
    got = deco_scores(final, early, alpha, top_p, top_k)
    for r in range(40):
        want = plain_deco(final[r].tolist(), early[:, r].tolist(), alpha, top_p, top_k)
        close(got[r], want)


def test_deco_null_control_is_plain_decoding_on_the_candidates():
    final, early = noise(200, 40), noise(3, 200, 40, seed=1)
    scores = deco_scores(final, early, alpha=0.0)
    kept = scores > -INF
    assert torch.equal(scores[kept], final[kept]) and (kept.sum(1) > 1).any()
    assert torch.equal(scores.argmax(-1), final.argmax(-1))
    assert torch.equal(deco_scores(final, early, alpha=0.0, top_p=1.0, top_k=40), final)


def test_deco_counts_a_mass_that_reaches_top_p_exactly():
    # probabilities 1/2, 1/4, 1/8, 1/8: two tokens reach 0.75, and a third would be one too many
    final = row(math.log(4), math.log(2), 0.0, 0.0)
    assert (deco_scores(final, final[None], top_p=0.75) > -INF).sum() == 2
    assert (deco_scores(final, final[None], top_p=0.7501) > -INF).sum() == 3


def test_deco_takes_no_token_of_probability_zero_however_the_mass_is_rounded():
    final = torch.cat([noise(200, 20), torch.full((200, 1), -500.0)], -1)
    mass = final.softmax(-1).sort(descending=True).values.cumsum(-1)[:, -1]
    assert (mass < 1).any()  # there the twenty do not quite reach 1
    scores = deco_scores(final, final[None], top_p=1.0, top_k=21)
    assert (scores[:, -1] == -INF).all()


# -- OPERA -------------------------------------------------------------------------------------
def trusting(k, column, share, elsewhere=0.01):
    """(k, k): every token pays `share` to one column, from its diagonal down, `elsewhere` to others."""
    attention = torch.full((k, k), elsewhere).tril()
    attention[column:, column] = share
    return attention


def test_opera_penalty_worked_by_hand():
    a = trusting(12, 3, 0.12)
    b = a.clone()
    b[11, 3] = 0.01
    penalty, column = opera_penalty(torch.stack([a, b]), torch.tensor([0.3, 0.3]))
    # rows 3 to 11 are nine factors of 50 * 0.12 = 6; the other candidate's last is 50 * 0.01 = 0.5
    close(penalty, [1e-7 * 6**9, 1e-7 * 6**8 * 0.5])
    close(penalty, [1.00777, 0.083981])
    assert column.tolist() == [3, 3]
    logits, candidates = row(4.0, 3.5), torch.tensor([[0, 1]])
    scores = opera_scores(logits, candidates, penalty[None])
    close(scores, [[2.99223, 3.416019]])


def test_opera_rewards_attention_to_the_image_up_to_the_tenth_token():
    image = torch.tensor([[0.2, 0.5, 0.1]])
    penalty, _ = opera_penalty(trusting(7, 2, 0.1).expand(1, 3, 7, 7), image)
    scores = opera_scores(row(5.0, 4.8, 4.5), torch.tensor([[0, 1, 2]]), penalty)
    close(scores, [[5.2, 5.3, 4.6]])


@pytest.mark.parametrize(("k", "want"), [(9, -0.25), (10, -0.25), (11, 5**11 * 1e-7)])
def test_opera_penalises_from_the_eleventh_token_on_and_names_the_column_from_the_first(k, want):
    for column in (0, 1):
        attention = trusting(k, column, 0.1)
        penalty, got = opera_penalty(attention, torch.tensor(0.25))
        close(penalty, want / 5**column if k > 10 else want)
        assert got == column


# (k, attention paid to column 0, penalty): below 1 in the unit, then a cliff; too little never acts
CLIFF = [(11, 0.02, 1e-7), (12, 0.1, 24.414), (15, 0.1, 3051.76), (30, 0.02, 1e-7)]


@pytest.mark.parametrize(("k", "share", "want"), CLIFF)
def test_operas_penalty_is_a_cliff(k, share, want):
    close(opera_penalty(trusting(k, 0, share, 0.001), torch.tensor(0.0))[0], want, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operas_product_does_not_overflow_in_half_precision(dtype):
    # 50 * 0.0625 = 3.125 exactly, and 3.125^11 is past float16's 65,504
    penalty, _ = opera_penalty(trusting(11, 0, 0.0625).to(dtype), torch.tensor(0.0, dtype=dtype))
    close(penalty, 1e-7 * 3.125**11)


def test_operas_scores_stay_finite_and_ordered_by_column_however_long_the_text():
    penalty, column = opera_penalty(trusting(512, 7, 0.9), torch.tensor(0.0))
    assert penalty.isfinite() and column == 7
    scores = opera_scores(row(1.0, 2.0, 3.0), torch.tensor([[1, 2]]), penalty.expand(1, 2))
    close(scores.log_softmax(-1), [[-INF, math.log(0.5), math.log(0.5)]])


def test_opera_reads_nothing_above_the_diagonal_and_takes_zeros():
    attention = noise(4, 12, 12).abs()
    assert torch.equal(
        opera_penalty(attention, torch.zeros(4))[0],
        opera_penalty(attention.tril(), torch.zeros(4))[0],
    )
    assert opera_penalty(torch.zeros(12, 12), torch.tensor(0.5))[0] == 0


def test_opera_compares_beams_by_log_probabilities_among_the_candidates():
    logits, penalty = row(2.0, 5.0, 4.8, 0.0, 4.5, 1.0), row(1.0, 0.1, 0.0)
    candidates = torch.tensor([[1, 2, 4]])
    # 5 - 1, 4.8 - 0.1, 4.5 - 0
    total = math.log(sum(map(math.exp, (4, 4.7, 4.5))))
    logps = opera_scores(logits, candidates, penalty).log_softmax(-1)
    close(logps, [[-INF, 4 - total, 4.7 - total, -INF, 4.5 - total, -INF]])
    close(logps[:, [1, 2, 4]], [[-1.539546, -0.839546, -1.039546]])
    # over the whole vocabulary, without penalties, they would be smaller by what the others weigh
    everything = torch.arange(6)[None]
    plain = opera_scores(logits, everything, torch.zeros(1, 6)).log_softmax(-1)
    close(plain[:, [1, 2, 4]], [[-0.916332, -1.116332, -1.416332]])


def test_opera_null_control_is_the_plain_order_of_the_candidates():
    logits = noise(5, 30)
    candidates = logits.topk(5).indices
    scores = opera_scores(logits, candidates, noise(5, 5, seed=1), alpha=0.0)
    kept = scores > -INF
    assert (kept.sum(1) == 5).all() and torch.equal(scores[kept], logits[kept])


# (what two beams remember, location, where to go back to)
ROLLBACKS = {
    "15 is not more than 15": ([[12] * 15 + [3, 4], [12] * 15 + [2, 2]], 12, None),
    "16 in both": ([[12] * 16 + [3], [12] * 16 + [2]], 12, 13),
    "16 in one only": ([[12] * 16 + [3], [12] * 15 + [2, 3]], 12, None),
    "position 9 is too early": ([[9] * 17, [9] * 17], 9, None),
    "position 10 is not": ([[10] * 17, [10] * 17], 10, 11),
    "nothing remembered": ([[], []], 12, None),
}


@pytest.mark.parametrize(("columns", "location", "want"), ROLLBACKS.values(), ids=ROLLBACKS)
def test_opera_steps_back_where_every_beam_hangs_on_one_token(columns, location, want):
    assert opera_rollback(torch.tensor(columns), location) == want


# -- repetition penalty ------------------------------------------------------------------------
SEEN = {
    "ids": torch.tensor([[0, 2]]),
    "ids again": torch.tensor([[2, 0, 2, 0]]),
    "mask": torch.tensor([[True, False, True, False]]),
}


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_repetition_penalty_worked_by_hand(seen):
    scores = row(0.7, 0.2, -0.4, -1.0)
    close(repetition_penalty(scores, seen, 1.2), [[0.7 / 1.2, 0.2, -0.4 * 1.2, -1.0]])


def test_repetition_penalty_null_control_and_ruled_out_tokens():
    scores = noise(20, 30)
    scores[:, :4] = -INF
    seen = torch.randint(30, (20, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(repetition_penalty(scores, seen, 1.0), scores)
    assert (repetition_penalty(scores, seen, 1.2)[:, :4] == -INF).all()
