from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supir_batch.errors import ImageError
from supir_batch.levels import from_floats, spread, unassociate


@given(st.integers(1, 16))
def test_spread_keeps_black_white_and_order_and_can_be_undone(bits: int) -> None:
    samples = np.arange(2**bits, dtype=np.uint16)
    levels = spread(samples, bits)
    whole = 255 if bits <= 8 else 65535
    assert levels.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert (levels[0], levels[-1]) == (0, whole)
    assert (np.diff(levels.astype(int)) > 0).all()
    np.testing.assert_array_equal(np.rint(levels.astype(np.float64) / whole * (2**bits - 1)), samples)


def test_a_sample_above_its_bits_is_white() -> None:
    assert spread(np.array([5000], np.uint16), 12).tolist() == [65535]


def test_floats_become_the_nearest_level_and_their_range_is_told() -> None:
    levels, low, high = from_floats(np.array([[[0.25], [1.0], [0.5 / 65535 + 1e-6]]], np.float32))
    assert levels.ravel().tolist() == [16384, 65535, 1]
    assert (low, high) == (pytest.approx(0.5 / 65535 + 1e-6), 1.0)


@pytest.mark.parametrize("value", [1.0001, -0.001, float("nan"), float("inf"), 65535.0])
def test_floats_without_an_agreed_meaning_are_refused(value: float) -> None:
    with pytest.raises(ImageError, match="no numbers" if not np.isfinite(value) else "0 to 1") as caught:
        from_floats(np.array([[[0.5], [value]]], np.float32))
    assert caught.value.kind == "unsupported"


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 255)), min_size=1, max_size=50))
def test_unassociate_undoes_the_multiplication_by_alpha(pairs: list[tuple[int, int]]) -> None:
    color, alpha = np.array(pairs, np.float64).T
    stored = np.stack([np.rint(color * alpha / 255), alpha], -1).astype(np.uint8)[None]
    restored = unassociate(stored)[0]
    np.testing.assert_array_equal(restored[:, 1], alpha)
    # all that eight bits of a product can say about a factor
    assert (np.abs(restored[:, 0] - color) <= 0.5 * 255 / alpha + 0.5).all()


def test_where_alpha_is_zero_the_color_is_black() -> None:
    assert unassociate(np.array([[[77, 0]]], np.uint8)).tolist() == [[[0, 0]]]
