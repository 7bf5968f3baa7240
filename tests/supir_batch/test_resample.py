from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supir_batch.resample import reduce_to, resize, resize_part, span


@pytest.mark.parametrize("size", [(1, 1), (37, 5), (100, 33), (257, 64)])
def test_the_size_is_exact_and_the_range_kept(rng: np.random.Generator, size: tuple[int, int]) -> None:
    image = np.rint(rng.random((50, 40, 3))).astype(np.float32)  # hard edges, on which Lanczos overshoots
    resized = resize(image, *size)
    assert resized.shape == (size[1], size[0], 3)
    assert resized.min() >= 0
    assert resized.max() <= 1


def test_the_same_size_is_the_same_array(rng: np.random.Generator) -> None:
    image = rng.random((5, 4, 3), dtype=np.float32)
    assert resize(image, 4, 5) is image


def test_shrinking_averages_instead_of_skipping() -> None:
    checks = np.indices((64, 64)).sum(axis=0)[..., None] % 2
    np.testing.assert_allclose(resize(checks.astype(np.float32), 8, 8)[2:-2, 2:-2], 0.5, atol=0.02)


def test_nothing_shifts(rng: np.random.Generator) -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32)[None, :, None], (8, 1, 1))
    doubled = resize(ramp, 128, 16)
    np.testing.assert_allclose(doubled[:, :, 0], doubled[:, ::-1, 0][::-1] * -1 + 1, atol=1e-5)


def test_reducing_never_enlarges(rng: np.random.Generator) -> None:
    image = rng.random((10, 20, 3), dtype=np.float32)
    assert reduce_to(image, 30) is image
    assert reduce_to(image, 5).shape == (2, 5, 3)


@given(
    source=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    target=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    data=st.data(),
)
def test_parts_are_cut_from_the_whole(source: tuple[int, int], target: tuple[int, int], data: st.DataObject) -> None:
    image = np.random.default_rng(0).random((source[1], source[0], 2)).astype(np.float32)
    whole = resize(image, *target)
    left, top = (data.draw(st.integers(0, side - 1)) for side in target)
    width, height = (data.draw(st.integers(1, side - at)) for side, at in zip(target, (left, top), strict=True))
    across, down = span(left, width, target[0], source[0]), span(top, height, target[1], source[1])
    part = resize_part(
        image[down.pixels, across.pixels], (across.start, down.start, across.end, down.end), width, height
    )
    np.testing.assert_allclose(part, whole[top : top + height, left : left + width], rtol=0, atol=2e-5)


def test_a_part_reads_little_around_it() -> None:
    assert span(1000, 200, 20_000, 10_000).pixels == slice(496, 604)
    assert span(1000, 200, 10_000, 10_000) == (slice(1000, 1200), 0, 200)
    assert span(0, 100, 1000, 4000).pixels == slice(0, 413)


def test_signs_are_kept_where_nothing_is_clipped() -> None:
    image = np.full((8, 8, 1), -0.5, np.float32)
    np.testing.assert_allclose(resize(image, 16, 16, clip=False), -0.5, atol=1e-6)
