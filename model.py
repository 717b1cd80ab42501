"""The policy: an image-text model with its processor, and what is asked of it.

    >>> import random, scm, tiny
    >>> examples = [scm.sample_example(random.Random(seed)) for seed in (0, 1)]
    >>> policy = tiny.build_tiny_policy()                  # or load_policy("runs/first/checkpoint")
    >>> prefix = policy.prefill(collate(examples, policy.processor))    # images and prompts, once
    >>> prompt_index = torch.tensor([0, 0, 1])             # row r continues prompt_index[r]
    >>> uniforms = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    >>> rows = policy.rows(prefix, prompt_index)
    >>> first = sample_tokens(prefix.logits[prompt_index], uniforms[:, :1])[:, 0]    # costs no pass
    >>> budget = torch.tensor([5, 5, 5])                   # most tokens; rows that end leave the batch
    >>> ids, lengths = policy.decode(rows, first, budget, uniforms)
    >>> mask = torch.arange(ids.shape[1]) < lengths[:, None]
    >>> logps, entropy = policy.per_token_logps(prefix, prompt_index, ids, mask)     # with gradient
    >>> logps.shape, logps.requires_grad
    (torch.Size([3, 5]), True)

Sampling inverts the distribution function at a uniform number, which the caller supplies for every
row and step. A row's text therefore depends on its own numbers alone: not on the rows beside it, nor
on how a large batch was cut to fit the memory. Replaying a row's numbers replays its text.

What model families do differently stands in one place, `Quirks`, with the reason for each.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from data import DataError, Example, collate, opening, with_opening
from kv_cache import KeyValues, PrefixView, Rows

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# How far logits of two orders of summation may lie apart, in their standard deviations.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass
class Prefix:
    """B prompts after their one forward pass, padded on the left to P tokens.

    key_values: of the prompts.  mask: (B, P) bool.
    logits: (B, V) of the first completion token.  position: (B,) its rotary position.
    """

    key_values: KeyValues
    mask: Tensor
    logits: Tensor
    position: Tensor

    def view(self, prompt_index: Tensor) -> PrefixView:
        """R rows that read the prompts; row r reads prompt_index[r]."""
        return PrefixView(self.key_values, prompt_index, self.mask[prompt_index])


def refuse_unless_exact(config, cache, length: int) -> None:
    """Raise DataError for a decoder that attends in ways the shared prefixes do not reproduce.

    length: tokens of the prompts. A layer that keeps another number of keys keeps something else: the
    image, for cross-attention, which the completion could then not see.
    """
    odd = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    kept = {layer.keys.shape[2] for layer in cache.layers if type(layer) is DynamicLayer} - {length}
    odd |= {f"a layer that keeps {n} places of {length}" for n in kept}
    odd |= {
        name
        for name in ("attn_logit_softcapping", "logit_softcapping", "final_logit_softcapping")
        if getattr(config, name, None) is not None
    }
    if odd:
        raise DataError(
            f"{config.model_type}: {', '.join(sorted(odd))}: shared prefixes serve plain full attention "
            f"only; choose a model without sliding-window, hybrid, cross-attention or soft-capped layers"
        )


def sample_tokens(logits: Tensor, uniforms: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Tokens at which the distribution function of softmax(logits / temperature) passes `uniforms`.

    logits: (K, V) float32.  uniforms: (K, H) in [0, 1), one independent draw each, or None for the
    most likely token.  Returns (K, H) ids, or (K,) for None.  Tokens of probability 0 are never drawn.
    """
    if uniforms is None:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    # Below the last value of a cdf that rounding may have left a little off 1.
    targets = (uniforms.clamp(max=1 - 1e-6) * cdf[:, -1:]).contiguous()
    return torch.searchsorted(cdf, targets, right=True)


