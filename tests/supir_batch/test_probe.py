from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from supir_batch.errors import ImageError
from supir_batch.probe import probe


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(bytes(100)))


def _kind(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        probe(path)
    return caught.value.kind


def test_facts_of_a_16_bit_grey_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((40, 50), np.uint16), resolution=(300, 300), resolutionunit="INCH", metadata=None)
    header = probe(path)
    assert (header.format, header.width, header.height, header.bands, header.bit_depth) == ("tiff", 50, 40, 1, 16)
    assert header.mode == "grey"
    assert header.dpi == (300.0, 300.0)
    assert not header.has_alpha


@pytest.mark.parametrize(("name", "dpi"), [("a.png", (300.0, 300.0)), ("a.jpg", (300.0, 300.0)), ("b.png", None)])
def test_a_resolution_is_only_what_the_file_claims(tmp_path: Path, name: str, dpi: tuple[float, float] | None) -> None:
    path = tmp_path / name
    Image.new("RGB", (20, 20)).save(path, **({} if dpi is None else {"dpi": dpi}))
    assert probe(path).dpi == dpi


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really-a-png.jpg"
    Image.new("L", (3, 2)).save(path, "PNG")
    assert probe(path).format == "png"


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch()
    assert _kind(path) == "empty"


def test_a_text_file_named_jpg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("Dear archive, please find attached")
    with pytest.raises(ImageError, match="Dear archive") as caught:
        probe(path)
    assert caught.value.kind == "not-an-image"


def test_a_table_of_numbers_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"  # libvips would load it
    path.write_text("1,2,3\n4,5,6\n")
    assert _kind(path) == "not-an-image"


@pytest.mark.parametrize("start", [b"GIF89a", b"%PDF-1.7", b"\x00\x00\x00\x0cJXL \r\n\x87\n", b"\0\0\0\x18ftypisom"])
def test_known_formats_that_are_not_read_are_named(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(start + bytes(64))
    assert _kind(path) == "unsupported"


def test_half_a_jpeg_header(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(buffer.getvalue()[:60])
    assert _kind(path) == "truncated"


def test_more_pixels_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png_that_claims(40_000, 40_000))
    with pytest.raises(ImageError, match="40000 x 40000") as caught:
        probe(path)
    assert caught.value.kind == "too-large"
    small = tmp_path / "b.png"
    Image.new("L", (11, 10)).save(small)
    assert probe(small).width == 11
    with pytest.raises(ImageError, match=r"limit of 100; split the image$"):  # no setting raises it
        probe(small, max_pixels=100)


def test_a_small_file_that_declares_a_huge_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png_that_claims(20_000, 20_000))  # below the limit on pixels, 1.2 GB decoded
    with pytest.raises(ImageError, match="decompression bomb") as caught:
        probe(path)
    assert caught.value.kind == "too-large"


def test_a_png_of_900_megapixels_in_less_than_a_megabyte(tmp_path: Path) -> None:
    """A sound file: any decoder would answer it with 900 MB."""
    side, rows = 30_000, 1_000
    deflate = zlib.compressobj(9)
    head = deflate.compress(b"") + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes((side + 1) * rows)) + deflate.flush(zlib.Z_FULL_FLUSH)
    again = deflate.compress(bytes((side + 1) * rows)) + deflate.flush(zlib.Z_FULL_FLUSH)
    rest = deflate.flush()[:-4]  # the checksum of 900 MB of zeros is known: 1, and their number in the upper half
    check = struct.pack(">I", ((side + 1) * side % 65521) << 16 | 1)
    data = head + block + again * (side // rows - 1) + rest + check
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")
    )
    assert path.stat().st_size < 2**20
    inflate = zlib.decompressobj()
    assert len(inflate.decompress(data, 1000)) == 1000
    with pytest.raises(ImageError, match="30000 x 30000") as caught:
        probe(path)
    assert caught.value.kind == "too-large"


@pytest.mark.parametrize(
    ("tag", "value"),
    [("ImageWidth", 60_000_000), ("ImageLength", 60_000_000), ("TileWidth", 2**30), ("TileLength", 2**30)],
)
def test_a_kilobyte_of_tiff_that_claims_100_gigabytes(tmp_path: Path, tag: str, value: int) -> None:
    path = tmp_path / "a.tif"
    options = {"tile": (16, 16)} if tag.startswith("Tile") else {}
    tifffile.imwrite(path, np.zeros((240, 16, 3), np.uint16)[: 16 if options else 240], photometric="rgb",
                     compression="deflate", metadata=None, **options)  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tif:
        found = tif.pages.first.tags[tag]
        tif.filehandle.seek(found.offset + 2)
        tif.filehandle.write(struct.pack("<HII", 4, 1, value))  # one LONG, in place
    assert path.stat().st_size < 2000
    assert _kind(path) == "too-large"


def test_tiles_far_larger_than_their_image(tmp_path: Path) -> None:
    """What the file's size alone would allow."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), tile=(16, 16), metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tif:
        for name in ("TileWidth", "TileLength"):
            tif.pages.first.tags[name].overwrite(32_768)
    path.write_bytes(path.read_bytes() + bytes(2 * 2**20))
    with pytest.raises(ImageError, match="tiles take 1073741824 bytes") as caught:
        probe(path)
    assert caught.value.kind == "too-large"


def test_a_header_whose_error_quotes_bytes_that_are_no_text(tmp_path: Path) -> None:
    """pyvips cannot say such an error, and would fail to say any later one."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (16, 16)).save(buffer, "AVIF", exif=exif)
    path, other = tmp_path / "a.avif", tmp_path / "b.jpg"
    path.write_bytes(buffer.getvalue().replace(b"irot", b"\xffrot"))
    other.write_bytes(b"\xff\xd8\xff\xe0")
    assert _kind(path) == "truncated"
    with pytest.raises(ImageError, match=r"premature|Jpeg|JPEG"):
        probe(other)


def test_a_lying_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint16), metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags["ImageWidth"].overwrite(60_000)
        tif.pages.first.tags["ImageLength"].overwrite(16_000)
    assert _kind(path) == "too-large"
