"""TIFF: what the tags of a page say, and its samples by the strict second reader.

libvips reads most TIFFs, but takes kinds of samples that it does not know for RGB, so the tags decide what a page is.
tifffile with imagecodecs reads what libvips cannot: compressions it was built without, floats, 10 to 14 bits, CIELAB.

Sources: TIFF 6.0 (sections 5 on palettes, 18 on alpha, 23 on CIELAB), Adobe's Photoshop TIFF notes (ICCLab).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from supir_batch.errors import ImageError
from supir_batch.levels import Levels, from_floats, spread, unassociate

_MAX_PAGES = 65_535
_STRIP_PIXELS = 2**22  # per step of a conversion that needs temporary copies

# PhotometricInterpretation
_WHITE_IS_ZERO, _PALETTE, _SEPARATED, _YCBCR, _CIELAB, _ICCLAB = 0, 3, 5, 6, 8, 9
_MODES: dict[int, Literal["grey", "rgb", "cmyk", "lab"]] = {
    _WHITE_IS_ZERO: "grey",
    1: "grey",
    2: "rgb",
    _PALETTE: "rgb",
    _SEPARATED: "cmyk",
    _YCBCR: "rgb",
    _CIELAB: "lab",
    _ICCLAB: "lab",
}
# Compression: none, CCITT, LZW, JPEG (old and new), deflate, PackBits, LZMA, ZSTD. Their decoders write no more than
# the tags announce; the others (JPEG 2000, LERC, WebP, ...) make room for what a header of their own says.
_JPEG = frozenset({6, 7})  # turns YCbCr into RGB
_COMPRESSIONS = _JPEG | {1, 2, 3, 4, 5, 8, 32946, 32773, 34925, 34926, 50000}
_UNSIGNED, _FLOAT, _UNDEFINED = 1, 3, 4  # SampleFormat
_ASSOCIATED = 1  # ExtraSamples: colors are multiplied by alpha
_CMYK_INKS = 1  # InkSet
_REDUCED = 1  # bit of NewSubfileType


@dataclass(frozen=True)
class Tiff:
    """What the tags of a page declare, checked: ``read_samples`` knows how to read it.

    ``bits`` of a stored sample; ``bands`` counts channels, alpha included, after a palette is expanded. ``reduced``:
    the page calls itself a smaller version of another. ``raw_bytes`` is the memory of its strips or tiles, padding
    included. ``orientation`` as stored, any number. ``vips`` says whether libvips interprets such pixels rightly.
    """

    width: int
    height: int
    bands: int
    bits: int
    mode: Literal["grey", "rgb", "cmyk", "lab"]
    has_alpha: bool
    palette: bool
    floats: bool
    orientation: object
    dpi: tuple[float, float] | None
    page: int
    pages: int
    reduced: bool
    raw_bytes: int
    vips: bool


def read_header(path: Path, page: int = 1) -> Tiff:
    """Read the tags of ``page``; decodes nothing.

    Raises ImageError ``truncated``, ``damaged``, ``unsupported`` or ``no-such-page``.
    """
    pages = _count_pages(path)
    if page > pages:
        raise ImageError("no-such-page", f"page {page} was asked for, and it has {pages}; correct the number")
    try:
        with tifffile.TiffFile(path) as tif:
            return _header(tif.pages[page - 1], page, pages)
    except ImageError:
        raise
    # tifffile raises its own errors, but a damaged directory also surfaces as IndexError, struct.error and others
    except Exception as error:
        raise ImageError(
            "truncated", f"the TIFF header cannot be read ({error}); get a whole copy of the file"
        ) from error


def read_samples(path: Path, header: Tiff) -> tuple[Levels, bytes | None, tuple[str, ...]]:
    """Decode a page: [h, w, bands] over the whole range of their type, ICC profile, and notes.

    CIELAB becomes sRGB; CMYK stays. Raises ImageError, and whatever tifffile and the codecs raise on damaged data.
    """
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[header.page - 1]
        _check_segments(page, tif.filehandle)
        samples = page.asarray()
        if page.axes == "SYX":
            samples = np.moveaxis(samples, 0, 2)
        elif page.axes == "YX":
            samples = samples[..., None]
        elif page.axes != "YXS":
            raise ImageError("unsupported", f"a TIFF with axes {page.axes} is not read; convert it to grey or RGB")
        photometric, color_map = int(page.photometric), page.colormap
        associated = header.has_alpha and tuple(page.extrasamples)[:1] == (_ASSOCIATED,)
        found = page.tags.valueof("InterColorProfile")
    icc = bytes(found) if found else None

    if header.palette:
        return _expanded(samples, color_map, header), icc, ()
    if header.mode == "lab":
        return _lab_to_srgb(samples, photometric), None, ()
    notes: tuple[str, ...] = ()
    if header.floats:
        levels, low, high = from_floats(samples)
        meaning = "" if icc else "; without an ICC profile they were taken for sRGB"
        notes = (f"float samples from {low:g} to {high:g} became 16-bit integers{meaning}",)
    else:
        levels = spread(samples.astype(np.uint8) if samples.dtype == bool else samples, header.bits)
    if photometric == _WHITE_IS_ZERO:
        colors = levels[..., :1]
        np.subtract(np.iinfo(levels.dtype).max, colors, out=colors)
    return unassociate(levels) if associated else levels, icc, notes


def _header(page: Any, number: int, pages: int) -> Tiff:
    photometric, bits, samples = int(page.photometric), page.bitspersample, int(page.samplesperpixel)
    kind = f"a TIFF of PhotometricInterpretation {photometric} with {samples} samples of {bits} bits"
    mode = _MODES.get(photometric)
    if mode is None:
        raise ImageError("unsupported", f"{kind} is not read; convert it to grey or RGB")
    palette, floats = photometric == _PALETTE, page.sampleformat == _FLOAT
    colors = {"grey": 1, "rgb": 3, "lab": 3, "cmyk": 4}[mode]
    alpha = samples - (1 if palette else colors)
    if alpha not in (0, 1) or (alpha and (palette or mode == "lab")):
        raise ImageError("unsupported", f"{kind} is not read; convert it to grey or RGB with at most one alpha channel")
    if int(page.compression) not in _COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise ImageError("unsupported", f"a TIFF of compression {name} is not read; save it with deflate or LZW")
    if photometric == _YCBCR and int(page.compression) not in _JPEG:
        raise ImageError("unsupported", f"{kind} (YCbCr, and no JPEG) is not read; convert it to RGB")
    if photometric == _SEPARATED and page.tags.valueof("InkSet", default=_CMYK_INKS) != _CMYK_INKS:
        raise ImageError("unsupported", f"{kind}, of inks other than CMYK, is not read; convert it to RGB")
    if not _are_known(bits, page.sampleformat, mode, photometric):
        raise ImageError(
            "unsupported",
            f"{kind} (SampleFormat {page.sampleformat}) is not read; convert it to unsigned integers of 8 or 16 bits",
        )
    if 0 in page.dataoffsets:  # libvips would show the header of the file as pixels, tifffile zeros
        raise ImageError("damaged", "a strip or tile of its pixels lies nowhere (offset 0); get a sound copy")
    width, height = int(page.imagewidth), int(page.imagelength)
    padded = width * height
    if page.is_tiled and page.tilewidth > 0 and page.tilelength > 0:
        padded = -(-width // page.tilewidth) * -(-height // page.tilelength) * page.tilewidth * page.tilelength
    bands = colors + alpha
    return Tiff(
        width=width,
        height=height,
        bands=bands,
        bits=bits,
        mode=mode,
        has_alpha=alpha == 1,
        palette=palette,
        floats=floats,
        orientation=page.tags.valueof("Orientation", default=1),
        dpi=_dpi(page.tags),
        page=number,
        pages=pages,
        reduced=bool(page.subfiletype & _REDUCED),
        raw_bytes=int(padded) * bands * max(8, bits) // 8,
        vips=not floats and mode != "lab" and (bits in (8, 16) or (samples == 1 and bits in (1, 2, 4))),
    )


def _check_segments(page: Any, stream: Any) -> None:
    """Refuse strips or tiles that are not there, or for which tifffile would make more room than the tags announce.

    For one that is missing or of no bytes tifffile answers zeros.
    """
    needed, found = math.prod(page.chunked), min(len(page.dataoffsets), len(page.databytecounts))
    kind = "tiles" if page.is_tiled else "strips"
    if found < needed:
        raise ImageError("damaged", f"it has {found} of the {needed} {kind} of its pixels; get a sound copy")
    width = page.tilewidth if page.is_tiled else page.imagewidth
    most = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    least = most if page.is_tiled else 1  # the last strip may be short
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        if not length:
            raise ImageError("damaged", f"one of the {kind} of its pixels has no bytes; get a sound copy")
        if start + length > stream.size:
            raise ImageError("truncated", "its pixels reach beyond the end of the file; get a whole copy of it")
        if int(page.compression) in _JPEG and length:
            stream.seek(start)
            size = _jpeg_size(stream.read(length))
            if size is None or size[0] != width or not least <= size[1] <= most:
                raise ImageError(
                    "damaged", f"one of its JPEG parts holds {size} pixels instead of {(width, most)}; get a sound copy"
                )


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a JPEG's frame header; None if it has none (ITU-T T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _are_known(bits: object, sample_format: object, mode: str, photometric: int) -> bool:
    if not isinstance(bits, int):  # a tuple where the channels differ
        return False
    if sample_format == _FLOAT:
        return bits in (16, 24, 32, 64) and mode in ("grey", "rgb") and photometric not in (_PALETTE, _YCBCR)
    if mode == "lab":
        return bits in (8, 16)  # declared as signed by some writers, as unsigned by others
    if sample_format not in (_UNSIGNED, _UNDEFINED):
        return False
    return bits in (8, 16) if mode == "cmyk" else 1 <= bits <= (8 if photometric == _PALETTE else 16)


def _count_pages(path: Path) -> int:
    """The length of the chain of directories, whose end must be reached; tifffile would stop at a loop."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(16)
        order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
        big = b"+" in start[2:4]  # BigTIFF
        count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)
        at = int.from_bytes(start[8:16] if big else start[4:8], order)
        seen: set[int] = set()
        while at:
            if at in seen or len(seen) >= _MAX_PAGES:
                raise ImageError("damaged", f"its page {len(seen)} leads back to an earlier one; get a sound copy")
            seen.add(at)
            end = size
            if at < size:
                stream.seek(at)
                end = at + count_bytes + int.from_bytes(stream.read(count_bytes), order) * entry_bytes
            if end + offset_bytes > size:
                raise ImageError("truncated", f"page {len(seen)} has no whole header; get a whole copy of the file")
            stream.seek(end)
            at = int.from_bytes(stream.read(offset_bytes), order)
    if not seen:
        raise ImageError("truncated", "the TIFF has no page; get a whole copy of the file")
    return len(seen)


