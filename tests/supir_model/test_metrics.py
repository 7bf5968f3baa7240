"""Metrics: known values, and the order that damage must give them."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from supir_model.metrics import METRICS, NO_REFERENCE, Metrics, gmsd, gradient_ratio, ms_ssim


def picture(height: int = 192, width: int = 200, seed: int = 0) -> torch.Tensor:
    """Smooth structure with edges, [3, H, W] in [0, 1]."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="nearest")[0] * 0.8 + 0.1


def noisy(image: torch.Tensor, level: float) -> torch.Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    return (image + level / 255 * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics()


def test_an_image_is_equal_to_itself(metrics: Metrics) -> None:
    image = picture()
    found = metrics.measure(image, image)
    assert found["psnr"] == math.inf
    assert found["ssim"] == pytest.approx(1, abs=1e-5)
    assert found["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert found["gmsd"] == 0
    assert found["gradient"] == 1


def test_psnr_is_that_of_eight_bit_files(metrics: Metrics) -> None:
    flat = torch.full((3, 64, 64), 100 / 255)
    assert metrics.measure(flat + 10.3 / 255, flat)["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert metrics.measure(flat + 0.4 / 255, flat)["psnr"] == math.inf
    assert metrics.measure(flat + 9, flat)["psnr"] == pytest.approx(20 * math.log10(255 / 155), abs=1e-3)


def test_more_damage_is_worse_by_every_distance(metrics: Metrics) -> None:
    image = picture()
    mild, heavy = (metrics.measure(noisy(image, level), image) for level in (5, 25))
    for name, sign in (("psnr", 1), ("ssim", 1), ("ms_ssim", 1), ("gmsd", -1), ("gradient", -1)):
        a, b = mild[name], heavy[name]
        assert a is not None
        assert b is not None
        assert sign * (a - b) > 0, name


def test_gradient_energy_tells_softness_from_noise() -> None:
    image = picture()
    assert gradient_ratio(F.avg_pool2d(image[None], 5, 1, 2)[0], image) < 0.7
    assert gradient_ratio(noisy(image, 25), image) > 1.2
    assert gradient_ratio(image / 2, image) == pytest.approx(0.25)


@hypothesis_settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**20), st.integers(2, 40), st.integers(2, 40))
def test_gmsd_is_symmetric_and_bounded(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand((2, 3, height, width), generator=generator)
    assert gmsd(a, b) == pytest.approx(gmsd(b, a), abs=1e-6)
    assert 0 <= gmsd(a, b) <= 0.5


def test_gmsd_of_a_constant_shift_is_nearly_nothing() -> None:
    inside = (slice(None), slice(2, -2), slice(2, -2))  # the border sees zeros around the image
    image = torch.full((3, 40, 40), 0.5)
    assert gmsd(image[inside], image[inside] * 0.98) < 0.02


def test_ms_ssim_needs_five_scales() -> None:
    assert ms_ssim(picture(168, 300), picture(168, 300)) is None
    assert ms_ssim(picture(176, 176), picture(176, 176)) == pytest.approx(1, abs=1e-5)


def test_without_a_reference_only_quality_is_measured(metrics: Metrics) -> None:
    found = metrics.measure(picture(), None)
    assert tuple(found) == METRICS
    assert all(value is None for name, value in found.items() if name not in NO_REFERENCE)


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_what_is_not_installed_is_named_with_its_reason(metrics: Metrics) -> None:
    assert set(metrics.unavailable) == {"lpips", "niqe", "musiq", "maniqa", "clipiqa"}
    assert all("pyiqa cannot be imported (ModuleNotFoundError" in reason for reason in metrics.unavailable.values())
    assert metrics.measure(picture(), picture())["lpips"] is None
