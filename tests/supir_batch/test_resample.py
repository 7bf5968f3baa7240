from __future__ import annotations

import numpy as np
import pytest

from supir_batch.resample import reduce_to, resize


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
