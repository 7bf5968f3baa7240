from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from supir_batch import encode
from supir_batch.encode import FileSpec
from supir_batch.errors import ImageError
from supir_batch.types import OutputFormat

NONE = np.zeros((0, 0), np.float32)


def _levels(path: Path) -> np.ndarray:
    if path.suffix == ".tif":
        return tifffile.imread(path)
    if path.suffix == ".png":
        return np.asarray(imagecodecs.png_decode(path.read_bytes()))
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("file_format", ["tiff", "png"])
def test_lossless_formats_hold_exactly_these_levels(
    tmp_path: Path,
    rng: np.random.Generator,
    file_format: OutputFormat,
    depth: Literal[8, 16],
    bands: int,
    alpha: bool,
) -> None:
    path = tmp_path / f"a{encode.EXTENSIONS[file_format]}"
    pixels = rng.random((20, 30, bands), dtype=np.float32)
    mask = rng.random((20, 30), dtype=np.float32) if alpha else NONE
    spec = FileSpec(file_format, depth)
    encode.encode(pixels, mask, path, spec)
    meant = np.concatenate([pixels, mask[..., None]], axis=2) if alpha else pixels
    np.testing.assert_array_equal(np.squeeze(_levels(path)), np.squeeze(encode.quantize(meant, depth)))
    encode.check_file(path, 30, 20, spec, bands, alpha)


def test_rounding_is_to_the_nearest_level() -> None:
    levels = np.arange(65536)
    np.testing.assert_array_equal(encode.quantize((levels / 65535).astype(np.float32), 16), levels)
    np.testing.assert_array_equal(encode.quantize(np.array([-1, 0.0019, 0.0020, 2], np.float32), 8), [0, 0, 1, 255])


@pytest.mark.parametrize("file_format", ["tiff", "png", "jpeg"])
@pytest.mark.parametrize("dpi", [None, (600.0, 300.0)])
def test_resolution_and_profile(tmp_path: Path, file_format: OutputFormat, dpi: tuple[float, float] | None) -> None:
    path = tmp_path / f"a{encode.EXTENSIONS[file_format]}"
    icc = bytes(imagecodecs.cms_profile("adobergb"))
    encode.encode(np.full((9, 9, 3), 0.5, np.float32), NONE, path, FileSpec(file_format, 8, icc=icc, dpi=dpi))
    with Image.open(path) as image:
        assert image.info["icc_profile"] == icc
        if dpi is not None:
            assert image.info["dpi"] == pytest.approx(dpi, abs=0.02)
        elif file_format == "jpeg":
            assert image.info["jfif_unit"] == 0
        elif file_format == "png":
            assert "dpi" not in image.info
        else:
            assert image.tag_v2[296] == 1


def test_a_jpeg_keeps_full_color_resolution_and_leaves_alpha_out(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.jpg"
    spec = FileSpec("jpeg", 8)
    encode.encode(rng.random((32, 32, 3), dtype=np.float32), np.ones((32, 32), np.float32), path, spec)
    with Image.open(path) as image:
        assert image.mode == "RGB"
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    encode.check_file(path, 32, 32, spec, 3, True)


def test_a_bigtiff_carries_its_xmp(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    spec = FileSpec("tiff", 16, bigtiff=True, xmp=b"<x/>")
    encode.encode(np.zeros((4, 4, 1), np.float32), NONE, path, spec)
    with tifffile.TiffFile(path) as tif:
        assert tif.is_bigtiff
        assert bytes(tif.pages.first.tags.valueof(700)) == b"<x/>"
    assert encode.needs_bigtiff(30_000, 20_000, 3, 16)
    assert not encode.needs_bigtiff(10_000, 10_000, 3, 16)


def test_the_same_pixels_give_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.random((50, 60, 3), dtype=np.float32)
    for file_format, extension in encode.EXTENSIONS.items():
        for name in "ab":
            encode.encode(pixels, NONE, tmp_path / (name + extension), FileSpec(file_format, 8, dpi=(300.0, 300.0)))
        assert (tmp_path / f"a{extension}").read_bytes() == (tmp_path / f"b{extension}").read_bytes()


def test_a_file_that_is_not_what_was_meant_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.png"
    spec = FileSpec("png", 8)
    encode.encode(rng.random((64, 64, 3), dtype=np.float32), NONE, path, spec)
    for width, depth in ((63, 8), (64, 16)):
        with pytest.raises(ImageError, match="instead of"):
            encode.check_file(path, width, 64, dataclasses.replace(spec, bit_depth=depth), 3, False)
    with pytest.raises(ImageError, match="ICC profile"):
        encode.check_file(path, 64, 64, dataclasses.replace(spec, icc=b"x"), 3, False)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ImageError, match="read back"):
        encode.check_file(path, 64, 64, spec, 3, False)


def test_a_jpeg_too_wide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="70000 x 1"):
        encode.encode(np.zeros((1, 70_000, 1), np.float32), NONE, tmp_path / "a.jpg", FileSpec("jpeg", 8))
