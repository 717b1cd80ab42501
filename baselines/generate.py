"""Answers by a decoding rule: one loop for rules that score tokens, one for beams, and OPERA's.

    >>> import random, scm, tiny
    >>> policy, rng = tiny.build_tiny_policy(), random.Random(0)
    >>> texts = answer(policy, [scm.sample_example(rng)], VCD(alpha=0.5), max_new_tokens=5)
    >>> len(texts)
    1

The equations stand in decoding.py; here is what feeds them: `Stream`, rows that a model reads by plain
passes with a cache, keeping of the last position what the rule asks for. Each step a rule makes scores
(R, V); then, in this order, the repetition penalty, the temperature, the largest score or a draw.

    rule           reads                                 forwards of one row per token
    plain          one stream                            1
    vcd            a second stream, the image noised     2
    dola, deco     hidden states of earlier layers       1, and the head once per layer
    beam           num_beams rows                        num_beams
    opera          attention of the last layer           num_beams (1 + candidates), and steps back

Where we depart from the authors' code, besides what decoding.py lists:
 1. Rows are batched, but for OPERA, and an answer does not depend on its batch. VCD's noise is a function
    of the image and the seed: the same in every question about it.
 2. VCD changes greedy answers, too: the largest of its scores. The code then leaves VCD out unsaid.
 3. Beams are compared by their mean log-probability per new token, as transformers does today; OPERA's
    code, of an older transformers, divides by the length of prompt and text.
 4. OPERA: a refused token scores -inf, not the smallest score of the step; a step back reads the text
    anew, and frees what had been refused at any later token, where the code frees the next alone.
"""

import contextlib
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
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
from baselines.settings import OPERA, VCD, Beam, DeCo, DoLa, Rule
from data import DataError, Example, collate, opening, with_opening
from model import Policy, sample_tokens

NEVER = -1e9  # score of beams that do not exist yet: the first step fills all from the first