def _dpi(tags: Any) -> tuple[float, float] | None:
    scale = {2: 1.0, 3: 2.54}.get(int(tags.valueof("ResolutionUnit", default=2)))
    x, y = tags.valueof("XResolution"), tags.valueof("YResolution")
    if scale is None or x is None or y is None or not all((*x, *y)):
        return None
    return (round(x[0] / x[1] * scale, 2), round(y[0] / y[1] * scale, 2))


def _expanded(indices: NDArray[Any], color_map: NDArray[np.uint16] | None, header: Tiff) -> Levels:
    """Palette indices [h, w, 1] as 8-bit RGB; the map's 16-bit values are 8-bit ones in nearly every file."""
    if color_map is None or color_map.shape[0] != 3 or int(indices.max(initial=0)) >= color_map.shape[1]:
        raise ImageError("damaged", "it has no whole palette; get a sound copy of the file")
    levels: Levels = (color_map >> 8).astype(np.uint8).T[indices[..., 0]]
    return levels


def _lab_to_srgb(samples: NDArray[Any], photometric: int) -> Levels:
    """CIELAB samples (white D50, 8 or 16 bits) as sRGB levels of the same depth, clipped to its gamut."""
    deep = samples.dtype.itemsize == 2
    kind = np.uint16 if deep else np.uint8
    whole = int(np.iinfo(kind).max)
    unit = 256 if deep else 1  # of a* and b*
    result: Levels = np.empty(samples.shape, kind)
    lab_profile, srgb = imagecodecs.cms_profile("lab4"), imagecodecs.cms_profile("srgb")
    for top in range(0, len(samples), rows := max(1, _STRIP_PIXELS // max(1, samples.shape[1]))):
        part = samples[top : top + rows].view(kind)
        lab = np.empty(part.shape, np.float32)
        chroma = part[..., 1:]
        if photometric == _ICCLAB:  # a* and b* are offset by 128
            lab[..., 0] = part[..., 0].astype(np.float32) * (100 / (65280 if deep else 255))
            lab[..., 1:] = chroma.astype(np.float32) / unit - 128
        else:  # a* and b* are signed
            lab[..., 0] = part[..., 0].astype(np.float32) * (100 / whole)
            lab[..., 1:] = chroma.view(np.int16 if deep else np.int8).astype(np.float32) / unit
        rgb = imagecodecs.cms_transform(
            lab, lab_profile, srgb, colorspace="lab", outcolorspace="rgb", outdtype="float32"
        )
        result[top : top + rows] = np.rint(np.clip(rgb, 0.0, 1.0) * whole)
    return result
