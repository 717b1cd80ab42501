"""CSR (Zhou et al., arXiv 2405.14622): the model's own texts, sentence by sentence, ranked by the image.

A tree grows for every prompt. Its nodes are texts, each one sentence longer than its parent:

    expand   five sentences by diverse beam search, five groups of one beam: in every step a group
             finds a token less likely, by 3 nats, for each earlier group that has just chosen it
    go on    while five or more texts have not ended, with the one whose sentences were likeliest and the
             two that were least likely; the image plays no part in this
    rank     siblings by likelihood and by image, place / siblings, 1 / n the best. A node costs
             0.1 rank + 0.9 image rank; a text the mean over its nodes, the root's 0 among them
    pair     the text of the lowest cost is chosen, that of the highest rejected

The pairs then train by the DPO loss, and the trained model makes the next ones: three rounds.

    image    CSR-pull: log pi(s | image) - log pi(s | noised image), the mean per token of sentence s. It
             stands in for CLIP: about the image and self-contained, but not an independent judge.
             oracle: the share of the things named in s that are there. A control, and never CSR.

 1. A group ends at its first full stop; the original may look on for a better beam of the same group.
 2. Equal scores share the best place: the oracle's often are, where CLIP's never were.
 3. A sentence that the token budget cuts off is dropped. Shorter than four characters, too, unless it
    only ends the text.
 4. Paper and code differ in the search and in what is summed: this is the code's way (CSR 353de42).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baselines.pairs import Pair
from baselines.photos import named
from data import Example, opening, with_opening
from model import Policy, Prefix

WIDTH, PENALTY, IMAGE_WEIGHT = 5, 3.0, 0.9


@dataclass
class Node:
    """A text: token ids up to the end of its last sentence, and what that sentence scored.

    likelihood: mean log-probability per token, the diversity penalty included.  total: that of all
    sentences so far, added up.  image: how much the sentence owes to the image.
    """

    ids: list[int]
    likelihood: float = 0.0
    image: float = 0.0
    total: float = 0.0
    ended: bool = False
    children: list["Node"] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------
# Ranks and pairs
# ---------------------------------------------------------------------------------------------
def ranks(values: Sequence[float]) -> list[float]:
    """place / n of each value, the largest at place 1; equal ones share a place.

    >>> ranks([20.0, 24.0, 24.0, 15.0])
    [0.75, 0.25, 0.25, 1.0]
    """
    return [(sum(other > value for other in values) + 1) / len(values) for value in values]


def costs(root: Node, image_weight: float = IMAGE_WEIGHT) -> list[tuple[float, Node]]:
    """(cost, node) of every text that has ended; the lower, the better."""

    def below(node: Node, spent: float, nodes: int) -> Iterator[tuple[float, Node]]:
        if node.ended:
            yield spent / nodes, node
        by_model = ranks([child.likelihood for child in node.children])
        by_image = ranks([child.image for child in node.children])
        for child, own, of_image in zip(node.children, by_model, by_image, strict=True):
            step = (1 - image_weight) * own + image_weight * of_image
            yield from below(child, spent + step, nodes + 1)

    return list(below(root, 0.0, 1))


def go_on_with(nodes: list[Node], width: int = WIDTH) -> list[Node]:
    """Of texts that have not ended the likeliest and the least likely, where there are `width` or more.

    >>> scores = (-0.1, -0.5, -0.9, -1.4, -2.0, -3.0)
    >>> [node.total for node in go_on_with([Node([], total=score) for score in scores])]
    [-0.1, -2.0, -3.0]
    """
    if len(nodes) < width:
        return nodes
    nodes = sorted(nodes, key=lambda node: -node.total)
    return nodes[: width // 2 - 1] + nodes[-(width // 2) :]


def best_and_worst(root: Node) -> tuple[Node, Node] | None:
    """The ended texts of the lowest and of the highest cost; None where all cost the same."""
    found = costs(root)
    if len({cost for cost, _ in found}) < 2:
        return None
    return min(found, key=lambda one: one[0])[1], max(found, key=lambda one: one[0])[1]


# ---------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def csr_pairs(
    policy: Policy,
    prefix: Prefix,
    examples: Sequence[Example],
    noised: Prefix | None,
    max_length: int,
    width: int = WIDTH,
) -> list[Pair]:
    """The pairs of B prompts, one each at most.

    prefix: of the prompts.  noised: of the same prompts with noised images, for the image's pull; None:
    the oracle judges, and the examples must say what is there.  max_length: most tokens of a text.
    """
    roots = [Node([]) for _ in examples]
    growing = [(b, root) for b, root in enumerate(roots)]
    while growing:
        which = torch.tensor([b for b, _ in growing], device=policy.device)
        starts = [node.ids for _, node in growing]
        for (_, node), found in zip(
            growing, sentences(policy, prefix, which, starts, max_length, width), strict=True
        ):
            node.children = [child for child in found if _is_sentence(policy, node, child)]
            for child in node.children:
                child.total = node.total + child.likelihood
        grown = [(b, node, child) for b, node in growing for child in node.children]
        if noised is None:
            _judge_by_truth(policy, examples, grown)
        else:
            _judge_by_pull(policy, prefix, noised, grown)
        growing = [
            (b, node)
            for b in range(len(roots))
            for node in go_on_with([c for a, _, c in grown if a == b and not c.ended], width)
        ]
    pairs = []
    for example, root in zip(examples, roots, strict=True):
        if ends := best_and_worst(root):
            opened = opening(example, policy.processor)
            pairs.append(Pair(example, *(with_opening(opened, policy.text(n.ids)) for n in ends)))
    return pairs


@torch.no_grad()
def sentences(
    policy: Policy,
    prefix: Prefix,
    which: Tensor,
    starts: Sequence[list[int]],
    max_length: int,
    width: int = WIDTH,
    penalty: float = PENALTY,
) -> list[list[Node]]:
    """`width` next sentences of each of R texts, by diverse beam search in groups of one beam.

    which: (R,) the prompt that each text answers.  starts: its token ids, which are read again.
    """
    R, device = len(starts), policy.device
    begins = torch.tensor([len(start) for start in starts], device=device)
    given = torch.zeros(R, max_length, dtype=torch.long, device=device)
    for row, start in zip(given, starts, strict=True):
        row[: len(start)] = torch.tensor(start, dtype=torch.long)
    stops = torch.cat([policy.eos_ids, _full_stops(policy)])
    rows = policy.rows(prefix, which.repeat_interleave(width))
    logits = prefix.logits[which].repeat_interleave(width, 0)
    sums, counts = torch.zeros(R, width, device=device), torch.zeros(R, width, device=device)
    ended = torch.zeros(R, width, dtype=torch.bool, device=device)
    history = []
    for step in range(max_length):
        free = step >= begins  # (R,) past the text that is given
        tokens, scores = _one_step(logits.view(R, width, -1), ~ended & free[:, None], penalty)
        tokens = torch.where(free[:, None], tokens, given[:, step, None])
        live = ~ended & free[:, None]
        sums, counts = sums + torch.where(live, scores, 0.0), counts + live
        ended = ended | (live & torch.isin(tokens, stops))
        history.append(tokens)
        if ended.all() or step + 1 == max_length:
            break
        read = rows.extend(policy.embed(tokens.flatten())[:, None])
        logits = policy.logits(read[:, -1])
    texts = torch.stack(history, -1)  # (R, width, steps)
    lengths, means = begins[:, None] + counts.long(), sums / counts
    return [
        [
            _node(policy, texts[r, g, : lengths[r, g]], means[r, g].item())
            for g in range(width)
            if ended[r, g]
        ]
        for r in range(R)
    ]


def _one_step(logits: Tensor, live: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The next token of each group and its score: (R, width, V), (R, width) bool -> (R, width) twice.

    Groups choose one after the other; one that is not live says nothing that others should avoid.
    """
    R, width, V = logits.shape
    logps, said = logits.log_softmax(-1), logits.new_zeros(R, V)
    chosen = []
    for g in range(width):
        best = (logps[:, g] - penalty * said).max(-1)
        said = said.scatter_add(1, best.indices[:, None], live[:, g, None].to(said))
        chosen.append(best)
    return torch.stack([c.indices for c in chosen], 1), torch.stack([c.values for c in chosen], 1)


