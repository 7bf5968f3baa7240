"""The output gate: what a restored tile has to be like before its image may be committed.

It looks for outputs that went wrong, not for good ones: other colors, another picture, dead areas. All scores compare
a tile with the working copy it was restored from, both reduced to at most ``REDUCED`` pixels, because grain and noise,
which restoration removes, must not count; dead areas alone are looked for at full size.

Sources: CIE 142 (Delta E 2000), Wang et al. 2004 (SSIM).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity

from supir_batch import color, resample
from supir_batch.types import FloatImage, GateLimits, GateScores

REDUCED = 64
"""Longer side, in pixels, to which a tile is reduced for color and structure."""

_BLOCK = 16  # pixels: side of the squares that are called dead or alive
_DEAD, _ALIVE = 0.1 / 255, 2.0 / 255  # standard deviation of luma in a square, after and before
_WINDOW = 7  # pixels: the window of SSIM


def measure(before: FloatImage, after: FloatImage, tone: color.Tone) -> GateScores:
    """The scores of one tile; both [h, w, 3] sRGB in [0, 1], ``after`` without the source's tone, which is added here.

    Values of ``after`` outside [0, 1] are clipped as the writer will. Raises ValueError for different shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"a tile of {before.shape} was restored to {after.shape}")
    area = before.shape[0] * before.shape[1]
    if after is before and tone.kind == "color":  # an engine that changes nothing: known without measuring
        return GateScores(area, finite=True, color_drift=0.0, similarity=1.0, dead=0.0)
    if not np.isfinite(after).all():
        return GateScores(area, finite=False, color_drift=float("inf"), similarity=-1.0, dead=1.0)
    toned = color.apply_tone(np.clip(after, 0.0, 1.0), tone)
    small = [resample.reduce_to(image, REDUCED) for image in (before, toned)]
    drift = deltaE_ciede2000(*(rgb2lab(image) for image in small)).mean()
    return GateScores(
        area,
        finite=True,
        color_drift=float(drift),
        similarity=_similarity(*(color.luma(image) for image in small)),
        dead=_dead(before @ color.LUMA, toned @ color.LUMA),
    )


def combine(scores: Sequence[GateScores]) -> GateScores:
    """The scores of an image from those of its tiles: means by area."""
    areas = np.array([score.area for score in scores], dtype=np.float64)
    return GateScores(
        int(areas.sum()),
        finite=all(score.finite for score in scores),
        color_drift=float(np.average([score.color_drift for score in scores], weights=areas)),
        similarity=float(np.average([score.similarity for score in scores], weights=areas)),
        dead=float(np.average([score.dead for score in scores], weights=areas)),
    )


def complaints(scores: GateScores, limits: GateLimits) -> list[str]:
    """What is wrong, in words with numbers; empty for an output that may be committed."""
    found = []
    if not scores.finite:
        return ["values that are no numbers"]  # never written: write.py refuses such a tile
    if scores.color_drift > limits.color_drift:
        found.append(f"color drift {scores.color_drift:.2f} above gate.color_drift {limits.color_drift:g}")
    if scores.similarity < limits.similarity:
        found.append(f"similarity {scores.similarity:.3f} below gate.similarity {limits.similarity:g}")
    if scores.dead > limits.dead:
        found.append(f"dead area {scores.dead:.1%} above gate.dead {limits.dead:.1%}")
    if scores.seam is not None and scores.seam > limits.seam:
        found.append(f"seam score {scores.seam:.3f} above gate.seam {limits.seam:g}")
    return found


def _similarity(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """SSIM of two luma planes; one too small for its window is compared by its mean difference."""
    if min(before.shape) < _WINDOW:
        return 1.0 - float(np.abs(before - after).mean())
    return float(structural_similarity(before, after, win_size=_WINDOW, data_range=1.0))


def _dead(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Share of squares in which the source varies and the output is constant, as where values saturate."""
    rows, columns = (side // _BLOCK for side in before.shape)
    if rows == 0 or columns == 0:
        return float(before.std() > _ALIVE and after.std() < _DEAD)

    def variance(plane: NDArray[np.float32]) -> NDArray[np.float64]:
        whole = plane[: rows * _BLOCK, : columns * _BLOCK].astype(np.float64).reshape(rows, _BLOCK, columns, _BLOCK)
        mean = whole.sum(axis=1).sum(axis=2) / _BLOCK**2
        squares: NDArray[np.float64] = np.einsum("ijkl,ijkl->ik", whole, whole) / _BLOCK**2
        return np.asarray(squares - mean**2)  # of values up to 1 in float64: exact to 1e-15, and _DEAD**2 is 1.5e-7

    return float(((variance(before) > _ALIVE**2) & (variance(after) < _DEAD**2)).mean())
