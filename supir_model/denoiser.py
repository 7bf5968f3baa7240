"""Noise levels, network preconditioning and guidance (specification sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from supir_model.config import Prediction

SIGMA_MAX = 14.6146  # rounded literal of the release, not sigma_table()[999]: guidance schedules depend on it

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""F(x * c_in [B, C, h, w], timestep [B] int64, control_scale [B, 1, 1, 1]) -> [B, C, h, w]"""

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""D(x [B, C, h, w], sigma [B], control_scale [B]) -> [B, C, h, w], all float32"""


@cache
def sigma_table() -> Tensor:
    """SDXL's 1000 noise levels, ascending, [1000] float32: 0.0291672 ... 14.6146412 (section 5)."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    alpha_bar = np.cumprod(1.0 - beta)
    return torch.from_numpy(((1 - alpha_bar) / alpha_bar).astype(np.float32)).sqrt()


@cache
def _table_on(device: torch.device) -> Tensor:
    return sigma_table().to(device)


def legacy_sigmas(steps: int) -> Tensor:
    """The n-step schedule of the release, descending, with a final 0: [steps + 1] float32 (section 5)."""
    timesteps = np.linspace(999, 0, steps, endpoint=False).astype(np.int64)  # numpy's rounding decides some n
    return torch.cat([sigma_table()[torch.from_numpy(timesteps)], torch.zeros(1)])


def karras_sigmas(steps: int) -> Tensor:
    """The range of ``legacy_sigmas`` spaced as in Karras et al. 2022 (rho 7), with a final 0 (section 7.3)."""
    legacy = legacy_sigmas(steps).double()
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    largest, smallest = legacy[0] ** (1 / 7), legacy[-2] ** (1 / 7)
    return torch.cat([((largest + ramp * (smallest - largest)) ** 7).float(), torch.zeros(1)])


def nearest_timestep(sigma: Tensor) -> Tensor:
    """Index of the table's nearest noise level, [B] int64, for sigma [B]."""
    return (sigma[:, None] - _table_on(sigma.device)).abs().argmin(dim=1)


@dataclass(frozen=True)
class Origin:
    """What a model of prediction ``residual`` measures its residual from.

    latent: the control latent, [B, C, h, w] float32. std: [C], how far the clean latent usually lies from it.
    """

    latent: Tensor
    std: tuple[float, ...]


def denoise(
    network: Network,
    prediction: Prediction,
    x: Tensor,
    sigma: Tensor,
    control_scale: Tensor,
    origin: Origin | None = None,
) -> Tensor:
    """Estimate of the clean latent behind ``x`` (section 5); sigma selects a table entry, x is not renormalized to it.

    x: [B, C, h, w] float32; sigma, control_scale: [B] float32. ``epsilon``: D = x - q F. ``v``: the variance-preserving
    velocity (Salimans & Ho 2022, appendix D) in the same variance-exploding coordinates. ``residual``: the
    preconditioning of Karras et al. 2022 (table 1) around ``origin`` instead of around 0, with a data deviation per
    channel; without control it falls back to ``v``. F = 0 then answers with the best guess that control latent and
    noisy latent allow channel by channel, and the network has only the rest to learn.
    """
    timestep = nearest_timestep(sigma)
    q = _table_on(x.device)[timestep][:, None, None, None]
    c_in = (q**2 + 1).rsqrt()
    scale = control_scale[:, None, None, None]
    out = network(x * c_in, timestep, scale).float()
    match prediction:
        case "epsilon":
            return x - q * out
        case "v":
            return c_in**2 * x - q * c_in * out
        case "residual":
            if origin is None:
                raise ValueError("prediction 'residual' needs an origin")
            center = scale * origin.latent
            std = _vector_on(origin.std, x.device)[None, :, None, None] ** scale
            spread = (q**2 + std**2).rsqrt()
            return center + (std * spread) ** 2 * (x - center) - q * std * spread * out


@cache
def _vector_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def linear_cfg(cfg_start: float, cfg_end: float, sigma: Tensor) -> Tensor:
    """Guidance scale at sigma [B]: ``cfg_end`` at 0, ``cfg_start`` at ``SIGMA_MAX`` (section 6)."""
    return (cfg_start - cfg_end) * sigma / SIGMA_MAX + cfg_end


def guide(denoised: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance; denoised: [2B, C, h, w] as [unconditional; conditional], scale: [B]."""
    uncond, cond = denoised.chunk(2)
    return uncond + scale[:, None, None, None] * (cond - uncond)
