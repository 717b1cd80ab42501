"""What tokens earn beside what they should: classes, expectations, ways to take a token away."""

import pytest
import torch

from experiments import tokens
from experiments.tables import MASKS
from experiments.tokens import Batch, Chances, Counterfactuals, auc, correlation, token_classes
from model import load_policy
from rollouts import Rollouts
from scm import CLEAR, Scene, Thing, question_about

SCENE = Scene((Thing("boat", "red", 0.3, 0.3, 0.4), Thing("car", "blue", 0.7, 0.7, 0.4)), "snow")


def test_a_token_has_the_class_of_the_word_it_spells():
    words = ["I", "see", "a", "red", "boat", "and", "a", "blue", "tree", ".", "A", "snowman", "?"]
    kinds = token_classes(question_about(SCENE, "yesno", "snowman"), words)
    assert kinds[4] == "grounded object" and kinds[8] == "hallucinated object"
    assert kinds[3] == kinds[7] == "attribute"
    assert {kinds[i] for i in (0, 1, 2, 5, 6, 9)} == {"filler"}
    assert kinds[10:] == ["question repeated"] * 3  # named to answer, not claimed to be there


def test_expectations_of_equation_2_by_hand():
    c = Chances(torch.tensor([0.6, 0.9]), torch.tensor([0.6, 0.5]), torch.tensor([0.75, 0.0]))
    assert torch.allclose(c.expected("independent"), torch.tensor([0.24, 0.45]))
    # a token that changes nothing keeps (1 - pi) of its floor; one never drawn keeps all
    assert torch.allclose(c.expected("coupled"), torch.tensor([0.06, 0.45]))
    lower, upper = c.bounds
    assert torch.allclose(lower, torch.tensor([0.0, 0.4]))
    assert torch.allclose(upper, torch.tensor([0.4, 0.5]))


def test_the_expectations_are_what_simulated_pairs_average_to():
    generator = torch.Generator().manual_seed(0)
    p_with, p_leaving, own, n = 0.7, 0.2, 0.6, 400_000
    without = own * p_with + (1 - own) * p_leaving
    with_ = torch.rand(n, generator=generator) < p_with
    follows = torch.rand(n, generator=generator) < own
    leaving = torch.rand(n, generator=generator) < p_leaving
    coupled = (with_ & ~follows & ~leaving).float()  # a pair that follows is one completion
    expected = Chances(*(torch.tensor(x) for x in (p_with, without, own))).expected("coupled")
    assert abs(coupled.mean() - expected) < 5 * coupled.std() / n**0.5


def test_agreement_and_auc_by_hand():
    a = torch.tensor([0.0, 1.0, 2.0])
    assert correlation(a, -2 * a) == pytest.approx(-1) and correlation(a, a * 0) == 0
    high, low, pairs = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0]), torch.ones(2, 2) > 0
    assert auc(high, low, pairs) == pytest.approx(3.5 / 4)
    assert auc(high, low, torch.eye(2) > 0) == 1  # of the same completion: 1 over 0.5, 0.5 over 0


@pytest.fixture
def batch(policy, prefix, rollouts: Rollouts):
    n, t = rollouts.reasoning_mask.nonzero(as_tuple=True)
    return Batch(policy, prefix, rollouts, n, t, ["filler"] * len(n))


def plain_logits(policy, prompt, embeddings, positions, hidden=None):
    """Next-token logits after a prompt and embedded tokens, from one forward pass without a cache."""
    inputs = {k: v for k, v in prompt.items() if k != "pixel_values"}
    with torch.no_grad():
        image = policy.model.model.get_image_features(pixel_values=prompt["pixel_values"])
        image = image.pooler_output if hasattr(image, "pooler_output") else image
        before = policy.embed(inputs["input_ids"]).clone()
        before[inputs["input_ids"] == policy.model.config.image_token_id] = torch.cat(list(image))
        P = before.shape[1]
        mask = torch.ones(1, P + embeddings.shape[1])
        if hidden is not None:
            mask[0, P + hidden] = 0
        out = policy.decoder(
            inputs_embeds=torch.cat([before, embeddings], 1),
            attention_mask=mask,
            position_ids=torch.cat([torch.arange(P), P + positions])[None],
        )
        return policy.logits(out.last_hidden_state[:, -1])


