"""Pixels to the bytes of an image file, and the check that they can be read back.

Metadata (EXIF, IPTC, XMP) is put in afterwards by metadata.py; here go pixels, ICC profile and physical resolution.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyvips
import tifffile
from numpy.typing import NDArray

from supir_batch import jpeg2000, probe
from supir_batch.errors import ImageError
from supir_batch.types import Compression, FloatImage, OutputFormat, Settings

EXTENSIONS: dict[OutputFormat, str] = {
    "tiff": ".tif",
    "png": ".png",
    "jpeg": ".jpg",
    "webp": ".webp",
    "jpeg2000": ".jp2",
}

BIGTIFF_BYTES = 2_000_000_000
"""Raw size from which a TIFF is written as BigTIFF; compressed it may be smaller, but nobody knows before."""

_STRIP_ROWS = 64
_LIMITS: dict[OutputFormat, int] = {"jpeg": 65535, "webp": 16383}  # pixels per side
_EIGHT_BIT: tuple[OutputFormat, ...] = ("jpeg", "webp")
_JPEG_QUALITY = 95
_TILE = 256  # pixels
# as libvips writes them on the first page; tifffile's own "deflate" is an obsolete number for the same data
_TIFFFILE_COMPRESSIONS: dict[Compression, str] = {"deflate": "adobe_deflate", "lzw": "lzw", "none": "none"}
_KEEP_XMP, _KEEP_ICC = 2, 8  # libvips' VipsForeignKeep flags
_UNCLAIMED_DPI = 72.0  # written, then unmarked again, where the source claims no resolution


@dataclass(frozen=True)
class FileSpec:
    """What the file must be besides its pixels.

    ``dpi`` is (x, y) pixels per inch; None writes a file that claims no physical size. ``xmp`` is used by BigTIFF
    only, whose metadata nothing can add later. ``compression``, ``tiled`` and ``pyramid`` are a TIFF's; ``quality`` is
    1 to 100 for JPEG and WebP, PSNR in dB for JPEG 2000, None for the best there is.
    """

    format: OutputFormat
    bit_depth: Literal[8, 16]
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    bigtiff: bool = False
    xmp: bytes = b""
    compression: Compression = "deflate"
    tiled: bool = False
    pyramid: bool = False
    quality: int | None = None


def output_format(source_format: str, settings: Settings) -> OutputFormat:
    """Format of the output: as set, or the source's where that is one we write, else PNG (lossless)."""
    if settings.format != "source":
        return settings.format
    return next((known for known in EXTENSIONS if known == source_format), "png")


def output_depth(source_depth: Literal[8, 16], file_format: OutputFormat, settings: Settings) -> Literal[8, 16]:
    """Bits per sample of the output: as set or as the source's; a JPEG and a WebP always have 8."""
    return 8 if file_format in _EIGHT_BIT else settings.bit_depth or source_depth


def refuse_size(width: int, height: int, file_format: OutputFormat) -> None:
    """Raise ImageError ``unsupported`` if the format cannot hold an image of this size, in pixels."""
    if max(width, height) > _LIMITS.get(file_format, width + height):
        raise ImageError(
            "unsupported", f"a {file_format} cannot be {width} x {height} pixels; set output.format to tiff or png"
        )


def needs_bigtiff(width: int, height: int, bands: int, bit_depth: int) -> bool:
    """Whether a TIFF of this size must be a BigTIFF to be safe."""
    return width * height * bands * bit_depth // 8 >= BIGTIFF_BYTES


def quantize(pixels: NDArray[np.float32], bit_depth: Literal[8, 16]) -> NDArray[np.unsignedinteger[Any]]:
    """Round [0, 1] floats of any shape to the nearest of 2^bit_depth levels; what lies outside is clipped."""
    # float64: in float32 a 16-bit level plus 0.5 has no bits left to round correctly
    levels: NDArray[np.floating[Any]] = pixels * np.float32(255) if bit_depth == 8 else pixels * np.float64(65535)
    np.rint(np.clip(levels, 0.0, 2**bit_depth - 1, out=levels), out=levels)
    rounded: NDArray[np.unsignedinteger[Any]] = levels.astype(np.uint8 if bit_depth == 8 else np.uint16)
    return rounded


def encode(pixels: FloatImage, alpha: NDArray[np.float32], path: Path, spec: FileSpec) -> None:
    """Write [h, w, 1 or 3] in [0, 1], with alpha [h, w] or none (size 0), to ``path``: the same bytes every time.

    TIFF: deflate and LZW with horizontal predictor. JPEG: quality 95 unless told, color not subsampled, alpha left out.
    WebP has no grey: give it three bands. PNG, and unless told WebP and JPEG 2000, are lossless.
    Raises ImageError ``unsupported`` or ``encode-failed``.
    """
    encode_strips([np.dstack([pixels, alpha]) if alpha.size else pixels], pixels.shape[0], path, spec)


