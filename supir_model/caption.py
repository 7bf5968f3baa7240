"""Captions from image statistics: needs no weights, always the same answer for the same pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def describe(images: Tensor, material: str = "photograph") -> list[str]:
    """One line per image [B, 3, H, W] in [-1, 1]: tone and material, brightness, contrast, detail.

    SUPIR prompts with what the robust encoder sees, so pass its decoded image, not the raw input.
    """
    return [_describe(image, material) for image in images.detach().float().clamp(-1, 1)]


def _describe(image: Tensor, material: str) -> str:
    rgb = (image + 1) / 2
    luma = torch.einsum("chw,c->hw", rgb, torch.tensor(_LUMA, device=rgb.device))
    warmth = float((rgb[0] - rgb[2]).mean())
    chroma = float((rgb - luma).abs().mean())
    chroma_spread = float((rgb - luma - (rgb - luma).mean(dim=(1, 2), keepdim=True)).abs().mean())
    if chroma < 0.015:
        tone = f"a black and white {material}"
    elif chroma_spread < 0.012 and warmth > 0.03:
        tone = f"a sepia toned {material}"
    elif warmth > 0.06:
        tone = f"a color {material} in warm tones"
    elif warmth < -0.04:
        tone = f"a color {material} in cool tones"
    else:
        tone = f"a color {material}"
    mean, spread = float(luma.mean()), float(luma.std(correction=0))
    brightness = "dark" if mean < 0.33 else "bright" if mean > 0.62 else "evenly lit"
    contrast = "low contrast" if spread < 0.13 else "high contrast" if spread > 0.27 else "medium contrast"
    return f"{tone}, {brightness}, {contrast}, {_detail(luma)}"


def _detail(luma: Tensor) -> str:
    """Share of the contrast that lies in fine structure (difference of the image and its 5x5 mean)."""
    if min(luma.shape) < 5:
        return "plain"
    smooth = F.avg_pool2d(luma[None, None], 5, stride=1)[0, 0]
    fine = float((luma[2:-2, 2:-2] - smooth).std(correction=0))
    return "richly detailed" if fine > 0.06 else "plain" if fine < 0.02 else "detailed"
