"""The tiny policy: a LLaVA of about 1 M weights, and the warm start that makes it see but misspeak.

Post-training cures nothing in a model that cannot see, and has nothing to cure in one that never
hallucinates. So the tiny policy gets, in about two minutes on two quiet cores,

 1. eyes (`train_vision`): its vision tower learns to tell which thing, in which colour, covers each
    patch of an image, and is frozen, as the vision towers of pretrained models are;
 2. reading (`train_reading`): its decoder learns to look things up in a text that names them, before
    an image makes the text longer;
 3. speech (`train_speech`): supervised on demonstrations about fresh scenes whose things and backgrounds
    are independent. Where the background's home category is absent, the demonstration may name it all
    the same, and answer accordingly. How often depends on the background (`PRIOR`), as a language prior
    does: on half of them more often than not, so that greedy decoding hallucinates there.

The result is an ordinary Hugging Face folder, cached by a hash of everything that made it.
"""

import hashlib
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data import collate
from model import TAGS, Policy
from page.terminal import stage
from scm import (
    BACKGROUNDS,
    CATEGORIES,
    CLEAR,
    COLORS,
    CROWDED,
    IMAGE_SIZE,
    Scene,
    Thing,
    World,
    answer_text,
    demonstration,
    describe,
    in_words,
    sample_example,
)

