"""What a browser can show of an image file: sRGB of 8 bits, reduced, as JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from supir_batch import commit, probe, readers, store
from supir_batch.types import FloatImage


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


def jpeg(pixels: FloatImage) -> bytes:
    """A JPEG file of ``pixels``, [h, w, 3] in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()