@torch.no_grad()
def answer(
    policy: Policy,
    examples: Sequence[Example],
    rule: Rule,
    max_new_tokens: int = 64,
    think: bool = True,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Completions as text, as `Policy.answer` gives them, by a rule.

    uniforms: (B, max_new_tokens) for draws at the temperature, None for the largest scores; beams draw
    nothing.  seed: of VCD's noise.  Raises DataError for a rule that this model or example cannot serve.
    """
    layers = layers_of(policy, rule)
    inputs = collate(examples, policy.processor, think)
    if rule.needs_image and "pixel_values" not in inputs:
        raise DataError(f"--decoding {rule.name} works on an image: this question has none")
    if isinstance(rule, OPERA):
        alone = [collate([example], policy.processor, think) for example in examples]
        texts = [_opera(policy, one, rule, max_new_tokens) for one in alone]
    elif isinstance(rule, Beam):
        texts = beam_search(policy, Stream(policy, inputs), rule.num_beams, max_new_tokens)
    else:
        streams = [Stream(policy, inputs, hidden=bool(layers))]
        if isinstance(rule, VCD):
            noise = image_noise(policy, examples, think, inputs["pixel_values"], seed)
            noised = diffuse(inputs["pixel_values"], rule.noise_step, noise)
            streams.append(Stream(policy, inputs | {"pixel_values": noised}))
        texts = decode(
            policy, streams, rule, layers, prompt_tokens(policy, inputs), max_new_tokens,
            uniforms, temperature,
        )  # fmt: skip
    return [
        with_opening(opening(example, policy.processor, think), policy.text(ids))
        for example, ids in zip(examples, texts, strict=True)
    ]


# ---------------------------------------------------------------------------------------------
# What a model reads
# ---------------------------------------------------------------------------------------------
class Stream:
    """R rows, each a prompt and what was added to it, read by plain passes with one cache.

    Attributes, all of the last position read: logits (R, V) float32, nothing ruled out; hidden
    (L + 1, R, D), of the embeddings and after each layer, the last one after the final norm; and, from
    `extend`, attention (R, n, P + text) of the last layer, the largest over heads. hidden and attention
    are None unless asked for.
    """

    def __init__(
        self,
        policy: Policy,
        inputs: dict[str, Tensor],
        hidden: bool = False,
        attention: bool = False,
    ):
        self.policy, self._wanted = policy, {}
        inputs = {name: value.to(policy.device) for name, value in inputs.items()}
        self.mask = inputs["attention_mask"].bool()  # (R, P + text)
        self.prompt = self.mask.shape[1]
        inputs |= policy.quirks.before_prefill(self.mask)
        out = policy.model(**inputs, use_cache=True, logits_to_keep=1, output_hidden_states=hidden)
        self.cache, self.position = policy.quirks.after_prefill(out, self.mask)
        self._wanted = {"output_hidden_states": hidden, "output_attentions": attention}
        self.logits = out.logits[:, -1].float()
        # InstructBLIP hands on its language model's output as a whole.
        self._keep_last(getattr(out, "language_model_outputs", out))

    def _keep_last(self, out) -> None:
        self.hidden = self.attention = None
        if self._wanted["output_hidden_states"]:
            self.hidden = torch.stack([states[:, -1] for states in out.hidden_states])
        if self._wanted["output_attentions"] and out.attentions:
            self.attention = out.attentions[-1].float().amax(1)

    def extend(self, tokens: Tensor) -> None:
        """Read n more tokens in each row: (R, n)."""
        R, n = tokens.shape
        self.mask = torch.cat([self.mask, self.mask.new_ones(R, n)], 1)
        out = self.policy.decoder(
            inputs_embeds=self.policy.embed(tokens),
            attention_mask=self.mask.long(),
            position_ids=self.position[:, None] + torch.arange(n, device=tokens.device),
            past_key_values=self.cache,
            use_cache=True,
            **self._wanted,
        )
        self.position = self.position + n
        self.logits = self.policy.head(out.last_hidden_state[:, -1]).float()
        self._keep_last(out)

    def forget(self, n: int) -> None:
        """Take back the last n tokens of every row; logits and the like stay those of before."""
        self.cache.crop(-n)
        self.mask, self.position = self.mask[:, : self.mask.shape[1] - n], self.position - n

    def keep(self, index: Tensor) -> None:
        """Go on with these rows: (R',) indices into the present ones, repeats allowed."""
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]
        self.logits = self.logits[index]
        if self.hidden is not None:
            self.hidden = self.hidden[:, index]
        if self.attention is not None:
            self.attention = self.attention[index]

    @property
    def allowed(self) -> Tensor:
        """(R, V) logits, -inf for what is never said."""
        return self.logits.masked_fill(self.policy.forbidden, -torch.inf)


def prompt_tokens(policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
    """(B, V) bool: the tokens of each prompt, padding left out."""
    ids, mask = (inputs[name].to(policy.device) for name in ("input_ids", "attention_mask"))
    V = len(policy.forbidden)
    mask = mask.bool() & (ids < V)  # placeholders may lie outside the head
    seen = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter(1, torch.where(mask, ids, V), True)[:, :V]


def image_noise(
    policy: Policy, examples: Sequence[Example], think: bool, pixels: Tensor, seed: int
) -> Tensor:
    """N(0, 1) of the shape of a batch's pixels, the same for an image wherever it stands.

    pixels: of the batch. One row per example, its images padded to the most that one has (LLaVA,
    Idefics); or the patches of all examples, one after the other (Qwen).
    """
    drawn = []
    for example in examples:
        alone = collate([example], policy.processor, think)["pixel_values"]
        facts = f"{seed} ".encode() + alone.float().cpu().numpy().tobytes()
        number = int.from_bytes(hashlib.sha256(facts).digest()[:8], "big") >> 1
        rng = torch.Generator().manual_seed(number)
        drawn.append(torch.randn(alone.shape, generator=rng))
    if sum(map(len, drawn)) == len(pixels) and len({noise.shape[1:] for noise in drawn}) == 1:
        return torch.cat(drawn).to(pixels)
    noise = torch.zeros_like(pixels)  # on padding, which no model reads
    for row, of_one in zip(noise, drawn, strict=True):
        row[tuple(slice(size) for size in of_one.shape[1:])] = of_one[0].to(pixels)
    return noise


def layers_of(policy: Policy, rule: Rule) -> list[int]:
    """The hidden states that a rule reads besides the last; none for most.  DataError: no such layer."""
    if not isinstance(rule, DoLa | DeCo):
        return []
    tied = policy.head.weight is policy.embed.weight
    return rule.layers_of(policy.decoder.config.num_hidden_layers, tied)


def final_norm(policy: Policy, hidden: Tensor) -> Tensor:
    """The norm between a decoder's last layer and its head."""
    for name in ("norm", "final_layer_norm"):  # of most families; of OPT
        if hasattr(policy.decoder, name):
            return getattr(policy.decoder, name)(hidden)
    raise DataError(
        f"{type(policy.decoder).__name__}: its final norm was not found: use another rule"
    )


# ---------------------------------------------------------------------------------------------
# Rules that score tokens
# ---------------------------------------------------------------------------------------------
def scores_of(policy: Policy, streams: list[Stream], rule: Rule, layers: list[int]) -> Tensor:
    """(R, V) scores of the next token, -inf where it is ruled out."""
    final, hidden = streams[0].allowed, streams[0].hidden
    match rule:
        case VCD():
            return vcd_scores(final, streams[1].logits, rule.alpha, rule.beta)
        case DoLa():
            early = policy.head(hidden[layers])
            return dola_scores(final, early, rule.relative_top, rule.divergence)[0]
        case DeCo():
            early = policy.head(final_norm(policy, hidden[layers]))
            return deco_scores(final, early, rule.alpha, rule.top_p, rule.top_k)
    return final


def decode(
    policy: Policy,
    streams: list[Stream],
    rule: Rule,
    layers: list[int],
    seen: Tensor,
    max_new_tokens: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Token ids of each of B rows, EOS included; rows that have ended leave the streams.

    seen: (B, V) bool, tokens that the repetition penalty finds said before.  uniforms: (B, tokens), or
    None for the largest scores.
    """
    B = len(seen)
    ids = torch.full((B, max_new_tokens), policy.pad_id, device=policy.device)
    lengths, index, seen = [0] * B, torch.arange(B, device=policy.device), seen.clone()
    for step in range(max_new_tokens):
        scores = scores_of(policy, streams, rule, layers)
        scores = repetition_penalty(scores, seen[index], rule.repetition_penalty)
        of_step = None if uniforms is None else uniforms.to(policy.device)[index, step, None]
        tokens = sample_tokens(scores, of_step, temperature).view(-1)
        ids[index, step], seen[index, tokens] = tokens, True
        for row in index.tolist():
            lengths[row] = step + 1
        going = (~torch.isin(tokens, policy.eos_ids)).nonzero()[:, 0]
        if not len(going) or step + 1 == max_new_tokens:
            break
        for stream in streams:
            if len(going) < len(index):
                stream.keep(going)
            stream.extend(tokens[going, None])
        index = index[going]
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


# ---------------------------------------------------------------------------------------------
# Beams
# ---------------------------------------------------------------------------------------------
class Beams:
    """Beam search over the texts of one question.

    Attributes: ids (b, n) of the running beams, the best first; scores (b,), the sums of their
    log-probabilities; ended, the best b of those that have ended as (mean, ids), the best first; done.
    """

    def __init__(self, width: int, eos_ids: Tensor):
        self.eos_ids, self.done = eos_ids, False
        self.ids = torch.zeros(width, 0, dtype=torch.long, device=eos_ids.device)
        self.scores = torch.full((width,), NEVER, device=eos_ids.device)
        self.scores[0] = 0
        self.ended: list[tuple[float, Tensor]] = []

    def advance(self, logps: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Choose the next b beams; what ends among the best b is kept aside, and does not run on.

        logps: (b, V) log-probabilities of the next token.  last: all that are among the best b end here.
        Returns the beams (b,) that they continue, and their tokens (b,).
        Done when b have ended and none that runs has a better mean than the worst of them.
        """
        b, V = logps.shape
        total = (self.scores[:, None] + logps).flatten()
        # Enough that b remain if every beam's ends are among them.
        best, place = total.topk(min((1 + len(self.eos_ids)) * b, b * V))
        source, tokens = place // V, place % V
        texts = torch.cat([self.ids[source], tokens[:, None]], 1)
        n, ends = texts.shape[1], torch.isin(tokens, self.eos_ids)
        ended = [(float(best[i]) / n, texts[i]) for i in range(b) if last or ends[i]]
        self.ended = sorted([*self.ended, *ended], key=lambda text: -text[0])[:b]
        going = (~ends).nonzero()[:b, 0]
        self.ids, self.scores = texts[going], best[going]
        full = len(self.ended) == b and float(self.scores[0]) / n <= self.ended[-1][0]
        self.done = last or full
        return source[going], tokens[going]


def beam_search(policy: Policy, stream: Stream, width: int, max_new_tokens: int) -> list[Tensor]:
    """Token ids of the best text of each of B prompts, EOS included, by beams `width` wide."""
    B = len(stream.logits)
    stream.keep(torch.arange(B, device=policy.device).repeat_interleave(width))
    texts = [Beams(width, policy.eos_ids) for _ in range(B)]
    running = texts
    for step in range(1, max_new_tokens + 1):
        logps = stream.allowed.log_softmax(-1).split(width)
        moves = [
            (place * width + source, tokens)
            for place, beams in enumerate(running)
            for source, tokens in [beams.advance(logps[place], step == max_new_tokens)]
            if not beams.done
        ]
        running = [beams for beams in running if not beams.done]
        if not running:
            break
        rows, tokens = (torch.cat(part) for part in zip(*moves, strict=True))
        stream.keep(rows)
        stream.extend(tokens[:, None])
    return [beams.ended[0][1] for beams in texts]


# ---------------------------------------------------------------------------------------------
# OPERA
# ---------------------------------------------------------------------------------------------
class Opera:
    """OPERA's search over one question: beams that weigh candidates by attention, and may step back.

    stream: of one prompt, with attention; its decoder must run with eager attention.
    image: (P,) bool, where the prompt's image tokens stand.

    rows (b, n, n): attention among the n tokens of each beam.  columns (b, steps): what each slot of the
    beams remembers of every token's choice; they are not re-ordered with the beams, as in the code.
    before[t], chosen[t]: the beams before token t was chosen, and the (beam, token) pairs chosen.
    refused[t]: pairs that steps back have ruled out there, after the beams as they now stand.  times[t]: how
    often the search has stepped back to token t.
    """

    def __init__(self, policy: Policy, stream: Stream, image: Tensor, rule: OPERA):
        self.policy, self.stream, self.image, self.rule = policy, stream, image, rule
        b, device = rule.num_beams, policy.device
        stream.keep(torch.zeros(b, dtype=torch.long, device=device))
        self.beams = Beams(b, policy.eos_ids)
        self.rows = torch.zeros(b, 0, 0, device=device)
        self.columns = torch.zeros(b, 0, dtype=torch.long, device=device)
        self.before: list[Beams] = []
        self.chosen: list[tuple[Tensor, Tensor]] = []
        self.refused: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.times: Counter[int] = Counter()
        self.logits = stream.allowed  # (b, V) of the next token

    def run(self, max_new_tokens: int) -> Tensor:
        """Token ids of the best text, EOS included."""
        stepped_back = False
        while not self.beams.done:
            self.before.append(copy.copy(self.beams))
            scores = self._anew() if stepped_back else self._penalised()
            place = None if stepped_back else self._step_back_to()
            stepped_back = place is not None
            if stepped_back:
                self._step_back(place)
            else:
                self._choose(scores, max_new_tokens)
        return self.beams.ended[0][1]

    def _penalised(self) -> Tensor:
        """(b, V) scores of the candidates, each tried; adds to the columns."""
        count = min(self.rule.candidates, self.logits.shape[1])
        candidates = self.logits.topk(count).indices  # (b, c)
        shares = torch.stack([self._tried(tokens) for tokens in candidates.T], 1)  # (b, c, P + k)
        P = self.stream.prompt
        earlier = F.pad(self.rows, (0, 1))[:, None].expand(-1, count, -1, -1)
        attention = torch.cat([earlier, shares[:, :, None, P:]], 2)  # (b, c, k, k)
        on_image = shares[..., :P][..., self.image].sum(-1)
        penalty, column = opera_penalty(attention, on_image, self.rule.sigma)
        self.columns = torch.cat([self.columns, column.mode(-1).values[:, None]], 1)
        return opera_scores(self.logits, candidates, penalty, self.rule.alpha)

    def _tried(self, tokens: Tensor) -> Tensor:
        """(b, P + k) attention that the beams' next tokens (b,) would pay; nothing is kept of it."""
        self.stream.extend(tokens[:, None])
        self.stream.forget(1)
        return self._shares()[:, 0]

    def _shares(self) -> Tensor:
        """(b, n, P + k) the stream's attention as shares: the largest over heads, sums of 1 again."""
        attention = self.stream.attention
        return attention / attention.sum(-1, keepdim=True)

    def _anew(self) -> Tensor:
        """(b, V) plain logits after a step back, without the pairs refused here."""
        logits = self.logits.clone()
        for source, tokens in self.refused[self.beams.ids.shape[1]]:
            logits[source, tokens] = -torch.inf
        return logits

    def _step_back_to(self) -> int | None:
        """The token to choose anew, or None; a place worn out by steps back passes to the one before."""
        location = int(self.columns[:, -1].mode().values)
        place = opera_rollback(self.columns, location, self.rule.threshold)
        for t in () if place is None else (place, place - 1):
            if t < len(self.chosen) and self.times[t] < self.rule.rollbacks:
                return t
        return None

    def _step_back(self, place: int) -> None:
        """To just before token `place` was chosen: the stream reads the text up to there again.

        What that choice remembered stays, as in the code: it is made anew without being weighed.
        """
        self.times[place] += 1
        self.refused.setdefault(place, []).append(self.chosen[place])
        # Pairs of later tokens followed other texts: of those that will stand there they say nothing.
        self.refused = {t: pairs for t, pairs in self.refused.items() if t <= place}
        self.beams, self.columns = self.before[place], self.columns[:, : place + 1]
        del self.before[place:], self.chosen[place:]
        self.stream.forget(self.stream.mask.shape[1] - self.stream.prompt)
        self.stream.extend(self.beams.ids)
        self.rows, self.logits = self._shares()[..., self.stream.prompt :], self.stream.allowed

    def _choose(self, scores: Tensor, max_new_tokens: int) -> None:
        """The next tokens of the beams, read by the stream unless the search is done."""
        last = self.beams.ids.shape[1] + 1 == max_new_tokens
        source, tokens = self.beams.advance(scores.log_softmax(-1), last)
        self.chosen.append((source, tokens))
        if self.beams.done:
            return
        self.stream.keep(source)
        self.stream.extend(tokens[:, None])
        earlier = F.pad(self.rows[source], (0, 1))
        self.rows = torch.cat([earlier, self._shares()[..., self.stream.prompt :]], 1)
        self.logits = self.stream.allowed


def _opera(policy: Policy, inputs: dict[str, Tensor], rule: OPERA, max_new_tokens: int) -> Tensor:
    config = policy.model.config
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    places = inputs["input_ids"][0] == (-1 if image is None else image)
    if not places.any():
        raise DataError(
            f"--decoding opera: {config.model_type} shows no image tokens in its prompt: use another rule"
        )
    with eager_attention(policy):
        stream = Stream(policy, inputs, attention=True)
        return Opera(policy, stream, places.to(policy.device), rule).run(max_new_tokens)


@contextlib.contextmanager
def eager_attention(policy: Policy) -> Iterator[None]:
    """Let the decoder compute attention in the way that shows its weights, and put it back."""
    before = policy.decoder.config._attn_implementation
    policy.decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        policy.decoder.set_attn_implementation(before)
