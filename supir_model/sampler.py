"""Restoration-guided sampling over latent windows (SUPIR, Algorithm 1; specification section 7).

Latents are lists of [C, h, w] float32 tensors, one per image and of any size. Every step cuts all of them into windows
of one shape, advances the windows, and blends them back, so that no seam can outlive a step. A latent that fits into a
window is its own single window.

Networks see ``window_batch`` windows at once, never fewer: the last batch of each shape is filled up with windows that
are computed and thrown away. A kernel may round differently for another batch size, but never meets one, so a result
depends on that number, to rounding, and not on the company that its windows keep.

Noise levels stay on the CPU: steps decide by them, and a decision must not wait for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from supir_model.denoiser import SIGMA_MAX, karras_sigmas, legacy_sigmas
from supir_model.errors import RequestError

RESTORATION_MIN_SIGMA = 0.05  # the release's gate of the restoration guidance, on the next sigma


@dataclass(frozen=True)
class Window:
    """A rectangle of latent positions of image ``item``, the ``index``-th of its windows (rows outer)."""

    item: int
    top: int
    left: int
    height: int
    width: int
    index: int = 0

    def crop(self, latent: Tensor) -> Tensor:
        """The window's part of a [C, h, w] tensor, a view."""
        return latent[:, self.top : self.top + self.height, self.left : self.left + self.width]


Guided = Callable[[Tensor, Tensor, Tensor, Sequence[Window]], Tensor]
"""Guided denoiser D(x [N, C, h, w], sigma [N], control_scale [N], windows [N]) -> [N, C, h, w]; sigma and control_scale
are one value again and again, on the CPU"""

Noise = Callable[[int, int], Tensor]
"""noise(item, draw) -> [C, h, w] unit normal; draw 0 starts the trajectory, draw i + 1 belongs to step i"""


@dataclass(frozen=True)
class EDMSettings:
    """Settings of the restoration-guided EDM sampler.

    restoration_tau: exponent of the pull towards ``x_center`` (larger is weaker), None = off. restoration_to_end: pull
    at every step, as the paper's Algorithm 1 does; the release leaves out the last ones. churn: s_churn >= 0. noise:
    s_noise, the factor on churn noise. control_scale_start: control scale at the largest sigma, linear in sigma to
    ``control_scale`` at 0; None = constant. window, stride: latent positions. bfloat16_sigmas: round the first latent,
    all sigmas and what is computed from sigmas alone to bfloat16, as the release does beside a bfloat16 autoencoder
    (section 13); only to repeat its numbers.
    """

    steps: int
    restoration_tau: float | None = None
    restoration_to_end: bool = False
    churn: float = 0.0
    noise: float = 1.003
    control_scale: float = 1.0
    control_scale_start: float | None = None
    window: int = 128
    stride: int = 64
    bfloat16_sigmas: bool = False


@dataclass(frozen=True)
class DPMPP2MSettings:
    """Settings of the DPM++ 2M SDE sampler (section 7.3), for few-step (Lightning) weights.

    eta: share of the noise that is drawn anew, 0 = deterministic. noise: s_noise, the factor on it. The rest as in
    ``EDMSettings``; the release ignores ``restoration_tau`` and ``control_scale_start`` here, so None is what it does.
    """

    steps: int
    eta: float = 1.0
    noise: float = 1.003
    restoration_tau: float | None = None
    restoration_to_end: bool = False
    control_scale: float = 1.0
    control_scale_start: float | None = None
    window: int = 128
    stride: int = 64


