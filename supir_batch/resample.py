"""Change of size: Lanczos-3 in float32, area-correct when shrinking, exact target size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from supir_batch.types import FloatImage


def resize(pixels: FloatImage, width: int, height: int, clip: bool = True) -> FloatImage:
    """Resize [h, w, C] to [height, width, C], clipped to [0, 1] unless told; the very same array if the size is right.

    Edges keep their place: the whole image maps to the whole image, without cropping or padding.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    result = np.empty((height, width, pixels.shape[2]), np.float32)
    for band in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., band], dtype=np.float32))  # mode F: floats throughout
        result[..., band] = np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS))
    return np.clip(result, 0.0, 1.0, out=result) if clip else result


def reduce_to(pixels: FloatImage, longer_side: int) -> FloatImage:
    """Shrink [h, w, C] so that its longer side is at most ``longer_side``; never enlarges."""
    height, width = pixels.shape[:2]
    factor = longer_side / max(height, width)
    if factor >= 1.0:
        return pixels
    return resize(pixels, max(1, round(width * factor)), max(1, round(height * factor)))
