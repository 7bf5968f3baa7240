"""The pixels of a file as it holds them: every reader strict, so that damage is an error and never grey or zeros.

libvips reads most formats; TIFFs that it refuses, or would misread, get a second reader (tiff.py); JPEG 2000 has its
own (jpeg2000.py), and HEIC needs the optional pillow-heif.
"""

from __future__ import annotations

import os
import re
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyvips
from numpy.typing import NDArray

from supir_batch import color, jpeg2000, probe, resample, tiff
from supir_batch.errors import ImageError
from supir_batch.levels import Levels, spread
from supir_batch.types import FloatImage

_STRIP_ROWS = 256  # of which blocks are averaged at once
_ALL = slice(None)

STORED_BYTES = 2**28
"""Raw size from which the samples of an image wait in a file, and not in memory, where libvips can stream them."""

# how the readers word that a file ends too early
_CUT_SHORT = re.compile(
    r"premature|truncat|unexpected end|end of file|read error|seek|EOF|got \d+ bytes|unable to parse|not enough"
    r"|missing SOS|corrupted strip|incorrect data",
    re.IGNORECASE,
)


class StoredLevels:
    """Samples of a giant, upright, in a file that has no name; of [h, w, C] only the part that is asked for is read."""

    def __init__(self, image: pyvips.Image, orientation: int) -> None:
        """Let libvips write ``image`` row by row. Raises pyvips.Error for damage."""
        self._file = tempfile.TemporaryFile(prefix="supir-batch-")  # noqa: SIM115 - open as long as this lives
        weakref.finalize(self, self._file.close)
        image.rawsave_target(pyvips.Target.new_to_descriptor(self._file.fileno()))
        self.dtype = np.dtype(np.uint8 if image.format == "uchar" else np.uint16)
        self._stored, self._orientation = (image.height, image.width, image.bands), orientation
        # where each upright pixel is stored; views that take no memory
        rows, columns = np.arange(image.height)[:, None], np.arange(image.width)[None]
        both = np.broadcast_arrays(rows, columns)
        self._rows, self._columns = (upright(places, orientation) for places in both)
        self.shape = (*self._rows.shape, image.bands)

    def __getitem__(self, part: tuple[slice, slice]) -> Levels:
        top, end = _ends(self._rows[part])
        left, right = _ends(self._columns[part])
        _, width, bands = self._stored
        found = np.empty((end - top, right - left, bands), self.dtype)
        pixel = bands * self.dtype.itemsize
        for row, into in zip(range(top, end), found, strict=True):
            read = os.preadv(self._file.fileno(), [into], (row * width + left) * pixel)
            if read != into.nbytes:
                raise OSError(f"a temporary file of samples ends early, in row {row}; is the disk full?")
        return upright(found, self._orientation)


def _ends(places: NDArray[np.int64]) -> tuple[int, int]:
    """The first of the places of a part, which run evenly, and the one behind the last."""
    corners = int(places[0, 0]), int(places[-1, -1])
    return min(corners), max(corners) + 1


