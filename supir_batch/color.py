"""Color in and out: ICC profiles, monochrome images, toned prints.

The engine works in sRGB (gamma-encoded, [0, 1], float32). What it returns goes back to the source's profile, to its
number of bands, and, for a source without color of its own, to its tone:

* *neutral*: an RGB file of a black-and-white image. Nothing but grey comes out.
* *toned*: a print whose chroma is a smooth function of its lightness (sepia, selenium, cyanotype, a yellowed base). The
  function is measured on the source and put back on the restored lightness.
* *color*: everything else, left alone. In doubt an image is color.

Definitions, in CIELAB (D65) on the source reduced to at most ``TONE_SIZE`` pixels, so that grain does not count as
color. *Neutral*: 99 % of all pixels have a chroma below 2 and none has 6. *Toned*: the distance in (a*, b*) to a smooth
curve over L* is below 3 for 95 % of all pixels and nowhere 12. The bounds on the single worst pixel keep a black-and-
white photograph with one hand-colored cheek a color image.

Sources: IEC 61966-2-1 (sRGB), CIE 15 (CIELAB), BT.709 (luma weights); profiles are evaluated by Little CMS in floats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from supir_batch.errors import ImageError
from supir_batch.types import FloatImage

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Weights of red, green and blue in luma (BT.709); they add up to 1."""

TONE_SIZE = 128
"""Longer side, in pixels, to which an image is reduced before its tone is judged."""

NEUTRAL_CHROMA, NEUTRAL_WORST = 2.0, 6.0
TONED_RESIDUAL, TONED_WORST = 3.0, 12.0

_NODES = 33  # of a tone curve, evenly spaced over L* = 0 .. 100
_SMOOTHNESS = 0.02  # weight of a curve's second differences against the mean square residual
_D65 = np.array([0.95047, 1.0, 1.08883])
_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_LATTICE = 17  # levels per band
_LEAST_LOSS = 0.25 / 65535
_STRIP_PIXELS = 2**21  # per step of a conversion that needs several temporary copies


@dataclass(frozen=True)
class Tone:
    """Whether an image has color, and if it is a toned monochrome, its tone.

    ``curve`` holds (a*, b*) at evenly spaced L* from 0 to 100; empty unless ``kind`` is "toned".
    """

    kind: Literal["color", "neutral", "toned"]
    curve: tuple[tuple[float, float], ...] = ()


def check_profile(icc: bytes, bands: int) -> str | None:
    """Say why ``icc`` cannot serve an image of ``bands`` (1 or 3) color bands; None if it can."""
    space = icc[16:20].decode("ascii", "replace").strip()
    if space != ("GRAY" if bands == 1 else "RGB"):
        return f"the ICC profile is for {space or 'nothing'} data and the image has {bands} color band(s)"
    try:
        _transform(np.zeros((1, 1, bands), np.float32), icc, _srgb(), bands, 3)
    except ImageError as error:
        return str(error)
    return None


def to_srgb(pixels: FloatImage, icc: bytes | None) -> FloatImage:
    """Convert [h, w, 1 or 3] in [0, 1] in the space of ``icc`` (None: sRGB, or its tone curve) to [h, w, 3] sRGB.

    Clipped to [0, 1]. Raises ImageError ``bad-profile``.
    """
    if pixels.shape[2] == 1:
        grey = pixels[..., 0]
        if icc is not None:
            levels, curve = _grey_curve(icc)
            grey = np.interp(grey, levels, curve).astype(np.float32)
        return np.repeat(grey[..., None], 3, axis=2)
    if icc is None:
        return pixels
    return np.clip(_transform(pixels, icc, _srgb(), 3, 3), 0.0, 1.0)


def from_srgb(pixels: FloatImage, icc: bytes | None, bands: int) -> FloatImage:
    """Convert [h, w, 3] sRGB in [0, 1] to [h, w, bands] in [0, 1] in the space of ``icc``: undoes ``to_srgb``.

    One band is the luma of the three. Raises ImageError ``bad-profile``.
    """
    if bands == 1:
        grey = luma(pixels)
        if icc is not None:
            levels, curve = _grey_curve(icc)
            grey = np.interp(grey, curve, levels).astype(np.float32)
        return np.clip(grey, 0.0, 1.0)[..., None]
    if icc is None:
        return pixels
    return np.clip(_transform(pixels, _srgb(), icc, 3, 3), 0.0, 1.0)


def lost_in_srgb(pixels: FloatImage, srgb: FloatImage, icc: bytes | None) -> FloatImage:
    """What the way of [h, w, bands] through sRGB loses, in values of its own space, same shape.

    ``srgb`` is ``to_srgb(pixels, icc)``. Added to ``from_srgb`` of a restored image it brings back colors outside of
    sRGB, and what a profile's tables lose by rounding.
    """
    lost: FloatImage = pixels - from_srgb(srgb, icc, pixels.shape[2])
    return lost


@functools.lru_cache(maxsize=64)  # the images of an archive share a few profiles
def exceeds_srgb(icc: bytes | None, bands: int) -> bool:
    """Whether ``lost_in_srgb`` matters: for profiles of three bands with colors outside of sRGB, or with coarse tables.

    Judged on a lattice of the space's colors.
    """
    if icc is None or bands == 1:
        return False
    levels = np.linspace(0.0, 1.0, _LATTICE, dtype=np.float32)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(_LATTICE, -1, 3)
    return bool(np.abs(lost_in_srgb(lattice, to_srgb(lattice, icc), icc)).max() > _LEAST_LOSS)


