"""Restoration-guided sampling over latent windows (SUPIR, Algorithm 1; specification sections 7.1 and 7.2).

Latents are lists of [C, h, w] float32 tensors, one per image and of any size. Every step cuts all of them into windows
of one shape, advances the windows, and blends them back, so that no seam can outlive a step. A latent that fits into a
window is its own single window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from supir_model.denoiser import SIGMA_MAX, legacy_sigmas

RESTORATION_MIN_SIGMA = 0.05  # gate of the restoration guidance, on the next sigma


@dataclass(frozen=True)
class Window:
    """A rectangle of latent positions of image ``item``."""

    item: int
    top: int
    left: int
    height: int
    width: int

    def crop(self, latent: Tensor) -> Tensor:
        """The window's part of a [C, h, w] tensor, a view."""
        return latent[:, self.top : self.top + self.height, self.left : self.left + self.width]


Guided = Callable[[Tensor, Tensor, Tensor, Sequence[Window]], Tensor]
"""Guided denoiser D(x [N, C, h, w], sigma [N], control_scale [N], windows [N]) -> [N, C, h, w]"""

Noise = Callable[[int, int], Tensor]
"""noise(item, draw) -> [C, h, w] unit normal; draw 0 starts the trajectory, draw i + 1 belongs to step i"""


@dataclass(frozen=True)
class EDMSettings:
    """Settings of the restoration-guided EDM sampler.

    restoration_tau: exponent of the pull towards ``x_center`` (larger is weaker), None = off. churn: s_churn >= 0.
    noise: s_noise, the factor on churn noise. control_scale_start: control scale at the largest sigma, linear in sigma
    to ``control_scale`` at 0; None = constant. window, stride: latent positions.
    """

    steps: int
    restoration_tau: float | None = None
    churn: float = 0.0
    noise: float = 1.003
    control_scale: float = 1.0
    control_scale_start: float | None = None
    window: int = 128
    stride: int = 64


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
    return [
        Window(item, top, left, min(window, height), min(window, width))
        for top in window_starts(height, window, stride)
        for left in window_starts(width, window, stride)
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

    x, x_center, eps: [N, C, h, w]; sigma, next_sigma: float32 scalars; guided(x, sigma_hat [N], control_scale [N]).
    """
    count = x.shape[0]
    gamma = min(settings.churn / settings.steps, math.sqrt(2) - 1)
    sigma_hat = sigma * (1 + gamma)
    if gamma > 0:
        x = x + settings.noise * eps * torch.sqrt(sigma_hat**2 - sigma**2)

    control_scale = torch.as_tensor(settings.control_scale, dtype=torch.float32)
    if settings.control_scale_start is not None:
        # sigma here, sigma_hat in the denoiser: the release mixes them and results depend on it
        control_scale = sigma / SIGMA_MAX * (settings.control_scale_start - control_scale) + control_scale
    denoised = guided(x, sigma_hat.expand(count), control_scale.to(x.device).expand(count))

    if settings.restoration_tau is not None and next_sigma > RESTORATION_MIN_SIGMA:
        denoised = denoised - (sigma / SIGMA_MAX) ** settings.restoration_tau * (denoised - x_center)
    return x + (next_sigma - sigma_hat) * (x - denoised) / sigma_hat


def sample_edm(
    guided: Guided,
    x_center: Sequence[Tensor],
    noise: Noise,
    settings: EDMSettings,
    window_batch: int = 1,
) -> list[Tensor]:
    """Sample one latent per ``x_center`` [C, h, w]. Returns float32 latents of the same sizes.

    window_batch: how many windows the networks see at once; it changes speed, not results (to rounding).
    """
    sigmas = legacy_sigmas(settings.steps).to(x_center[0].device)
    windows = [
        w for i, c in enumerate(x_center) for w in windows_of(i, c.shape[1], c.shape[2], settings.window, settings.stride)
    ]
    batches = _batches(windows, window_batch)
    latents = [noise(i, 0).to(c) * torch.sqrt(1 + sigmas[0] ** 2) for i, c in enumerate(x_center)]
    for step in range(settings.steps):
        sigma, next_sigma = sigmas[step], sigmas[step + 1]
        eps = [noise(i, step + 1).to(c) if settings.churn > 0 else torch.zeros_like(c) for i, c in enumerate(x_center)]
        blended = [torch.zeros_like(latent) for latent in latents]
        total = [torch.zeros_like(latent[0]) for latent in latents]
        for batch in batches:

            def guided_batch(x: Tensor, s: Tensor, scale: Tensor, batch: Sequence[Window] = batch) -> Tensor:
                return guided(x, s, scale, batch)

            advanced = edm_step(
                guided_batch,
                torch.stack([w.crop(latents[w.item]) for w in batch]),
                torch.stack([w.crop(x_center[w.item]) for w in batch]),
                torch.stack([w.crop(eps[w.item]) for w in batch]),
                sigma,
                next_sigma,
                settings,
            )
            weight = window_weights(batch[0].height, batch[0].width).to(advanced)
            for window, result in zip(batch, advanced, strict=True):
                window.crop(blended[window.item]).add_(weight * result)
                window.crop(total[window.item][None])[0].add_(weight)
        latents = [b / t for b, t in zip(blended, total, strict=True)]
    return latents


def _batches(windows: Sequence[Window], size: int) -> list[list[Window]]:
    """Windows of equal shape together, at most ``size`` at a time, in order."""
    by_shape: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        by_shape.setdefault((window.height, window.width), []).append(window)
    return [group[i : i + size] for group in by_shape.values() for i in range(0, len(group), size)]