def encode_strips(strips: Iterable[FloatImage], height: int, path: Path, spec: FileSpec) -> None:
    """``encode`` for an image that comes from top to bottom, in strips [rows, w, bands, and one for alpha].

    Of an image of several strips little more than one is in memory: the samples wait in an uncompressed TIFF beside
    ``path``, from which libvips streams; a file of bare samples it would map into memory as a whole. Only the codec of
    JPEG 2000 takes the image whole.
    """
    kept = (_without_alpha(strip) if spec.format == "jpeg" else strip for strip in strips)
    levels = (quantize(strip, spec.bit_depth) for strip in kept)
    first = next(levels)
    if len(first) == height:
        _save(_interpreted(pyvips.Image.new_from_array(first), spec), path, spec)
        return
    waiting = path.with_name(f"{path.name}.samples")
    try:
        _store_samples(itertools.chain([first], levels), height, waiting)
        image = pyvips.Image.tiffload(str(waiting), access="sequential", fail_on="warning")
        _save(_interpreted(image, spec), path, spec)
    finally:
        waiting.unlink(missing_ok=True)


def _interpreted(image: pyvips.Image, spec: FileSpec) -> pyvips.Image:
    deep, grey = spec.bit_depth == 16, image.bands <= 2
    return image.copy(interpretation=("grey16" if deep else "b-w") if grey else ("rgb16" if deep else "srgb"))


def _without_alpha(strip: FloatImage) -> FloatImage:
    return strip[..., : 1 if strip.shape[2] <= 2 else 3]


def _store_samples(strips: Iterable[NDArray[np.unsignedinteger[Any]]], height: int, path: Path) -> None:
    """Write strips [rows, w, C] as an uncompressed TIFF of height rows."""
    rest = iter(strips)
    first = next(rest)
    width, channels = int(first.shape[1]), int(first.shape[2])
    evened = _evened(itertools.chain([first], rest))
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(
            evened if channels > 1 else (strip[..., 0] for strip in evened),
            shape=(height, width, channels) if channels > 1 else (height, width),
            dtype=first.dtype,
            photometric="minisblack" if channels <= 2 else "rgb",
            planarconfig="contig",
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            rowsperstrip=_STRIP_ROWS,
            metadata=None,
        )


