from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from supir_batch import readers
from supir_batch.errors import ImageError
from supir_batch.probe import probe
from supir_batch.tiff import read_header, read_samples


def _write(path: Path, samples: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, samples, metadata=None, **options)
    return path


def _refusal(path: Path, page: int = 1) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_header(path, page)
    return caught.value


def _next_page_at(data: bytes, start: int) -> int:
    (count,) = struct.unpack_from("<H", data, start)
    return start + 2 + 12 * count


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pages_are_counted_and_each_has_its_header(tmp_path: Path, big: bool, order: str) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as tif:
        for width in (10, 20, 30):
            tif.write(np.full((5, width), width, np.uint8), metadata=None)
    assert [read_header(path, page).width for page in (1, 2, 3)] == [10, 20, 30]
    assert read_header(path).pages == 3
    levels, _, _ = read_samples(path, read_header(path, 2))
    assert levels.shape == (5, 20, 1)
    assert (levels == 20).all()
    assert _refusal(path, 4).kind == "no-such-page"


def test_pages_that_lead_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, byteorder="<") as tif:
        for _ in range(2):
            tif.write(np.zeros((5, 5), np.uint8), metadata=None)
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (second,) = struct.unpack_from("<I", data, _next_page_at(data, first))
    struct.pack_into("<I", data, _next_page_at(data, second), first)
    path.write_bytes(data)
    assert _refusal(path).kind == "damaged"


@pytest.mark.parametrize("offset", [10**6, 2**32 - 1])
def test_a_page_behind_the_end_of_the_file(tmp_path: Path, offset: int) -> None:
    path = _write(tmp_path / "a.tif", np.zeros((5, 5), np.uint8), byteorder="<")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, _next_page_at(data, struct.unpack_from("<I", data, 4)[0]), offset)
    path.write_bytes(data)
    assert _refusal(path).kind == "truncated"


def test_a_bigtiff_that_claims_more_tags_than_can_be(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 2**64 - 1))
    assert _refusal(path).kind == "truncated"


def test_no_page_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0\0\0\0\0")
    assert _refusal(path).kind == "truncated"


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        (np.zeros((4, 4), np.int16), {}),
        (np.zeros((4, 4), np.uint32), {}),
        (np.zeros((4, 4), np.complex64), {}),
        (np.zeros((4, 4, 5), np.uint8), {"photometric": "rgb", "planarconfig": "contig", "extrasamples": [2, 0]}),
        (np.zeros((4, 4, 3), np.uint8), {"photometric": "itulab"}),
        (np.zeros((4, 4, 3), np.uint8), {"photometric": "ycbcr"}),  # libvips would take it for RGB
        (np.zeros((4, 4, 3), np.float32), {"photometric": "cielab"}),
        (np.zeros((4, 4), np.uint8), {"compression": "lerc"}),  # these two may declare any size inside
        (np.zeros((4, 4), np.uint8), {"compression": "jpeg2000"}),
        (np.zeros((4, 4, 4), np.uint8), {"photometric": "separated", "extratags": [(332, 3, 1, 2, True)]}),  # InkSet
    ],
)
def test_samples_of_unknown_meaning_are_refused(tmp_path: Path, samples: np.ndarray, options: dict[str, Any]) -> None:
    assert _refusal(_write(tmp_path / "a.tif", samples, **options)).kind == "unsupported"


def test_a_smaller_version_of_another_page_is_known_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(np.zeros((5, 5), np.uint8), subfiletype=1, metadata=None)
        tif.write(np.zeros((10, 10), np.uint8), metadata=None)
    assert read_header(path).reduced
    assert not read_header(path, 2).reduced


