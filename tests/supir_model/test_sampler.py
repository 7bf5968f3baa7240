from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from supir_model import sampler
from supir_model.denoiser import SIGMA_MAX, karras_sigmas, legacy_sigmas
from supir_model.errors import RequestError
from supir_model.noise import latent_noise
from supir_model.sampler import (
    DPMPP2MSettings,
    EDMSettings,
    SamplerSettings,
    Window,
    sample,
    trajectory,
    window_starts,
    window_weights,
    windows_of,
)

MEAN, VARIANCE = 0.4, 0.25

BOTH = [
    pytest.param(EDMSettings(6, restoration_tau=4.0, churn=5.0, window=16, stride=8), id="edm"),
    pytest.param(DPMPP2MSettings(6, window=16, stride=8), id="dpmpp2m"),
]


def gaussian(x: Tensor, sigma: Tensor, _control_scale: Tensor, _windows: Sequence[Window]) -> Tensor:
    """The exact denoiser of latents that are independent N(MEAN, VARIANCE) at every position."""
    s2 = sigma[:, None, None, None] ** 2
    return (VARIANCE * x + s2 * MEAN) / (VARIANCE + s2)


def local(x: Tensor, sigma: Tensor, control_scale: Tensor, windows: Sequence[Window]) -> Tensor:
    """A denoiser that depends on its window, as networks do."""
    place = torch.tensor([0.1 * w.top + 0.01 * w.left + 0.3 * w.item for w in windows])[:, None, None, None]
    return gaussian(x, sigma, control_scale, windows) + 0.1 * torch.tanh(place + x.mean(dim=(1, 2, 3), keepdim=True))