def _evened(strips: Iterable[NDArray[np.unsignedinteger[Any]]]) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """The same rows in strips of ``_STRIP_ROWS``."""
    held: list[NDArray[np.unsignedinteger[Any]]] = []
    for strip in strips:
        held.append(strip)
        if sum(map(len, held)) >= _STRIP_ROWS:
            rows = np.concatenate(held)
            ready = len(rows) // _STRIP_ROWS * _STRIP_ROWS
            yield from np.split(rows[:ready], ready // _STRIP_ROWS)
            held = [rows[ready:]]
    if held and len(last := np.concatenate(held)):
        yield last


def _save(image: pyvips.Image, path: Path, spec: FileSpec) -> None:
    refuse_size(image.width, image.height, spec.format)
    if spec.format == "jpeg2000":
        path.write_bytes(jpeg2000.encode(image.numpy(), spec.icc, spec.dpi, spec.quality))
        return
    dpi = spec.dpi or (_UNCLAIMED_DPI, _UNCLAIMED_DPI)
    image = image.copy(xres=dpi[0] / 25.4, yres=dpi[1] / 25.4)
    if spec.icc is not None:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", spec.icc)
    if spec.bigtiff and spec.xmp:
        image.set_type(pyvips.GValue.blob_type, "xmp-data", spec.xmp)
    try:
        if spec.format == "tiff":
            image.tiffsave(
                str(path),
                compression=spec.compression,
                predictor="none" if spec.compression == "none" else "horizontal",
                tile=spec.tiled,
                tile_width=_TILE,
                tile_height=_TILE,
                resunit="inch",
                bigtiff=spec.bigtiff,
                keep=_KEEP_ICC | _KEEP_XMP if spec.bigtiff else _KEEP_ICC,
            )
        elif spec.format == "png":
            image.pngsave(str(path), compression=6, keep=_KEEP_ICC)
        elif spec.format == "webp":
            lossless = spec.quality is None
            image.webpsave(str(path), lossless=lossless, Q=spec.quality or 100, exact=lossless, keep=_KEEP_ICC)
        else:
            image.jpegsave(
                str(path), Q=spec.quality or _JPEG_QUALITY, subsample_mode="off", optimize_coding=True, keep=_KEEP_ICC
            )
    except pyvips.Error as error:
        raise ImageError("encode-failed", f"the {spec.format} cannot be written: {error}") from error
    if spec.format == "jpeg":
        _add_jfif(path, spec.dpi)
    elif spec.dpi is None and spec.format != "webp":
        _unclaim_resolution(path, spec.format)


def add_pyramid(path: Path, spec: FileSpec) -> None:
    """Append ever smaller copies, halved by means, to a finished TIFF as further pages, as image servers want them.

    After the metadata, because Exiv2 keeps the first page only.
    """
    whole = probe.open_vips(path, "tiff")
    width, height, factor = whole.width, whole.height, 2
    while max(width, height) > _TILE * factor // 2:
        small = probe.open_vips(path, "tiff").shrink(factor, factor)
        with tifffile.TiffWriter(path, append=True) as tif:
            tif.write(
                _tiles_of(small),
                shape=(small.height, small.width, small.bands)[: 2 if small.bands == 1 else 3],
                dtype=np.uint16 if spec.bit_depth == 16 else np.uint8,
                tile=(_TILE, _TILE),
                compression=_TIFFFILE_COMPRESSIONS[spec.compression],
                predictor=spec.compression != "none",
                photometric="minisblack" if small.bands <= 2 else "rgb",
                planarconfig="contig" if small.bands > 1 else None,
                extrasamples=["unassalpha"] if small.bands in (2, 4) else None,
                subfiletype=1,  # a reduced copy of another page
                software=False,
                metadata=None,
            )
        factor *= 2


def _tiles_of(image: Any) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """The tiles of an image row by row, full size also at its edges."""
    for top in range(0, image.height, _TILE):
        rows = image.crop(0, top, image.width, min(_TILE, image.height - top)).numpy()
        below, beside = _TILE - rows.shape[0], -image.width % _TILE
        padded = np.pad(rows, [(0, below), (0, beside), (0, 0)][: rows.ndim], mode="edge")
        yield from np.split(padded, padded.shape[1] // _TILE, axis=1)


def check_file(path: Path, width: int, height: int, spec: FileSpec, bands: int, has_alpha: bool) -> None:
    """Read ``path`` back completely and compare it with what was meant; ImageError ``bad-output`` if it differs.

    ``bands`` counts color bands. Nothing else tells a full disk or a broken codec from a good file.
    """
    if spec.format == "jpeg2000":
        _check_jpeg2000(path, width, height, spec, bands + int(has_alpha))
        return
    try:
        image = probe.open_vips(path, spec.format)
        image.avg()  # decodes every pixel, in constant memory
        icc = image.get("icc-profile-data") if "icc-profile-data" in image.get_fields() else None
    except pyvips.Error as error:
        raise ImageError("bad-output", f"the written file cannot be read back: {error}") from error
    seen = (image.width, image.height, image.bands, image.format)
    alpha = 1 if has_alpha and spec.format != "jpeg" else 0
    meant = (width, height, bands + alpha, "uchar" if spec.bit_depth == 8 else "ushort")
    if seen != meant:
        raise ImageError("bad-output", f"the written file has (width, height, bands, type) {seen} instead of {meant}")
    if icc != spec.icc:
        raise ImageError("bad-output", "the written file does not hold the source's ICC profile byte for byte")


def _check_jpeg2000(path: Path, width: int, height: int, spec: FileSpec, channels: int) -> None:
    try:
        found = jpeg2000.read_header(path)
        jpeg2000.read_samples(path, found)
    except ImageError as error:
        raise ImageError("bad-output", f"the written file cannot be read back: {error}") from error
    seen = (found.width, found.height, found.components, found.bits, found.icc == spec.icc)
    if seen != (width, height, channels, spec.bit_depth, True):
        raise ImageError("bad-output", f"the written file has {seen} instead of {(width, height, channels)}")


def _add_jfif(path: Path, dpi: tuple[float, float] | None) -> None:
    """Add the JFIF header with the resolution; libvips leaves it out whenever it is told to write no metadata."""
    data = path.read_bytes()
    unit, x, y = (1, *dpi) if dpi is not None else (0, 1.0, 1.0)
    x_density, y_density = (min(65535, max(1, round(density))) for density in (x, y))
    header = b"JFIF\x00" + struct.pack(">HBHHBB", 0x0102, unit, x_density, y_density, 0, 0)
    path.write_bytes(data[:2] + b"\xff\xe0" + struct.pack(">H", len(header) + 2) + header + data[2:])


def _unclaim_resolution(path: Path, file_format: OutputFormat) -> None:
    """Remove the physical resolution that libvips always writes; inventing one would change what prints measure."""
    if file_format == "tiff":
        with tifffile.TiffFile(path, mode="r+") as tif:
            tif.pages.first.tags["ResolutionUnit"].overwrite(1)  # 1: no absolute unit
        return
    with path.open("r+b") as file:
        data = file.read()
        at = data.index(b"pHYs") - 4
        (length,) = struct.unpack_from(">I", data, at)
        file.seek(at)
        file.write(data[at + 12 + length :])
        file.truncate()
