from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supir_batch.tiles import feather, output_size, plan_tiles, work_size
from supir_batch.types import TileBox

sides = st.integers(1, 400)


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """width, height, max_pixels, overlap, align for which a grid exists, as settings guarantee."""
    overlap, align = draw(st.integers(0, 24)), draw(st.sampled_from([1, 4, 8, 16]))
    least = max((2 * overlap + 2 * align) ** 2, 1024)
    return draw(sides), draw(sides), draw(st.integers(least, least * 8)), overlap, align


@settings(deadline=None)
@given(grids())
def test_tiles_cover_the_image_and_keep_every_promise(grid: tuple[int, int, int, int, int]) -> None:
    width, height, max_pixels, overlap, align = grid
    boxes = plan_tiles(width, height, max_pixels, overlap, align)
    cover = np.zeros((height, width), int)
    for index, box in enumerate(boxes):
        assert (box.index, box.count) == (index, len(boxes))
        assert box.x % align == 0
        assert box.y % align == 0
        assert box.width * box.height <= max_pixels
        assert box.x + box.width <= width
        assert box.y + box.height <= height
        cover[box.y : box.y + box.height, box.x : box.x + box.width] += 1
    assert cover.min() >= 1
    assert (len(boxes) == 1) == (width * height <= max_pixels)
    for spans in ({(box.x, box.width) for box in boxes}, {(box.y, box.height) for box in boxes}):
        for (start, length), (following, _) in itertools.pairwise(sorted(spans)):
            assert start + length - following == overlap


@settings(deadline=None)
@given(grids())
def test_feathered_weights_are_positive_and_one_at_the_border(grid: tuple[int, int, int, int, int]) -> None:
    width, height, max_pixels, overlap, align = grid
    boxes = plan_tiles(width, height, max_pixels, overlap, align)
    total = np.zeros((height, width), np.float32)
    for box in boxes:
        weights = feather(box, (width, height), overlap)
        assert weights.shape == (box.height, box.width)
        assert weights.dtype == np.float32
        assert weights.min() > 0
        assert weights.max() <= 1
        total[box.y : box.y + box.height, box.x : box.x + box.width] += weights
    assert total[0, 0] == total[-1, -1] == total[0, -1] == total[-1, 0] == 1
    if all(min(box.width, box.height) >= 2 * overlap for box in boxes):
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_a_large_image_is_cut_evenly() -> None:
    boxes = plan_tiles(3000, 2000, 2048 * 2048, 128, 16)
    assert boxes == (TileBox(0, 2, 0, 0, 1568, 2000), TileBox(1, 2, 1440, 0, 1560, 2000))


def test_a_gigapixel_image_is_planned_without_waste() -> None:
    boxes = plan_tiles(100_000, 80_000, 2048 * 2048, 128, 16)
    assert sum(box.width * box.height for box in boxes) < 1.15 * 100_000 * 80_000


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4096), (64, 64), (63, 65), (65, 63)])
def test_what_fits_is_one_tile(width: int, height: int) -> None:
    assert plan_tiles(width, height, 4096, 8, 8) == (TileBox(0, 1, 0, 0, width, height),)


def test_one_pixel_more_is_cut() -> None:
    assert len(plan_tiles(4097, 1, 4096, 8, 8)) == 2


def test_a_grid_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"max_pixels 100 is too small .* at least 1600"):
        plan_tiles(1000, 1000, 100, 32, 8)
    with pytest.raises(ValueError, match="overlap must not be negative"):
        plan_tiles(10, 10, 100, -1, 8)
    with pytest.raises(ValueError, match="width must be positive, saw 0"):
        plan_tiles(0, 10, 100, 1, 8)


@given(sides, sides, st.floats(0.1, 16))
def test_output_size_is_the_rounded_product(width: int, height: int, upscale: float) -> None:
    assert output_size(width, height, upscale) == (max(1, round(width * upscale)), max(1, round(height * upscale)))


def test_output_size_rounds_halves_to_even() -> None:
    assert output_size(5, 7, 0.5) == (2, 4)
    assert output_size(1, 1, 0.1) == (1, 1)


@given(sides, sides, st.integers(0, 2000))
def test_work_size_reaches_min_size_and_keeps_the_shape(width: int, height: int, min_size: int) -> None:
    wide, high = work_size(width, height, min_size)
    if max(width, height) <= 8 * min(width, height):
        assert min(wide, high) == max(min(width, height), min_size)
    assert abs(wide * height - high * width) <= max(width, height)  # one rounding apart


def test_a_sliver_is_not_enlarged_beyond_measure() -> None:
    assert work_size(1, 10_000, 1024) == (1, 10_000)
    assert work_size(8, 1000, 1024) == (66, 8192)
