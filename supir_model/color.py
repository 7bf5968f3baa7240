"""Color fixes: give a restoration the colors of its stage-1 image (specification section 10)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from supir_model.config import ColorFix

_LEVELS = 5


def fix_color(content: Tensor, style: Tensor, method: ColorFix) -> Tensor:
    """Content's structure with style's colors; both [B, 3, H, W] in [-1, 1]."""
    if method == "wavelet":
        return wavelet(content, style)
    if method == "adain":
        return adain(content, style)
    return content


def decompose(image: Tensor) -> tuple[Tensor, Tensor]:
    """High and low band of a five-level a-trous decomposition with the 3x3 binomial kernel."""
    channels = image.shape[1]
    row = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3)
    low = image
    for level in range(_LEVELS):
        radius = 2**level
        padded = F.pad(low, (radius,) * 4, mode="replicate")
        low = F.conv2d(padded, kernel, groups=channels, dilation=radius)
    return image - low, low


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """High frequencies of content over low frequencies of style."""
    return decompose(content)[0] + decompose(style)[1]


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Content with the per-channel mean and standard deviation of style (Huang & Belongie 2017)."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        correction = min(1, x[0, 0].numel() - 1)  # unbiased, but one pixel has no unbiased variance
        std = (x.var(dim=(2, 3), correction=correction, keepdim=True) + 1e-5).sqrt()
        return x.mean(dim=(2, 3), keepdim=True), std

    mean, std = statistics(content)
    style_mean, style_std = statistics(style)
    return (content - mean) / std * style_std + style_mean
