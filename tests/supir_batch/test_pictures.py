"""Pictures for a browser: small, over white, and of a known file of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from supir_batch import commit, probe
from supir_batch.errors import ImageError
from supir_batch.pictures import picture
from supir_batch.readers import Raster
from supir_batch.types import FloatImage


def test_where_transparent_white_shows(tmp_path: Path) -> None:
    levels = np.zeros((40, 60, 4), np.uint8)  # transparent black, whose edge must not become dark
    levels[:, :30] = (255, 0, 0, 255)
    levels[20:, :30, 3] = 51
    Image.fromarray(levels).save(tmp_path / "a.png")
    seen = picture(str(tmp_path / "a.png"), 60)
    assert seen.shape == (40, 60, 3)
    np.testing.assert_allclose(seen[:, 30:], 1.0)
    np.testing.assert_allclose(seen[:20, :30], np.broadcast_to((1.0, 0.0, 0.0), (20, 30, 3)))
    np.testing.assert_allclose(seen[20:, :30], np.broadcast_to((1.0, 0.8, 0.8), (20, 30, 3)), atol=1e-6)
    small = picture(str(tmp_path / "a.png"), 6)
    assert small.shape == (4, 6, 3)
    assert small[..., 0].min() > 0.99  # red in red and in white


def test_a_giant_is_never_made_float_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((3000, 400), 77, np.uint8)).save(tmp_path / "a.png")
    most = 0
    whole = Raster.floats

    def floats(raster: Raster, rows: slice, columns: slice) -> tuple[FloatImage, FloatImage]:
        nonlocal most
        colors, alpha = whole(raster, rows, columns)
        most = max(most, colors.size)
        return colors, alpha

    monkeypatch.setattr(Raster, "floats", floats)
    assert picture(str(tmp_path / "a.png"), 100).shape == (100, 13, 3)
    assert 0 < most < 3000 * 400 / 4


def test_a_known_file_is_shown_however_tightly_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (500, 400), "white").save(path)
    monkeypatch.setattr(probe, "EXPANSION_FREE_BYTES", 1000)
    monkeypatch.setattr(probe, "MAX_EXPANSION", 10)
    digest = commit.file_sha256(path)
    assert picture(str(path), 50, sha256=digest).shape == (40, 50, 3)
    for unknown in (None, "00" * 32):
        with pytest.raises(ImageError, match="decompression bomb"):
            picture(str(path), 50, sha256=unknown)