SamplerSettings = EDMSettings | DPMPP2MSettings
"""The settings' type says which sampler runs."""


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First positions of windows along one axis: multiples of stride, then one flush with the end (section 7.2)."""
    if size <= window:
        return [0]
    starts = list(range(0, size - window + 1, stride))
    if (size - window) % stride:
        starts.append(size - window)
    return starts


def windows_of(item: int, height: int, width: int, window: int, stride: int) -> list[Window]:
    """All windows of one latent, rows outer, columns inner."""
    corners = itertools.product(window_starts(height, window, stride), window_starts(width, window, stride))
    return [
        Window(item, top, left, min(window, height), min(window, width), index)
        for index, (top, left) in enumerate(corners)
    ]


@cache
def window_weights(height: int, width: int) -> Tensor:
    """Gaussian blending weights [height, width] float64; rows are off-center by half a position, as released."""
    variance = 0.01

    def bell(size: int, middle: float) -> Tensor:
        position = torch.arange(size, dtype=torch.float64)
        return torch.exp(-((position - middle) ** 2) / (size**2 * 2 * variance)) / math.sqrt(2 * math.pi * variance)

    return bell(height, height / 2)[:, None] * bell(width, (width - 1) / 2)


def edm_step(
    guided: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    x_center: Tensor,
    eps: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    settings: EDMSettings,
) -> Tensor:
    """One restoration-guided EDM step (SUPIR, Algorithm 1; section 7.1): Euler, no second-order correction.

    x, x_center, eps: [N, C, h, w]; sigma, next_sigma: float32 scalars on the CPU; guided(x, sigma_hat [N],
    control_scale [N]).
    """
    count = x.shape[0]
    gamma = min(settings.churn / settings.steps, math.sqrt(2) - 1)
    sigma_hat = sigma * (1 + gamma)
    if gamma > 0:
        x = x + settings.noise * eps * torch.sqrt(sigma_hat**2 - sigma**2)

    # sigma in the schedules, sigma_hat in the denoiser: the release mixes them and results depend on it
    denoised = guided(x, sigma_hat.expand(count), control_scale_at(sigma, settings).expand(count))
    denoised = pull_to_center(denoised, x_center, sigma, next_sigma, settings)
    return x + (next_sigma - sigma_hat) * (x - denoised) / sigma_hat


def dpmpp2m_step(
    guided: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    previous: Tensor | None,
    x_center: Tensor,
    eps: Tensor,
    last_sigma: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    settings: DPMPP2MSettings,
) -> tuple[Tensor, Tensor]:
    """One DPM++ 2M SDE step (Lu et al. 2022; section 7.3). Returns the next x and this step's denoised.

    x, x_center, eps: [N, C, h, w]; previous: denoised of the step before, at ``last_sigma``, None on the first step,
    which adds no noise although its coefficients are the SDE's (as released). Sigmas: float32 scalars on the CPU.
    """
    count = x.shape[0]
    denoised = guided(x, sigma.expand(count), control_scale_at(sigma, settings).expand(count))
    denoised = pull_to_center(denoised, x_center, sigma, next_sigma, settings)
    if next_sigma == 0:
        return denoised, denoised  # the limit of the formulas below, which would be 0 * inf at eta 0
    h = torch.log(sigma / next_sigma)
    scale, push = next_sigma / sigma * torch.exp(-settings.eta * h), torch.expm1(-(1 + settings.eta) * h)
    if previous is None:
        return scale * x - push * denoised, denoised
    r = torch.log(last_sigma / sigma) / h
    extrapolated = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
    spread = settings.noise * next_sigma * torch.sqrt(-torch.expm1(-2 * settings.eta * h))
    return scale * x - push * extrapolated + spread * eps, denoised


def control_scale_at(sigma: Tensor, settings: SamplerSettings) -> Tensor:
    """Control scale at a noise level: constant, or linear in sigma from ``control_scale_start``."""
    control_scale = torch.as_tensor(settings.control_scale, dtype=torch.float32)
    if settings.control_scale_start is None:
        return control_scale
    return sigma / SIGMA_MAX * (settings.control_scale_start - control_scale) + control_scale


def pull_to_center(
    denoised: Tensor, x_center: Tensor, sigma: Tensor, next_sigma: Tensor, settings: SamplerSettings
) -> Tensor:
    """Restoration guidance (SUPIR, Algorithm 1): strong at large sigma; the release turns it off below a gate."""
    tau = settings.restoration_tau
    if tau is None or (next_sigma <= RESTORATION_MIN_SIGMA and not settings.restoration_to_end):
        return denoised
    return denoised - (sigma / SIGMA_MAX) ** tau * (denoised - x_center)


def sample(
    guided: Guided,
    x_center: Sequence[Tensor],
    noise: Noise,
    settings: SamplerSettings,
    window_batch: int = 1,
) -> list[Tensor]:
    """Sample one latent per ``x_center`` [C, h, w]. Returns float32 latents of the same sizes.

    window_batch: how many windows the networks see at once; more are faster on a GPU, and cost more where many are
    filling.
    """
    *_, latents = trajectory(guided, x_center, noise, settings, window_batch)
    return latents


def trajectory(
    guided: Guided,
    x_center: Sequence[Tensor],
    noise: Noise,
    settings: SamplerSettings,
    window_batch: int = 1,
) -> Iterator[list[Tensor]]:
    """The latents after every step of ``sample``."""
    if settings.steps < 1:
        raise RequestError(f"a sampler needs at least 1 step, got {settings.steps}")
    schedule = legacy_sigmas if isinstance(settings, EDMSettings) else karras_sigmas
    sigmas = schedule(settings.steps)
    windows = [
        window
        for i, center in enumerate(x_center)
        for window in windows_of(i, center.shape[1], center.shape[2], settings.window, settings.stride)
    ]
    batches = _batches(windows, window_batch)
    # what one step hands to the next, latents first; all of it is blended
    state = [[noise(i, 0).to(c) * torch.sqrt(1 + sigmas[0] ** 2) for i, c in enumerate(x_center)]]
    if isinstance(settings, EDMSettings) and settings.bfloat16_sigmas:
        state = [[x.bfloat16().to(x) for x in state[0]]]
        sigmas = sigmas.bfloat16()
    for step in range(settings.steps):
        draw = _draws_noise(settings, step)
        eps = [noise(i, step + 1).to(c) if draw else torch.zeros_like(c) for i, c in enumerate(x_center)]
        blends: list[_Blend] = []
        for batch in batches:

            def guided_batch(x: Tensor, s: Tensor, scale: Tensor, batch: _Batch = batch) -> Tensor:
                return guided(x, s, scale, batch.filled)

            advanced = _advance(
                guided_batch,
                [_crop(part, batch.filled) for part in state],
                _crop(x_center, batch.filled),
                _crop(eps, batch.filled),
                sigmas,
                step,
                settings,
            )
            blends = blends or [_Blend(state[0]) for _ in advanced]
            for blend, part in zip(blends, advanced, strict=True):
                blend.add(part[: len(batch.windows)], batch.windows)
        state = [blend.result() for blend in blends]
        yield state[0]


def _advance(
    guided: Callable[[Tensor, Tensor, Tensor], Tensor],
    state: Sequence[Tensor],
    x_center: Tensor,
    eps: Tensor,
    sigmas: Tensor,
    step: int,
    settings: SamplerSettings,
) -> tuple[Tensor, ...]:
    """One step of the sampler that the settings name; state: x, then what that sampler remembers, [N, C, h, w] each."""
    sigma, next_sigma = sigmas[step], sigmas[step + 1]
    if isinstance(settings, EDMSettings):
        return (edm_step(guided, state[0], x_center, eps, sigma, next_sigma, settings),)
    previous = state[1] if step > 0 else None
    last_sigma = sigmas[max(step - 1, 0)]
    return dpmpp2m_step(guided, state[0], previous, x_center, eps, last_sigma, sigma, next_sigma, settings)


def _draws_noise(settings: SamplerSettings, step: int) -> bool:
    if isinstance(settings, EDMSettings):
        return settings.churn > 0
    return settings.eta > 0 and 0 < step < settings.steps - 1


def _crop(latents: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    return torch.stack([window.crop(latents[window.item]) for window in windows])


class _Blend:
    """Weighted mean of windows, per image."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._sum = [torch.zeros_like(latent) for latent in like]
        self._weight = [torch.zeros_like(latent[:1]) for latent in like]

    def add(self, values: Tensor, windows: Sequence[Window]) -> None:
        weight = _weights_on(windows[0].height, windows[0].width, values.device)
        for window, value in zip(windows, values, strict=True):
            window.crop(self._sum[window.item]).add_(weight * value)
            window.crop(self._weight[window.item]).add_(weight)

    def result(self) -> list[Tensor]:
        return [total / weight for total, weight in zip(self._sum, self._weight, strict=True)]


@cache
def _weights_on(height: int, width: int, device: torch.device) -> Tensor:
    return window_weights(height, width).to(device, torch.float32)


@dataclass(frozen=True)
class _Batch:
    """Windows of one shape, at most ``size``."""

    windows: tuple[Window, ...]
    size: int

    @property
    def filled(self) -> tuple[Window, ...]:
        """As many as ``size``: the last one again and again."""
        return self.windows + self.windows[-1:] * (self.size - len(self.windows))


def _batches(windows: Sequence[Window], size: int) -> list[_Batch]:
    """Windows of equal shape together, at most ``size`` at a time, in order."""
    by_shape: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        by_shape.setdefault((window.height, window.width), []).append(window)
    return [_Batch(tuple(group[i : i + size]), size) for group in by_shape.values() for i in range(0, len(group), size)]
