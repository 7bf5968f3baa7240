"""Header facts and limits, before any pixel is decoded.

A file is judged by its first bytes, never by its name, and opened only by the reader of the format that they announce:
libvips would otherwise take a ``.csv`` or a PDF for an image. What a header declares is believed only within limits,
because a few kilobytes can declare (and some readers then allocate) a hundred gigabytes.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyvips
import tifffile

from supir_batch import jpeg2000
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

ImageFormat = Literal["tiff", "png", "jpeg", "webp", "avif", "jpeg2000"]

_LOADERS: dict[ImageFormat, str] = {  # of libvips; JPEG 2000 has its own reader
    "tiff": "tiffload",
    "png": "pngload",
    "jpeg": "jpegload",
    "webp": "webpload",
    "avif": "heifload",
}

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
    claims none. ``reader`` is the library that could parse the header.
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
    reader: Literal["vips", "tifffile", "jpeg2000"]

    @property
    def raw_bytes(self) -> int:
        """Size of the decoded pixels in bytes."""
        return self.width * self.height * self.bands * self.bit_depth // 8


def probe(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header of ``path`` and check it against limits; decodes no pixel.

    Raises ImageError with kind ``empty``, ``not-an-image``, ``unsupported``, ``too-large`` or ``truncated``.
    """
    file_bytes = path.stat().st_size
    if file_bytes == 0:
        raise ImageError("empty", "the file is 0 bytes; upload it again or remove it from the inputs")
    with path.open("rb") as stream:
        head = stream.read(64)
    image_format = sniff(head)
    if image_format == "jpeg2000":
        header = _from_jpeg2000(jpeg2000.read_header(path))
        _check_limits(header, file_bytes, max_pixels)
        return header
    try:
        header = _from_vips(open_vips(path, image_format), path, image_format)
    except pyvips.Error as error:
        if image_format != "tiff":
            raise ImageError(
                "truncated", f"the {image_format} header cannot be read ({vips_message(error, path)}); get a whole copy"
            ) from error
        header = _from_tifffile(path, vips_message(error, path))
    _check_limits(header, file_bytes, max_pixels)
    return header


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
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "avif"
        raise ImageError(
            "unsupported", f"an ISO media file of brand {brand!r} (HEIC, video, ...) is not read; convert it to TIFF"
        )
    for magic, name in _KNOWN_UNREAD:
        if head.startswith(magic):
            raise ImageError("unsupported", f"{name} is not read; convert it to TIFF, PNG or JPEG")
    raise ImageError(
        "not-an-image",
        f"the file starts with {head[:16]!r}, which is no TIFF, PNG, JPEG, JPEG 2000, WebP or AVIF; "
        "check that it is what its name says",
    )


def open_vips(path: Path, image_format: ImageFormat) -> Any:
    """Open ``path`` (page 1) with the one loader of its format, lazily; any defect found while decoding is an error.

    ``fail_on="warning"`` because libvips answers some damage, and codecs it was built without, with zeros and a
    warning.
    """
    loader = getattr(pyvips.Image, _LOADERS[image_format])
    return loader(str(path), access="sequential", fail_on="warning")


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
    modes = {"cmyk": "cmyk", "lab": "lab", "labs": "lab", "labq": "lab"}
    has_alpha = bool(image.hasalpha())
    color_bands = image.bands - int(has_alpha)
    mode = modes.get(image.interpretation, "grey" if color_bands == 1 else "rgb")
    expected = {"grey": 1, "rgb": 3, "lab": 3, "cmyk": 4}[mode]
    if color_bands != expected:
        raise ImageError(
            "unsupported", f"{image.bands} channels ({image.interpretation}) are not read; convert to grey or RGB"
        )
    dpi = _png_dpi(path) if image_format == "png" else None
    if dpi is None and "resolution-unit" in fields and (image_format != "webp" or image.xres != 1.0):
        dpi = (round(image.xres * 25.4, 2), round(image.yres * 25.4, 2))
    return Header(
        format=image_format,
        width=image.width,
        height=image.height,
        bands=image.bands,
        bit_depth=depths[image.format],
        has_alpha=has_alpha,
        # libheif has applied the rotation of an AVIF already; its EXIF tag is information only
        orientation=_orientation(image.get("orientation")) if "orientation" in fields and image_format != "avif" else 1,
        mode=mode,
        pages=image.get("n-pages") if "n-pages" in fields else 1,
        dpi=dpi,
        reader="vips",
    )


def _from_tifffile(path: Path, vips_said: str) -> Header:
    """Read the header of page 1 of a TIFF that libvips cannot open; ``vips_said`` goes into the error."""
    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            tags = page.tags
            bits = page.bitspersample
            samples = page.samplesperpixel
            photometric = getattr(page.photometric, "name", str(page.photometric))
            alpha = len(page.extrasamples) > 0
            orientation = _orientation(tags.valueof("Orientation", default=1))
            unit = int(tags.valueof("ResolutionUnit", default=2))
            x, y = tags.valueof("XResolution"), tags.valueof("YResolution")
            width, height, pages = page.imagewidth, page.imagelength, len(tif.pages)
    # tifffile raises its own errors, but a damaged directory also surfaces as IndexError, struct.error and others
    except Exception as error:
        raise ImageError(
            "truncated",
            f"the TIFF header cannot be read (libvips: {vips_said}; tifffile: {error}); get a whole copy of the file",
        ) from error
    modes = {"MINISBLACK": "grey", "MINISWHITE": "grey", "RGB": "rgb", "YCBCR": "rgb", "SEPARATED": "cmyk"}
    if photometric not in modes or bits not in (8, 16):
        raise ImageError(
            "unsupported",
            f"a TIFF of type {photometric} with {bits} bits per sample is not read (libvips: {vips_said}); "
            "convert it to 8 or 16 bit grey or RGB",
        )
    scale = {2: 1.0, 3: 2.54}.get(unit)
    dpi = None
    if scale is not None and x is not None and y is not None and x[1] and y[1]:
        dpi = (round(x[0] / x[1] * scale, 2), round(y[0] / y[1] * scale, 2))
    return Header(
        format="tiff",
        width=width,
        height=height,
        bands=samples,
        bit_depth=8 if bits == 8 else 16,
        has_alpha=alpha,
        orientation=orientation,
        mode=modes[photometric],
        pages=pages,
        dpi=dpi,
        reader="tifffile",
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
    )


def _check_limits(header: Header, file_bytes: int, max_pixels: int) -> None:
    size = f"{header.width} x {header.height} pixels"
    if header.width < 1 or header.height < 1:
        raise ImageError("truncated", f"the header declares {size}; get a whole copy of the file")
    if header.width * header.height > max_pixels:
        raise ImageError(
            "too-large", f"the header declares {size}, above the limit of {max_pixels}; split the image or raise it"
        )
    raw = header.raw_bytes
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
