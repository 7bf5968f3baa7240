"""Tiles back to one image: a weighted mean where they overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from supir_batch import tiles
from supir_batch.types import FloatImage, TileBox


def stitch(parts: Sequence[tuple[TileBox, FloatImage]], width: int, height: int, overlap: int) -> FloatImage:
    """Blend tiles [h, w, C] into one [height, width, C] image by the feathered weights of ``tiles.feather``.

    The order of ``parts`` does not matter: they are summed by index, so that the result is the same to the last bit.
    Raises ValueError if a part does not fill its box or the boxes leave a gap.
    """
    if not parts:
        raise ValueError("there are no tiles to stitch")
    channels = parts[0][1].shape[2]
    total = np.zeros((height, width, channels), np.float32)
    weight = np.zeros((height, width, 1), np.float32)
    for box, pixels in sorted(parts, key=lambda part: part[0].index):
        if pixels.shape != (box.height, box.width, channels):
            raise ValueError(f"tile {box.index} has shape {pixels.shape}, its box is {box}")
        share = tiles.feather(box, (width, height), overlap)[..., None].astype(np.float32)
        rows, columns = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        total[rows, columns] += share * pixels
        weight[rows, columns] += share
    if not (weight > 0).all():
        raise ValueError(f"{len(parts)} tiles do not cover the {width} x {height} image")
    total /= weight
    return total


def seam(parts: Sequence[tuple[TileBox, FloatImage]], whole: FloatImage, overlap: int) -> float:
    """How far tiles differ from their blend where they overlap: mean distance of colors, of the worst tile."""
    height, width = whole.shape[:2]
    distances = [0.0]
    for box, pixels in parts:
        shared = tiles.feather(box, (width, height), overlap) < 1
        if shared.any():
            blend = whole[box.y : box.y + box.height, box.x : box.x + box.width, :3]
            distances.append(float(np.abs(pixels[..., :3] - blend)[shared].mean()))
    return max(distances)
