"""POVID (Zhou et al., arXiv 2402.11411): a true description against the same with an error put in.

    stage 1   chosen    a true description
              rejected  the same with one error, here by rule, where the original asks GPT-4V
    stage 2   the same pairs, and beside the rejected text the words that the model itself would have
              said, after every prefix of the chosen one, had the image been noised

 1. Errors in the scene world: the background's home category where it is absent, else a wrong colour.
    Both are what a prior suggests. The original has wrong relations, too; our texts state none. For
    photographs: see photos.py.
 2. The paper puts both rejected texts into one sigmoid, the code takes the mean of two losses: as here.
 3. In the code the reference takes its own words under noise, so that the two log-probabilities are of
    different tokens once the models part. Here both are of the policy's words.
 4. The code noises the image in [0, 1] before it is resized and normalised, as here; where it lets values
    outside wrap around in 8 bits, ours are clipped.

P pairs, C tokens of the chosen texts, padded; V words.
"""

import dataclasses
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from baselines.decoding import diffuse
from baselines.pairs import Pair
from baselines.photos import injected
from data import Example
from model import Policy, Prefix
from scm import COLORS, Thing, demonstration


def injected_pair(example: Example, rng: random.Random) -> Pair | None:
    """Stage 1: what is there against the same with one error.

    An absent thing is named last, as the tiny model's own inventions are.  Without a scene the example's
    answer is a caption, and photos.py puts the error in, or gives None.  ValueError for neither.
    """
    if example.scene is None and example.objects:
        texts = injected(example)
        return texts and Pair(example, *texts)
    if example.scene is None:
        raise ValueError(f"{example.question!r} has no scene: what it shows is not known")
    things, home = list(example.scene.things), example.scene.home
    if home not in example.scene.categories:
        things.append(Thing(home, rng.choice(tuple(COLORS)), x=0.5, y=0.5, size=0.4))
    else:
        place = rng.randrange(len(things))
        wrong = [color for color in COLORS if color != things[place].color]
        things[place] = dataclasses.replace(things[place], color=rng.choice(wrong))
    right = demonstration(example, example.scene.things)
    return Pair(example, right, demonstration(example, things))


def noised_bytes(pixels: Tensor, step: int, noise: Tensor) -> Tensor:
    """Pixels in [0, 1] after VCD's noise, as whole numbers from 0 to 255, cut off and not rounded.

    >>> noised_bytes(torch.tensor([0.1, 0.5, 0.9, 0.9]), 500, torch.tensor([-1.0, 0.2, -0.5, 1.0]))
    tensor([  0, 135, 133, 255], dtype=torch.uint8)
    """
    return (255 * diffuse(pixels, step, noise).clamp(0, 1)).byte()


def noised(example: Example, step: int, generator: torch.Generator) -> Example:
    """The same question about the noised image."""
    pixels = torch.tensor(np.asarray(example.open_image())) / 255
    noise = torch.randn(pixels.shape, generator=generator)
    image = Image.fromarray(noised_bytes(pixels, step, noise).numpy())
    return dataclasses.replace(example, image=image)


def next_logits(policy: Policy, prefix: Prefix, ids: Tensor) -> Tensor:
    """(P, C, V) logits of what follows each prefix of the texts `ids` (P, C), one text per prompt."""
    each = torch.arange(len(ids), device=ids.device)
    hidden = policy.rows(prefix, each).extend(policy.embed(ids[:, :-1]))
    return torch.cat([prefix.logits[:, None], policy.logits(hidden)], 1)


def own_logps(logits: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """(P,) log-probability of the model's own words: the sum over places, each after the chosen prefix.

    logits: (P, C, V) under the clean image; gradients flow through them alone.  words: (P, C), the likeliest
    under the noised image.  mask: (P, C), true on the chosen text's tokens.
    """
    of_words = logits.log_softmax(-1).gather(-1, words[..., None])[..., 0]
    return torch.where(mask, of_words, 0.0).sum(1)
