"""Tiles back to one image, from top to bottom: a weighted mean where they overlap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from supir_batch import tiles
from supir_batch.types import FloatImage, TileBox

_STRIP_PIXELS = 2**20


class Stitched:
    """A cut image that is put together while it is iterated over: strips [rows, width, C], from top to bottom.

    Tiles are blended by the feathered weights of ``tiles.feather``. ``read`` gives the pixels [h, w, C] of a box and is
    called once for each; no more than one row of tiles is in memory. The order of ``boxes`` does not matter: tiles are
    summed by index, so that the result is the same to the last bit. Raises ValueError, while iterating, if a tile does
    not fill its box or the boxes leave a gap.

    ``seam``, once iteration is over: the largest mean distance of colors (the first three channels) between two
    neighbors where they overlap; 0 without an overlap.
    """

    def __init__(
        self, boxes: Sequence[TileBox], read: Callable[[TileBox], FloatImage], width: int, height: int, overlap: int
    ) -> None:
        if not boxes:
            raise ValueError("there are no tiles to stitch")
        self._boxes = sorted(boxes, key=lambda box: box.index)
        self._read, self._width, self._height, self._overlap = read, width, height, overlap
        self.seam = 0.0

    def __iter__(self) -> Iterator[FloatImage]:
        rows = [list(row) for _, row in itertools.groupby(self._boxes, key=lambda box: box.y)]
        total = weight = np.zeros((0, self._width, 0), np.float32)
        above: dict[int, FloatImage] = {}  # what the row above has in common with this one, by x
        for row, below in itertools.zip_longest(rows, rows[1:]):
            top, end = row[0].y, below[0].y if below else self._height
            tallest = max(box.height for box in row)
            left: FloatImage | None = None
            common: dict[int, FloatImage] = {}
            for place, box in enumerate(row):
                pixels = self._read(box)
                if pixels.shape[:2] != (box.height, box.width) or total.shape[2] not in (0, pixels.shape[2]):
                    raise ValueError(f"tile {box.index} has shape {pixels.shape}, its box is {box}")
                if place == 0:
                    total = _continued(total, (tallest, self._width, pixels.shape[2]))
                    weight = _continued(weight, (tallest, self._width, 1))
                share = tiles.feather(box, (self._width, self._height), self._overlap)[..., None].astype(np.float32)
                total[: box.height, box.x : box.x + box.width] += share * pixels
                weight[: box.height, box.x : box.x + box.width] += share
                self._compare(pixels[: len(above.get(box.x, ()))], above.get(box.x))
                if left is not None:
                    shared = row[place - 1].x + left.shape[1] - box.x
                    self._compare(pixels[:, : max(0, shared)], left[:, left.shape[1] - max(0, shared) :])
                left, common[box.x] = pixels, pixels[end - top :, :, :3].copy()
            ready = end - top
            if len(total) < ready or not (weight[:ready] > 0).all():
                raise ValueError(f"{len(self._boxes)} tiles do not cover the {self._width} x {self._height} image")
            step = max(1, _STRIP_PIXELS // self._width)
            for start in range(0, ready, step):
                strip = slice(start, min(ready, start + step))
                yield total[strip] / weight[strip]
            total, weight, above = total[ready:].copy(), weight[ready:].copy(), common

    def _compare(self, ours: FloatImage, theirs: FloatImage | None) -> None:
        if theirs is not None and ours.size:
            self.seam = max(self.seam, float(np.abs(ours[..., :3] - theirs[..., :3]).mean()))


def stitch(parts: Sequence[tuple[TileBox, FloatImage]], width: int, height: int, overlap: int) -> FloatImage:
    """``Stitched`` for tiles that are all in memory: one image [height, width, C]."""
    pixels = {box.index: tile for box, tile in parts}
    return np.concatenate(
        list(Stitched([box for box, _ in parts], lambda box: pixels[box.index], width, height, overlap))
    )


def _continued(rest: FloatImage, shape: tuple[int, int, int]) -> FloatImage:
    """Zeros of a shape that begin with what is left of the row above."""
    sums = np.zeros(shape, np.float32)
    if rest.size:
        sums[: len(rest)] = rest
    return sums
