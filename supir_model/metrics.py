"""Image quality: how close a result is to a reference, and how good it looks without one.

PSNR, SSIM and MS-SSIM are torchmetrics'; LPIPS, NIQE, MUSIQ, MANIQA and CLIP-IQA are pyiqa's, where that is installed
and finds its weights: what cannot be computed is named with its reason and never filled in.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

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
_SSIM_SMALLEST = 11  # pixels: its window
_MS_SSIM_SMALLEST = 176  # pixels: an 11-pixel window on the last of five scales
_LEARNED = ("lpips", *NO_REFERENCE)


class UnavailableError(Exception):
    """A metric cannot be computed; the message is the reason."""


@dataclass(frozen=True)
class Measured:
    """The metrics of one image that could be computed, and why others that apply to it could not."""

    values: dict[str, float]
    unavailable: dict[str, str]


class Metrics:
    """All metrics, loaded once; of the learned ones, those that pyiqa is there for and finds the weights of."""

    def __init__(self) -> None:
        self._unavailable: dict[str, str] = {}
        self._learned: dict[str, Callable[..., Tensor]] = {}
        try:
            pyiqa = importlib.import_module("pyiqa")
        except ModuleNotFoundError as error:
            missing = "pyiqa is not installed; pip install 'supir-batch[metrics]'"
            reason = missing if error.name == "pyiqa" else f"pyiqa cannot be imported ({_line(error)})"
            self._unavailable = dict.fromkeys(_LEARNED, reason)
            return
        except Exception as error:  # a package that is there but broken fails in any way
            self._unavailable = dict.fromkeys(_LEARNED, f"pyiqa cannot be imported ({_line(error)})")
            return
        for name in _LEARNED:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # it says what it loads; stdout is data
                    self._learned[name] = pyiqa.create_metric(name, device="cpu")
            except Exception as error:  # weights that are not there and cannot be fetched fail in any way
                self._unavailable[name] = f"pyiqa cannot load it ({_line(error)})"

    def measure(self, image: Tensor, reference: Tensor | None) -> Measured:
        """Every metric of one image [3, H, W], RGB in [0, 1]; without a reference, those that need none.

        The reference has the image's shape. Both are rounded to 8 bits first, as a file would hold them.
        """
        image = _eight_bit(image)
        images = [image] if reference is None else [image, _eight_bit(reference)]
        values: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        for name in NO_REFERENCE if reference is None else METRICS:
            try:
                if name in _LEARNED:
                    values[name] = self._learn(name, images[:1] if name in NO_REFERENCE else images)
                else:
                    values[name] = _COMPUTED[name](*images)
            except UnavailableError as reason:
                unavailable[name] = str(reason)
        return Measured(values, unavailable)

    def _learn(self, name: str, images: list[Tensor]) -> float:
        if name in self._unavailable:
            raise UnavailableError(self._unavailable[name])
        try:
            with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
                return float(self._learned[name](*(image[None] for image in images)))
        except Exception as error:  # a network may refuse an image for reasons of its own
            raise UnavailableError(f"pyiqa cannot measure some images ({_line(error)})") from error


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of [3, H, W] in [0, 1], over all channels; at most 100: means stay finite."""
    return min(100.0, float(peak_signal_noise_ratio(image[None], reference[None], data_range=1.0)))


def ssim(image: Tensor, reference: Tensor) -> float:
    """SSIM (Wang et al. 2004) of [3, H, W] in [0, 1], mean of the channels. Raises UnavailableError below 11 pixels."""
    _require_sides(image, _SSIM_SMALLEST)
    return _similarity(structural_similarity_index_measure(image[None], reference[None], data_range=1.0))


def ms_ssim(image: Tensor, reference: Tensor) -> float:
    """Multi-scale SSIM (Wang et al. 2003) of [3, H, W] in [0, 1]. Raises UnavailableError below 176 pixels."""
    _require_sides(image, _MS_SSIM_SMALLEST)
    value = multiscale_structural_similarity_index_measure(
        image[None], reference[None], data_range=1.0, normalize="relu"
    )
    return _similarity(value)


def gmsd(image: Tensor, reference: Tensor) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014) of [3, H, W] in [0, 1]: 0 for equal images.

    On luma in 8-bit levels, halved by 2x2 means, Prewitt gradients, constant 170. Raises UnavailableError below 2
    pixels.
    """
    _require_sides(image, 2)

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
    """Energy of neighbor differences of [3, H, W], relative to the reference's; 1 is as sharp, above 1 is noise.

    Raises UnavailableError below 2 pixels, and for a reference without differences.
    """
    _require_sides(image, 2)

    def energy(x: Tensor) -> float:
        return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())

    whole = energy(reference)
    if whole == 0:
        raise UnavailableError("some originals are flat")
    return energy(image) / whole


_COMPUTED: dict[str, Callable[[Tensor, Tensor], float]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
    "gmsd": gmsd,
    "gradient": gradient_ratio,
}


def _require_sides(image: Tensor, least: int) -> None:
    if min(image.shape[1:]) < least:
        raise UnavailableError(f"it needs sides of at least {least} pixels, and some images are smaller")


def _eight_bit(image: Tensor) -> Tensor:
    return (image.float().clamp(0, 1) * 255).round() / 255


def _similarity(value: object) -> float:
    assert isinstance(value, Tensor)  # torchmetrics returns more only when asked to
    return float(value)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
