from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from supir_batch.stitch import Stitched, stitch
from supir_batch.tiles import plan_tiles
from supir_batch.types import FloatImage, TileBox


def _cut(image: FloatImage, overlap: int) -> list[tuple[TileBox, FloatImage]]:
    height, width = image.shape[:2]
    boxes = plan_tiles(width, height, 80 * 80, overlap, 8)
    return [(b, image[b.y : b.y + b.height, b.x : b.x + b.width]) for b in boxes]


@pytest.mark.parametrize("overlap", [0, 16])
@pytest.mark.parametrize("size", [(150, 201), (81, 80)])
def test_tiles_of_an_image_make_the_image(rng: np.random.Generator, size: tuple[int, int], overlap: int) -> None:
    image = rng.random((*size, 4), dtype=np.float32)
    parts = _cut(image, overlap)
    assert len(parts) > 1
    np.testing.assert_allclose(stitch(parts, size[1], size[0], overlap), image, rtol=0, atol=2e-7)


def test_the_order_of_parts_does_not_matter_to_the_last_bit(rng: np.random.Generator) -> None:
    image = rng.random((150, 150, 3), dtype=np.float32)
    parts = [(box, pixels + np.float32(0.01 * box.index)) for box, pixels in _cut(image, 16)]
    np.testing.assert_array_equal(stitch(parts, 150, 150, 16), stitch(parts[::-1], 150, 150, 16))


def test_neighbors_that_disagree_blend_without_a_step() -> None:
    parts = [(TileBox(0, 2, 0, 0, 64, 32), np.zeros((32, 64, 1), np.float32))]
    parts += [(TileBox(1, 2, 32, 0, 64, 32), np.ones((32, 64, 1), np.float32))]
    row = stitch(parts, 96, 32, 32)[16, :, 0]
    assert np.abs(np.diff(row)).max() < 0.05
    assert row[0] == 0
    assert row[-1] == 1


def test_a_gap_or_a_wrong_shape_is_refused(rng: np.random.Generator) -> None:
    parts = _cut(rng.random((150, 150, 3), dtype=np.float32), 16)
    with pytest.raises(ValueError, match="do not cover"):
        stitch(parts[1:], 150, 150, 16)
    with pytest.raises(ValueError, match="shape"):
        stitch([(parts[0][0], parts[0][1][:-1]), *parts[1:]], 150, 150, 16)
    with pytest.raises(ValueError, match="no tiles"):
        stitch([], 150, 150, 16)


def test_an_image_comes_in_strips_and_each_tile_is_opened_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supir_batch.stitch._STRIP_PIXELS", 201 * 20)
    image = rng.random((150, 201, 4), dtype=np.float32)
    pixels = dict(_cut(image, 16))
    opened: list[TileBox] = []
    still_open: set[TileBox] = set()

    @contextmanager
    def reading(box: TileBox) -> Iterator[FloatImage]:
        opened.append(box)
        still_open.add(box)
        yield pixels[box]
        still_open.remove(box)

    whole = Stitched(list(pixels), reading, 201, 150, 16)
    top = 0
    for strip in whole:
        np.testing.assert_allclose(strip, image[top : top + len(strip)], rtol=0, atol=2e-7)
        assert len(strip) <= 20
        assert still_open == {box for box in pixels if box.y <= top < box.y + box.height}
        top += len(strip)
    assert (top, opened, still_open) == (150, list(pixels), set())
    assert whole.seam == 0


@pytest.mark.parametrize("odd", range(8))
def test_the_seam_is_the_worst_difference_of_two_neighbors(odd: int, rng: np.random.Generator) -> None:
    image = rng.random((150, 201, 4), dtype=np.float32)
    pixels = {box: tile + np.float32(0.1 if box.index == odd else 0.001 * box.index) for box, tile in _cut(image, 16)}
    assert len(pixels) == 8
    whole = Stitched(list(pixels), lambda box: nullcontext(pixels[box]), 201, 150, 16)
    list(whole)
    assert whole.seam == pytest.approx(0.1, abs=0.01)
    pixels = dict(_cut(image, 0))
    apart = Stitched(list(pixels), lambda box: nullcontext(pixels[box]), 201, 150, 0)
    list(apart)
    assert apart.seam == 0