def _node(policy: Policy, ids: Tensor, likelihood: float) -> Node:
    return Node(ids.tolist(), likelihood, ended=bool(torch.isin(ids[-1], policy.eos_ids)))


def _full_stops(policy: Policy) -> Tensor:
    """The tokens that spell a full stop, alone and after a word."""
    spelled = [
        policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (".", "a.")
    ]
    return torch.tensor(sorted({ids[-1] for ids in spelled}), device=policy.device)


def _is_sentence(policy: Policy, parent: Node, child: Node) -> bool:
    added = policy.text(child.ids[len(parent.ids) :]).strip()
    return len(added) >= 4 or (child.ended and not added and bool(parent.ids))


# ---------------------------------------------------------------------------------------------
# What a sentence owes to the image
# ---------------------------------------------------------------------------------------------
def _judge_by_truth(
    policy: Policy, examples: Sequence[Example], grown: list[tuple[int, Node, Node]]
) -> None:
    for b, parent, child in grown:
        added = policy.text(child.ids[len(parent.ids) :])
        things = named(examples[b], added)
        there = sum(name in examples[b].objects for name in things)
        child.image = there / len(things) if things else 1.0


def _judge_by_pull(
    policy: Policy, prefix: Prefix, noised: Prefix, grown: list[tuple[int, Node, Node]]
) -> None:
    if not grown:
        return
    which = torch.tensor([b for b, _, _ in grown], device=policy.device)
    texts = [torch.tensor(child.ids, device=policy.device) for _, _, child in grown]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=policy.pad_id)
    begins = torch.tensor([len(parent.ids) for _, parent, _ in grown], device=policy.device)
    ends = torch.tensor([len(text) for text in texts], device=policy.device)
    places = torch.arange(ids.shape[1], device=policy.device)
    mask = (places >= begins[:, None]) & (places < ends[:, None])  # the last sentence alone
    clean, _ = policy.per_token_logps(prefix, which, ids, mask)
    blind, _ = policy.per_token_logps(noised, which, ids, mask)
    for (_, _, child), pull in zip(grown, (clean - blind).sum(1) / mask.sum(1), strict=True):
        child.image = float(pull)
