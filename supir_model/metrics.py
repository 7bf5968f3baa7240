"""Image quality: how close a result is to a reference, and how good it looks without one.

PSNR, SSIM and MS-SSIM are torchmetrics'; LPIPS, NIQE, MUSIQ, MANIQA and CLIP-IQA are pyiqa's, where that is installed
and finds its weights: what cannot be computed is named with its reason and never filled in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

FULL_REFERENCE = ("psnr", "ssim", "ms_ssim", "gmsd", "gradient", "lpips")
NO_REFERENCE = ("niqe", "musiq", "maniqa", "clipiqa")
METRICS = (*FULL_REFERENCE, *NO_REFERENCE)
HIGHER_IS_BETTER = {
    "psnr": True,
    "ssim": True,
    "ms_ssim": True,
    "gmsd": False,
    "gradient": None,  # 1 is best
    "lpips": False,
    "niqe": False,
    "musiq": True,
    "maniqa": True,
    "clipiqa": True,
}

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MS_SSIM_SMALLEST = 176  # pixels: an 11-pixel window on the last of five scales
_LEARNED = ("lpips", *NO_REFERENCE)


class Metrics:
    """All metrics, loaded once. ``unavailable``: metric to the reason why it is not computed."""

    def __init__(self) -> None:
        self.unavailable: dict[str, str] = {}
        self._learned: dict[str, Callable[..., Tensor]] = {}
        try:
            pyiqa = importlib.import_module("pyiqa")
        except Exception as error:  # a package that is there but broken fails in any way
            reason = f"pyiqa cannot be imported ({_line(error)})"
            self.unavailable = dict.fromkeys(_LEARNED, reason)
            return
        for name in _LEARNED:
            try:
                self._learned[name] = pyiqa.create_metric(name, device="cpu")
            except Exception as error:  # weights that are not there and cannot be fetched fail in any way
                self.unavailable[name] = f"pyiqa cannot load it ({_line(error)})"

    def measure(self, image: Tensor, reference: Tensor | None) -> dict[str, float | None]:
        """Every metric of one image [3, H, W], RGB in [0, 1]; None where it is unavailable or needs the reference.

        The reference has the image's shape. Both are rounded to 8 bits first, as a file would hold them.
        """
        image = _eight_bit(image)
        found: dict[str, float | None] = dict.fromkeys(METRICS)
        for name in NO_REFERENCE:
            if name in self._learned:
                found[name] = float(self._learned[name](image[None]))
        if reference is None:
            return found
        reference = _eight_bit(reference)
        found |= {
            "psnr": float(peak_signal_noise_ratio(image[None], reference[None], data_range=1.0)),
            "ssim": _similarity(structural_similarity_index_measure(image[None], reference[None], data_range=1.0)),
            "ms_ssim": ms_ssim(image, reference),
            "gmsd": gmsd(image, reference),
            "gradient": gradient_ratio(image, reference),
        }
        if "lpips" in self._learned:
            found["lpips"] = float(self._learned["lpips"](image[None], reference[None]))
        return found


def ms_ssim(image: Tensor, reference: Tensor) -> float | None:
    """Multi-scale SSIM (Wang et al. 2003) of [3, H, W] in [0, 1]; None below 176 pixels, where it is undefined."""
    if min(image.shape[1:]) < _MS_SSIM_SMALLEST:
        return None
    value = multiscale_structural_similarity_index_measure(
        image[None], reference[None], data_range=1.0, normalize="relu"
    )
    return _similarity(value)


def gmsd(image: Tensor, reference: Tensor) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014) of [3, H, W] in [0, 1]: 0 for equal images.

    On luma in 8-bit levels, halved by 2x2 means, Prewitt gradients, constant 170.
    """

    def magnitude(x: Tensor) -> Tensor:
        luma = torch.einsum("chw,c->hw", x * 255, torch.tensor(_LUMA))[None, None]
        halved = F.avg_pool2d(luma, 2)
        prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3)[None, None] / 3
        horizontal = F.conv2d(halved, prewitt, padding=1)
        vertical = F.conv2d(halved, prewitt.transpose(2, 3), padding=1)
        return (horizontal.square() + vertical.square()).sqrt()

    a, b = magnitude(image), magnitude(reference)
    similarity = (2 * a * b + 170) / (a.square() + b.square() + 170)
    return float(similarity.std(correction=0))


def gradient_ratio(image: Tensor, reference: Tensor) -> float:
    """Energy of neighbor differences of [3, H, W], relative to the reference's; 1 is as sharp, above 1 is noise."""

    def energy(x: Tensor) -> float:
        return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())

    return energy(image) / max(energy(reference), 1e-12)


def _eight_bit(image: Tensor) -> Tensor:
    return (image.float().clamp(0, 1) * 255).round() / 255


def _similarity(value: object) -> float:
    assert isinstance(value, Tensor)  # torchmetrics returns more only when asked to
    return float(value)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