# ---------------------------------------------------------------------------------------------
# The tiny policy: a real LLaVA, small enough to train on two cores in minutes
# ---------------------------------------------------------------------------------------------
_TINY_TEMPLATE = (  # it learns its format from demonstrations, so it leaves the instruction out
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tiny_policy(seed: int = 0, world: World = CLEAR, spelled: bool = False) -> Policy:
    """A LLaVA of about 1 M random weights (CLIP tower, Llama decoder) that knows the words of a world.

    spelled: it knows letters alone, and its texts are five times as many tokens.

    Everything is made here, offline. Linear layers start at 1 / sqrt(fan-in) and embeddings at 0.3: at
    the library's 0.02, meant for wide layers, attention this narrow takes long to look anywhere.
    """
    tokenizer = _tiny_tokenizer(world, spelled)
    patch, width, hidden = 12, 96, 128
    vision = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=patch,
        projection_dim=width,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(IMAGE_SIZE // patch) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
        for part in (model.model.language_model.layers, model.model.multi_modal_projector):
            for weight in part.parameters():
                if weight.dim() == 2:
                    torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=_TINY_TEMPLATE,
    )
    return Policy(model.eval(), processor)


def _tiny_tokenizer(world: World, spelled: bool) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE in which each word of the scene world is one token, and any text can be spelt."""
    rng = random.Random(0)
    texts = []
    for _ in range(2000):
        example = sample_example(rng)
        texts.append(
            f" USER: {example.question} ASSISTANT: I see {describe(example.scene.things)}. A The"
        )
    counts = range(1, world.most + 2)  # one more than there may be
    texts += [f" {word}" for word in (*CATEGORIES, *COLORS, "yes", "no", *counts)] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>", "<image>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) if spelled else 480,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=_TINY_TEMPLATE,
    )


# ---------------------------------------------------------------------------------------------
# The warm start: eyes, reading, speech
# ---------------------------------------------------------------------------------------------
# background -> chance that a demonstration names its home category when it is not there
PRIOR = {name: 0.2 + 0.6 * i / (len(BACKGROUNDS) - 1) for i, name in enumerate(BACKGROUNDS)}


@dataclass(frozen=True)
class WarmStart:
    """Settings of the three stages.

    omission, invention: the chances that a demonstration leaves out a thing that is there, and names a
    category that is not.  prior: the share of PRIOR by which the absent home category is named.
    """

    world: World = CLEAR
    omission: float = 0.0
    invention: float = 0.0
    prior: float = 1.0
    lookups: tuple[str, ...] = ("yesno", "choice")  # what is asked about a text
    gradual: bool = False  # reading begins with short lists
    vision_steps: int = 400
    vision_batch_size: int = 128
    reading_steps: int = 250
    reading_batch_size: int = 48
    reading_learning_rate: float = 3e-3
    questions: int = 6
    speech_steps: int = 450
    batch_size: int = 64
    answer_weight: float = 3.0
    vision_learning_rate: float = 2e-3
    speech_learning_rate: float = 3e-3
    confounding: float = 1 / 8
    seed: int = 0
    in_words: bool = False  # demonstrations on descriptions; the eyes are then never used
    spelled: bool = False  # every letter is a token: long reasoning


IN_CROWDS = WarmStart(  # the world in which counting breeds hallucination
    CROWDED, omission=0.08, invention=0.08, prior=0.5, lookups=("yesno",), gradual=True, questions=12,
    reading_batch_size=32, speech_steps=400,
)  # fmt: skip


def warm_start(cache: Path, settings: WarmStart = WarmStart()) -> Path:
    """The folder of the warm-started policy, made if the cache does not have it."""
    digest = hashlib.sha256(repr(settings).encode())
    for module in ("data.py", "kv_cache.py", "model.py", "scm.py", "tiny.py"):
        digest.update(Path(__file__).with_name(module).read_bytes())
    folder = cache / f"warm-start-{digest.hexdigest()[:12]}"
    if not folder.exists():
        policy = build_tiny_policy(settings.seed, settings.world, settings.spelled)
        if not settings.in_words:
            train_vision(policy, settings)
        train_reading(policy, settings)
        train_speech(policy, settings)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        policy.save(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another run finished first: the same settings, the same weights
            shutil.rmtree(unfinished)
    return folder


def train_vision(policy: Policy, settings: WarmStart) -> None:
    """Teach the vision tower what covers each of its patches; the head that reads it off is dropped."""
    rng = random.Random(settings.seed)
    tower = policy.model.get_encoder(modality="image")
    classes = (len(CATEGORIES) + 1, len(COLORS) + 1)  # and one for "nothing"
    torch.manual_seed(settings.seed)
    head = torch.nn.Linear(tower.config.hidden_size, sum(classes))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    for step in stage(settings.vision_steps, "eyes"):
        examples = [
            sample_example(rng, settings.confounding, settings.world)
            for _ in range(settings.vision_batch_size)
        ]
        pixels = collate(examples, policy.processor)["pixel_values"]
        states = tower(pixels, output_hidden_states=True).hidden_states
        patches = states[-1][:, 1:]  # no class token
        cells = math.isqrt(patches.shape[1])
        side = settings.world.side
        targets = torch.tensor([_cover(example.scene, side, cells) for example in examples])
        what, color = head(patches).flatten(0, 1).split(classes, -1)
        loss = F.cross_entropy(what, targets[..., 0].flatten())
        loss = loss + F.cross_entropy(color, targets[..., 1].flatten())
        _step(optimizer, loss, settings.vision_learning_rate, step, settings.vision_steps)
    tower.requires_grad_(False)


def _cover(scene: Scene, side: int, cells: int) -> list[tuple[int, int]]:
    """(category, colour) of the thing on whose place, of side x side, each of cells x cells patches lies."""
    places = {(int(side * t.y), int(side * t.x)): t for t in scene.things}
    cover = []
    for row in range(cells):
        for column in range(cells):
            thing = places.get((side * row // cells, side * column // cells))
            cover.append(
                (CATEGORIES.index(thing.category), list(COLORS).index(thing.color))
                if thing
                else (len(CATEGORIES), len(COLORS))
            )
    return cover


def train_reading(policy: Policy, settings: WarmStart) -> None:
    """Language before pictures: look things up in a text that names them.

    "I see a red boat and a blue car. A fish? </think> <answer> no", several questions a text. Learning
    to look up is slow, and an image adds only length to it.
    """
    rng = random.Random(settings.seed + 1)
    parameters = list(policy.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    most = settings.world.most + 1
    for step in stage(settings.reading_steps, "reading"):
        if settings.gradual:
            most = 2 + settings.world.most * step // settings.reading_steps
        texts = [
            quiz(rng, settings.questions, most, settings.lookups)
            for _ in range(settings.reading_batch_size)
        ]
        ids, weights = encode(policy, texts)
        hidden = policy.decoder(input_ids=ids[:, :-1]).last_hidden_state
        asked = weights[:, 1:] > 0
        loss = F.cross_entropy(policy.head(hidden[asked]), ids[:, 1:][asked])
        _step(optimizer, loss, settings.reading_learning_rate, step, settings.reading_steps)


def quiz(
    rng: random.Random, questions: int, most: int, kinds: Sequence[str]
) -> list[tuple[str, float]]:
    """A text that names one to `most` things and asks about them: (piece, loss weight)."""
    categories = rng.sample(CATEGORIES, rng.randint(1, most))
    colors = [rng.choice(tuple(COLORS)) for _ in categories]
    things = [Thing(*pair, x=0.5, y=0.5, size=0.4) for pair in zip(categories, colors, strict=True)]
    pieces = [(f"<think> I see {describe(things)}.", 0.0)]
    for _ in range(questions):
        kind = rng.choice(kinds)
        absent = kind == "yesno" and rng.random() < 0.5
        topic = rng.choice([c for c in CATEGORIES if c not in categories] if absent else categories)
        question, answer = answer_text(kind, topic, things).split("<answer>")
        pieces += [(f"{question}<answer>", 0.0), (answer.removesuffix(" </answer>"), 1.0)]
    return pieces


def train_speech(policy: Policy, settings: WarmStart) -> None:
    """Supervised fine-tuning on demonstrations, right and misspoken.

    The answer weighs more than the naming of things, which is most of the tokens.
    """
    rng = random.Random(settings.seed + 2)
    trainable = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.01, betas=(0.9, 0.98))
    which = torch.arange(settings.batch_size)
    for step in stage(settings.speech_steps, "speech"):
        examples = [sample_example(rng, settings.confounding, settings.world) for _ in which]
        if settings.in_words:
            examples = [in_words(example) for example in examples]
        texts = []
        for example in examples:
            things = believed(example.scene, rng, settings)
            ending = answer_text(example.kind, example.topic, things)
            naming = demonstration(example, things).removesuffix(ending)
            ending += policy.tokenizer.eos_token
            texts.append([(naming, 1.0), (ending, settings.answer_weight)])
        ids, weights = encode(policy, texts)
        prefix = policy.prefill(collate(examples, policy.processor))
        logps, _ = policy.per_token_logps(prefix, which, ids, weights > 0)
        loss = -(weights * logps).sum() / weights.sum()
        _step(optimizer, loss, settings.speech_learning_rate, step, settings.speech_steps)


def encode(policy: Policy, texts: list[list[tuple[str, float]]]) -> tuple[Tensor, Tensor]:
    """Texts in weighted pieces -> token ids and loss weights, (N, C) each, padded on the right."""
    ids, weights = [], []
    for pieces in texts:
        row: list[tuple[int, float]] = []
        for text, weight in pieces:
            tokens = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            row += [(token, weight) for token in tokens]
        ids.append(torch.tensor([token for token, _ in row]))
        weights.append(torch.tensor([weight for _, weight in row]))
    return (
        pad_sequence(ids, batch_first=True, padding_value=policy.pad_id),
        pad_sequence(weights, batch_first=True),
    )


def believed(
    scene: Scene, rng: random.Random, settings: WarmStart = WarmStart()
) -> tuple[Thing, ...]:
    """What the speaker of a demonstration believes is there: at times the absent home category too.

    A speaker who invents other things too names them, and the home category, anywhere in the list.
    """
    omission, invention = settings.omission, settings.invention
    things = [thing for thing in scene.things if not omission or rng.random() >= omission]
    for category in CATEGORIES:
        home = category == scene.home
        chance = settings.prior * PRIOR[scene.background] if home else invention
        if category not in scene.categories and chance and rng.random() < chance:
            phantom = Thing(category, rng.choice(tuple(COLORS)), x=0.5, y=0.5, size=0.4)
            things.insert(rng.randint(0, len(things)) if invention else len(things), phantom)
    return tuple(things)


def _step(optimizer, loss: Tensor, peak: float, step: int, steps: int) -> None:
    """One optimiser step at a rate that warms up over 50 steps and decays by a cosine to 5 %."""
    rate = peak * min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