def test_padding_of_tiles_counts_as_memory(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tif", np.zeros((20, 20, 3), np.uint16), photometric="rgb", tile=(16, 32))
    assert read_header(path).raw_bytes == 32 * 32 * 3 * 2


@pytest.mark.parametrize("mode", ["cielab", "icclab"])
@pytest.mark.parametrize("depth", [8, 16])
def test_lab_becomes_srgb(tmp_path: Path, mode: str, depth: int) -> None:
    """Against published values: sRGB red and blue in CIELAB under D50 (adapted by Bradford), grey, black, white."""
    known = {
        (54.29, 80.80, 69.89): (255, 0, 0),
        (29.57, 68.30, -112.03): (0, 0, 255),
        (53.59, 0.0, 0.0): (128, 128, 128),
        (0.0, 0.0, 0.0): (0, 0, 0),
        (100.0, 0.0, 0.0): (255, 255, 255),
    }
    lab = np.array(list(known))
    unit, kind = (1, np.uint8) if depth == 8 else (256, np.uint16)
    scale = (255 if depth == 8 else 65280 if mode == "icclab" else 65535) / 100
    chroma = np.rint(lab[:, 1:] * unit).astype(np.int64) + (128 * unit if mode == "icclab" else 0)
    stored = np.concatenate([np.rint(lab[:, :1] * scale), chroma % (256 * unit)], axis=1).astype(kind)
    path = _write(tmp_path / "a.tif", stored[None], photometric=mode)
    levels, icc, _ = read_samples(path, read_header(path))
    assert icc is None
    assert levels.dtype == kind
    # eight bits of L*, a* and b* say no more about blue
    np.testing.assert_allclose(
        levels[0] / (1 if depth == 8 else 257), list(known.values()), atol=4 if depth == 8 else 1
    )


@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_white_is_zero(tmp_path: Path, bits: int) -> None:
    samples = (np.arange(64).reshape(8, 8) % 2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    stored = samples.astype(bool) if bits == 1 else samples
    path = _write(tmp_path / "a.tif", stored, photometric="miniswhite", bitspersample=bits)
    levels, _, _ = read_samples(path, read_header(path))
    whole = 255 if bits <= 8 else 65535
    np.testing.assert_array_equal(np.rint((1 - levels[..., 0] / whole) * (2**bits - 1)), samples)


def test_strips_that_claim_more_bytes_than_the_file_has(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), compression="zstd")
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags["StripByteCounts"].overwrite(2**31)
    with pytest.raises(ImageError, match="beyond the end") as caught:
        read_samples(path, read_header(path))
    assert caught.value.kind == "truncated"


@pytest.mark.parametrize("compression", [None, "deflate", "zstd"])
@pytest.mark.parametrize("missing", ["offset", "bytes", "part"])
@pytest.mark.parametrize("layout", [{"tile": (16, 16)}, {"rowsperstrip": 16}, {"rowsperstrip": 40}])
@pytest.mark.parametrize("planes", [False, True])
def test_a_part_that_is_not_there_is_damage_and_never_black(
    tmp_path: Path,
    rng: np.random.Generator,
    compression: str | None,
    missing: str,
    layout: dict[str, Any],
    planes: bool,
) -> None:
    samples = rng.integers(1, 255, (3, 40, 48) if planes else (40, 48, 3), np.uint8)
    path = _write(tmp_path / "a.tif", samples, photometric="rgb", compression=compression,
                  planarconfig="separate" if planes else "contig", **layout)  # fmt: skip
    levels, _, _ = read_samples(path, read_header(path))
    np.testing.assert_array_equal(levels, np.moveaxis(samples, 0, 2) if planes else samples)
    kind = "Tile" if "tile" in layout else "Strip"
    with tifffile.TiffFile(path, mode="r+") as tif:
        tags = tif.pages.first.tags
        offsets, counts = tags[f"{kind}Offsets"], tags[f"{kind}ByteCounts"]
        if missing == "part" and len(offsets.value) == 1:
            return  # a page must have one
        for tag in (offsets,) if missing == "offset" else (counts,) if missing == "bytes" else (offsets, counts):
            tag.overwrite(tag.value[:-1] if missing == "part" else (*tag.value[:-1], 0))
    with pytest.raises(ImageError) as caught:
        read_samples(path, read_header(path))
    assert caught.value.kind == "damaged"
    with pytest.raises(ImageError):  # by libvips first
        readers.read(path, probe(path))


@pytest.mark.parametrize("layout", [{}, {"tile": (32, 32)}, {"rowsperstrip": 24}])
def test_jpeg_parts_by_the_second_reader(tmp_path: Path, layout: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    _write(path, np.full((70, 90, 3), 99, np.uint8), photometric="rgb", compression="jpeg", **layout)
    levels, _, _ = read_samples(path, read_header(path))
    assert levels.shape == (70, 90, 3)
    assert np.abs(levels.astype(int) - 99).max() <= 4


@pytest.mark.parametrize("claimed", [(20_000, 20_000), (16, 8), (8, 16)])
def test_a_jpeg_part_that_is_not_what_the_tags_say(tmp_path: Path, claimed: tuple[int, int]) -> None:
    """The decoder would make room for 1.2 GB, or leave out what is missing."""
    path = tmp_path / "a.tif"
    _write(path, np.zeros((16, 16, 3), np.uint8), photometric="rgb", compression="jpeg", tile=(16, 16))
    data = bytearray(path.read_bytes())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, *claimed)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="JPEG parts") as caught:
        read_samples(path, read_header(path))
    assert caught.value.kind == "damaged"
