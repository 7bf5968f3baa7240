"""What a browser can show of an image file: sRGB of 8 bits, reduced, as JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from supir_batch import decode, resample, store
from supir_batch.types import FloatImage


def picture(uri: str, longer_side: int, page: int = 1) -> FloatImage:
    """The image reduced to at most ``longer_side`` pixels, [h, w, 3] sRGB in [0, 1]; where transparent, white shows.

    ``page`` is of a TIFF with several. Raises StoreError if it cannot be reached, ImageError if it cannot be read.
    """
    with store.local_copy(uri) as path:
        pixels, alpha = decode.read_srgb(path, page)
    if alpha.size:
        pixels = pixels * alpha[..., None] + (1 - alpha[..., None])
    return resample.reduce_to(pixels, longer_side)


def jpeg(pixels: FloatImage) -> bytes:
    """A JPEG file of ``pixels``, [h, w, 3] in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()
