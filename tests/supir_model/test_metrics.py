"""Metrics: known values, and the order that damage must give them."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from supir_model.metrics import (
    METRICS,
    NO_REFERENCE,
    Measured,
    Metrics,
    UnavailableError,
    gmsd,
    gradient_ratio,
    ms_ssim,
    ssim,
)

_LEARNED = {"lpips", "niqe", "musiq", "maniqa", "clipiqa"}


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
    found = metrics.measure(image, image).values
    assert found["psnr"] == 100, "means over images stay finite"
    assert found["ssim"] == pytest.approx(1, abs=1e-5)
    assert found["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert found["gmsd"] == 0
    assert found["gradient"] == 1


def test_psnr_is_that_of_eight_bit_files(metrics: Metrics) -> None:
    flat = torch.full((3, 64, 64), 100 / 255)
    assert metrics.measure(flat + 10.3 / 255, flat).values["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert metrics.measure(flat + 0.4 / 255, flat).values["psnr"] == 100
    assert metrics.measure(flat + 9, flat).values["psnr"] == pytest.approx(20 * math.log10(255 / 155), abs=1e-3)


def test_more_damage_is_worse_by_every_distance(metrics: Metrics) -> None:
    image = picture()
    mild, heavy = (metrics.measure(noisy(image, level), image).values for level in (5, 25))
    for name, sign in (("psnr", 1), ("ssim", 1), ("ms_ssim", 1), ("gmsd", -1), ("gradient", -1)):
        assert sign * (mild[name] - heavy[name]) > 0, name


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


def test_ssim_of_two_flat_images_is_its_luminance_term() -> None:
    a, b = torch.full((3, 32, 32), 0.25), torch.full((3, 32, 32), 0.75)
    assert ssim(a, b) == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), abs=1e-3)


def test_ssim_and_ms_ssim_are_symmetric() -> None:
    a = picture()
    b = noisy(a, 20)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-6)
    assert ms_ssim(a, b) == pytest.approx(ms_ssim(b, a), abs=1e-6)


def test_ms_ssim_needs_five_scales() -> None:
    with pytest.raises(UnavailableError, match="sides of at least 176 pixels"):
        ms_ssim(picture(168, 300), picture(168, 300))
    assert ms_ssim(picture(176, 176), picture(176, 176)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("side", "missing"), [(1, {"ssim", "ms_ssim", "gmsd", "gradient"}), (10, {"ssim", "ms_ssim"}), (11, {"ms_ssim"})]
)
def test_what_an_image_is_too_small_for_is_unavailable(metrics: Metrics, side: int, missing: set[str]) -> None:
    image = picture(192, 200)[:, :side, :150]
    image = image + torch.linspace(0, 0.1, 150)  # not flat
    found = metrics.measure(image, image)
    assert {name for name in found.unavailable if name not in _LEARNED} == missing
    assert "sides of at least" in found.unavailable["ms_ssim"]
    assert found.values.keys() | found.unavailable.keys() == set(METRICS)


def test_gradient_energy_of_a_flat_original_is_unavailable(metrics: Metrics) -> None:
    flat = torch.full((3, 64, 64), 0.5)
    assert metrics.measure(flat, flat).unavailable["gradient"] == "some originals are flat"


def test_without_a_reference_only_quality_is_measured(metrics: Metrics) -> None:
    found = metrics.measure(picture(), None)
    assert found.values.keys() | found.unavailable.keys() == set(NO_REFERENCE)


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_what_is_not_installed_is_named_with_its_reason(metrics: Metrics) -> None:
    found = metrics.measure(picture(), picture())
    reason = "pyiqa is not installed; pip install 'supir-batch[metrics]'"
    assert found.unavailable == dict.fromkeys(_LEARNED, reason)


def with_pyiqa(monkeypatch: pytest.MonkeyPatch, create: Callable[..., Callable[..., torch.Tensor]]) -> Measured:
    module = types.ModuleType("pyiqa")
    module.create_metric = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return Metrics().measure(picture(), noisy(picture(), 10))


def test_learned_metrics_are_asked_for_with_the_images_they_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(name: str, device: str) -> Callable[..., torch.Tensor]:
        print(f"loading {name} on {device}")
        return lambda *images: torch.tensor([float(len(images)) + images[0].shape[0]])

    found = with_pyiqa(monkeypatch, create)
    assert {name: found.values[name] for name in _LEARNED} == {"lpips": 3.0} | dict.fromkeys(NO_REFERENCE, 2.0)
    assert capsys.readouterr().out == "", "stdout is data"


def test_weights_that_are_not_there_and_images_that_are_refused_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, device: str) -> Callable[..., torch.Tensor]:
        if name == "musiq":
            raise OSError("no route to host\nsecond line")

        def refuse(*images: torch.Tensor) -> torch.Tensor:
            raise AssertionError("too small")

        return refuse

    found = with_pyiqa(monkeypatch, create)
    assert found.unavailable["musiq"] == "pyiqa cannot load it (OSError: no route to host)"
    assert found.unavailable["niqe"] == "pyiqa cannot measure some images (AssertionError: too small)"
    assert not found.values.keys() & _LEARNED