def _chosen(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `ids` under (N, C, V) logits, and entropies; 0 where the mask is 0."""
    logps = logits.log_softmax(-1)
    chosen = logps.gather(-1, ids[..., None])[..., 0]
    with torch.no_grad():
        entropy = torch.special.entr(logps.exp()).sum(-1)
    return torch.where(mask.bool(), chosen, 0.0), torch.where(mask.bool(), entropy, 0.0)


class Quirks:
    """What some families do differently from the rest, in the order in which it matters.

    mrope      Qwen-VL counts rotary positions itself, in three dimensions, and keeps the last prompt's
               offset as state (`rope_deltas`): it is cleared before every prompt and added to positions.
    qformer    InstructBLIP puts the image before the padding, and its decoder counts padding as
               positions; its Q-Former has absolute positions, so its own tokenizer pads on the right.
    appended   Where token types tell image from text (Qwen: 0 is text; PaliGemma: 0 sees both ways, 1
               only back), completion tokens need one, too.
    """

    def __init__(self, model, processor):
        self.core = getattr(model, "model", model)
        self.mrope, self.qformer = hasattr(self.core, "rope_deltas"), hasattr(model, "qformer")
        if hasattr(processor, "qformer_tokenizer"):
            processor.qformer_tokenizer.padding_side = "right"

    def before_prefill(self, mask: Tensor) -> dict[str, Tensor]:
        """Inputs to add to the prompts' own: positions, where the model does not count them itself."""
        if self.mrope:
            self.core.rope_deltas = None
        if self.mrope or self.qformer:
            return {}
        return {"position_ids": _places(mask)}

    def after_prefill(self, out, mask: Tensor) -> tuple[transformers.DynamicCache, Tensor]:
        """The prompts' cache, and the rotary position (B,) of the token that follows each."""
        if self.qformer:
            position = torch.full_like(mask[:, 0].long(), mask.shape[1])
            return out.language_model_outputs.past_key_values, position
        position = _places(mask)[:, -1] + 1
        if self.mrope:
            position = position + self.core.rope_deltas.view(-1).to(position.device)
        return out.past_key_values, position

    def append(self, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The inputs of N prompts with completions (N, C) after them, for one pass over everything."""
        if self.mrope:
            self.core.rope_deltas = None
        added = {"input_ids": ids, "attention_mask": mask}
        added["mm_token_type_ids"] = torch.zeros_like(ids)
        added["token_type_ids"] = torch.ones_like(ids)
        return inputs | {
            name: torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
            for name, more in added.items()
            if name in inputs
        }


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer) -> frozenset[int]:
    """Tokens that are no text: the end, padding, placeholders; but never one of the four tags."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # convert_tokens_to_ids would take a tag that is no token for the unknown token.
    vocabulary = tokenizer.get_vocab()
    tags = {vocabulary.get(tag) for tag in TAGS}
    return frozenset((added | set(tokenizer.all_special_ids)) - tags)


def _places(mask: Tensor) -> Tensor:
    """(B, P) positions of prompts that are padded on the left."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Policy:
    """An image-text model in eval mode (no dropout), its processor, and what may be sampled.

    Attributes: model, processor, tokenizer, device, eos_ids (any of them ends a completion),
    pad_id, forbidden (V,) bool: placeholders and other special tokens, never sampled: a sampled image
    placeholder would make the next full forward pass fail.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.quirks = Quirks(model, processor)
        self.decoder, self.embed = model.get_decoder(), model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]
        self.eos_ids = torch.tensor(sorted({i for i in ends if i is not None}))
        pad = self.tokenizer.pad_token_id
        self.pad_id = int(self.eos_ids[0]) if pad is None else pad
        special = special_ids(self.tokenizer) | {
            value
            for name, value in vars(model.config).items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        self.forbidden = torch.zeros(self.head.weight.shape[0], dtype=torch.bool)
        self.forbidden[
            [i for i in special - set(self.eos_ids.tolist()) if 0 <= i < len(self.forbidden)]
        ] = True
        self.to(next(model.parameters()).device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.forbidden.device

    def to(self, device: torch.device | str) -> "Policy":
        """Move the model and what goes with it."""
        self.model.to(device)
        self.eos_ids, self.forbidden = self.eos_ids.to(device), self.forbidden.to(device)
        return self

    # -- the network -------------------------------------------------------------------------
    def prefill(self, inputs: dict[str, Tensor]) -> Prefix:
        """Run images and prompts through the whole model, once.

        inputs: as `data.collate` makes them.  Raises DataError for a decoder that attends in ways the
        shared prefixes do not reproduce.
        """
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        mask = inputs["attention_mask"].bool()
        inputs |= self.quirks.before_prefill(mask)
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        cache, position = self.quirks.after_prefill(out, mask)
        refuse_unless_exact(self.decoder.config, cache, mask.shape[1])
        return Prefix(
            key_values=KeyValues([x.keys for x in cache.layers], [x.values for x in cache.layers]),
            mask=mask,
            logits=self._allowed(out.logits[:, -1]),
            position=position,
        )

    def rows(self, prefix: Prefix, prompt_index: Tensor) -> Rows:
        """R rows; row r continues prompt_index[r]."""
        return Rows(self.decoder, [prefix.view(prompt_index)], prefix.position[prompt_index])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) next-token logits in float32, -inf where forbidden."""
        return self._allowed(self.head(hidden))

    def _allowed(self, logits: Tensor) -> Tensor:
        return logits.float().masked_fill(self.forbidden, -torch.inf)

    @torch.no_grad()
    def draw(self, hidden: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        """H next tokens after each of K hidden states: (K, D), (K, H) -> (K, H).

        In pieces: K distributions over a vocabulary of 150,000 words need not be held at once.
        """
        pieces = zip(hidden.split(1024), uniforms.split(1024), strict=True)
        drawn = [sample_tokens(self.logits(h), u, temperature) for h, u in pieces]
        return torch.cat(drawn) if drawn else torch.zeros_like(uniforms, dtype=torch.long)

    @torch.no_grad()
    def stretches(self, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """(K, 2): from which number to which `draw` draws these tokens after these hidden states."""
        found = [hidden.new_zeros(0, 2, dtype=torch.float32)]
        for h, t in zip(hidden.split(1024), tokens[:, None].split(1024), strict=True):
            p = (self.logits(h) / temperature).softmax(-1)
            cdf = p.cumsum(-1)
            high = cdf.gather(1, t)
            found.append(torch.cat([high - p.gather(1, t), high], 1) / cdf[:, -1:])
        return torch.cat(found)

    def token_logps(self, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of given next tokens: (K, D), (K,) -> (K,), in pieces as in `draw`."""
        pieces = zip(hidden.split(1024), tokens.split(1024), strict=True)
        logps = [
            (self.logits(h) / temperature).log_softmax(-1).gather(-1, t[:, None])[:, 0]
            for h, t in pieces
        ]
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    def decode(
        self,
        rows: Rows,
        tokens: Tensor,
        budget: Tensor,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Continue each row until it ends or its budget is spent; ended rows leave the batch.

        tokens: (R,) the first new token of each row.  budget: (R,) most new tokens, at least 1.
        uniforms: (R, L) one number per row and step (column 0, the first token's, is not read), or
        None for greedy.  Returns ids (R, max budget), padded, and their lengths (R,), EOS included.
        """
        longest = int(budget.max()) if len(budget) else 0
        ids = torch.full((len(tokens), longest), self.pad_id, device=self.device)
        lengths = torch.ones_like(budget)
        index = torch.arange(len(tokens), device=self.device)
        if longest:
            ids[:, 0] = tokens
        # Faster than no_grad where operations are small; ids and lengths were made outside of it.
        with torch.inference_mode():
            for step in range(1, longest):
                going = (~torch.isin(tokens, self.eos_ids) & (budget[index] > step)).nonzero()[:, 0]
                if not len(going):
                    break
                if len(going) < len(index):
                    index, tokens = index[going], tokens[going]
                    rows.keep(going)
                logits = self.logits(rows.extend(self.embed(tokens)[:, None])[:, -1])
                if uniforms is None:
                    tokens = sample_tokens(logits, None)
                else:
                    tokens = sample_tokens(logits, uniforms[index, step, None], temperature)[:, 0]
                ids[index, step] = tokens
                lengths[index] += 1
        return ids, lengths

    def per_token_logps(
        self,
        prefix: Prefix,
        prompt_index: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the sampling temperature, and entropies, of given completions.

        prompt_index: (N,) prompt of each.  completion_ids, completion_mask: (N, C).
        Returns (N, C) float32 twice, 0 where the mask is 0; gradients flow where they are enabled.
        """
        logits = prefix.logits[prompt_index][:, None]
        if completion_ids.shape[1] > 1:
            hidden = self.rows(prefix, prompt_index).extend(self.embed(completion_ids[:, :-1]))
            logits = torch.cat([logits, self.logits(hidden)], 1)
        return _chosen(logits / temperature, completion_ids, completion_mask)

    def full_per_token_logps(
        self,
        examples: Sequence[Example],
        prompt_index: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The same from one full forward pass per completion, without a cache.

        Slower, as the prompt runs once per completion; but activation checkpointing, which a cache rules
        out, works here: the decoder recomputes its layers in the backward pass.
        """
        inputs = collate([examples[i] for i in prompt_index.tolist()], self.processor)
        # Layers recompute in training mode only; what is in them stays as it is, without dropout.
        layers = [x for x in self.decoder.modules() if hasattr(x, "gradient_checkpointing")]
        for layer in layers:
            layer.training = True
        try:
            logits = self.full_logits(inputs, completion_ids, completion_mask)
        finally:
            for layer in layers:
                layer.training = False
        return _chosen(logits / temperature, completion_ids, completion_mask)

    def full_logits(
        self, inputs: dict[str, Tensor], completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """(N, C, V) logits that predict given completions (N, C), from one forward pass over everything.

        inputs: N prompts as `data.collate` makes them; gradients flow to any that ask for them.
        """
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs = self.quirks.append(inputs, completion_ids, completion_mask)
        keep = completion_ids.shape[1] + 1
        return self._allowed(
            self.model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        )

    def checkpoint_activations(self) -> None:
        """Let the decoder keep no activations of its layers for the backward pass."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)()

    def rows_that_fit(self, prompt: int, longest: int) -> int:
        """Rows of up to `longest` new tokens that half of the free memory holds, at least 1.

        Counted per row: keys and values while they are copied to grow, the scores of attention over
        prompt, trajectory and own tokens, the widest activations of a layer, and the logits.
        """
        config = self.decoder.config
        heads, hidden = config.num_attention_heads, config.hidden_size
        size = self.head.weight.element_size()
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim * longest * size
        scores = 3 * 4 * heads * longest * (prompt + 2 * longest)
        layer = longest * (3 * config.intermediate_size + 8 * hidden) * size
        row = kv + scores + layer + 3 * 4 * len(self.forbidden)
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = free_memory()
        return max(1, free // (2 * row))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, without dropout; afterwards as it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    # -- text --------------------------------------------------------------------------------
    def text(self, ids: Tensor | Sequence[int]) -> str:
        """The text of token ids, special tokens (the end, padding) left out, but for the four tags."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        unsaid = special_ids(self.tokenizer)
        return self.tokenizer.decode(
            [i for i in ids if i not in unsaid], clean_up_tokenization_spaces=False
        )

    def begins_word(self, ids: Tensor) -> Tensor:
        """(N, C) bool: where a word begins, or a sign that is part of none, in completions (N, C).

        A token goes on with a word where it begins with a letter or digit, and the one before ends with
        one or is blank.
        """
        different, which = torch.unique(ids, return_inverse=True)
        pieces = [self.tokenizer.decode([i]) for i in different.tolist()]
        opens, leads = (
            torch.tensor(found, device=ids.device)
            for found in (
                [piece[:1].isalnum() for piece in pieces],
                [piece[-1:].isalnum() or piece.isspace() for piece in pieces],
            )
        )
        goes_on = opens[which][:, 1:] & leads[which][:, :-1]
        return F.pad(~goes_on, (1, 0), value=True)

    def tokens_to_spell(self, ids: Tensor, character: int) -> int:
        """How many leading tokens it takes to spell at least `character` characters of the text.

        The bytes of one character may be several tokens, and a part of them decodes to other characters:
        only what agrees with the whole text is spelled.
        """
        whole = self.text(ids)
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self.text(ids[:middle])[:character] != whole[:character]:
                low = middle + 1
            else:
                high = middle
        return low

    @torch.no_grad()
    def answer(
        self,
        examples: Sequence[Example],
        max_new_tokens: int = 64,
        think: bool = True,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
    ) -> list[str]:
        """Completions as text: greedy, or drawn with `uniforms` (B, max_new_tokens) on the CPU."""
        prefix = self.prefill(collate(examples, self.processor, think))
        prompt_index = torch.arange(len(examples), device=self.device)
        uniforms = None if uniforms is None else uniforms.to(self.device)
        of_first = None if uniforms is None else uniforms[:, :1]
        first = sample_tokens(prefix.logits, of_first, temperature).view(-1)
        budget = torch.full_like(prompt_index, max_new_tokens)
        rows = self.rows(prefix, prompt_index)
        ids, lengths = self.decode(rows, first, budget, uniforms, temperature)
        return [
            with_opening(opening(example, self.processor, think), self.text(row[:n]))
            for example, row, n in zip(examples, ids, lengths.tolist(), strict=True)
        ]

    def save(self, folder: Path | str) -> None:
        """An ordinary Hugging Face folder: configuration, safetensors, tokenizer, processor."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def free_memory() -> int:
    """Bytes of memory that are to be had; where the system does not say, half of the machine's, or 4 GB."""
    with contextlib.suppress(OSError):  # Linux; files that it keeps in memory can be dropped
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS
    except (AttributeError, ValueError):  # Windows
        return 4 * 2**30


def check_example(example: Example, config, processor, longest: int) -> None:
    """Raise DataError for an example whose prompt and a completion of `longest` the model cannot take."""
    names = {*processor.tokenizer.convert_ids_to_tokens(sorted(special_ids(processor.tokenizer)))}
    names |= {str(getattr(processor, "image_token", None) or "<image>")}
    if found := sorted(name for name in names if name in example.question):
        raise DataError(
            f"the question holds {found[0]}, which means something to this model: take it out"
        )
    try:
        inputs = collate([example], processor)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the model's processor refuses it: {_first_line(error)}") from None
    places = [("model", config.get_text_config(), inputs["input_ids"].shape[1] + longest)]
    if "qformer_input_ids" in inputs:
        places += [("Q-Former", config.qformer_config, inputs["qformer_input_ids"].shape[1])]
    for what, part, length in places:
        most = getattr(part, "max_position_embeddings", None) or length
        if length > most:
            raise DataError(
                f"{length} tokens, and the {what} takes at most {most}: shorten the question"
            )


def load_config(
    path_or_id: str | Path, trust_remote_code: bool = False
) -> transformers.PretrainedConfig:
    """The configuration of an image-text model.  Raises DataError where there is none to be had."""
    with _told_in_a_line(path_or_id):
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)
    if type(config) not in AutoModelForImageTextToText._model_mapping and not trust_remote_code:
        raise DataError(f"model {path_or_id}: {config.model_type} is not an image-text model")
    return config


def load_policy(
    path_or_id: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Policy:
    """Any image-text model of transformers, from a folder or by its name on the hub.

    Weights are read from safetensors only. trust_remote_code runs code that comes with the model.
    Raises DataError where it cannot be loaded.
    """
    config = load_config(path_or_id, trust_remote_code)
    processor = load_processor(path_or_id, config, trust_remote_code)
    with _told_in_a_line(path_or_id):
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            path_or_id,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        missing = sorted(loaded["missing_keys"])
        if missing:
            raise DataError(
                f"model {path_or_id}: {len(missing)} weights are not in its files, {missing[0]} among "
                f"them: they would be random; get all files of the model again"
            )
        broken = [name for name, w in model.named_parameters() if not w.isfinite().all()]
        if broken:
            raise DataError(
                f"model {path_or_id}: {broken[0]} holds values that are not finite numbers"
            )
        policy = Policy(model.to(device), processor)
    with _told_in_a_line(path_or_id, "answer a question with a shared prompt"):
        prove_exact(policy)
    return policy


@torch.no_grad()
def prove_exact(policy: Policy) -> None:
    """Compare a completion that reads a shared prefix with one plain pass.  Raises where they differ.

    So a model that keeps the image where shared prefixes do not reach is refused before it is used,
    whatever it is called.
    """
    picture = Image.effect_noise((56, 56), 64).convert("RGB")
    inputs = collate([Example(picture, "Is it there?", "yes")], policy.processor)
    ids = (~policy.forbidden).nonzero()[-5:].T  # (1, 5) any tokens do
    prefix = policy.prefill(inputs)
    rows = policy.rows(prefix, torch.zeros(1, dtype=torch.long, device=policy.device))
    hidden = rows.extend(policy.embed(ids[:, :-1]))
    shared = torch.cat([prefix.logits[:, None], policy.logits(hidden)], 1)[..., ~policy.forbidden]
    plain = policy.full_logits(inputs, ids, torch.ones_like(ids))[..., ~policy.forbidden]
    apart = (shared - plain).abs().max().item() / max(plain.std().item(), 1.0)
    # `not <=` refuses what is not a number, too.
    if not apart <= TOLERANCE[policy.head.weight.dtype]:
        raise DataError(
            f"{policy.model.config.model_type}: a completion that shares its prompt differs from a plain "
            f"pass by {apart:.2g}: this model cannot be scored exactly"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _told_in_a_line(path_or_id: str | Path, what: str = "be loaded") -> Iterator[None]:
    """Whatever the library raises over a broken model becomes a DataError that names the model.

    Its own pages about missing weights are left out: `load_policy` says them in a line.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (torch.OutOfMemoryError, DataError):
        raise
    except Exception as error:
        raise DataError(f"model {path_or_id}: cannot {what}: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def load_processor(
    path_or_id: str | Path, config: transformers.PretrainedConfig, trust_remote_code: bool = False
):
    """The model's processor; where its video half is what cannot be loaded, the rest of it.

    A tokenizer without a padding token pads with the end of text: the mask hides what is padded.
    """
    with _told_in_a_line(path_or_id):
        processor = _any_processor(path_or_id, config, trust_remote_code)
        for tokenizer in (processor.tokenizer, getattr(processor, "qformer_tokenizer", None)):
            if tokenizer is not None and tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return processor


def _any_processor(path_or_id: str | Path, config, trust_remote_code: bool):
    """Processors of models that also take videos want torchvision for them, and SmolVLM's num2words."""
    kind = PROCESSOR_MAPPING.get(type(config), None)
    try:
        return AutoProcessor.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError, OSError):
        if kind is None or "video_processor" not in kind.get_attributes():
            raise
    if kind is transformers.SmolVLMProcessor:  # the same placeholders, without videos
        return transformers.Idefics3Processor.from_pretrained(path_or_id)
    return image_only(kind).from_pretrained(path_or_id)


def image_only(kind: type) -> type:
    """A processor class without its video half, which needs torchvision."""
    keep = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: keep)})
