"""What the sampler asks at every step: the networks' view of some windows, guided by text and by the degraded image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from supir_model.config import ModelConfig
from supir_model.denoiser import Origin, denoise, guide, linear_cfg
from supir_model.networks import Conditioning
from supir_model.prompts import Text, conditioning
from supir_model.sampler import Window

RunNetworks = Callable[[Tensor, Tensor, Tensor, Conditioning], Tensor]
"""F(x [B, C, h, w], timestep [B], control_scale [B, 1, 1, 1], conditioning) -> [B, C, h, w]"""

ALL_SIGMAS = (0.0, math.inf)


@dataclass(frozen=True)
class Guide:
    """What leads one image: its prompts, one for all its windows or one for each, and its robust latent [C, h, w]."""

    negative: Text
    positive: tuple[Text, ...]
    control: Tensor

    def positive_of(self, window: Window) -> Text:
        """The prompt of a window."""
        return self.positive[window.index] if len(self.positive) > 1 else self.positive[0]


class GuidedDenoiser:
    """The ``Guided`` denoiser of some images; the networks see both halves of a batch at once.

    guided_sigmas: noise levels from and to which the guidance scale is ``cfg_start`` to ``cfg_end``; elsewhere it is 1.
    """

    def __init__(
        self,
        networks: RunNetworks,
        config: ModelConfig,
        guides: Sequence[Guide],
        cfg_start: float,
        cfg_end: float,
        guided_sigmas: tuple[float, float],
    ) -> None:
        self._networks, self._config, self._guides = networks, config, guides
        self._cfg_start, self._cfg_end, self._guided_sigmas = cfg_start, cfg_end, guided_sigmas

    def __call__(self, x: Tensor, sigma: Tensor, control_scale: Tensor, windows: Sequence[Window]) -> Tensor:
        """Estimate of the clean latents behind x [N, C, h, w]; see ``sampler.Guided``."""
        lowest, highest = self._guided_sigmas
        inside = (sigma >= lowest) & (sigma <= highest)
        scale = torch.where(inside, linear_cfg(self._cfg_start, self._cfg_end, sigma), 1.0)
        guided = bool((scale != 1).any())  # at 1 the negative prompt has no weight, and its half is not computed
        guides = [self._guides[window.item] for window in windows]
        texts = [guide.negative for guide in guides] if guided else []
        texts += [guide.positive_of(window) for guide, window in zip(guides, windows, strict=True)]
        halves = 2 if guided else 1
        crops = torch.stack([window.crop(guide.control) for guide, window in zip(guides, windows, strict=True)])
        told = conditioning(texts, crops.repeat(halves, 1, 1, 1))
        sigma, control_scale, scale = (value.to(x.device, non_blocking=True) for value in (sigma, control_scale, scale))

        def network(x_in: Tensor, timestep: Tensor, control_scale: Tensor) -> Tensor:
            return self._networks(x_in, timestep, control_scale, told)

        denoised = denoise(
            network,
            self._config.prediction,
            x.repeat(halves, 1, 1, 1),
            sigma.repeat(halves),
            control_scale.repeat(halves),
            Origin(told.control_latent, self._config.residual_std),
        )
        return guide(denoised, scale) if guided else denoised
