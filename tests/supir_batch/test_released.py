"""The release's geometry; its recorded numbers are compared in tests/supir_model/test_parity.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from supir_batch import released
from supir_batch.errors import ImageError
from supir_batch.types import FloatImage, Outcome

Restore = Callable[..., Outcome]

SIDE = st.integers(1, 40)


@hypothesis_settings(deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
def test_to_output_is_torchs_bicubic_truncated(height: int, width: int, out_height: int, out_width: int) -> None:
    pixels = np.random.default_rng(height * width).uniform(-0.2, 1.2, (height, width, 3)).astype(np.float32)
    tensor = torch.from_numpy(pixels).double().permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=(out_height, out_width), mode="bicubic", align_corners=False)
    wanted = (resized[0].permute(1, 2, 0) * 255).clip(0, 255).numpy()
    levels = released.to_output(pixels, out_width, out_height)
    assert levels.shape == (out_height, out_width, 3)
    # truncated: never above, less than one level below
    assert (levels - wanted).max() < 1e-3
    assert (wanted - levels).max() < 1 + 1e-3


@hypothesis_settings(deadline=None)
@given(st.integers(33, 4000), st.integers(33, 4000), st.sampled_from([1.0, 1.5, 2.0]), st.integers(0, 1024))
def test_sizes_are_multiples_next_to_what_was_asked(width: int, height: int, upscale: float, min_size: int) -> None:
    work, output = released.sizes(width, height, upscale, min_size)
    assert output == (round(width * upscale), round(height * upscale))
    factor = max(1.0, min_size / (min(width, height) * upscale))
    for side, given_side in zip(work, (width, height), strict=True):
        assert side % 64 == 0
        assert abs(side - given_side * upscale * factor) <= 32 + 1e-6


def test_halves_go_to_the_even_multiple() -> None:
    assert released.sizes(96, 160, 1.0, 0).work == (128, 128)


def test_no_pixels_and_too_many_are_refused() -> None:
    with pytest.raises(ImageError, match=r"20 x 300 pixels become 0 x 320 .* use geometry 'pad' or a larger min_size"):
        released.usable_sizes(20, 300, 1.0, 0)
    with pytest.raises(ImageError, match="would work on it at 1024 x 4096000 pixels"):
        released.usable_sizes(1, 4000, 1.0, 1024)
    assert released.usable_sizes(100, 1000, 1.0, 1024).work == (1024, 10240)


def _noisy(path: Path, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return levels


def test_an_image_goes_through_as_the_release_does_it(
    tmp_path: Path, rng: np.random.Generator, restore: Restore
) -> None:
    levels = _noisy(tmp_path / "a.png", 131, 75, rng)
    seen: list[FloatImage] = []

    def overshoot(pixels: FloatImage) -> FloatImage:
        seen.append(pixels * np.float32(1.3) - np.float32(0.15))
        return seen[-1]

    outcome = restore(tmp_path / "a.png", change=overshoot, geometry="released", upscale=1.5, min_size=128)
    assert outcome.status == "done", outcome.ticket.failure
    # 196.5 x 112.5, enlarged to a shorter side of 128: 223.6 x 128, then to multiples of 64
    worked = Image.fromarray(levels).resize((192, 128), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(seen[0], np.asarray(worked) / 255 * 1.3 - 0.15, atol=1e-6)
    tensor = torch.from_numpy(seen[0]).permute(2, 0, 1)[None]
    wanted = F.interpolate(tensor, size=(112, 196), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    wanted = (wanted * 255).clip(0, 255).to(torch.uint8).numpy()
    with Image.open(outcome.output_uri) as image:
        written = np.asarray(image)
    assert written.shape == (112, 196, 3)
    difference = np.abs(written.astype(int) - wanted.astype(int))
    assert difference.max() <= 1  # a value on the edge of a level
    assert (difference > 0).mean() < 1e-3


def test_alpha_survives(tmp_path: Path, rng: np.random.Generator, restore: Restore) -> None:
    Image.fromarray(rng.integers(0, 256, (70, 90, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    outcome = restore(tmp_path / "a.png", geometry="released")
    with Image.open(outcome.output_uri) as image:
        assert (image.mode, image.size) == ("RGBA", (90, 70))


def test_sixteen_bits_are_noted(tmp_path: Path, rng: np.random.Generator, restore: Restore) -> None:
    Image.fromarray(rng.integers(0, 2**16, (70, 90), dtype=np.uint16)).save(tmp_path / "a.png")
    facts = restore(tmp_path / "a.png", geometry="released").ticket.facts
    assert facts is not None
    assert "geometry 'released' works on 8 bits per sample; the source has 16" in facts.notes


def test_a_refused_image_is_a_failed_outcome(tmp_path: Path, rng: np.random.Generator, restore: Restore) -> None:
    _noisy(tmp_path / "a.png", 90, 20, rng)
    failure = restore(tmp_path / "a.png", geometry="released").ticket.failure
    assert failure is not None
    assert failure.kind == "geometry"
