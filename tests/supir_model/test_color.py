from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supir_model.color import adain, decompose, fix_color, wavelet
from supir_model.config import ColorFix


def images(count: int, height: int = 33, width: int = 47) -> Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (33, 47)])
def test_bands_add_up_to_the_image(size: tuple[int, int]) -> None:
    image = images(2, *size)
    high, low = decompose(image)
    torch.testing.assert_close(high + low, image)


def test_low_band_of_a_flat_image_is_the_image() -> None:
    flat = torch.full((1, 3, 40, 40), 0.3)
    torch.testing.assert_close(decompose(flat)[1], flat)


@pytest.mark.parametrize("method", ["wavelet", "adain", "none"])
def test_an_image_with_its_own_colors_stays_as_it_is(method: ColorFix) -> None:
    image = images(1)
    torch.testing.assert_close(fix_color(image, image, method), image, rtol=0, atol=1e-6)


def test_wavelet_undoes_a_shift_of_color() -> None:
    image = images(1)
    shifted = image + torch.tensor([0.2, -0.1, 0.3])[None, :, None, None]
    torch.testing.assert_close(wavelet(shifted, image), image, rtol=0, atol=1e-5)


def test_adain_takes_mean_and_deviation_per_image_and_channel() -> None:
    content, style = images(2), images(2).flip(0) * 0.5 + 0.1
    out = adain(content, style)
    torch.testing.assert_close(out.mean(dim=(2, 3)), style.mean(dim=(2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(dim=(2, 3)), style.std(dim=(2, 3)), rtol=1e-3, atol=0)


def test_adain_of_a_flat_image_is_finite() -> None:
    assert adain(torch.zeros(1, 3, 8, 8), images(1)).isfinite().all()


def test_one_pixel_takes_the_color_of_its_style() -> None:
    content, style = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), -0.25)
    for method in ("wavelet", "adain"):
        assert torch.allclose(fix_color(content, style, method), style)
