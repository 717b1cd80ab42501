"""Settings of the decoding rules: each a flag of evaluate.py with its range, each in the name of a file.

    greedy, sample   the model's own distribution, with a repetition penalty if asked for
    beam             beam search
    vcd dola deco opera   the rules of decoding.py, and their authors' settings

No torch here: a command line is read, and refused, before it is loaded.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from hallucination.files import DataError


def _set(default, flag: str, help_: str, low=-math.inf, above=-math.inf, high=math.inf, choices=()):
    """One field.  low, high: its range, ends included; above: what it must be larger than."""
    facts = {"flag": flag, "help": help_, "low": low, "above": above, "high": high}
    return dataclasses.field(default=default, metadata=facts | {"choices": choices})


def _penalty(default: float):
    return _set(
        default,
        "--repetition-penalty",
        "seen tokens, the prompt's included, made less likely; 1: off (1.2 for dola, 1 for others)",
        above=0,
    )


def _beams(low: int):
    return _set(5, "--num-beams", "texts kept side by side, for beam and opera", low=low)


@dataclass(frozen=True)
class Rule:
    """What all rules have in common.  Raises DataError for a setting out of its range."""

    name: ClassVar[str]
    draws: ClassVar[bool] = True  # whether a temperature means anything to it
    needs_image: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            facts, value = field.metadata, getattr(self, field.name)
            if facts["choices"] and value not in facts["choices"]:
                raise DataError(f"{facts['flag']} must be one of {facts['choices']}, got {value!r}")
            if isinstance(field.default, str):
                continue
            low, above, high = (facts[end] for end in ("low", "above", "high"))
            if not (math.isfinite(value) and low <= value <= high and value > above):
                bounds = [f"at least {low:g}"] * (low > -math.inf)
                bounds += [f"above {above:g}"] * (above > -math.inf)
                bounds += [f"at most {high:g}"] * (high < math.inf)
                raise DataError(f"{facts['flag']} must be {' and '.join(bounds)}, got {value:g}")

    def facts(self) -> dict:
        """The rule as it stands in every row of a file of answers."""
        return {"name": self.name} | dataclasses.asdict(self)


@dataclass(frozen=True)
class Plain(Rule):
    """The model's own distribution: greedy, or drawn at a temperature."""

    name: ClassVar[str] = "plain"
    repetition_penalty: float = _penalty(1.0)


@dataclass(frozen=True)
class Beam(Rule):
    """Beam search: the likeliest texts found, by mean log-probability per token."""

    name: ClassVar[str] = "beam"
    draws: ClassVar[bool] = False
    num_beams: int = _beams(1)


@dataclass(frozen=True)
class VCD(Rule):
    """Settings of `decoding.vcd_scores` and `decoding.diffuse`."""

    name: ClassVar[str] = "vcd"
    needs_image: ClassVar[bool] = True
    alpha: float = _set(1.0, "--vcd-alpha", "weight of the contrast; 0: its null control", low=0)
    beta: float = _set(
        0.1, "--vcd-beta", "least share of the likeliest token's probability", low=0, high=1
    )
    noise_step: int = _set(
        500, "--vcd-noise-step", "of the diffusion; the paper has 999 for POPE", low=0, high=999
    )
    repetition_penalty: float = _penalty(1.0)


@dataclass(frozen=True)
class DoLa(Rule):
    """Settings of `decoding.dola_scores`."""

    name: ClassVar[str] = "dola"
    layers: str = _set(
        "low", "--dola-layers", "low (long answers), high (short facts), or numbers, as 2,4,6"
    )
    relative_top: float = _set(
        0.1,
        "--dola-relative-top",
        "least share of the likeliest token's probability",
        low=0,
        high=1,
    )
    divergence: str = _set(
        "official",
        "--dola-divergence",
        "that chooses the layer: the code's, or the paper's",
        choices=("official", "jensen_shannon"),
    )
    repetition_penalty: float = _penalty(1.2)

    def __post_init__(self):
        super().__post_init__()
        _numbers("--dola-layers", self.layers, ("low", "high"))

    def layers_of(self, count: int, tied: bool) -> list[int]:
        """Hidden states to contrast with, in a model of `count` layers; 0 are the embeddings.

        For 32 layers low is 0, 2 .. 14 and high 16, 18 .. 30.  tied: the head is the embedding matrix, so
        that hidden state 0 would only say the token just read: low then starts at 2.
        """
        named = {
            "low": range(2 if tied else 0, count // 2, 2),
            "high": range(count // 2, count, 2),
        }
        return _checked_layers("--dola-layers", self.layers, named, count)


@dataclass(frozen=True)
class DeCo(Rule):
    """Settings of `decoding.deco_scores`."""

    name: ClassVar[str] = "deco"
    alpha: float = _set(0.6, "--deco-alpha", "weight of the correction; 0: its null control", low=0)
    top_p: float = _set(0.9, "--deco-top-p", "mass of the candidates", above=0, high=1)
    top_k: int = _set(20, "--deco-top-k", "most candidates", low=1)
    layers: str = _set("late", "--deco-layers", "late (20 to 28 of 32), or numbers, as 2,3")
    repetition_penalty: float = _penalty(1.0)

    def __post_init__(self):
        super().__post_init__()
        _numbers("--deco-layers", self.layers, ("late",))

    def layers_of(self, count: int, tied: bool) -> list[int]:
        """Hidden states that may correct the last, in a model of `count` layers: .625 to .875 of them."""
        late = range(math.ceil(0.625 * count), math.floor(0.875 * count) + 1)
        return _checked_layers("--deco-layers", self.layers, {"late": late}, count)


@dataclass(frozen=True)
class OPERA(Rule):
    """Settings of `decoding.opera_penalty`, `opera_scores` and `opera_rollback`, and of its beams."""

    name: ClassVar[str] = "opera"
    draws: ClassVar[bool] = False
    needs_image: ClassVar[bool] = True
    num_beams: int = _beams(2)
    candidates: int = _set(5, "--opera-candidates", "tokens that a beam weighs", low=2)
    alpha: float = _set(1.0, "--opera-alpha", "weight of the penalty", low=0)
    sigma: float = _set(50.0, "--opera-sigma", "scale of the attention", above=0)
    threshold: int = _set(
        15, "--opera-threshold", "step back where all beams meet a column more often", low=0
    )
    rollbacks: int = _set(5, "--opera-rollbacks", "most steps back to one place; 0: none", low=0)


RULES: dict[str, type[Rule]] = {
    "greedy": Plain,
    "sample": Plain,
    "beam": Beam,
    "vcd": VCD,
    "dola": DoLa,
    "deco": DeCo,
    "opera": OPERA,
}


def _numbers(flag: str, text: str, names: tuple[str, ...]) -> list[int]:
    """The layers that a flag lists, none where it has a name.  Raises DataError for anything else."""
    if text in names:
        return []
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        kinds = ", ".join([*names, "or numbers, as 2,4"])
        raise DataError(f"{flag} must be {kinds}, got {text!r}") from None


def _checked_layers(flag: str, text: str, named: dict[str, range], count: int) -> list[int]:
    found = list(named.get(text, ())) or _numbers(flag, text, tuple(named))
    if not found:
        raise DataError(
            f"{flag} {text} is no layer of a model that has {count}: name some of 0 to {count - 1}, "
            f"as {flag} {max(count - 2, 0)}"
        )
    if odd := [layer for layer in found if not 0 <= layer < count]:
        raise DataError(
            f"{flag} names layer {odd[0]}: this model has {count}, and the last is what the others are "
            f"compared with; name some of 0 to {count - 1}"
        )
    return found
