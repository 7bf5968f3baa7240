"""Change of size: Lanczos-3 in float32, area-correct when shrinking, exact target size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supir_batch.types import FloatImage


def resize(pixels: FloatImage, width: int, height: int) -> FloatImage:
    """Resize [h, w, C] in [0, 1] to [height, width, C], clipped to [0, 1]; the very same array if the size is right.

    Edges keep their place: the whole image maps to the whole image, without cropping or padding.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    result = np.empty((height, width, pixels.shape[2]), np.float32)
    for band in range(pixels.shape[2]):
        result[..., band] = resize_plane(pixels[..., band], width, height)
    return result


def resize_plane(plane: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Resize one [h, w] plane in [0, 1]; see ``resize``."""
    if plane.shape == (height, width):
        return plane
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))  # mode F: Pillow computes in floats
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return np.clip(resized, 0.0, 1.0)


def reduce_to(pixels: FloatImage, longer_side: int) -> FloatImage:
    """Shrink [h, w, C] so that its longer side is at most ``longer_side``; never enlarges."""
    height, width = pixels.shape[:2]
    factor = longer_side / max(height, width)
    if factor >= 1.0:
        return pixels
    return resize(pixels, max(1, round(width * factor)), max(1, round(height * factor)))
