"""The decoding loop gives what plain passes without a cache give, and costs what it says."""

import contextlib
import copy
import dataclasses
import functools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from baselines import generate
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
from baselines.generate import Stream, answer
from baselines.settings import OPERA, VCD, Beam, DeCo, DoLa, Plain
from data import DataError, Example, collate, with_opening
from data import opening as opened_with
from model import load_policy
from scm import sample_example

TOKENS = 12
RULES = [
    Plain(repetition_penalty=1.3),
    VCD(),
    DoLa(layers="1,2"),
    DoLa(layers="1,2", divergence="jensen_shannon", repetition_penalty=1.0),
    DeCo(),
    DeCo(layers="0,1,2", top_p=1.0, alpha=2.0),
    Beam(num_beams=3),
    OPERA(num_beams=3, candidates=2),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@pytest.fixture(scope="module")
def talker(speaker):
    """A policy that has just learned the format: its answers differ, and end."""
    return load_policy(speaker)


def uniforms(rows=3, seed=0):
    return torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def counted(module):
    """What goes through a module: a list of (rows, tokens) of its calls."""
    calls = []

    def hook(_, args, kwargs):
        given = kwargs.get("inputs_embeds", args[0] if args else None)
        calls.append(tuple(given.shape[:-1]))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------
# The slow plain way: one question, everything read again for every token, no cache
# ---------------------------------------------------------------------------------------------
def whole(policy, inputs, ids, **wanted):
    """Logits (1, V) after a prompt and text (n,), and the output of that one pass."""
    text = ids[None]
    given = policy.quirks.append(inputs, text, torch.ones_like(text)) if len(ids) else dict(inputs)
    given |= policy.quirks.before_prefill(given["attention_mask"].bool())
    out = policy.model(**given, use_cache=False, **wanted)
    return out.logits[:, -1].float(), out


def slow_scores(policy, example, inputs, rule, ids):
    logits, out = whole(policy, inputs, ids, output_hidden_states=True)
    final = logits.masked_fill(policy.forbidden, -torch.inf)
    hidden = [states[:, -1] for states in out.hidden_states]
    if isinstance(rule, VCD):
        noise = generate.image_noise(policy, [example], True, inputs["pixel_values"], 0)
        noised = diffuse(inputs["pixel_values"], rule.noise_step, noise)
        other, _ = whole(policy, inputs | {"pixel_values": noised}, ids)
        final = vcd_scores(final, other, rule.alpha, rule.beta)
    elif isinstance(rule, DoLa):
        early = torch.stack([policy.head(hidden[int(i)]) for i in rule.layers.split(",")])
        final, _ = dola_scores(final, early, rule.relative_top, rule.divergence)
    elif isinstance(rule, DeCo):
        layers = [2] if rule.layers == "late" else [int(i) for i in rule.layers.split(",")]
        early = torch.stack([policy.head(policy.decoder.norm(hidden[i])) for i in layers])
        final = deco_scores(final, early, rule.alpha, rule.top_p, rule.top_k)
    seen = torch.cat([inputs["input_ids"][0], ids])[None]
    return repetition_penalty(final, seen, rule.repetition_penalty)


def slow_tokens(policy, example, inputs, rule, tokens=TOKENS):
    ids = torch.zeros(0, dtype=torch.long)
    while len(ids) < tokens and not (len(ids) and ids[-1] in policy.eos_ids):
        ids = torch.cat([ids, slow_scores(policy, example, inputs, rule, ids).argmax(-1)])
    return ids


def slow_beams(policy, width, tokens, scores_of):
    """The best text by beams, plain lists; scores_of(beam texts) -> (b, V) of the next token.

    scores_of may hand back another state to go on from, as (texts, sums, ended).
    """
    state = ([[]] + [[]] * (width - 1), [0.0] + [generate.NEVER] * (width - 1), [])
    while True:
        texts, sums, ended = state
        answered = scores_of(texts, sums, ended)
        if isinstance(answered, tuple):
            state = answered
            continue
        logps = answered.log_softmax(-1)
        total = torch.tensor(sums)[:, None] + logps
        order = total.flatten().argsort(descending=True, stable=True)[: 2 * width].tolist()
        n, V = len(texts[0]) + 1, logps.shape[1]
        options = [(total.flatten()[i].item(), i // V, i % V) for i in order]
        last = n == tokens
        ended = ended + [
            (score / n, [*texts[b], token])
            for score, b, token in options[:width]
            if last or token in policy.eos_ids
        ]
        ended = sorted(ended, key=lambda one: -one[0])[:width]
        going = [one for one in options if one[2] not in policy.eos_ids][:width]
        scores_of.chosen = [(b, token) for _, b, token in going]
        if last or (len(ended) == width and going[0][0] / n <= ended[-1][0]):
            return ended[0][1]
        state = ([[*texts[b], t] for _, b, t in going], [score for score, *_ in going], ended)


def plain_scores(policy, inputs):
    """For `slow_beams`: logits of whole passes, forbidden tokens left out."""

    def logits(texts, sums, ended):
        rows = [whole(policy, inputs, torch.tensor(text).long())[0] for text in texts]
        return torch.cat(rows).masked_fill(policy.forbidden, -torch.inf)

    return logits


class SlowOpera:
    """OPERA's scores from whole passes; keeps every earlier state as it was."""

    penalty, rollback = staticmethod(opera_penalty), staticmethod(opera_rollback)

    def __init__(self, policy, inputs, rule):
        self.policy, self.inputs, self.rule = policy, inputs, rule
        self.columns, self.states, self.pairs = [], [], []
        self.refused, self.times = {}, Counter()
        self.again, self.steps_back, self.chosen = False, [], None

    def __call__(self, texts, sums, ended):
        k = len(texts[0])
        if k > len(self.pairs):
            self.pairs.append(self.chosen)
        self.states[k:] = [copy.deepcopy((texts, sums, ended))]
        logits = torch.cat([self.read(text)[0] for text in texts])
        if self.again:
            self.again = False
            for b, token in (pair for pairs in self.refused[k] for pair in pairs):
                logits[b, token] = -torch.inf
            return logits
        candidates = logits.topk(self.rule.candidates).indices
        penalties, columns = zip(*map(self.weigh, texts, candidates.tolist()), strict=True)
        self.columns = [*self.columns, [max(sorted(c), key=c.count) for c in columns]]
        now = sorted(self.columns[-1])
        place = self.rollback(
            torch.tensor(self.columns).T, max(now, key=now.count), self.rule.threshold
        )
        for t in [] if place is None else [place, place - 1]:
            if t < len(self.pairs) and self.times[t] < self.rule.rollbacks:
                self.steps_back.append((k, t))
                return self.back(t)
        return opera_scores(logits, candidates, torch.stack(penalties), self.rule.alpha)

    def back(self, t):
        self.times[t] += 1
        self.refused.setdefault(t, []).append(self.pairs[t])
        self.refused = {place: pairs for place, pairs in self.refused.items() if place <= t}
        state = copy.deepcopy(self.states[t])
        self.pairs, self.states, self.columns = (
            self.pairs[:t],
            self.states[:t],
            self.columns[: t + 1],
        )
        self.again = True
        return state

    def read(self, text):
        ids = torch.tensor(text, dtype=torch.long)
        logits, out = whole(self.policy, self.inputs, ids, output_attentions=True)
        shares = out.attentions[-1][0].amax(0)
        shares = shares / shares.sum(-1, keepdim=True)
        return logits.masked_fill(self.policy.forbidden, -torch.inf), shares

    def weigh(self, text, candidates):
        P = self.inputs["input_ids"].shape[1]
        image = self.inputs["input_ids"][0] == self.policy.model.config.image_token_id
        shares = torch.stack([self.read([*text, token])[1][P:] for token in candidates])
        on_image = shares[:, -1, :P][:, image].sum(-1)
        penalty, column = self.penalty(shares[:, :, P:], on_image, self.rule.sigma)
        return penalty, column.tolist()


def spelled(policy, example, ids):
    return with_opening(opened_with(example, policy.processor, True), policy.text(ids))


# ---------------------------------------------------------------------------------------------
# The loop against the policy's own
# ---------------------------------------------------------------------------------------------
def test_without_a_rule_the_loop_is_the_policys_own_token_for_token(policy, talker, examples):
    for model in (policy, talker):
        assert answer(model, examples, Plain(), TOKENS) == model.answer(examples, TOKENS)
        for temperature in (0.7, 1.5):
            drawn = answer(model, examples, Plain(), TOKENS, True, uniforms(), temperature)
            assert drawn == model.answer(examples, TOKENS, True, uniforms(), temperature)
        bare = answer(model, examples, Plain(), TOKENS, think=False)
        assert bare == model.answer(examples, TOKENS, think=False)


def test_rows_that_end_leave_the_stream_and_the_others_go_on(talker, examples):
    with counted(talker.decoder) as calls:
        answers = answer(talker, examples, Plain(), 60)
    assert answers == talker.answer(examples, 60)
    rows = [call[0] for call in calls]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) > 1


def test_every_family_reads_the_same_with_and_without_a_cache(family):
    policy, prefix, _, (inputs,) = family
    ids = (~policy.forbidden).nonzero()[-4:, 0]
    with torch.no_grad():
        stream = Stream(policy, inputs, hidden=True)
        assert torch.allclose(stream.allowed, prefix.logits, atol=1e-4)
        for n in range(1, 5):
            stream.extend(ids[None, n - 1 : n])
            plain = policy.full_logits(
                inputs, torch.cat([ids[:n], ids[:1]])[None], torch.ones(1, n + 1).long()
            )
            allowed = ~policy.forbidden
            assert torch.allclose(stream.logits[:, allowed], plain[:, -1][:, allowed], atol=1e-4)
            assert len(stream.hidden) == policy.decoder.config.num_hidden_layers + 1
            # the last one has been through the final norm already
            assert torch.allclose(policy.head(stream.hidden[-1]).float(), stream.logits, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Rules against the slow way
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES[:-2], ids=lambda rule: rule.name)
def test_a_rule_gives_what_whole_passes_without_a_cache_give(
    policy, talker, examples, prompts, rule
):
    for model in (policy, talker):
        with torch.no_grad():
            slow = [
                spelled(model, example, slow_tokens(model, example, inputs, rule))
                for example, inputs in zip(examples, prompts, strict=True)
            ]
        assert answer(model, examples, rule, TOKENS) == slow


def test_beams_are_those_of_plain_lists_and_of_transformers(policy, talker, examples, prompts):
    for model, width in ((policy, 3), (talker, 2), (talker, 4)):
        forbidden = model.forbidden.nonzero()[:, 0].tolist()
        with torch.no_grad():
            fast = answer(model, examples, Beam(num_beams=width), TOKENS)
            for example, inputs, text in zip(examples, prompts, fast, strict=True):
                slow = slow_beams(model, width, TOKENS, plain_scores(model, inputs))
                theirs = model.model.generate(
                    **inputs, num_beams=width, do_sample=False, max_new_tokens=TOKENS,
                    suppress_tokens=forbidden, length_penalty=1.0,
                )[0, inputs["input_ids"].shape[1] :]  # fmt: skip
                assert text == spelled(model, example, torch.tensor(slow))
                assert text == spelled(model, example, theirs)


@pytest.mark.parametrize(
    "rule",
    [OPERA(num_beams=3, candidates=2), OPERA(num_beams=2, candidates=3, alpha=4.0)],
)
def test_opera_gives_what_whole_passes_give(policy, talker, examples, prompts, monkeypatch, rule):
    before = [answer(model, examples[1:2], rule, 6) for model in (policy, talker)]
    # the penalty after two tokens instead of ten, so that short texts meet it, and large enough to matter
    soon = functools.partial(opera_penalty, bonus_until=2, unit=0.1)
    monkeypatch.setattr(generate, "opera_penalty", soon)
    monkeypatch.setattr(SlowOpera, "penalty", staticmethod(soon))
    for model in (policy, talker):
        same_as_slow(model, examples[1], prompts[1], rule, 6)
    assert before != [answer(model, examples[1:2], rule, 6) for model in (policy, talker)]


@pytest.fixture
def early(monkeypatch):
    """OPERA that hangs on token 3 and steps back from the second token on, so that short texts do."""

    def hung(attention, image_attention, sigma):
        penalty, _ = opera_penalty(attention, image_attention, sigma)
        return penalty, torch.full_like(penalty, min(attention.shape[-1] - 1, 3)).long()

    soon = functools.partial(opera_rollback, earliest=2)
    monkeypatch.setattr(generate, "opera_penalty", hung)
    monkeypatch.setattr(generate, "opera_rollback", soon)
    monkeypatch.setattr(SlowOpera, "penalty", staticmethod(hung))
    monkeypatch.setattr(SlowOpera, "rollback", staticmethod(soon))


@pytest.mark.parametrize("rollbacks", [0, 1, 3])
def test_opera_steps_back_to_the_very_state_it_had(
    policy, examples, prompts, monkeypatch, early, rollbacks
):
    steps_back, step_back = [], generate.Opera._step_back

    def noted(search, place):
        steps_back.append((search.beams.ids.shape[1], place))
        step_back(search, place)

    monkeypatch.setattr(generate.Opera, "_step_back", noted)
    rule = OPERA(num_beams=3, candidates=2, threshold=2, rollbacks=rollbacks)
    assert same_as_slow(policy, examples[0], prompts[0], rule, 8) == steps_back
    places = [place for _, place in steps_back]
    assert places == [4] * rollbacks + [3] * rollbacks  # where one is worn out, to the one before


def test_operas_attention_and_logits_are_those_of_its_beams_after_every_step(
    talker, examples, prompts, monkeypatch, early
):
    slow, P = SlowOpera(talker, prompts[0], None), prompts[0]["input_ids"].shape[1]
    orders = []

    def check(search):
        read = [slow.read(ids.tolist()) for ids in search.beams.ids]
        assert torch.allclose(search.logits, torch.cat([row for row, _ in read]), atol=1e-4)
        shares = torch.stack([one[P:, P:] for _, one in read])
        assert torch.allclose(search.rows, shares, atol=1e-5)

    def then_check(step):
        def checked(search, *args):
            step(search, *args)
            if not search.beams.done:
                orders.append(search.chosen[-1][0].tolist())
                check(search)

        return checked

    for name in ("_choose", "_step_back"):
        monkeypatch.setattr(generate.Opera, name, then_check(getattr(generate.Opera, name)))
    answer(talker, examples[:1], OPERA(num_beams=3, candidates=3, threshold=2, rollbacks=1), 7)
    assert any(order not in ([0, 0, 0], [0, 1, 2]) for order in orders)  # beams did change places


def plain_opera(model, inputs, rule, tokens, earliest):
    """OPERA from its description alone: lists, whole passes, products; (ids, places it stepped back to)."""
    image = (inputs["input_ids"][0] == model.model.config.image_token_id).nonzero()[:, 0].tolist()
    b, P, V = rule.num_beams, inputs["input_ids"].shape[1], len(model.forbidden)
    texts, sums, ended = [()] * b, [0.0] + [-1e9] * (b - 1), []
    states, picked, remembered, times, refused, back = [], [], [], Counter(), {}, []

    def read(text):
        logits, out = whole(model, inputs, torch.tensor(text).long(), output_attentions=True)
        most = out.attentions[-1][0].amax(0)
        return logits[0].masked_fill(model.forbidden, -torch.inf), most / most.sum(-1, keepdim=True)

    def weigh(text, token):
        shares = read((*text, token))[1].tolist()
        k = len(text) + 1
        phi = [
            1e-7 * math.prod(rule.sigma * shares[P + i][P + j] for i in range(j, k))
            for j in range(k)
        ]
        return max(phi) if k > 10 else -sum(shares[-1][i] for i in image), phi.index(max(phi))

    def commonest(values):
        return min(set(values), key=lambda value: (-values.count(value), value))

    while True:
        n = len(texts[0])
        states[n:] = [(texts, sums, ended)]
        plain, scores, columns = [read(text)[0] for text in texts], [], []
        for text, logits in zip(texts, plain, strict=True):
            row, found = [-math.inf] * V, []
            for token in logits.topk(rule.candidates).indices.tolist():
                penalty, column = weigh(text, token)
                row[token] = logits[token].item() - rule.alpha * penalty
                found.append(column)
            scores.append(row)
            columns.append(commonest(found))
        remembered[n:] = [columns]
        s = commonest(columns)
        worn = all(sum(one[i] == s for one in remembered) > rule.threshold for i in range(b))
        places = [t for t in (s + 1, s) if t < n and times[t] < rule.rollbacks]
        if worn and s >= earliest and places:
            t = places[0]
            times[t] += 1
            back.append(t)
            refused = {k: v for k, v in refused.items() if k < t} | {
                t: refused.get(t, []) + picked[t]
            }
            texts, sums, ended = states[t]
            picked, remembered = picked[:t], remembered[: t + 1]
            scores = [read(text)[0].tolist() for text in texts]
            for i, token in refused[t]:
                scores[i][token] = -math.inf
        n = len(texts[0]) + 1
        logps = torch.tensor(scores).log_softmax(-1) + torch.tensor(sums)[:, None]
        order = logps.flatten().argsort(descending=True, stable=True)[: 2 * b].tolist()
        found = [(logps.flatten()[i].item(), i // V, i % V) for i in order]
        over = [
            (x / n, (*texts[i], v)) for x, i, v in found[:b] if v in model.eos_ids or n == tokens
        ]
        ended = sorted(ended + over, key=lambda one: -one[0])[:b]
        found = [one for one in found if one[2] not in model.eos_ids][:b]
        if n == tokens or (len(ended) == b and found[0][0] / n <= ended[-1][0]):
            return list(ended[0][1]), back
        picked.append([(i, v) for _, i, v in found])
        texts, sums = [(*texts[i], v) for _, i, v in found], [x for x, _, _ in found]


def test_opera_is_its_description_where_its_own_attention_makes_it_step_back(
    policy, talker, examples, prompts, monkeypatch
):
    """Nothing is forced here but how soon: which column is trusted, and where it steps back, it finds."""
    soon = functools.partial(opera_rollback, earliest=1)
    monkeypatch.setattr(generate, "opera_rollback", soon)
    seen = []
    for model in (policy, talker):
        for example, inputs in zip(examples, prompts, strict=True):
            rule = OPERA(num_beams=2, candidates=2, threshold=1, rollbacks=2, sigma=60.0)
            with torch.no_grad(), generate.eager_attention(model):
                ids, back = plain_opera(model, inputs, rule, 14, 1)
            assert answer(model, [example], rule, 14) == [
                spelled(model, example, torch.tensor(ids))
            ]
            seen.append(back)
    assert any(len(set(back)) > 1 for back in seen), seen  # to several places in one text


def test_a_step_back_keeps_its_choices_column_and_frees_what_was_refused_after_it(talker, prompts):
    rule = OPERA(num_beams=3, candidates=3)
    image = prompts[0]["input_ids"][0] == talker.model.config.image_token_id
    with torch.no_grad(), generate.eager_attention(talker):
        search = generate.Opera(talker, Stream(talker, prompts[0], attention=True), image, rule)

        def choose(scores_of):
            search.before.append(copy.copy(search.beams))
            search._choose(scores_of(), 30)

        for _ in range(6):
            choose(search._penalised)
        remembered, first = search.columns, search.chosen[4]
        search._step_back(4)
        assert torch.equal(search.columns, remembered[:, :5]) and len(search.chosen) == 4
        choose(search._anew)
        old, new = (
            set(zip(*(x.tolist() for x in pair), strict=True)) for pair in (first, search.chosen[4])
        )
        assert not old & new
        choose(search._penalised)
        assert search.columns.shape[1] == 6  # one for each token, the one chosen anew included
        search._step_back(3)
        assert set(search.refused) == {3} and search.times == {4: 1, 3: 1}


def same_as_slow(model, example, inputs, rule, tokens):
    """Asserts that OPERA says what the slow way says; the steps back of that, as (from, to)."""
    with torch.no_grad(), generate.eager_attention(model):
        slow = SlowOpera(model, inputs, rule)
        ids = slow_beams(model, rule.num_beams, tokens, slow)
    assert answer(model, [example], rule, tokens) == [spelled(model, example, torch.tensor(ids))]
    return slow.steps_back


# ---------------------------------------------------------------------------------------------
# Families: their caches, positions and pictures differ; each has two layers here
# ---------------------------------------------------------------------------------------------
OF_TWO_LAYERS = [
    Plain(repetition_penalty=1.3),
    VCD(),
    DoLa(layers="1"),
    DoLa(layers="0,1", divergence="jensen_shannon", repetition_penalty=1.0),
    DeCo(layers="0,1", top_p=1.0, alpha=2.0),
    Beam(num_beams=3),
    OPERA(num_beams=2, candidates=3),
]
SIZES = ((40, 40), (28, 56), (56, 28), (84, 56))  # tiles and patches in different numbers


@pytest.fixture(scope="module", params=["llava_clip", "qwen2_5_vl", "idefics3"])
def other(request, folder_of):
    return load_policy(folder_of(request.param))


@pytest.fixture(scope="module")
def sixteen():
    """Questions about pictures of four sizes."""
    rng = random.Random(0)
    asked = [sample_example(rng) for _ in range(16)]
    return [
        dataclasses.replace(one, image=one.open_image().resize(SIZES[i % 4]))
        for i, one in enumerate(asked)
    ]


@pytest.mark.parametrize("rule", OF_TWO_LAYERS, ids=lambda rule: rule.name)
def test_in_every_family_an_answer_is_the_same_at_batch_1_and_16_and_in_whole_passes(
    other, sixteen, rule
):
    tokens, drawn = 5, torch.rand(16, 5, generator=torch.Generator().manual_seed(0))
    batch = answer(other, sixteen, rule, tokens)
    assert [answer(other, [one], rule, tokens)[0] for one in sixteen[:4]] == batch[:4]
    if rule.draws:
        of_each = [
            answer(other, [one], rule, tokens, True, drawn[i : i + 1])[0]
            for i, one in enumerate(sixteen[:4])
        ]
        assert answer(other, sixteen, rule, tokens, True, drawn)[:4] == of_each
        assert len(set(of_each)) == 4
    for example, text in list(zip(sixteen, batch, strict=True))[2:4]:
        inputs = collate([example], other.processor)
        with torch.no_grad():
            if isinstance(rule, OPERA):
                same_as_slow(other, example, inputs, rule, tokens)
            elif isinstance(rule, Beam):
                ids = slow_beams(other, rule.num_beams, tokens, plain_scores(other, inputs))
                assert text == spelled(other, example, torch.tensor(ids))
            else:
                ids = slow_tokens(other, example, inputs, rule, tokens)
                assert text == spelled(other, example, ids)


def test_in_every_family_null_controls_are_plain_decoding(other, sixteen):
    greedy = other.answer(sixteen, 5)
    for rule in (
        Plain(),
        VCD(alpha=0.0),
        DoLa(layers="1", relative_top=1.0, repetition_penalty=1.0),
        DeCo(layers="1", alpha=0.0),
        Beam(num_beams=1),
    ):
        assert answer(other, sixteen, rule, 5) == greedy, rule
    drawn = torch.rand(16, 5, generator=torch.Generator().manual_seed(0))
    plain = other.answer(sixteen, 5, True, drawn, 1.0)
    for rule in (VCD(alpha=0.0, beta=0.0), DeCo(layers="1", alpha=0.0, top_p=1.0, top_k=10_000)):
        assert answer(other, sixteen, rule, 5, True, drawn, 1.0) == plain, rule


def test_in_every_family_operas_null_control_is_beams_where_every_token_is_a_candidate(
    other, sixteen, monkeypatch
):
    few = other.forbidden.clone()
    said = {token for text in other.answer(sixteen, 5) for token in other.tokenizer(text).input_ids}
    few[:] = True
    few[sorted(said)[:6]] = False
    monkeypatch.setattr(other, "forbidden", few)
    count = int((~few).sum())
    still = OPERA(num_beams=3, candidates=count, alpha=0.0, rollbacks=0)
    asked = sixteen[2:4]
    assert answer(other, asked, still, 6) == answer(other, asked, Beam(num_beams=3), 6)


# ---------------------------------------------------------------------------------------------
# Null controls
# ---------------------------------------------------------------------------------------------
NULLS = [
    VCD(alpha=0.0),
    VCD(alpha=0.0, beta=0.0),
    VCD(beta=1.0),  # the likeliest token alone is left
    VCD(alpha=3.0, beta=0.0, noise_step=0),  # an image all but unchanged
    DoLa(layers="1,2", relative_top=1.0, repetition_penalty=1.0),
    DeCo(alpha=0.0),
    DeCo(top_k=1),
    Beam(num_beams=1),
]


@pytest.mark.parametrize("rule", NULLS, ids=str)
def test_a_null_control_gives_greedys_answers(policy, talker, examples, rule):
    for model in (policy, talker):
        assert answer(model, examples, rule, TOKENS) == model.answer(examples, TOKENS)


def test_drawn_null_controls_give_plain_draws(talker, examples):
    plain = talker.answer(examples, TOKENS, True, uniforms(), 1.0)
    for rule in (VCD(alpha=0.0, beta=0.0), DeCo(alpha=0.0, top_p=1.0, top_k=10_000)):
        assert answer(talker, examples, rule, TOKENS, True, uniforms(), 1.0) == plain
    assert answer(talker, examples, VCD(alpha=0.0), TOKENS, True, uniforms(), 1.0) != plain


def test_operas_null_control_is_beams_and_with_every_token_a_candidate_plain_beams(
    talker, examples, prompts
):
    still = OPERA(num_beams=3, candidates=3, alpha=0.0, rollbacks=0)

    def among_candidates(texts, sums, ended):
        logits = torch.cat([whole(talker, prompts[0], torch.tensor(t).long())[0] for t in texts])
        logits = logits.masked_fill(talker.forbidden, -torch.inf)
        top, ids = logits.topk(3)
        return torch.full_like(logits, -torch.inf).scatter(-1, ids, top)

    with torch.no_grad():
        slow = slow_beams(talker, 3, TOKENS, among_candidates)
    text = spelled(talker, examples[0], torch.tensor(slow))
    assert answer(talker, examples[:1], still, TOKENS) == [text]

    every = dataclasses.replace(still, num_beams=2, candidates=len(talker.forbidden))
    assert answer(talker, examples[:1], every, 2) == answer(talker, examples[:1], Beam(2), 2)


def test_every_rule_changes_some_answer(talker, examples):
    greedy = talker.answer(examples, TOKENS)
    for rule in [*RULES[:4], *RULES[5:]]:
        assert answer(talker, examples, rule, TOKENS) != greedy, rule


# ---------------------------------------------------------------------------------------------
# Batches, cost, the image
# ---------------------------------------------------------------------------------------------
@every_rule
def test_an_answer_does_not_depend_on_its_batch(talker, examples, rule):
    drawn = uniforms() if rule.draws else None
    batch = answer(talker, examples, rule, TOKENS, True, drawn, 1.0)
    drawn_turned = None if drawn is None else drawn.flip(0)
    turned = answer(talker, examples[::-1], rule, TOKENS, True, drawn_turned, 1.0)
    assert turned[::-1] == batch
    for i, example in enumerate(examples):
        own = None if drawn is None else drawn[i : i + 1]
        assert answer(talker, [example], rule, TOKENS, True, own, 1.0) == [batch[i]]


COSTS = [  # forwards of one row per token after the first, head products beside the model's own
    (Plain(repetition_penalty=1.3), 1, 0),
    (VCD(), 2, 0),
    (DoLa(layers="1,2"), 1, 2),
    (DeCo(layers="0,1,2"), 1, 3),
    (Beam(num_beams=5), 5, 0),
    (OPERA(), 30, 0),
]


@pytest.mark.parametrize(
    ("rule", "forwards", "products"), COSTS, ids=lambda x: getattr(x, "name", "")
)
def test_forwards_and_head_products_per_token(policy, examples, rule, forwards, products):
    tokens = 8
    with counted(policy.decoder) as passes, counted(policy.head) as heads:
        (text,) = answer(policy, examples[:1], rule, tokens)
    assert len(policy.tokenizer(text)["input_ids"]) >= 1
    prompts = [call for call in passes if call[1] > 1]
    assert len(prompts) == (2 if isinstance(rule, VCD) else 1)
    read = sum(call[0] for call in passes if call[1] == 1)
    if isinstance(rule, OPERA):  # the last token is weighed, too, and then not read
        assert read == 25 * tokens + 5 * (tokens - 1)
        assert forwards == 25 + 5
    else:
        assert read == forwards * (tokens - 1)
        extra = sum(torch.Size(call).numel() for call in heads) - read - len(prompts)
        assert extra == products * tokens


def test_a_step_back_of_opera_costs_the_reading_of_its_text_and_no_more(
    policy, examples, monkeypatch, early
):
    done, steps_back = Counter(), []
    for name in ("_penalised", "_step_back", "_choose"):
        step = getattr(generate.Opera, name)

        def noted(search, *args, name=name, step=step):
            done[name] += 1
            steps_back.extend(args if name == "_step_back" else [])
            return step(search, *args)

        monkeypatch.setattr(generate.Opera, name, noted)
    b, c = 3, 2
    rule = OPERA(num_beams=b, candidates=c, threshold=2, rollbacks=3)
    with counted(policy.decoder) as passes:
        answer(policy, examples[:1], rule, 8)
    assert passes.pop(0)[0] == 1 and len(steps_back) == done["_step_back"] == 6
    assert [call for call in passes if call[1] > 1] == [(b, place) for place in steps_back]
    # every weighing tries c tokens of each beam; every choice but the last is read once
    once = b * c * done["_penalised"] + b * (done["_choose"] - 1)
    assert sum(rows * tokens for rows, tokens in passes) == once + b * sum(steps_back)
    # a token chosen anew is not weighed: in all, no token chosen or given up costs more than b (1 + c)
    assert once <= b * (1 + c) * (done["_choose"] + done["_step_back"])


def test_the_noise_is_of_the_image_wherever_it_stands_and_of_the_seed(policy, examples, prompts):
    pixels = collate(examples, policy.processor)["pixel_values"]
    noise = generate.image_noise(policy, examples, True, pixels, 0)
    asked_else = [
        dataclasses.replace(example, question="What is it?") for example in examples[::-1]
    ]
    turned = generate.image_noise(policy, asked_else, True, pixels, 0)
    assert torch.equal(noise, turned.flip(0)) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, generate.image_noise(policy, examples, True, pixels, 1))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("layout", ["padded", "patches"])
def test_the_noise_fits_images_of_many_sizes(policy, examples, monkeypatch, layout):
    sizes = {id(example): i + 1 for i, example in enumerate(examples)}

    def collated(batch, processor, think):
        shape = (sizes[id(batch[0])], 4)  # one, two, three tiles or patches
        ones = torch.ones(shape if layout == "patches" else (1, *shape))
        return {"pixel_values": ones}

    monkeypatch.setattr(generate, "collate", collated)
    pixels = torch.ones((6, 4) if layout == "patches" else (3, 3, 4))
    noise = generate.image_noise(policy, examples, True, pixels, 0)
    assert noise.shape == pixels.shape
    if layout == "padded":
        assert [(row != 0).all(1).tolist() for row in noise] == [
            [True, False, False], [True, True, False], [True, True, True],
        ]  # fmt: skip
    else:
        assert (noise != 0).all()


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (DoLa(), "--dola-layers low is no layer of a model that has 3: name some of 0 to 2"),
        (DoLa(layers="1,3"), "--dola-layers names layer 3: this model has 3"),
        (DeCo(layers="-1"), "--deco-layers names layer -1"),
    ],
)
def test_a_rule_that_the_model_is_too_shallow_for_is_refused(policy, examples, rule, message):
    with pytest.raises(DataError, match=message):
        answer(policy, examples, rule, 4)


@pytest.mark.parametrize("rule", [VCD(), OPERA()])
def test_a_rule_about_the_image_is_refused_without_one(policy, rule):
    with pytest.raises(DataError, match=f"--decoding {rule.name} works on an image"):
        answer(policy, [Example(None, "Is there a cat?", "no")], rule, 4)


def test_the_other_rules_answer_without_an_image(policy):
    asked = [Example(None, "Is there a cat?", "no")]
    for rule in (Plain(), DeCo(alpha=0.0), Beam(num_beams=1)):
        assert answer(policy, asked, rule, 4) == policy.answer(asked, 4)


def test_opera_puts_the_attention_back_even_after_an_error(policy, examples, monkeypatch):
    before = policy.decoder.config._attn_implementation
    assert before != "eager"
    answer(policy, examples[:1], OPERA(num_beams=2), 2)
    assert policy.decoder.config._attn_implementation == before
    monkeypatch.setattr(generate.Opera, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(policy, examples[:1], OPERA(num_beams=2), 2)
    assert policy.decoder.config._attn_implementation == before


def test_opera_is_refused_where_a_prompt_shows_no_image_tokens(policy, examples, monkeypatch):
    monkeypatch.setattr(policy.model, "config", SimpleNamespace(model_type="odd"))
    with pytest.raises(DataError, match="shows no image tokens"):
        answer(policy, examples[:1], OPERA(), 2)
