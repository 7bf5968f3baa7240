"""JPEG 2000 masters: exact samples, whatever is in their boxes; liars and damage end as reasons."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from supir_batch import jpeg2000, metadata
from supir_batch.decode import read_srgb
from supir_batch.errors import ImageError
from supir_batch.probe import probe
from supir_batch.types import Outcome

GREY_ICC = bytes(imagecodecs.cms_profile("gray", gamma=2.2))
RGB_ICC = bytes(imagecodecs.cms_profile("adobergb"))
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/></x:xmpmeta>'


def codestream(levels: NDArray[Any], **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(levels, level=0, codecformat="j2k", **options))


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def jp2(data: bytes, *inner: bytes, after: bytes = b"") -> bytes:
    width, height, components = *struct.unpack_from(">2I", data, 8), *struct.unpack_from(">H", data, 40)
    size = struct.pack(">2IH4B", height, width, components, data[42], 7, 0, 0)
    header = box(b"ihdr", size) + b"".join(inner)
    return jpeg2000.JP2 + box(b"ftyp", b"jp2 " + bytes(4) + b"jp2 ") + box(b"jp2h", header) + after + box(b"jp2c", data)


def icc_box(icc: bytes) -> bytes:
    return box(b"colr", b"\x02\x00\x00" + icc)


def space_box(space: int) -> bytes:
    return box(b"colr", b"\x01\x00\x00" + struct.pack(">I", space))


def samples(path: Path) -> NDArray[Any]:
    return jpeg2000.read_samples(path, jpeg2000.read_header(path))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("icc", [True, False])
def test_samples_are_exact(tmp_path: Path, rng: np.random.Generator, dtype: Any, bands: int, icc: bool) -> None:
    levels = rng.integers(0, np.iinfo(dtype).max, (20, 30, bands), dtype, endpoint=True)
    profile = GREY_ICC if bands <= 2 else RGB_ICC
    path = tmp_path / "a.jp2"
    path.write_bytes(jp2(codestream(levels), icc_box(profile) if icc else space_box(17 if bands <= 2 else 16)))
    np.testing.assert_array_equal(samples(path), levels)
    header = probe(path)
    assert (header.format, header.width, header.height, header.bands) == ("jpeg2000", 30, 20, bands)
    assert header.bit_depth == np.dtype(dtype).itemsize * 8
    assert header.has_alpha == (bands in (2, 4))
    assert jpeg2000.read_header(path).icc == (profile if icc else None)


def test_the_codec_itself_changes_samples_of_a_file_with_a_profile(rng: np.random.Generator) -> None:
    """Why only the codestream is given to it; if this fails, the codec has been mended."""
    levels = rng.integers(0, 65535, (20, 30, 3), np.uint16)
    assert not np.array_equal(imagecodecs.jpeg2k_decode(jp2(codestream(levels), icc_box(RGB_ICC))), levels)


def cdef_box(*channels: tuple[int, int, int]) -> bytes:
    return box(b"cdef", struct.pack(">H", len(channels)) + b"".join(struct.pack(">3H", *each) for each in channels))


RGB = ((0, 0, 1), (1, 0, 2), (2, 0, 3))


@pytest.mark.parametrize("bands", [2, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_premultiplied_colors_are_divided_by_alpha(tmp_path: Path, bands: int, dtype: Any) -> None:
    whole = np.iinfo(dtype).max
    levels = np.full((8, 8, bands), whole // 2, dtype)
    levels[..., :-1] = whole // 4
    path = tmp_path / "a.jp2"
    channels = (*RGB[: bands - 1], (bands - 1, 2, 0))
    path.write_bytes(jp2(codestream(levels), cdef_box(*channels)))
    assert probe(path).has_alpha
    found = samples(path)
    assert (found[..., -1] == whole // 2).all()
    np.testing.assert_allclose(found[..., :-1], whole / 2, atol=2)


def test_colors_in_order_may_be_listed_in_any(tmp_path: Path, rng: np.random.Generator) -> None:
    levels = rng.integers(0, 255, (8, 8, 4), np.uint8)
    path = tmp_path / "a.jp2"
    path.write_bytes(jp2(codestream(levels), cdef_box((3, 1, 0), *reversed(RGB))))
    np.testing.assert_array_equal(samples(path), levels)
    assert probe(path).has_alpha
    path.write_bytes(jp2(codestream(levels[..., :3]), cdef_box(*RGB)))
    assert not probe(path).has_alpha


@pytest.mark.parametrize(
    "channels",
    [
        ((0, 0, 3), (1, 0, 2), (2, 0, 1)),  # blue first
        ((0, 1, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3)),  # alpha first
        (*RGB, (3, 1, 2)),  # alpha of one color
        (*RGB, (3, 65535, 65535)),
        (*RGB, (3, 0, 4)),
        ((0, 0, 1), (1, 1, 0), (2, 1, 0)),  # twice
        RGB[:2],
        (),
    ],
)
def test_channels_in_another_order_are_refused(tmp_path: Path, channels: tuple[tuple[int, int, int], ...]) -> None:
    path = tmp_path / "a.jp2"
    path.write_bytes(jp2(codestream(np.zeros((8, 8, max(3, len(channels))), np.uint8)), cdef_box(*channels)))
    with pytest.raises(ImageError, match="association") as caught:
        probe(path)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("bits", [1, 4, 10, 12])
def test_odd_depths_fill_their_type(tmp_path: Path, rng: np.random.Generator, bits: int) -> None:
    top = 2**bits - 1
    levels = rng.integers(0, top, (16, 16), np.uint8 if bits <= 8 else np.uint16, endpoint=True)
    path = tmp_path / "a.j2k"
    path.write_bytes(codestream(levels, bitspersample=bits))
    whole = 255 if bits <= 8 else 65535
    np.testing.assert_array_equal(samples(path)[..., 0], np.floor(levels * (whole / top) + 0.5))


def test_a_master_is_restored_in_kind(
    tmp_path: Path, rng: np.random.Generator, restore: Callable[..., Outcome]
) -> None:
    levels = rng.integers(0, 65535, (40, 50), np.uint16)
    path = tmp_path / "a.jp2"
    resolution = box(b"res ", box(b"resc", struct.pack(">4H2b", 11811, 1, 11811, 1, 0, 0)))
    xmp = box(b"uuid", XMP_BOX + XMP)
    path.write_bytes(jp2(codestream(levels), icc_box(GREY_ICC), resolution, after=xmp))
    assert probe(path).dpi == (300.0, 300.0)
    assert metadata.read_metadata(path).xmp == XMP
    outcome = restore(path)
    assert outcome.status == "done", outcome.ticket.failure
    output = Path(outcome.output_uri)
    assert output.name == "a.jp2"
    np.testing.assert_array_equal(samples(output)[..., 0], levels)
    assert jpeg2000.read_header(output).icc == GREY_ICC
    assert probe(output).dpi == (300.0, 300.0)
    assert "supirBatch:Fingerprint" in metadata.read_claims(output)
    with Image.open(output) as image:
        assert image.size == (50, 40)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_written_is_read_back(tmp_path: Path, rng: np.random.Generator, bands: int, dtype: Any) -> None:
    levels = rng.integers(0, np.iinfo(dtype).max, (20, 30, bands), dtype, endpoint=True)
    icc = GREY_ICC if bands <= 2 else RGB_ICC
    path = tmp_path / "a.jp2"
    data = jpeg2000.encode(levels, icc, (72.5, 4800.0), None)
    tagged = jp2(
        codestream(levels[:8, :8]), after=box(b"uuid", b"an EXIF box, say") + box(b"uuid", XMP_BOX + b"<old/>")
    )
    path.write_bytes(jpeg2000.with_metadata(data, tagged, XMP))
    np.testing.assert_array_equal(samples(path), levels)
    header = jpeg2000.read_header(path)
    assert (header.icc, header.xmp, header.has_alpha) == (icc, XMP, bands in (2, 4))
    assert header.dpi == pytest.approx((72.5, 4800.0), rel=1e-4)
    assert (path.read_bytes().count(b"<old/>"), path.read_bytes().count(b"an EXIF box, say")) == (0, 1)


def test_lossy_is_smaller_and_near(tmp_path: Path) -> None:
    levels = np.tile(np.linspace(0, 64000, 256).astype(np.uint16)[None, :, None], (256, 1, 3))
    levels += np.random.default_rng(0).integers(0, 999, levels.shape, np.uint16)
    path = tmp_path / "a.jp2"
    whole, lossy = (jpeg2000.encode(levels, None, None, psnr) for psnr in (None, 40))
    assert len(lossy) < len(whole) / 4
    path.write_bytes(lossy)
    assert np.abs(samples(path).astype(float) - levels).mean() / 65535 < 0.02


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ([space_box(18)], "color space 18"),
        ([box(b"pclr", bytes(8))], "palette"),
        ([struct.pack(">I4s", 2**31, b"colr")], "declares"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, inner: list[bytes], message: str) -> None:
    path = tmp_path / "a.jp2"
    path.write_bytes(jp2(codestream(np.zeros((8, 8, 3), np.uint8)), *inner))
    with pytest.raises(ImageError, match=message):
        probe(path)


def test_a_huge_size_in_a_small_file_is_a_bomb(tmp_path: Path) -> None:
    data = bytearray(codestream(np.zeros((8, 8), np.uint8)))
    data[8:16] = struct.pack(">2I", 30_000, 30_000)
    path = tmp_path / "a.j2k"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="decompression bomb"):
        probe(path)


@given(keep=st.floats(0.01, 0.999))
def test_a_cut_file_is_truncated(tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    for data in (codestream(levels), jp2(codestream(levels), icc_box(RGB_ICC))):
        path = tmp_path_factory.mktemp("cut") / "a.jp2"
        path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(ImageError):
            read_srgb(path)  # probes it first


@pytest.fixture
def tiled(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A bare codestream of 6 tiles."""
    path = tmp_path / "a.j2k"
    levels = rng.integers(0, 256, (100, 150, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path, no_jp2=True, tile_size=(64, 64), irreversible=False)
    np.testing.assert_array_equal(samples(path), levels)
    return path


def refusal(path: Path) -> ImageError:
    with pytest.raises(ImageError) as caught:
        samples(path)
    return caught.value


def test_a_cut_codestream_with_an_end_put_to_it_is_truncated(tiled: Path) -> None:
    """The codec would make the missing part grey."""
    data = tiled.read_bytes()
    tiled.write_bytes(data[: len(data) * 2 // 3])
    assert refusal(tiled).kind == "truncated"
    tiled.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    assert "is not whole" in str(refusal(tiled))


def test_a_missing_tile_is_no_grey_one(tiled: Path) -> None:
    data = tiled.read_bytes()
    start = data.index(b"\xff\x90\x00\x0a")
    (length,) = struct.unpack_from(">I", data, start + 6)
    tiled.write_bytes(data[:start] + data[start + length :])
    assert "5 of 6 tiles" in str(refusal(tiled))


def test_a_size_that_the_tiles_do_not_cover(tiled: Path) -> None:
    data = bytearray(tiled.read_bytes())
    struct.pack_into(">II", data, 8, 3000, 3000)
    tiled.write_bytes(data)
    assert "6 of 2209 tiles" in str(refusal(tiled))


@given(data=st.binary(max_size=300))
def test_noise_after_the_signature_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    for start in (jpeg2000.JP2, jpeg2000.CODESTREAM):
        path = tmp_path_factory.mktemp("noise") / "a.jp2"
        path.write_bytes(start + data)
        with pytest.raises(ImageError):
            probe(path)
