"""Header facts and limits, before any pixel is decoded.

A file is judged by its first bytes, never by its name, and opened only by the reader of the format that they announce:
libvips would otherwise take a ``.csv`` or a PDF for an image. What a header declares is believed only within limits,
because a few kilobytes can declare (and some readers then allocate) a hundred gigabytes.
"""

from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyvips

from supir_batch import jpeg2000, tiff
from supir_batch.errors import ImageError

# libvips keeps the results of past operations by file name: a path that was rewritten would return its OLD pixels.
pyvips.cache_set_max(0)
pyvips.cache_set_max_mem(0)

MAX_PIXELS = 1_000_000_000
"""Default limit on width x height that a header may declare."""

MAX_EXPANSION = 600
"""Most raw bytes that one byte of a file above ``EXPANSION_FREE_BYTES`` may declare.

Photographs compress 2 to 100 times; only a blank page or a bomb reaches the 1,000 times that deflate can do.
"""

EXPANSION_FREE_BYTES = 64 * 2**20
"""Raw size below which the ratio is not checked: such an image cannot exhaust memory, and may be a flat test chart."""

ImageFormat = Literal["tiff", "png", "jpeg", "webp", "avif", "heic", "jpeg2000"]

_LOADERS: dict[ImageFormat, str] = {  # of libvips; JPEG 2000 has its own reader
    "tiff": "tiffload",
    "png": "pngload",
    "jpeg": "jpegload",
    "webp": "webpload",
    "avif": "heifload",
    "heic": "heifload",  # header only: the package has no HEVC decoder
}

_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"})
_GENERIC_BRANDS = frozenset({b"mif1", b"msf1"})  # what codes the pixels stands among the compatible brands

_MAX_PADDING = 32  # bytes that tiles may take for each sample of the image, of 8 bytes at most

# first bytes of formats that are images or documents, but that this version does not read
_KNOWN_UNREAD: tuple[tuple[bytes, str], ...] = (
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL codestream"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"FUJIFILMCCD-RAW", "Fujifilm raw"),
)


@dataclass(frozen=True)
class Header:
    """What a file's header declares; sizes are as stored, before ``orientation`` is applied.

    ``bands`` counts all channels, alpha included. ``dpi`` is (x, y) in pixels per inch as stored, None where the file
    claims none. ``reader`` is the library that reads the pixels first. ``bit_depth`` is that of the samples as they are
    read, ``stored_bits`` that of the samples in the file: 1 to 16, or 16 to 64 where ``floats``. ``raw_bytes`` is the
    memory of the samples as stored, padding of tiles included. ``reduced``: the page calls itself a smaller version of
    another one.
    """

    format: ImageFormat
    width: int
    height: int
    bands: int
    bit_depth: Literal[8, 16]
    has_alpha: bool
    orientation: int
    mode: str  # "grey", "rgb", "cmyk" or "lab"
    pages: int
    dpi: tuple[float, float] | None
    reader: Literal["vips", "tifffile", "jpeg2000", "heif"]
    stored_bits: int
    raw_bytes: int
    page: int = 1
    palette: bool = False
    floats: bool = False
    reduced: bool = False


