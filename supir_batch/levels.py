"""Samples of any number of bits or floats, as the 8 or 16-bit integers that everything after the readers works on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from supir_batch.errors import ImageError

Levels = NDArray[np.unsignedinteger[Any]]  # [H, W, C], uint8 or uint16, over the whole range of the type

_STRIP_SAMPLES = 2**24  # per step of a conversion that needs temporary copies


def spread(samples: Levels, bits: int) -> Levels:
    """Samples of ``bits`` (1 to 16), in a type that may hold more, over the whole range of uint8 or uint16.

    Rounded to nearest; what exceeds ``bits`` counts as white.
    """
    kind = np.uint8 if bits <= 8 else np.uint16
    top, whole = 2**bits - 1, int(np.iinfo(kind).max)
    if top == whole and samples.dtype == kind:
        return samples
    table = (np.arange(top + 1, dtype=np.uint64) * whole + top // 2) // top
    levels: Levels = table.astype(kind)[np.minimum(samples, top)]
    return levels


def from_floats(samples: NDArray[np.floating[Any]]) -> tuple[NDArray[np.uint16], float, float]:
    """Floats of [0, 1] as 16-bit levels, and the least and greatest value.

    Raises ImageError ``unsupported`` for values that are not finite or outside [0, 1]: what they stand for (light of a
    scene, a measurement, percent) is not in the file, and any scaling would be a guess.
    """
    low, high = (float(samples.min()), float(samples.max())) if samples.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("unsupported", "its float samples hold values that are no numbers; convert it to 16 bit")
    if low < 0.0 or high > 1.0:
        raise ImageError(
            "unsupported",
            f"its float samples range from {low:g} to {high:g}, and only 0 to 1 has an agreed meaning; "
            "scale them to it, or convert it to 16 bit",
        )
    levels = np.empty(samples.shape, np.uint16)
    flat, into = samples.reshape(-1), levels.reshape(-1)
    for at in range(0, flat.size, _STRIP_SAMPLES):
        part = slice(at, at + _STRIP_SAMPLES)
        into[part] = np.rint(flat[part].astype(np.float64) * 65535)
    return levels, low, high


def unassociate(levels: Levels) -> Levels:
    """Undo the multiplication of colors [..., :-1] by alpha [..., -1]; where alpha is 0 nothing is known: black."""
    whole = int(np.iinfo(levels.dtype).max)
    result = levels.copy()
    for top in range(0, len(levels), rows := max(1, _STRIP_SAMPLES // max(1, levels[0].size))):
        part = levels[top : top + rows].astype(np.uint64)
        alpha = part[..., -1:]
        colors = (part[..., :-1] * whole + alpha // 2) // np.maximum(alpha, 1)
        result[top : top + rows, :, :-1] = np.where(alpha == 0, 0, np.minimum(colors, whole))
    return result
