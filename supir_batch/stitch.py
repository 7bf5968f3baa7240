"""Tiles back to one image, from top to bottom: a weighted mean where they overlap."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import numpy as np

from supir_batch import tiles
from supir_batch.types import FloatImage, TileBox

_STRIP_PIXELS = 2**20
_NOTHING = np.zeros((0, 0, 3), np.float32)


class Rows(Protocol):
    """Pixels [h, w, C] that are read in rows: an array, or a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(h, w, C)."""

    def __getitem__(self, rows: slice, /) -> FloatImage: ...


class Stitched:
    """A cut image that is put together while it is iterated over: strips [rows, width, C], from top to bottom.

    Tiles are blended by the feathered weights of ``tiles.feather``. ``read`` opens the pixels of a box; each is open
    once, while strips pass through its rows, and little more than one strip is in memory. The order of ``boxes`` does
    not matter: tiles are summed by index, so that the result is the same to the last bit. Raises ValueError, while
    iterating, if a tile does not fill its box or the boxes leave a gap.
    """

    def __init__(
        self,
        boxes: Sequence[TileBox],
        read: Callable[[TileBox], AbstractContextManager[Rows]],
        width: int,
        height: int,
        overlap: int,
    ) -> None:
        if not boxes:
            raise ValueError("there are no tiles to stitch")
        self._boxes = sorted(boxes, key=lambda box: box.index)
        self._read, self._width, self._height, self._overlap = read, width, height, overlap
        self._distances: dict[tuple[int, int], tuple[float, int]] = defaultdict(lambda: (0.0, 0))

    @property
    def seam(self) -> float:
        """Once iteration is over: the largest mean distance of colors (the first three channels) between two neighbors
        where they overlap; 0 without an overlap."""
        return max((total / count for total, count in self._distances.values()), default=0.0)

    def __iter__(self) -> Iterator[FloatImage]:
        self._distances.clear()
        step = max(1, _STRIP_PIXELS // self._width)
        # a strip never crosses the edge of a tile, so all of it is between the same neighbors
        edges = {edge for box in self._boxes for edge in (box.y, box.y + box.height)} | {0, self._height}
        channels: set[int] = set()
        with ExitStack() as whole:
            closing: dict[int, ExitStack] = {}
            tiles_open: dict[int, Rows] = {}
            for top, end in itertools.pairwise(sorted(edges)):
                here = [box for box in self._boxes if box.y <= top and end <= box.y + box.height]
                for index in tiles_open.keys() - {box.index for box in here}:
                    closing.pop(index).close()
                    del tiles_open[index]
                for box in here:
                    if box.index not in tiles_open:
                        closing[box.index] = whole.enter_context(ExitStack())
                        rows = closing[box.index].enter_context(self._read(box))
                        channels.add(rows.shape[2])
                        if rows.shape[:2] != (box.height, box.width) or len(channels) > 1:
                            raise ValueError(f"tile {box.index} has shape {rows.shape}, its box is {box}")
                        tiles_open[box.index] = rows
                for start in range(top, end, step):
                    yield self._strip(here, start, min(end, start + step), tiles_open)

    def _strip(self, boxes: Sequence[TileBox], top: int, end: int, tiles_open: Mapping[int, Rows]) -> FloatImage:
        """Rows ``top`` to ``end`` of the image, which all of ``boxes`` hold."""
        pixels = {box.index: tiles_open[box.index][top - box.y : end - box.y] for box in boxes}
        total = np.zeros((end - top, self._width, next(iter(pixels.values()), _NOTHING).shape[2]), np.float32)
        weight = np.zeros((end - top, self._width, 1), np.float32)
        for box in boxes:
            rows, columns = slice(top - box.y, end - box.y), slice(box.x, box.x + box.width)
            share = tiles.feather(box, (self._width, self._height), self._overlap, rows)[..., None]
            total[:, columns] += share * pixels[box.index]
            weight[:, columns] += share
        if not (weight > 0).all():
            raise ValueError(f"{len(self._boxes)} tiles do not cover the {self._width} x {self._height} image")
        for one, other in itertools.combinations(boxes, 2):
            if one.y == other.y or one.x == other.x:
                self._compare(one, other, pixels)
        return total / weight

    def _compare(self, one: TileBox, other: TileBox, pixels: Mapping[int, FloatImage]) -> None:
        left, right = max(one.x, other.x), min(one.x + one.width, other.x + other.width)
        if left < right:
            ours, theirs = (pixels[box.index][:, left - box.x : right - box.x, :3] for box in (one, other))
            total, count = self._distances[one.index, other.index]
            distance = float(np.abs(ours - theirs).sum(dtype=np.float64))
            self._distances[one.index, other.index] = total + distance, count + ours.size


def stitch(parts: Sequence[tuple[TileBox, FloatImage]], width: int, height: int, overlap: int) -> FloatImage:
    """``Stitched`` for tiles that are all in memory: one image [height, width, C]."""
    pixels = {box.index: tile for box, tile in parts}
    whole = Stitched([box for box, _ in parts], lambda box: nullcontext(pixels[box.index]), width, height, overlap)
    return np.concatenate(list(whole))
