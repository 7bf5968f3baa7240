from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from supir_batch.errors import ImageError
from supir_batch.probe import probe
from supir_batch.readers import Raster, StoredLevels, read

ZSTD = "libvips refused it: tiff2vips: ZSTD"
HAS_HEIC = importlib.util.find_spec("pillow_heif") is not None


def _read(path: Path, page: int = 1) -> Raster:
    return read(path, probe(path, page))


def _ramp(bands: int, depth: int, height: int = 70, width: int = 90) -> np.ndarray:
    """Every band another ramp that uses the whole range of the type."""
    y, x = np.mgrid[:height, :width]
    kind: Any = np.uint8 if depth == 8 else np.uint16
    planes = [(x * (band + 2) * 719 + y * 263).astype(np.uint32) % 2**depth for band in range(bands)]
    return np.stack(planes, -1).astype(kind)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize(
    "layout", [{}, {"tile": (32, 48)}, {"planarconfig": "separate"}, {"bigtiff": True}, {"byteorder": ">"}]
)
def test_every_lossless_tiff_is_read_exactly(
    tmp_path: Path, depth: int, bands: int, compression: str | None, layout: dict[str, Any]
) -> None:
    path, levels = tmp_path / "a.tif", _ramp(bands, depth)
    planar = bands == 3 and "planarconfig" in layout
    stored = np.moveaxis(levels, 2, 0) if planar else levels[..., 0] if bands == 1 else levels
    options = layout if planar or "planarconfig" not in layout else {}
    tifffile.imwrite(
        path, stored, photometric="rgb" if bands == 3 else "minisblack", compression=compression, metadata=None,
        **options,
    )  # fmt: skip
    raster = _read(path)
    np.testing.assert_array_equal(raster.levels, levels)
    assert raster.levels.dtype == levels.dtype


@pytest.mark.parametrize("layout", [{}, {"tile": (32, 48)}])
@pytest.mark.parametrize("bands", [1, 3])
def test_jpeg_in_tiff_is_read_as_another_decoder_reads_it(tmp_path: Path, bands: int, layout: dict[str, Any]) -> None:
    path, levels = tmp_path / "a.tif", np.full((64, 96, bands), (200, 40, 90)[:bands], np.uint8)
    tifffile.imwrite(
        path, levels if bands == 3 else levels[..., 0], compression="jpeg", metadata=None,
        photometric="rgb" if bands == 3 else "minisblack", **layout,
    )  # fmt: skip
    raster = _read(path)
    assert raster.bands == bands
    assert np.abs(raster.levels.astype(int) - levels).max() <= 2


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_compressions(tmp_path: Path, compression: str) -> None:
    path, bits = tmp_path / "a.tif", _ramp(1, 8)[..., 0] > 127
    Image.fromarray(bits).save(path, compression=compression)
    raster = _read(path)
    np.testing.assert_array_equal(raster.levels[..., 0], np.where(bits, 255, 0))
    assert raster.notes == ("1-bit samples were expanded to 8 bits",)


@pytest.mark.parametrize("compression", [None, "zstd"])  # both readers
def test_a_palette_is_expanded(tmp_path: Path, rng: np.random.Generator, compression: str | None) -> None:
    path, indices = tmp_path / "a.tif", _ramp(1, 8)[..., 0]
    colors = rng.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(
        path, indices, photometric="palette", colormap=colors, compression=compression, metadata=None
    )  # fmt: skip
    raster = _read(path)
    np.testing.assert_array_equal(raster.levels, np.moveaxis(colors[:, indices] // 257, 0, 2))
    assert raster.notes[-1] == "palette colors were expanded to RGB"


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", ["unassalpha", "unspecified", "assocalpha"])
@pytest.mark.parametrize("depth", [8, 16])
def test_both_readers_give_the_same_alpha(tmp_path: Path, depth: int, kind: str, compression: str | None) -> None:
    path, levels = tmp_path / "a.tif", _ramp(4, depth)
    whole = 2**depth - 1
    stored = levels.copy()
    if kind == "assocalpha":
        levels[..., 3] = np.maximum(levels[..., 3], whole // 2)
        stored = levels.copy()
        stored[..., :3] = np.rint(levels[..., :3] / whole * levels[..., 3:])
    tifffile.imwrite(
        path, stored, photometric="rgb", extrasamples=[kind], compression=compression, metadata=None
    )  # fmt: skip
    raster = _read(path)
    np.testing.assert_array_equal(raster.levels[..., 3], levels[..., 3])
    np.testing.assert_allclose(raster.levels, levels, atol=2 if kind == "assocalpha" else 0)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"compression": "deflate", "predictor": True}])
