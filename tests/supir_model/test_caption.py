from __future__ import annotations

import pytest
import torch

from supir_model.caption import describe


def picture(red: float, green: float, blue: float, spread: float = 0.3) -> torch.Tensor:
    """Stripes around a color, [3, 64, 64] in [-1, 1]."""
    stripes = torch.linspace(-spread, spread, 64).repeat(64, 1)
    rgb = torch.tensor([red, green, blue])[:, None, None]
    return ((rgb + stripes).clamp(0, 1)) * 2 - 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (picture(0.5, 0.5, 0.5), "black and white photograph"),
        (picture(0.6, 0.5, 0.35, spread=0.1), "sepia toned photograph"),
        (picture(0.2, 0.2, 0.2, spread=0.05), "dark, low contrast"),
        (picture(0.8, 0.8, 0.8, spread=0.05), "bright"),
    ],
)
def test_tone_brightness_and_contrast(image: torch.Tensor, words: str) -> None:
    assert words in describe(image[None])[0]


def test_colors_have_a_temperature() -> None:
    warm, cool = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    warm[0, :, 32:], cool[2, :, 32:] = 1.0, 1.0  # half of the picture colored: no tone of the whole
    assert "warm tones" in describe(warm[None])[0]
    assert "cool tones" in describe(cool[None])[0]


def test_detail_separates_noise_from_fog() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert "richly detailed" in describe(noise)[0]
    assert "plain" in describe(torch.zeros(1, 3, 64, 64))[0]


def test_material_replaces_photograph_and_one_pixel_is_enough() -> None:
    assert "black and white map" in describe(torch.zeros(1, 3, 1, 1), material="map")[0]


def test_batch_equals_single() -> None:
    images = torch.rand(3, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert describe(images) == [describe(image[None])[0] for image in images]
