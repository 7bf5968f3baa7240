from __future__ import annotations

import imagecodecs
import numpy as np
import pytest

from supir_batch import color
from supir_batch.color import Tone
from supir_batch.errors import ImageError
from supir_batch.types import FloatImage


def _ramp() -> FloatImage:
    return np.linspace(0, 1, 65536, dtype=np.float32).reshape(256, 256, 1)


def _sepia(grey: FloatImage) -> FloatImage:
    return np.concatenate([grey**0.75, grey, grey**1.4], axis=2).astype(np.float32)


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_every_16_bit_level_survives_a_grey_profile_both_ways(gamma: float) -> None:
    icc = bytes(imagecodecs.cms_profile("gray", gamma=gamma))
    back = color.from_srgb(color.to_srgb(_ramp(), icc), icc, 1)
    assert np.abs(back.astype(np.float64) - _ramp()).max() * 65535 < 0.05


def test_grey_becomes_three_equal_bands_and_returns_exactly() -> None:
    rgb = color.to_srgb(_ramp(), None)
    assert rgb.shape == (256, 256, 3)
    np.testing.assert_array_equal(color.from_srgb(rgb, None, 1), _ramp())


def test_colors_of_a_wider_space_return_when_srgb_can_hold_them(rng: np.random.Generator) -> None:
    icc = bytes(imagecodecs.cms_profile("adobergb"))
    srgb = rng.random((64, 64, 3), dtype=np.float32)
    wide = color.from_srgb(srgb, icc, 3)
    assert np.abs(wide - srgb).max() > 0.05
    assert np.abs(color.from_srgb(color.to_srgb(wide, icc), icc, 3) - wide).max() * 65535 < 1


def test_a_profile_for_other_data_is_named() -> None:
    grey = bytes(imagecodecs.cms_profile("gray", gamma=2.2))
    assert "GRAY" in str(color.check_profile(grey, 3))
    assert color.check_profile(grey, 1) is None
    assert color.check_profile(b"no profile at all" * 20, 3) is not None


def test_a_broken_profile_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="ICC profile"):
        color.to_srgb(np.zeros((2, 2, 3), np.float32), b"nonsense" * 40)


def test_neutral(rng: np.random.Generator) -> None:
    grey = rng.random((64, 64, 1), dtype=np.float32)
    assert color.measure_tone(np.repeat(grey, 3, axis=2)).kind == "neutral"
    tinted = rng.random((8, 8, 3), dtype=np.float32)
    neutral = color.apply_tone(tinted, Tone("neutral"))
    assert (neutral == neutral[..., :1]).all()


def test_a_sepia_tone_is_measured_and_put_back(rng: np.random.Generator) -> None:
    grey = rng.random((64, 64, 1), dtype=np.float32)
    tone = color.measure_tone(_sepia(grey))
    assert tone.kind == "toned"
    other = rng.random((32, 32, 1), dtype=np.float32) * 0.8 + 0.1
    toned = color.apply_tone(np.repeat(other, 3, axis=2), tone)
    assert color.measure_tone(toned).kind == "toned"
    again = color.apply_tone(_sepia(other), tone)
    assert np.abs(again - _sepia(other)).max() < 0.02  # a print that has the tone already keeps it


def test_one_hand_colored_cheek_makes_it_a_color_image(rng: np.random.Generator) -> None:
    image = _sepia(rng.random((100, 100, 1), dtype=np.float32))
    image[40:43, 40:43] = (0.9, 0.3, 0.4)
    assert color.measure_tone(image).kind == "color"


def test_color_photographs_are_left_alone(rng: np.random.Generator) -> None:
    image = rng.random((32, 32, 3), dtype=np.float32)
    tone = color.measure_tone(image)
    assert tone.kind == "color"
    assert color.apply_tone(image, tone) is image


def test_what_srgb_cannot_hold_is_kept_apart(wide_profile: bytes, rng: np.random.Generator) -> None:
    assert color.exceeds_srgb(wide_profile, 3)
    wide = rng.random((64, 64, 3), dtype=np.float32)
    wide[:8] = np.round(wide[:8])  # the corners of the space
    srgb = color.to_srgb(wide, wide_profile)
    lost = color.lost_in_srgb(wide, srgb, wide_profile)
    assert 0.05 < np.abs(lost).max() <= 1
    back = color.from_srgb(srgb, wide_profile, 3) + lost
    assert np.abs(back - wide).max() * 65535 < 0.1


def test_srgb_and_grey_lose_nothing() -> None:
    assert not color.exceeds_srgb(None, 3)
    assert not color.exceeds_srgb(bytes(imagecodecs.cms_profile("srgb")), 3)
    assert not color.exceeds_srgb(bytes(imagecodecs.cms_profile("gray", gamma=2.2)), 1)