def probe(path: Path, page: int = 1, max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header of ``path`` (of ``page`` of a TIFF) and check it against limits; decodes no pixel.

    Raises ImageError with kind ``too-large``, and as ``read_header`` does.
    """
    header = read_header(path, page)
    _check_limits(header, path.stat().st_size, max_pixels)
    return header


def read_header(path: Path, page: int = 1) -> Header:
    """What the header of ``path`` declares, whatever its size: to decode such a file, be sure of its bytes.

    A blank output may be packed more tightly than any source may be. Raises ImageError with kind ``empty``,
    ``not-an-image``, ``unsupported``, ``no-such-page``, ``truncated`` or ``damaged``.
    """
    if path.stat().st_size == 0:
        raise ImageError("empty", "the file is 0 bytes; upload it again or remove it from the inputs")
    with path.open("rb") as stream:
        head = stream.read(64)
    image_format = sniff(head)
    if image_format == "jpeg2000":
        header = _from_jpeg2000(jpeg2000.read_header(path))
    elif image_format == "tiff":
        header = _from_tiff(tiff.read_header(path, page))
    else:
        if image_format == "heic" and not can_read_heic():
            raise ImageError(
                "unsupported", "HEIC needs pillow-heif: pip install 'supir-batch[heic]', or convert it to TIFF"
            )
        try:
            header = _from_vips(open_vips(path, image_format), path, image_format)
        except pyvips.Error as error:
            raise ImageError(
                "truncated", f"the {image_format} header cannot be read ({vips_message(error, path)}); get a whole copy"
            ) from error
    if page > 1 and image_format != "tiff":
        raise ImageError("no-such-page", f"page {page} was asked for, and only a TIFF has several; correct the number")
    if header.width < 1 or header.height < 1:
        raise ImageError(
            "truncated", f"the header declares {header.width} x {header.height} pixels; get a whole copy of the file"
        )
    return header


def can_read_heic() -> bool:
    """Whether the optional decoder of HEIC is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def sniff(head: bytes) -> ImageFormat:
    """Name the format that a file's first bytes (at least 16, fewer if the file ends) announce.

    Raises ImageError ``unsupported`` for known formats that are not read, ``not-an-image`` for everything else.
    """
    if head[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return "tiff"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((jpeg2000.JP2, jpeg2000.CODESTREAM)):
        return "jpeg2000"
    if head[4:8] == b"ftyp":
        return _sniff_iso(head)
    for magic, name in _KNOWN_UNREAD:
        if head.startswith(magic):
            raise ImageError("unsupported", f"{name} is not read; convert it to TIFF, PNG or JPEG")
    raise ImageError(
        "not-an-image",
        f"the file starts with {head[:16]!r}, which is no TIFF, PNG, JPEG, JPEG 2000, WebP, AVIF or HEIC; "
        "check that it is what its name says",
    )


def _sniff_iso(head: bytes) -> ImageFormat:
    """Name the format of an ISO media file by its brands; of a generic one by the first compatible brands."""
    length = int.from_bytes(head[:4], "big")
    brands = {head[8:12]}
    if brands <= _GENERIC_BRANDS:
        brands = {head[at : at + 4] for at in range(16, min(length, len(head)), 4)}
    if brands & _AVIF_BRANDS:
        return "avif"
    if brands & _HEIC_BRANDS:
        return "heic"
    raise ImageError(
        "unsupported", f"an ISO media file of brand {head[8:12]!r} (video, ...) is not read; convert it to TIFF"
    )


def open_vips(path: Path, image_format: ImageFormat, page: int = 1) -> Any:
    """Open ``path`` with the one loader of its format, lazily; any defect found while decoding is an error.

    ``page`` counts from 1, for TIFFs.

    ``fail_on="warning"`` because libvips answers some damage, and codecs it was built without, with zeros and a
    warning.
    """
    loader = getattr(pyvips.Image, _LOADERS[image_format])
    chosen = {"page": page - 1} if page > 1 else {}
    with vips_errors():
        return loader(str(path), access="sequential", fail_on="warning", **chosen)


@contextmanager
def vips_errors() -> Iterator[None]:
    """Every failure of libvips as a pyvips.Error, also where its message quotes bytes that are no text.

    pyvips then raises UnicodeDecodeError, and keeps the message, so that every later failure of the process would end
    the same way.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        pyvips.vips_lib.vips_error_clear()
        raise pyvips.Error("libvips failed", "its message is no text") from error


def vips_message(error: pyvips.Error, path: Path) -> str:
    """First distinct lines of a libvips error as one line, without the local path."""
    lines = str(error).replace(str(path), "file").replace(path.name, "file").splitlines()
    told = dict.fromkeys(line.strip() for line in lines[1:] if line.strip())  # the first names only the operation
    return "; ".join(list(told)[:3]) or str(error).strip()


def _from_vips(image: Any, path: Path, image_format: ImageFormat) -> Header:
    fields = set(image.get_fields())
    depths: dict[str, Literal[8, 16]] = {"uchar": 8, "ushort": 16}
    if image.format not in depths:
        raise ImageError(
            "unsupported", f"samples of type {image.format!r} are not read; convert to 8 or 16 bit unsigned integers"
        )
    has_alpha = bool(image.hasalpha())
    color_bands = image.bands - int(has_alpha)
    mode = "cmyk" if image.interpretation == "cmyk" else "grey" if color_bands == 1 else "rgb"
    expected = {"grey": 1, "rgb": 3, "cmyk": 4}[mode]
    if color_bands != expected:
        raise ImageError(
            "unsupported", f"{image.bands} channels ({image.interpretation}) are not read; convert to grey or RGB"
        )
    dpi = _png_dpi(path) if image_format == "png" else None
    if dpi is None and "resolution-unit" in fields and (image_format != "webp" or image.xres != 1.0):
        dpi = (round(image.xres * 25.4, 2), round(image.yres * 25.4, 2))
    depth = depths[image.format]
    # libheif has applied the rotation already; the EXIF tag of such a file is information only
    upright = image_format in ("avif", "heic")
    return Header(
        format=image_format,
        width=image.width,
        height=image.height,
        bands=image.bands,
        bit_depth=depth,
        has_alpha=has_alpha,
        orientation=_orientation(image.get("orientation")) if "orientation" in fields and not upright else 1,
        mode=mode,
        pages=image.get("n-pages") if "n-pages" in fields else 1,
        dpi=dpi,
        reader="heif" if image_format == "heic" else "vips",
        stored_bits=image.get("bits-per-sample") if "bits-per-sample" in fields else depth,
        raw_bytes=image.width * image.height * image.bands * depth // 8,
        palette="palette" in fields,
    )


def _from_tiff(found: tiff.Tiff) -> Header:
    return Header(
        format="tiff",
        width=found.width,
        height=found.height,
        bands=found.bands,
        bit_depth=8 if found.bits <= 8 else 16,
        has_alpha=found.has_alpha,
        orientation=_orientation(found.orientation),
        mode=found.mode,
        pages=found.pages,
        dpi=found.dpi,
        reader="vips" if found.vips else "tifffile",
        stored_bits=found.bits,
        raw_bytes=found.raw_bytes,
        page=found.page,
        palette=found.palette,
        floats=found.floats,
        reduced=found.reduced,
    )


def _from_jpeg2000(found: jpeg2000.Jpeg2000) -> Header:
    return Header(
        format="jpeg2000",
        width=found.width,
        height=found.height,
        bands=found.components,
        bit_depth=8 if found.bits <= 8 else 16,
        has_alpha=found.has_alpha,
        orientation=1,  # the format has none
        mode="grey" if found.components <= 2 else "rgb",
        pages=1,
        dpi=found.dpi,
        reader="jpeg2000",
        stored_bits=found.bits,
        raw_bytes=found.width * found.height * found.components * (1 if found.bits <= 8 else 2),
    )


def _check_limits(header: Header, file_bytes: int, max_pixels: int) -> None:
    size = f"{header.width} x {header.height} pixels"
    if header.width * header.height > max_pixels:
        raise ImageError("too-large", f"the header declares {size}, above the limit of {max_pixels}; split the image")
    raw = header.raw_bytes
    if raw > EXPANSION_FREE_BYTES and raw > _MAX_PADDING * header.width * header.height * header.bands:
        raise ImageError(
            "too-large", f"its tiles take {raw} bytes for an image of {size}; get a sound copy, or save it anew"
        )
    if raw > EXPANSION_FREE_BYTES and raw > MAX_EXPANSION * file_bytes:
        raise ImageError(
            "too-large",
            f"the header declares {size} ({raw} bytes decoded), which a file of {file_bytes} bytes cannot honestly "
            "hold; it is blank, damaged or a decompression bomb: remove it, or save it anew if it is sound",
        )


def _orientation(value: object) -> int:
    """EXIF orientation 1 to 8; anything else counts as 1, as readers agree."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_dpi(path: Path) -> tuple[float, float] | None:
    """Read the pHYs chunk; libvips cannot say whether a PNG has one."""
    with path.open("rb") as stream:
        stream.seek(8)
        while len(start := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind in (b"IDAT", b"IEND"):
                return None
            if kind == b"pHYs" and length == 9:
                body, check = stream.read(9), stream.read(4)
                x, y, unit = struct.unpack(">IIB", body)
                if unit != 1 or x == 0 or y == 0 or zlib.crc32(kind + body) != int.from_bytes(check, "big"):
                    return None
                return (round(x * 0.0254, 2), round(y * 0.0254, 2))
            stream.seek(length + 4, 1)
    return None
