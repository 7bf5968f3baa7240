"""Change of size: Lanczos-3 in float32, area-correct when shrinking, exact target size."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from supir_batch.types import FloatImage

_REACH = 3  # source pixels, at full size, that Lanczos-3 looks to either side
_PER_PIXEL = 2  # blocks that a reduced pixel is made of, at least, to either side


class Span(NamedTuple):
    """The part of a source axis that a stretch of the target axis is computed from.

    ``pixels`` are to be read; ``start`` and ``end`` say where in them the stretch begins and ends, in fractions of
    pixels.
    """

    pixels: slice
    start: float
    end: float


def span(start: int, length: int, target: int, source: int) -> Span:
    """What positions ``start`` to ``start + length`` of an axis resized from ``source`` to ``target`` pixels need."""
    scale = source / target
    first, last = start * scale, (start + length) * scale
    reach = 0 if source == target else math.ceil(_REACH * max(scale, 1.0)) + 1
    low, high = max(0, math.floor(first) - reach), min(source, math.ceil(last) + reach)
    return Span(slice(low, high), first - low, last - low)


def resize(pixels: FloatImage, width: int, height: int, clip: bool = True) -> FloatImage:
    """Resize [h, w, C] to [height, width, C], clipped to [0, 1] unless told; the very same array if the size is right.

    Edges keep their place: the whole image maps to the whole image, without cropping or padding.
    """
    return resize_part(pixels, (0.0, 0.0, pixels.shape[1], pixels.shape[0]), width, height, clip)


def resize_part(
    pixels: FloatImage, box: tuple[float, float, float, float], width: int, height: int, clip: bool = True
) -> FloatImage:
    """Resize the ``box`` (left, top, right, bottom; fractions of pixels) of [h, w, C]; see ``resize``.

    Pixels around the box count as they would in the whole image, so parts of one image fit together.
    """
    if box == (0, 0, width, height) == (0, 0, pixels.shape[1], pixels.shape[0]):
        return pixels
    result = np.empty((height, width, pixels.shape[2]), np.float32)
    for band in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., band], dtype=np.float32))  # mode F: floats throughout
        result[..., band] = np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return np.clip(result, 0.0, 1.0, out=result) if clip else result


def reduce_to(pixels: FloatImage, longer_side: int) -> FloatImage:
    """Shrink [h, w, C] so that its longer side is at most ``longer_side``; never enlarges. For comparing."""
    height, width = pixels.shape[:2]
    block = block_of(width, height, longer_side)
    return from_blocks(block_means(pixels, block), block, width, height, longer_side)


def block_of(width: int, height: int, longer_side: int) -> int:
    """Side of the blocks that may be averaged before an image is reduced: nobody sees the difference."""
    return max(1, max(width, height) // (_PER_PIXEL * longer_side))


def block_means(pixels: FloatImage, block: int) -> FloatImage:
    """Means of the squares of ``block`` pixels of [h, w, C], from the top left; the last ones may be smaller."""
    for axis in (0, 1) if block > 1 else ():
        whole, part = np.split(pixels, [pixels.shape[axis] // block * block], axis)
        # line by line: numpy's own mean over so short an axis takes several times as long
        lines = (whole[*[slice(None)] * axis, first::block] for first in range(block))
        means: FloatImage = functools.reduce(np.add, lines) / np.float32(block)
        pixels = np.concatenate([means, part.mean(axis=axis, keepdims=True)], axis) if part.size else means
    return pixels


def from_blocks(means: FloatImage, block: int, width: int, height: int, longer_side: int) -> FloatImage:
    """Finish ``reduce_to`` for the ``block_means`` of an image of ``width`` x ``height``."""
    factor = min(1.0, longer_side / max(height, width))
    box = (0.0, 0.0, width / block, height / block)
    return resize_part(means, box, max(1, round(width * factor)), max(1, round(height * factor)))
