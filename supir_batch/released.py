"""The release's own geometry (``engine.geometry: released``): sizes, resampling and 8-bit rounding of its script.

It squashes each side to a multiple of 64, each axis on its own, and resizes the result back; the pipeline itself pads
and crops instead. Specification section 10. Everything here is arrays; colors are sRGB.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supir_batch.errors import ImageError
from supir_batch.tiles import SLIVER
from supir_batch.types import FloatImage

UNIT = 64  # pixels; sides at which the model works are multiples of it
_A = -0.75  # the free parameter of torch's bicubic; Pillow's is -0.5


class Sizes(NamedTuple):
    """(width, height) in pixels at which the model works, and of the output."""

    work: tuple[int, int]
    output: tuple[int, int]


def sizes(
    width: int, height: int, upscale: float, min_size: int, shorter: int | None = None, unit: int = UNIT
) -> Sizes:
    """Sizes for an image of width x height pixels.

    The output is ``round(side * upscale)``. The model works at that, enlarged until the shorter side has ``min_size``,
    each side rounded to a multiple of ``unit`` (halves to the even multiple). ``shorter`` sets the shorter side of both
    instead, for captioning. A work side of 0 is possible for an image smaller than half a unit.
    """
    across, down = width * upscale, height * upscale
    output = round(across), round(down)
    if min(across, down) < min_size:
        factor = min_size / min(across, down)
        across, down = across * factor, down * factor
    if shorter is not None:
        factor = shorter / min(across, down)
        across, down = across * factor, down * factor
        output = round(across), round(down)
    return Sizes((round(across / unit) * unit, round(down / unit) * unit), output)


def usable_sizes(width: int, height: int, upscale: float, min_size: int) -> Sizes:
    """``sizes``, unless the release would work at no pixels, or at immeasurably many: then ImageError ``geometry``."""
    found = sizes(width, height, upscale, min_size)
    if not all((*found.work, *found.output)):
        raise ImageError(
            "geometry",
            f"its {width} x {height} pixels become {found.work[0]} x {found.work[1]} under geometry 'released', whose "
            f"sides are multiples of {UNIT}; use geometry 'pad' or a larger min_size",
        )
    if min(found.output) < min_size and found.work[0] * found.work[1] > (SLIVER * min_size) ** 2:
        raise ImageError(
            "geometry",
            f"geometry 'released' would work on it at {found.work[0]} x {found.work[1]} pixels to give it a shorter "
            f"side of {min_size}; use geometry 'pad' or a smaller min_size",
        )
    return found


def to_work(pixels: FloatImage, width: int, height: int) -> FloatImage:
    """[h, w, 3] in [0, 1] to [height, width, 3] in [0, 1]: rounded to 8 bits, then Pillow's bicubic on these."""
    levels = np.rint(np.clip(pixels, 0.0, 1.0) * np.float32(255)).astype(np.uint8)
    resized = Image.fromarray(np.ascontiguousarray(levels)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized).astype(np.float32) / np.float32(255)


def to_output(pixels: FloatImage, width: int, height: int) -> NDArray[np.uint8]:
    """[h, w, C], not clipped, about [0, 1], to the 8-bit levels [height, width, C] of the release's image.

    torch's bicubic (without antialiasing, corners not aligned), clipped, and TRUNCATED to a level.
    """
    resized = _bicubic(_bicubic(pixels, width, axis=1), height, axis=0)
    levels: NDArray[np.uint8] = np.clip(resized * np.float32(255), 0, 255).astype(np.uint8)
    return levels


def _bicubic(pixels: FloatImage, length: int, axis: int) -> FloatImage:
    """Four taps along one axis, positions beyond the border repeated (Keys 1981, a = -0.75)."""
    if pixels.shape[axis] == length:
        return pixels
    place = (np.arange(length) + 0.5) * (pixels.shape[axis] / length) - 0.5
    first = np.floor(place).astype(np.int64)
    t = place - first
    shape = [1, 1, 1]
    shape[axis] = length
    resized = np.zeros((*pixels.shape[:axis], length, *pixels.shape[axis + 1 :]), np.float32)
    for tap in range(-1, 3):
        weight = _kernel(np.abs(t - tap)).astype(np.float32).reshape(shape)
        resized += weight * np.take(pixels, np.clip(first + tap, 0, pixels.shape[axis] - 1), axis=axis)
    return resized


def _kernel(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    near = (_A + 2) * distance**3 - (_A + 3) * distance**2 + 1
    far = _A * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