def noise(item: int, draw: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
    return latent_noise(item, draw, 4, 0, 0, *sizes[item])


def run(
    settings: SamplerSettings, sizes: Sequence[tuple[int, int]], guided: sampler.Guided = local, batch: int = 1
) -> list[Tensor]:
    centers = [torch.full((4, *size), 0.2) for size in sizes]
    return sample(guided, centers, lambda item, draw: noise(item, draw, sizes), settings, batch)


def flow(x: Tensor, sigma: Tensor, smallest: Tensor) -> Tensor:
    """Where the probability flow of the Gaussian takes x from noise level sigma, in closed form."""
    return MEAN + (x - MEAN) * torch.sqrt((VARIANCE + smallest**2) / (VARIANCE + sigma**2))


@pytest.mark.parametrize(
    ("settings", "schedule", "gain"),
    # four times the steps: a first-order solver gains about 4, a second-order one about 16
    [(EDMSettings(40), legacy_sigmas, 2.5), (DPMPP2MSettings(40, eta=0.0), karras_sigmas, 8.0)],
    ids=["edm", "dpmpp2m"],
)
def test_it_converges_to_the_closed_form(
    settings: SamplerSettings, schedule: Callable[[int], Tensor], gain: float
) -> None:
    start = latent_noise(0, 0, 4, 0, 0, 12, 12)

    def error(steps: int) -> float:
        sigmas, finer = schedule(steps), replace(settings, steps=steps)
        *_, before_last, _ = trajectory(gaussian, [torch.zeros(4, 12, 12)], lambda item, draw: start, finer)
        wanted = flow(start * torch.sqrt(1 + sigmas[0] ** 2), sigmas[0], sigmas[-2])
        return (before_last[0] - wanted).abs().max().item()

    coarse, fine = error(settings.steps), error(4 * settings.steps)
    assert fine < 0.02
    assert coarse / fine > gain


@pytest.mark.parametrize("settings", BOTH)
def test_noise_keeps_the_distribution(settings: SamplerSettings) -> None:
    settings = replace(settings, steps=60, noise=1.0, restoration_tau=None)
    (latent,) = run(settings, [(48, 48)], gaussian)
    assert latent.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert latent.var().item() == pytest.approx(VARIANCE, rel=0.25)


@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("size", [(16, 16), (5, 3), (9, 40), (23, 37), (17, 16)])
def test_any_size_works(settings: SamplerSettings, size: tuple[int, int]) -> None:
    (latent,) = run(settings, [size])
    assert latent.shape == (4, *size)
    assert latent.dtype == torch.float32
    assert latent.isfinite().all()


@pytest.mark.parametrize("settings", BOTH)
def test_a_latent_that_fits_is_its_own_window(settings: SamplerSettings) -> None:
    untiled = run(replace(settings, window=1000, stride=1000), [(13, 10)])
    torch.testing.assert_close(run(settings, [(13, 10)]), untiled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("batch", [1, 4])
def test_company_does_not_matter(settings: SamplerSettings, batch: int) -> None:
    sizes = [(23, 37), (5, 9), (16, 24), (23, 37)]
    together = run(settings, sizes, batch=batch)
    for item in range(len(sizes)):

        def alone(x: Tensor, s: Tensor, c: Tensor, windows: Sequence[Window], item: int = item) -> Tensor:
            return local(x, s, c, [replace(w, item=item) for w in windows])

        centers = [torch.full((4, *sizes[item]), 0.2)]
        (single,) = sample(alone, centers, lambda _, draw, item=item: noise(item, draw, sizes), settings)
        torch.testing.assert_close(together[item], single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", BOTH)
def test_the_order_of_windows_does_not_matter(settings: SamplerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = run(settings, [(29, 40)])
    monkeypatch.setattr(sampler, "windows_of", lambda *arguments: windows_of(*arguments)[::-1])
    torch.testing.assert_close(run(settings, [(29, 40)]), forwards, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", BOTH)
def test_windows_leave_no_trace_where_they_agree(settings: SamplerSettings) -> None:
    (tiled,) = run(settings, [(40, 33)], gaussian)
    (untiled,) = run(replace(settings, window=64), [(40, 33)], gaussian)
    torch.testing.assert_close(tiled, untiled, rtol=0, atol=1e-4)


def test_windows_know_their_number() -> None:
    windows = windows_of(3, 20, 30, 16, 8)
    assert [(w.top, w.left) for w in windows] == [(0, 0), (0, 8), (0, 14), (4, 0), (4, 8), (4, 14)]
    assert [w.index for w in windows] == list(range(6))
    assert {w.item for w in windows} == {3}


@pytest.mark.parametrize("size", range(1, 70))
def test_windows_cover_every_position_and_stay_inside(size: int) -> None:
    starts = window_starts(size, 16, 12)
    covered = {position for start in starts for position in range(start, start + min(16, size))}
    assert covered == set(range(size))


def test_window_weights_are_positive_in_float32() -> None:
    assert (window_weights(128, 128).float() > 0).all()


def test_the_last_step_is_never_pulled() -> None:
    settings = EDMSettings(1, restoration_tau=1.0)
    (latent,) = sample(
        lambda x, s, c, w: torch.full_like(x, 0.7), [torch.zeros(4, 3, 3)], lambda i, d: torch.ones(4, 3, 3), settings
    )
    torch.testing.assert_close(latent, torch.full_like(latent, 0.7))


@pytest.mark.parametrize(
    ("kind", "schedule"), [(EDMSettings, legacy_sigmas), (DPMPP2MSettings, karras_sigmas)], ids=["edm", "dpmpp"]
)
def test_pulled_to_the_end_the_last_step_keeps_a_share_of_the_center(
    kind: type[EDMSettings | DPMPP2MSettings], schedule: Callable[[int], Tensor]
) -> None:
    settings = kind(3, restoration_tau=0.5, restoration_to_end=True)
    (latent,) = sample(
        lambda x, s, c, w: torch.full_like(x, 0.7), [torch.zeros(4, 3, 3)], lambda i, d: torch.ones(4, 3, 3), settings
    )
    share = (schedule(3)[2] / SIGMA_MAX) ** 0.5  # the step that ends at sigma 0 returns what it denoised
    torch.testing.assert_close(latent, torch.full_like(latent, 0.7) * (1 - share))


def test_restoration_guidance_pulls_towards_the_center() -> None:
    def distance(tau: float | None) -> float:
        settings = EDMSettings(8, restoration_tau=tau)
        steps = trajectory(gaussian, [torch.full((4, 8, 8), 3.0)], lambda i, d: torch.zeros(4, 8, 8), settings)
        *_, (latent,) = islice(steps, 4)
        return abs(latent.mean().item() - 3.0)

    assert distance(1.0) < distance(4.0) < distance(None)  # a larger exponent is weaker


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        (EDMSettings(4), [0]),
        (EDMSettings(4, churn=5.0), [0, 1, 2, 3, 4]),
        (DPMPP2MSettings(4), [0, 2, 3]),
        (DPMPP2MSettings(4, eta=0.0), [0]),
    ],
)
def test_noise_is_drawn_only_where_it_is_used(settings: SamplerSettings, draws: list[int]) -> None:
    asked = []

    def remember(item: int, draw: int) -> Tensor:
        asked.append(draw)
        return noise(item, draw, [(6, 6)])

    sample(gaussian, [torch.zeros(4, 6, 6)], remember, settings)
    assert asked == draws


@pytest.mark.parametrize("kind", [EDMSettings, DPMPP2MSettings])
def test_control_scale_runs_from_its_start(kind: type) -> None:
    seen = []

    def guided(x: Tensor, sigma: Tensor, control_scale: Tensor, windows: Sequence[Window]) -> Tensor:
        seen.append((sigma[0].item(), control_scale[0].item()))
        return gaussian(x, sigma, control_scale, windows)

    settings = kind(5, control_scale=0.9, control_scale_start=0.2)
    sample(guided, [torch.zeros(4, 6, 6)], lambda i, d: noise(i, d, [(6, 6)]), settings)
    for sigma, control_scale in seen:
        assert control_scale == pytest.approx(0.9 + sigma / 14.6146 * (0.2 - 0.9), abs=1e-5)


def test_no_steps_are_refused() -> None:
    with pytest.raises(RequestError, match="at least 1 step, got 0"):
        run(EDMSettings(0), [(6, 6)])
