"""Pure geometry: output and working sizes, the tiles of a large image, and the weights that blend their overlap.

A grid of tiles has the same overlap everywhere, so the linear ramps of neighbors add up to one. Origins are multiples
of the model's alignment: noise is a function of absolute latent position, so neighboring tiles agree about it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from supir_batch.types import TileBox

SLIVER = 8  # a working image is enlarged to sides of at most this many times min_size


def output_size(width: int, height: int, upscale: float) -> tuple[int, int]:
    """``round(side * upscale)``, at least 1 pixel. Python's round: an exact half goes to the even neighbor."""
    _require_positive(width=width, height=height, upscale=upscale)
    return max(1, round(width * upscale)), max(1, round(height * upscale))


def work_size(output_width: int, output_height: int, min_size: int) -> tuple[int, int]:
    """The output size, enlarged so that its shorter side has at least ``min_size`` pixels (0: never enlarged).

    A sliver is enlarged only until its longer side has ``SLIVER * min_size`` pixels: one row of a scan would otherwise
    become an image of millions of pixels.
    """
    _require_positive(width=output_width, height=output_height)
    short, long = sorted((output_width, output_height))
    factor = min(Fraction(min_size, short), Fraction(SLIVER * min_size, long))
    if factor <= 1:
        return output_width, output_height
    return round(output_width * factor), round(output_height * factor)


def plan_tiles(width: int, height: int, max_pixels: int, overlap: int, align: int) -> tuple[TileBox, ...]:
    """Cover a ``width`` x ``height`` image by tiles of at most ``max_pixels``, in row-major order.

    One tile when the image fits. Otherwise origins are multiples of ``align``, neighbors share exactly ``overlap``
    pixels, and of all such grids the one with the least total area is taken (then the fewest, then the squarest tiles).
    The last row and column may be smaller. Raises ValueError when no grid satisfies ``max_pixels``.
    """
    _require_positive(width=width, height=height, max_pixels=max_pixels, align=align)
    if overlap < 0:
        raise ValueError(f"overlap must not be negative, saw {overlap}")
    if width * height <= max_pixels:
        return (TileBox(0, 1, 0, 0, width, height),)
    columns, rows = _grid(width, height, max_pixels, overlap, align)
    count = len(columns) * len(rows)
    return tuple(
        TileBox(r * len(columns) + c, count, x, y, tile_width, tile_height)
        for r, (y, tile_height) in enumerate(rows)
        for c, (x, tile_width) in enumerate(columns)
    )


def feather(box: TileBox, size: tuple[int, int], overlap: int, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Blending weights of a tile of an image of ``size`` (width, height): [height, width] float32 in (0, 1].

    With ``rows``, of those only.

    1 inside and along the image's border, falling linearly over ``overlap`` pixels towards a neighbor. Weights of all
    tiles add up to 1 wherever a tile is at least twice as wide as the overlap; divide by their sum to be sure.
    """
    across = _ramp(box.x, box.width, size[0], overlap)
    down = _ramp(box.y, box.height, size[1], overlap)
    return np.multiply.outer(down[rows], across)


# --- inside --------------------------------------------------------------------------------------------------------

_Spans = list[tuple[int, int]]  # (origin, length) along one axis


def _grid(width: int, height: int, max_pixels: int, overlap: int, align: int) -> tuple[_Spans, _Spans]:
    best: tuple[tuple[int, int, int], int, int] | None = None
    for columns in range(1, width // align + 2):
        step = _step(width, columns, overlap, align)
        tile_width = min(width, step + overlap)
        tallest = max_pixels // tile_width
        if tallest >= height:
            tile_height, step_down = height, height
        else:
            step_down = (tallest - overlap) // align * align
            if step_down <= 0:
                continue
            # the same number of rows, evened out
            step_down = _step(height, -(-(height - overlap) // step_down), overlap, align)
            tile_height = min(height, step_down + overlap)
        across, down = _count(width, step, overlap), _count(height, step_down, overlap)
        area = (width + (across - 1) * overlap) * (height + (down - 1) * overlap)
        rank = (area, across * down, abs(tile_width - tile_height))
        if best is None or rank < best[0]:
            best = rank, step, step_down
    if best is None:
        least = (min(width, overlap + align)) * (min(height, overlap + align))
        raise ValueError(
            f"max_pixels {max_pixels} is too small to cut {width} x {height} pixels with an overlap of {overlap} "
            f"at multiples of {align}; it must be at least {least}"
        )
    return _spans(width, best[1], overlap), _spans(height, best[2], overlap)


def _step(length: int, count: int, overlap: int, align: int) -> int:
    """Distance between origins, a multiple of ``align``, with which ``count`` tiles cover ``length``."""
    if count == 1:
        return length
    return max(align, -(-(length - overlap) // (count * align)) * align)


def _count(length: int, step: int, overlap: int) -> int:
    return max(1, -(-(length - overlap) // step))


def _spans(length: int, step: int, overlap: int) -> _Spans:
    origins = [index * step for index in range(_count(length, step, overlap))]
    return [(x, min(step + overlap, length - x)) for x in origins]


def _ramp(start: int, length: int, total: int, overlap: int) -> NDArray[np.float32]:
    weights = np.ones(length, dtype=np.float32)
    rising = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / np.float32(max(overlap, 1))
    if overlap and start > 0:
        weights = np.minimum(weights, rising)
    if overlap and start + length < total:
        weights = np.minimum(weights, rising[::-1])
    return weights


def _require_positive(**values: float) -> None:
    for label, value in values.items():
        if value <= 0:
            raise ValueError(f"{label} must be positive, saw {value}")