def test_float_samples_become_16_bits_and_say_their_range(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    samples = (_ramp(3, 8) / 510 + 0.25).astype(kind)
    tifffile.imwrite(path, samples, photometric="rgb", metadata=None, **options)
    header, raster = probe(path), _read(path)
    assert (header.bit_depth, header.bands, header.mode) == (16, 3, "rgb")
    np.testing.assert_array_equal(raster.levels, np.rint(samples.astype(np.float64) * 65535))
    assert "from 0.25 to 0.75" in raster.notes[0]
    assert "sRGB" in raster.notes[0]


def test_float_samples_with_a_profile_are_in_its_space(tmp_path: Path) -> None:
    path, icc = tmp_path / "a.tif", bytes(imagecodecs.cms_profile("adobergb"))
    tifffile.imwrite(path, np.full((4, 4, 3), 0.5, np.float32), photometric="rgb", iccprofile=icc, metadata=None)
    raster = _read(path)
    assert raster.icc == icc
    assert "sRGB" not in raster.notes[0]


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_samples_between_8_and_16_bits_reach_white(tmp_path: Path, bits: int) -> None:
    path, samples = tmp_path / "a.tif", _ramp(3, 16) >> (16 - bits)
    tifffile.imwrite(path, samples, photometric="rgb", bitspersample=bits, metadata=None)
    raster = _read(path)
    np.testing.assert_array_equal(np.rint(raster.levels / 65535 * (2**bits - 1)), samples)
    assert raster.notes == (f"{bits}-bit samples were expanded to 16 bits",)


@pytest.mark.parametrize("depth", [8, 16])
def test_cmyk_by_the_second_reader_is_the_same(tmp_path: Path, depth: int) -> None:
    path, levels = tmp_path / "a.tif", _ramp(4, depth)
    both = []
    for compression in ("deflate", "zstd"):
        tifffile.imwrite(path, levels, photometric="separated", compression=compression, metadata=None)
        both.append(_read(path))
    assert ZSTD in both[1].notes[0]
    assert both[0].levels.std() > 20
    np.testing.assert_array_equal(both[0].levels, both[1].levels)


def test_an_adobe_jpeg_is_not_read_as_its_negative(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(path, quality=95)  # Pillow stores it inverted, with Adobe's marker
    assert b"Adobe" in path.read_bytes()
    red, green, blue = _read(path).levels[5, 5].astype(int)
    assert red < 80
    assert min(green, blue) > 120


@pytest.mark.parametrize("bits", [10, 12])
def test_white_of_a_deep_avif_is_white(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.avif"
    samples = np.full((64, 64, 3), 2**bits - 1, np.uint16)
    samples[:, :32] = 0
    path.write_bytes(imagecodecs.avif_encode(samples, level=100, bitspersample=bits))
    raster = _read(path)
    assert raster.levels[:, 40:].min() == 65535
    assert raster.levels[:, :20].max() == 0


def test_png_of_16_bits_with_alpha_and_profile(tmp_path: Path) -> None:
    path, levels = tmp_path / "a.png", _ramp(4, 16)
    icc = bytes(imagecodecs.cms_profile("adobergb"))
    image = pyvips.Image.new_from_array(levels).copy(interpretation="rgb16")
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
    image.pngsave(str(path))
    raster = _read(path)
    np.testing.assert_array_equal(raster.levels, levels)
    assert raster.icc == icc


def test_webp_with_alpha(tmp_path: Path) -> None:
    path, levels = tmp_path / "a.webp", _ramp(4, 8)
    Image.fromarray(levels).save(path, lossless=True, exact=True)
    np.testing.assert_array_equal(_read(path).levels, levels)


def test_a_chosen_page_is_read_by_either_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        for level, compression in ((1, None), (2, "lzw"), (3, "zstd")):
            tif.write(np.full((8, 8), level, np.uint8), compression=compression, metadata=None)
    assert [int(_read(path, page).levels.max()) for page in (1, 2, 3)] == [1, 2, 3]


def test_another_page_is_asked_of_a_format_without_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(ImageError, match="page 2") as caught:
        probe(path, 2)
    assert caught.value.kind == "no-such-page"


@pytest.mark.skipif(not HAS_HEIC, reason="needs pillow-heif")
@pytest.mark.parametrize(("mode", "depth"), [("RGB", 8), ("RGBA", 8), ("L", 8), ("RGB;16", 16)])
def test_heic(tmp_path: Path, mode: str, depth: int) -> None:
    import pillow_heif

    path, bands = tmp_path / "a.heic", len(mode.partition(";")[0])
    levels = np.full((64, 96, bands), 2**depth - 1, np.uint8 if depth == 8 else np.uint16)
    levels[:, :48] = 0
    with path.open("wb") as stream:
        pillow_heif.encode(mode, (96, 64), levels.tobytes(), stream, quality=-1)
    header, raster = probe(path), _read(path)
    assert (header.format, header.width, header.height, header.bit_depth) == ("heic", 96, 64, depth)
    assert header.has_alpha == (bands == 4)
    assert raster.levels[:, 60:].min() == 2**depth - 1
    assert raster.levels[:, :36].max() == 0
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ImageError) as caught:
        _read(path)
    assert caught.value.kind in ("truncated", "damaged")


def test_heic_without_its_decoder_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    monkeypatch.setattr("supir_batch.probe.can_read_heic", lambda: False)
    with pytest.raises(ImageError, match=r"supir-batch\[heic\]") as caught:
        probe(path)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("longer_side", [128, 512])
@pytest.mark.parametrize("turned", [False, True])
def test_a_long_thin_image_is_reduced(tmp_path: Path, longer_side: int, turned: bool) -> None:
    path, levels = tmp_path / "a.png", np.full((8, 20_000, 3), 40, np.uint8)
    levels[:, 10_000:] = 200
    Image.fromarray(np.swapaxes(levels, 0, 1) if turned else levels).save(path)
    reduced = _read(path).reduced(longer_side)
    line = reduced[:, 0] if turned else reduced[0]
    assert reduced.shape == ((longer_side, 1, 3) if turned else (1, longer_side, 3))
    np.testing.assert_allclose(line[: longer_side // 2 - 3], 40 / 255, atol=1e-6)
    np.testing.assert_allclose(line[longer_side // 2 + 3 :], 200 / 255, atol=1e-6)


@given(height=st.integers(1, 90), width=st.integers(1, 90), longer_side=st.integers(4, 40), grey=st.booleans())
def test_nothing_is_left_out_of_a_reduced_image(height: int, width: int, longer_side: int, grey: bool) -> None:
    """Ramps stay ramps and keep their mean, whether or not blocks fit into them."""
    ramp = np.linspace(0, 65535, height)[:, None] / 2 + np.linspace(0, 65535, width)[None, :] / 2
    bands = 1 if grey else 3
    levels = np.repeat(np.rint(ramp).astype(np.uint16)[..., None], bands, axis=2)
    reduced = Raster(levels, bands, None, ()).reduced(longer_side)
    assert reduced.shape[2] == 3
    assert max(reduced.shape[:2]) == min(longer_side, max(height, width))
    assert reduced.mean() == pytest.approx(levels.mean() / 65535, abs=0.07)
    assert (np.diff(reduced[..., 0], axis=0) > -1e-3).all()
    assert (np.diff(reduced[..., 0], axis=1) > -1e-3).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("bands", "kind"), [(1, np.uint8), (3, np.uint16), (4, np.uint8)])
def test_a_giant_waits_outside_of_memory_and_is_the_same(
    tmp_path: Path, orientation: int, bands: int, kind: type, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = rng.integers(0, np.iinfo(kind).max, (70, 45, bands)[: 3 if bands > 1 else 2], endpoint=True).astype(kind)
    path = tmp_path / "a.tif"
    extra = [("Orientation", 3, 1, orientation, False)]
    tifffile.imwrite(path, levels, photometric="rgb" if bands > 1 else "minisblack", extratags=extra, tile=(16, 16))
    here = _read(path).levels
    monkeypatch.setattr("supir_batch.readers.STORED_BYTES", 0)
    there = _read(path).levels
    assert isinstance(here, np.ndarray)
    assert isinstance(there, StoredLevels)
    assert (there.shape, there.dtype) == (here.shape, here.dtype)
    for rows, columns in ((slice(None), slice(None)), (slice(3, 20), slice(30, 31)), (slice(44, 99), slice(0, 40))):
        np.testing.assert_array_equal(there[rows, columns], here[rows, columns])
