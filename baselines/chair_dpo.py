"""CHAIR-DPO (arXiv 2508.20181): of K descriptions that the model drew itself, the truest against the falsest.

Nothing is corrected and nobody else writes: both texts are the model's own. What tells them apart is
CHAIR_I, the share of the things named that are not there. It needs no more than a list of what is, so it
serves the scene world and any file of captions with their `objects`.

The original draws K = 2 at temperature 0.7 and has beta 0.2 in its DPO loss.
"""

from collections.abc import Sequence

from baselines.pairs import Pair
from baselines.photos import named
from data import Example
from rewards import final_answer


def chair_i(example: Example, completion: str) -> float | None:
    """The share of the things named in a completion's answer that are absent; None where it names none."""
    things = named(example, final_answer(completion))
    return sum(name not in example.objects for name in things) / len(things) if things else None


def best_against_worst(example: Example, completions: Sequence[str]) -> Pair | None:
    """The completion of the lowest CHAIR_I against the one of the highest; the first where several are.

    None for a tie, as in the original. Completions that name nothing take no part: saying nothing is not
    being right.

    >>> seen = Example(None, "Describe the image.", "", "caption", ("boat",), ("boat", "fish", "car"))
    >>> pair = best_against_worst(seen, ["a fish", "a boat and a fish", "a car", "a boat", "nothing"])
    >>> pair.chosen, pair.rejected
    ('a boat', 'a fish')
    """
    judged = [(text, chair_i(example, text)) for text in completions]
    judged = [(text, share) for text, share in judged if share is not None]
    if len({share for _, share in judged}) < 2:
        return None
    best = min(judged, key=lambda one: one[1])
    worst = max(judged, key=lambda one: one[1])
    return Pair(example, best[0], worst[0])