@dataclass(frozen=True)
class Raster:
    """Pixels as read, upright: ``levels`` [h, w, bands, and one for alpha] uint8 or uint16.

    A giant is held as stored, by ``StoredLevels`` outside of memory; floats are for parts of it.
    """

    levels: Levels | StoredLevels
    bands: int
    icc: bytes | None
    notes: tuple[str, ...]

    def floats(self, rows: slice, columns: slice) -> tuple[FloatImage, FloatImage]:
        """Color [h, w, bands] and alpha [h, w, 0 or 1] of a part, float32 in [0, 1]."""
        part = self.levels[rows, columns]
        values = part.astype(np.float32) / np.float32(np.iinfo(part.dtype).max)
        return np.ascontiguousarray(values[..., : self.bands]), np.ascontiguousarray(values[..., self.bands :])

    def reduced(self, longer_side: int, over_white: bool = False) -> FloatImage:
        """The image in sRGB, [h, w, 3], its longer side at most ``longer_side``.

        Alpha is left out, or the image laid ``over_white`` before anything is averaged.
        """
        height, width = self.levels.shape[:2]
        block = resample.block_of(width, height, longer_side)  # means of blocks fit into memory as floats
        step = max(1, _STRIP_ROWS // block) * block
        strips = []
        for top in range(0, height, step):
            part, alpha = self.floats(slice(top, top + step), _ALL)
            if over_white and alpha.size:
                part = part * alpha + (1 - alpha)
            strips.append(resample.block_means(part, block))
        pixels = color.to_srgb(np.concatenate(strips), self.icc)
        return resample.from_blocks(pixels, block, width, height, longer_side)


def read(path: Path, header: probe.Header) -> Raster:
    """Decode all pixels of the image, or of the TIFF page, that ``header`` is of; upright.

    CMYK and CIELAB become sRGB. Raises ImageError ``truncated``, ``damaged`` or ``unsupported``.
    """
    if header.reader == "jpeg2000":
        return _read_jpeg2000(path, header)
    if header.reader == "heif":
        return _read_heif(path, header)
    refused = None
    if header.reader == "vips":
        try:
            with probe.vips_errors():
                return _read_vips(path, header)
        except pyvips.Error as error:
            refused = probe.vips_message(error, path)
            if header.format != "tiff":
                raise _damaged(refused) from error
    return _read_tiff(path, header, refused)


def _read_jpeg2000(path: Path, header: probe.Header) -> Raster:
    found = jpeg2000.read_header(path)
    return _raster(jpeg2000.read_samples(path, found), header, found.icc)


def _read_heif(path: Path, header: probe.Header) -> Raster:
    import pillow_heif  # noqa: PLC0415 - optional

    try:
        image = pillow_heif.open_heif(path, convert_hdr_to_8bit=False)
        levels = np.array(image)
        icc = image.info.get("icc_profile")
    # libheif's failures come as ValueError, SyntaxError, RuntimeError, EOFError ...
    except Exception as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error
    if levels.ndim == 2:  # libvips, which read the header, calls every HEIC one of colors
        levels = np.repeat(levels[..., None], 3, axis=2)
    return _raster(_unshifted(levels, header), header, icc)


def _read_vips(path: Path, header: probe.Header) -> Raster:
    image = probe.open_vips(path, header.format, header.page)
    icc = bytes(image.get("icc-profile-data")) if "icc-profile-data" in image.get_fields() else None
    if header.mode == "cmyk":
        image, icc = _cmyk_to_srgb(image, header), None
    if header.raw_bytes >= STORED_BYTES and header.format != "avif":
        return _raster(StoredLevels(image, header.orientation), header, icc)
    levels = image.numpy()
    if levels.ndim == 2:
        levels = levels[..., None]
    return _raster(_unshifted(levels, header) if header.format == "avif" else levels, header, icc)


def _read_tiff(path: Path, header: probe.Header, refused: str | None) -> Raster:
    """By the second reader; ``refused`` is why libvips did not, None if it was not asked."""
    notes: tuple[str, ...] = ()
    asked = ""
    if refused is not None:
        notes, asked = (f"read by tifffile because libvips refused it: {refused}",), f"libvips: {refused}; "
    try:
        levels, icc, said = tiff.read_samples(path, tiff.read_header(path, header.page))
        if header.mode == "cmyk":
            image = pyvips.Image.new_from_array(levels).copy(interpretation="cmyk")
            if icc is not None:
                image.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
            with probe.vips_errors():
                levels, icc = _cmyk_to_srgb(image, header).numpy(), None
    except (ImageError, MemoryError):
        raise
    # tifffile raises its own errors, but damaged data also surfaces as codec errors, IndexError, struct.error ...
    except Exception as error:
        raise _damaged(f"{asked}tifffile: {type(error).__name__}: {error}") from error
    return _raster(levels, header, icc, (*said, *notes))


def _cmyk_to_srgb(image: Any, header: probe.Header) -> Any:
    alpha = image[image.bands - 1] if header.has_alpha else None
    if alpha is not None:
        image = image.extract_band(0, n=image.bands - 1)
    # without a profile of its own a CMYK image is taken for libvips' generic press; there is no better guess
    embedded = "icc-profile-data" in image.get_fields()
    image = image.icc_transform("srgb", embedded=embedded, input_profile="cmyk", depth=header.bit_depth)
    return image if alpha is None else image.bandjoin(alpha)


def _unshifted(levels: Levels, header: probe.Header) -> Levels:
    """Samples that libheif moved to the upper end of 16 bits, so that white was not 65535."""
    if header.bit_depth == header.stored_bits:
        return levels
    samples: Levels = np.right_shift(levels, 16 - header.stored_bits, dtype=np.uint16)
    return spread(samples, header.stored_bits)


def _damaged(seen: str) -> ImageError:
    kind = "truncated" if _CUT_SHORT.search(seen) else "damaged"
    return ImageError(kind, f"its pixels cannot be decoded ({seen}); get a whole copy of the file")


def _raster(
    levels: NDArray[Any] | StoredLevels, header: probe.Header, icc: bytes | None, notes: tuple[str, ...] = ()
) -> Raster:
    """Integer samples [h, w, bands], checked, upright: an array is turned, as it is as stored."""
    if not isinstance(levels, StoredLevels):
        levels = upright(levels, header.orientation)
    bands = 1 if header.mode == "grey" else 3
    size = (header.height, header.width) if header.orientation < 5 else (header.width, header.height)
    meant = (*size, bands + header.has_alpha)
    if levels.shape != meant or levels.dtype != (np.uint8 if header.bit_depth == 8 else np.uint16):
        raise ImageError(
            "damaged", f"its pixels are {levels.shape} {levels.dtype}, its header said {meant}; get a whole copy"
        )
    if icc is not None and (problem := color.check_profile(icc, bands)) is not None:
        notes = (*notes, f"{problem}; it was ignored and the image taken for sRGB")
        icc = None
    if header.palette:
        notes = (*notes, "palette colors were expanded to RGB")
    elif header.stored_bits < header.bit_depth:
        notes = (*notes, f"{header.stored_bits}-bit samples were expanded to {header.bit_depth} bits")
    return Raster(levels, bands, icc, notes)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn [h, w, ...] pixels as EXIF ``orientation`` (1 to 8) says they must be shown; a view."""
    turns: dict[int, tuple[bool, Literal[0, 1, 2, 3]]] = {  # (mirror left-right first, then quarter turns clockwise)
        1: (False, 0),
        2: (True, 0),
        3: (False, 2),
        4: (True, 2),
        5: (True, 3),
        6: (False, 1),
        7: (True, 1),
        8: (False, 3),
    }
    mirror, quarters = turns[orientation]
    return np.rot90(pixels[:, ::-1] if mirror else pixels, k=-quarters)