def luma(pixels: FloatImage) -> NDArray[np.float32]:
    """BT.709 luma [h, w] of [h, w, 3] gamma-encoded RGB; exactly the common value where the three agree."""
    red, green, blue = (pixels[..., band] for band in range(3))
    grey: NDArray[np.float32] = green + LUMA[0] * (red - green) + LUMA[2] * (blue - green)
    return grey


def measure_tone(reduced: FloatImage) -> Tone:
    """Judge the tone of [h, w, 3] sRGB in [0, 1], reduced to at most ``TONE_SIZE`` pixels; see the module's text."""
    lab = _srgb_to_lab(reduced.reshape(-1, 3))
    lightness, chroma = lab[:, 0], lab[:, 1:]
    distance = np.hypot(chroma[:, 0], chroma[:, 1])
    if np.percentile(distance, 99) < NEUTRAL_CHROMA and distance.max() < NEUTRAL_WORST:
        return Tone("neutral")
    curve = _fit_curve(lightness, chroma)
    away = chroma - _along(curve, lightness)
    residual = np.hypot(away[:, 0], away[:, 1])
    if np.percentile(residual, 95) < TONED_RESIDUAL and residual.max() < TONED_WORST:
        return Tone("toned", tuple((round(float(a), 4), round(float(b), 4)) for a, b in curve))
    return Tone("color")


def apply_tone(pixels: FloatImage, tone: Tone) -> FloatImage:
    """Give [h, w, 3] sRGB in [0, 1] the tone measured on its source; a color image is returned as it is."""
    if tone.kind == "color":
        return pixels
    if tone.kind == "neutral":
        return np.repeat(luma(pixels)[..., None], 3, axis=2)
    curve = np.array(tone.curve)
    result = np.empty_like(pixels)
    for rows in _strips(pixels):
        lightness = _srgb_to_lab(pixels[rows].reshape(-1, 3))[:, 0]
        lab = np.concatenate([lightness[:, None], _along(curve, lightness)], axis=1)
        result[rows] = _lab_to_srgb(lab).reshape(pixels[rows].shape)
    return result


def _srgb() -> bytes:
    return bytes(imagecodecs.cms_profile("srgb"))


def _transform(pixels: FloatImage, icc: bytes, to: bytes, bands: int, to_bands: int) -> FloatImage:
    spaces = {1: "gray", 3: "rgb"}
    data = np.ascontiguousarray(pixels if bands > 1 else pixels[..., 0], dtype=np.float32)
    try:
        moved = imagecodecs.cms_transform(
            data, icc, to, colorspace=spaces[bands], outcolorspace=spaces[to_bands], outdtype="float32"
        )
    except imagecodecs.CmsError as error:
        raise ImageError("bad-profile", f"the ICC profile ({len(icc)} bytes) cannot be used: {error}") from error
    result: FloatImage = np.asarray(moved, dtype=np.float32).reshape(*pixels.shape[:2], to_bands)
    return result


def _grey_curve(icc: bytes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Levels of a grey profile and the sRGB values they show as: increasing, one node per 16-bit level.

    A table rather than a transform each way, so that both ways are exact inverses of each other.
    """
    levels = np.linspace(0.0, 1.0, 65536)
    shown = _transform(levels.astype(np.float32).reshape(256, 256, 1), icc, _srgb(), 1, 3).astype(np.float64)
    curve = np.clip(shown.mean(axis=2).ravel(), 0.0, 1.0)
    return levels, np.maximum.accumulate(curve)


def _fit_curve(lightness: NDArray[np.float64], chroma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares piecewise linear curve of (a*, b*) over L*, its second differences damped; [_NODES, 2]."""
    place = np.clip(lightness / 100.0, 0.0, 1.0) * (_NODES - 1)
    left = np.minimum(place.astype(np.int64), _NODES - 2)
    right = place - left  # weight of the node above; the one below has the rest

    def mean(values: NDArray[np.float64], nodes: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.bincount(nodes, values, _NODES) / len(lightness)

    own = mean((1 - right) ** 2, left) + mean(right**2, left + 1)
    shared = np.diag(mean((1 - right) * right, left)[:-1], 1)
    bend = np.diff(np.eye(_NODES), n=2, axis=0)
    # a touch of the identity pulls nodes that no pixel supports toward no chroma, and keeps the system regular
    normal = np.diag(own) + shared + shared.T + _SMOOTHNESS * bend.T @ bend + 1e-6 * np.eye(_NODES)
    target = [mean((1 - right) * band, left) + mean(right * band, left + 1) for band in chroma.T]
    return np.asarray(np.linalg.solve(normal, np.stack(target, axis=1)), dtype=np.float64)


def _along(curve: NDArray[np.float64], lightness: NDArray[np.float64]) -> NDArray[np.float64]:
    nodes = np.linspace(0.0, 100.0, len(curve))
    return np.stack([np.interp(lightness, nodes, curve[:, band]) for band in range(2)], axis=1)


def _strips(pixels: FloatImage) -> Iterator[slice]:
    height, width = pixels.shape[:2]
    step = max(1, _STRIP_PIXELS // max(1, width))
    return (slice(top, top + step) for top in range(0, height, step))


def _srgb_to_lab(rgb: NDArray[np.float32]) -> NDArray[np.float64]:
    encoded = rgb.astype(np.float64)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _RGB_TO_XYZ.T / _D65
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def _lab_to_srgb(lab: NDArray[np.float64]) -> NDArray[np.float32]:
    """Inverse of ``_srgb_to_lab``, clipped to [0, 1]."""
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], axis=1)
    ratio = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    linear = np.clip((ratio * _D65) @ np.linalg.inv(_RGB_TO_XYZ).T, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    rgb: NDArray[np.float32] = np.clip(encoded, 0.0, 1.0).astype(np.float32)
    return rgb
