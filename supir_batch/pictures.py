"""What a browser can show of an image file: sRGB of 8 bits, as JPEG."""

from __future__ import annotations

import io
import tempfile
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray
from PIL import Image

from supir_batch import color, commit, probe, readers, store
from supir_batch.errors import ImageError
from supir_batch.types import FloatImage

_STRIP_PIXELS = 2**21  # that are floats at once
_STORED_PIXELS = 2**26  # a larger picture waits in a file, and not in memory


def picture(uri: str, longer_side: int, page: int = 1, sha256: str | None = None) -> FloatImage:
    """The image reduced to at most ``longer_side`` pixels, [h, w, 3] sRGB in [0, 1]; where transparent, white shows.

    ``page`` is of a TIFF with several. A file of this ``sha256`` is known to be sound, and may be of any size; any
    other is held against the limits of ``probe``. It is in memory as stored. Raises StoreError if it cannot be reached,
    ImageError if it cannot be read.
    """
    with store.local_copy(uri) as path:
        known = sha256 is not None and commit.file_sha256(path) == sha256
        header = probe.read_header(path, page) if known else probe.probe(path, page)
        raster = readers.read(path, header)
    return raster.reduced(longer_side, over_white=True)


def whole_picture(uri: str, sha256: str, page: int = 1) -> pyvips.Image:
    """All pixels of the image, sRGB of 8 bits in three bands; where transparent, white shows.

    A giant waits in a file that has no name. Raises StoreError if it cannot be reached, ImageError if it cannot be read
    or is not what ``sha256`` says.
    """
    with store.local_copy(uri) as path:
        if commit.file_sha256(path) != sha256:
            raise ImageError("changed", f"{uri}: is not what it was when the image was restored")
        raster = readers.read(path, probe.read_header(path, page))
    height, width = raster.levels.shape[:2]
    pixels = _room(height, width)
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        part, alpha = raster.floats(slice(top, top + step), slice(None))
        if alpha.size:
            part = part * alpha + (1 - alpha)
        pixels[top : top + step] = np.rint(color.to_srgb(part, raster.icc) * 255)
    return pyvips.Image.new_from_memory(pixels.data, width, height, 3, "uchar").copy(interpretation="srgb")


def jpeg(pixels: FloatImage) -> bytes:
    """A JPEG file of ``pixels``, [h, w, 3] in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def _room(height: int, width: int) -> NDArray[Any]:
    """An array [h, w, 3] of bytes."""
    shape = (height, width, 3)
    if height * width < _STORED_PIXELS:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(prefix="supir-batch-") as file:  # the mapping keeps it
        return np.memmap(file, np.uint8, "w+", shape=shape)