@pytest.mark.parametrize("mask", ["none", *MASKS])
def test_each_way_to_take_a_token_away_equals_a_plain_forward(batch, prompts, mask):
    policy, rollouts = batch.policy, batch.rollouts
    asked = batch.ask(0, 1, way=Counterfactuals)
    seen = []
    asked.policy = Watched(policy, seen)
    for k in (0, len(batch.n) // 2):
        n, t = batch.n[k : k + 1], batch.t[k : k + 1]
        prompt = prompts[int(rollouts.prompt_index[n[0]])]
        asked.taken_away(n, t, mask, 2)
        kept = rollouts.completion_ids[n[0], : rollouts.answer_start[n[0]]]
        embeddings, positions = policy.embed(kept)[None].clone(), torch.arange(len(kept))
        left_out = None
        if mask == "zero":
            embeddings[0, t] = 0
        elif mask == "hidden":
            left_out = int(t)
        elif mask == "deleted":
            keep = positions != t
            embeddings, positions = embeddings[:, keep], torch.arange(len(kept) - 1)
        elif mask == "second-best":
            logits = plain_logits(policy, prompt, embeddings[:, :t], positions[:t])
            logits[0, kept[t]] = -torch.inf
            embeddings[0, t] = policy.embed(logits.argmax(-1))
        plain = plain_logits(policy, prompt, embeddings, positions, left_out)
        assert torch.allclose(policy.logits(seen[-1]), plain, atol=1e-4)


class Watched:
    """A policy that notes the hidden states that answers are drawn from."""

    def __init__(self, policy, seen):
        self.__dict__ = dict(policy.__dict__)
        self.of, self.seen = policy, seen

    def __getattr__(self, name):
        return getattr(self.of, name)

    def draw(self, hidden, *given):
        self.seen.append(hidden)
        return self.of.draw(hidden, *given)


def test_the_truth_never_draws_the_token(batch, monkeypatch):
    asked = batch.ask(0, 1, way=Counterfactuals)
    drawn = []

    def decode(departures):
        drawn.append(departures)
        return torch.zeros(len(departures.n))

    monkeypatch.setattr(asked, "_decode", decode)
    asked.never_held(batch.n, batch.t, 8)
    (departures,) = drawn
    own = batch.rollouts.completion_ids[departures.n, departures.place]
    assert len(departures.n) == 8 * len(batch.n)
    assert (departures.token != own).all()
    assert len(set(departures.token.tolist())) > 1


def test_necessity_by_truth_and_by_mask_are_what_is_lost_without_the_token(batch, monkeypatch):
    of = {"none": 0.9, "zero": 0.5, "hidden": 0.9, "deleted": 0.2, "second-best": 0.2}
    alike = torch.ones(len(batch.n))
    monkeypatch.setattr(
        Counterfactuals, "taken_away", lambda _, n, t, mask, draws: of[mask] * alike
    )
    monkeypatch.setattr(Counterfactuals, "never_held", lambda *_: 0.2 * alike)
    rows = {row["mask"]: row for row in tokens.mask_rows(batch, 0, 10**6) if row["class"] == "all"}
    for mask, score in (("zero", 0.4), ("hidden", 0.0), ("deleted", 0.7), ("second-best", 0.7)):
        found = [rows[mask][k] for k in ("truth", "score", "bias", "error")]
        assert found == pytest.approx([0.7, score, score - 0.7, 0.7 - score], abs=1e-3)


def test_every_question_gives_a_row_for_each_setting_and_class(batch):
    batch.kinds = ["grounded object", "hallucinated object"] * (len(batch.n) // 2)
    batch.kinds += ["filler"] * (len(batch.n) % 2)
    classes = set(batch.kinds)
    estimator = tokens.estimator_rows(batch, 0, repeats=2, sizes=(1, 2), draws=4)
    assert len(estimator) == 2 * 2 + len(classes)
    for row in estimator[-len(classes) :]:
        assert (
            row["coupled"] <= row["independent"] + 1e-6
            and row["independent"] <= row["upper"] + 1e-6
        )
    masks = tokens.mask_rows(batch, 0, draws=2)
    assert len(masks) == len(MASKS) * (2 + len(classes))
    credit = tokens.credit_rows(batch, 0, H=2)
    assert len(credit) == 2 * (len(classes) + 1)
    assert {row["n"] for row in credit if row["class"] == "grounded object"} == {len(batch.n) // 2}


def test_sampled_completions_have_a_class_for_each_reasoning_token(speaker, monkeypatch):
    batch = tokens.sample_batch(load_policy(speaker), 0, 3, 2, CLEAR)
    assert len(batch.n) == len(batch.kinds) == int(batch.rollouts.reasoning_mask.sum()) > 0
    assert all(example.kind != "caption" for example in batch.rollouts.examples)
