"""Colours are told apart by everyone, and what is written is read on its ground."""

import itertools

import numpy as np
import pytest

from page.palette import DARK, LIGHT

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# IEEE TVCG 15(6), 2009, at severity 1.0: of linear RGB.
SEEN = {
    "by all cones": np.eye(3),
    "protanopia": np.array([
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ]),
    "deuteranopia": np.array([
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ]),
}  # fmt: skip
XYZ = np.array(  # of linear sRGB, D65
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)


def linear(color):
    """#rrggbb as linear RGB."""
    channels = np.frombuffer(bytes.fromhex(color[1:]), np.uint8) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB."""
    t = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a, b):
    """WCAG 2: of two colours."""
    low, high = sorted(XYZ[1] @ linear(color) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


def test_the_measures_give_the_numbers_known_for_them():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    assert lab(linear("#ff0000")) == pytest.approx([53.2, 80.1, 67.2], abs=0.1)
    for seen in SEEN.values():  # white stays white
        assert seen @ np.ones(3) == pytest.approx(np.ones(3), abs=1e-5)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("seen", SEEN)
def test_no_two_meanings_look_alike(scheme, seen):
    colors = scheme.hues | {"ink": scheme.ink, "soft": scheme.soft}
    for (a, one), (b, other) in itertools.combinations(colors.items(), 2):
        places = [lab(SEEN[seen] @ linear(color)) for color in (one, other)]
        assert np.linalg.norm(places[0] - places[1]) >= 15, (a, b)  # Delta E of 1976


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_are_read_on_their_ground(scheme):
    assert contrast(scheme.ink, scheme.ground) >= 4.5 <= contrast(scheme.soft, scheme.ground)
    assert all(contrast(color, scheme.ground) >= 3 for color in scheme.hues.values())


def test_both_schemes_have_the_same_meanings():
    assert LIGHT.hues.keys() == DARK.hues.keys()
