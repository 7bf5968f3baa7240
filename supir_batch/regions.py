"""Faces and text in a source: where invented detail does most harm, and a curator should look first.

Both detectors are classical and come with OpenCV's package, so nothing is downloaded. *Faces* are what at least two of
four trained cascades find at one place; each of them alone finds many more things that are no faces. *Text* is a row of
at least ``LETTERS`` stable regions (MSER) that are alike in height, stroke and grey, and stand close together on one
line; of small ones twice as many. Lines that are close together are one region. Both flag, neither proves; how much
they miss and how often they are wrong stands in docs/audit.md.

Sources: Viola and Jones 2001 (cascades), Matas et al. 2002 (MSER), Chen et al. 2011 (text from MSER and stroke width).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from supir_batch import color
from supir_batch.types import FloatImage, Region

SIZE = 1400
"""Longer side, in pixels, to which an image is reduced before it is searched for text."""

FACE_SIZE = 800
"""The same for faces."""

LETTERS = 4
"""Fewest letters of a line of text."""

_CASCADES = ("frontalface_alt", "frontalface_alt2", "frontalface_default", "profileface")
_VOTES = 2
_SMALLEST_FACE = 20  # pixels of the reduced image
_SAME_PLACE = 0.3  # intersection over union

_LETTER_HEIGHT = (5, 200)  # pixels of the reduced image
_SMALL = 8  # pixels: lower letters look like many other things
_MOST_LETTERS = 1500
_TOUCHING = 0.5  # intersection over union of two regions that are one letter

Boxes = NDArray[np.float64]  # [n, 4]: left, top, right, bottom


def find(reduced: FloatImage, width: int, height: int) -> tuple[Region, ...]:
    """Faces, then text, from the top left, in an image of ``width`` x ``height`` pixels.

    ``reduced`` is the image, [h, w, 3] sRGB in [0, 1], the longer side at most ``SIZE`` pixels.
    """
    grey = np.rint(255 * np.clip(color.luma(reduced), 0.0, 1.0)).astype(np.uint8)
    if min(grey.shape) < _SMALLEST_FACE:
        return ()
    factor = min(1.0, FACE_SIZE / max(grey.shape))
    smaller = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else grey
    faces = [_region("face", box, smaller, width, height) for box in _faces(smaller)]
    texts = [_region("text", box, grey, width, height) for box in _text(grey)]
    return tuple(region for kind in (faces, texts) for region in sorted(kind, key=lambda one: (one.y, one.x)))


def _region(
    kind: Literal["face", "text"], box: NDArray[np.float64], grey: NDArray[np.uint8], width: int, height: int
) -> Region:
    """A box of ``grey`` as a region of the image."""
    scale = np.array([width / grey.shape[1], height / grey.shape[0]] * 2)
    left, top, right, bottom = (int(side) for side in np.rint(box * scale))
    return Region(kind, left, top, right - left, bottom - top)


def _faces(grey: NDArray[np.uint8]) -> Boxes:
    """Where cascades agree."""
    boxes, voters = [np.zeros((0, 4))], [np.zeros(0, int)]
    for voter, name in enumerate(_CASCADES):
        for mirrored in (False, True) if name == "profileface" else (False,):
            image = cv2.flip(grey, 1) if mirrored else grey
            found = np.array(_cascade(name).detectMultiScale(image, 1.1, 3, 0, (_SMALLEST_FACE, _SMALLEST_FACE)))
            if not found.size:
                continue
            left = grey.shape[1] - found[:, 0] - found[:, 2] if mirrored else found[:, 0]
            boxes.append(np.stack([left, found[:, 1], left + found[:, 2], found[:, 1] + found[:, 3]], axis=1))
            voters.append(np.full(len(found), voter))
    every, votes = np.concatenate(boxes), np.concatenate(voters)
    places = _groups(_overlaps(every) > _SAME_PLACE)
    agreed = [np.median(every[group], axis=0) for group in places if len(set(votes[group])) >= _VOTES]
    return np.array(agreed).reshape(-1, 4)


@functools.cache
def _cascade(name: str) -> cv2.CascadeClassifier:
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_{name}.xml")  # type: ignore[attr-defined]


def _text(grey: NDArray[np.uint8]) -> Boxes:
    """Lines of text."""
    boxes, strokes, greys = _letters(grey)
    if len(boxes) < LETTERS:
        return np.zeros((0, 4))
    heights, widths = boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]

    def pairs(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return values[:, None], values[None, :]

    one, other = pairs(heights)
    taller = np.maximum(one, other)
    alike = np.minimum(one, other) > 0.55 * taller
    one, other = pairs(strokes)
    alike &= np.minimum(one, other) > 0.5 * np.maximum(one, other)
    one, other = pairs(greys)
    alike &= np.abs(one - other) < 30
    one, other = pairs(boxes[:, 3])
    other_top, one_top = boxes[None, :, 1], boxes[:, None, 1]
    alike &= (np.abs(one - other) < 0.3 * taller) | (np.abs(one_top - other_top) < 0.2 * taller)
    gap = np.maximum(boxes[:, None, 0], boxes[None, :, 0]) - np.minimum(boxes[:, None, 2], boxes[None, :, 2])
    alike &= (gap < 0.8 * taller) & (gap > -0.3 * np.minimum(widths[:, None], widths[None, :]))
    lines = []
    for group in _groups(alike):
        left, top = boxes[group, :2].min(axis=0)
        right, bottom = boxes[group, 2:].max(axis=0)
        fewest = LETTERS if np.median(heights[group]) >= _SMALL else 2 * LETTERS
        if len(group) >= fewest and right - left > 2 * (bottom - top):
            lines.append((left, top, right, bottom))
    return _blocks(np.array(lines).reshape(-1, 4))


def _blocks(lines: Boxes) -> Boxes:
    """Lines that are no further apart than twice their height, as one."""
    margin = (lines[:, 3] - lines[:, 1])[:, None]
    grown = np.concatenate([lines[:, :2] - margin, lines[:, 2:] + margin], axis=1)
    groups = list(_groups(_overlaps(grown) > 0))
    found = [np.concatenate([lines[group, :2].min(axis=0), lines[group, 2:].max(axis=0)]) for group in groups]
    return np.array(found).reshape(-1, 4)


def _letters(grey: NDArray[np.uint8]) -> tuple[Boxes, NDArray[np.float64], NDArray[np.float64]]:
    """Regions that may be letters: their boxes, the widths of their strokes, their greys."""
    low, high = _LETTER_HEIGHT
    finder = cv2.MSER_create(delta=8, min_area=2 * low, max_area=high * high, max_variation=0.2)  # type: ignore[attr-defined]
    regions, found = finder.detectRegions(grey)
    kept = []
    for points, (left, top, width, height) in zip(regions, found, strict=True):
        fill = len(points) / (width * height)
        if not (low <= height <= high and 0.08 < width / height < 2 and 0.2 < fill < 0.85):
            continue
        inside = np.zeros((height + 2, width + 2), np.uint8)
        inside[points[:, 1] - top + 1, points[:, 0] - left + 1] = 1
        border = int(np.count_nonzero(inside - cv2.erode(inside, np.ones((3, 3), np.uint8))))
        stroke = 2 * len(points) / border
        if 0.04 < stroke / height < 0.6:
            box = (left, top, left + width, top + height)
            kept.append((len(points), *box, stroke, float(np.median(grey[points[:, 1], points[:, 0]]))))
    if not kept:
        return np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    rows = np.array(sorted(kept, reverse=True)[:_MOST_LETTERS])
    # of the regions that are one letter the largest stands for it
    same = np.tril(_overlaps(rows[:, 1:5]) > _TOUCHING, -1).any(axis=1)
    rows = rows[~same]
    return rows[:, 1:5], rows[:, 5], rows[:, 6]


def _overlaps(boxes: Boxes) -> NDArray[np.float64]:
    """Intersection over union of all pairs."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(common / np.maximum(areas[:, None] + areas[None, :] - common, 1e-9))


def _groups(linked: NDArray[np.bool_]) -> Iterator[list[int]]:
    """The connected parts of a graph, in order of their first members."""
    left = set(range(len(linked)))
    for start in range(len(linked)):
        if start not in left:
            continue
        left.remove(start)
        group, at = [start], 0
        while at < len(group):
            new = left & set(np.flatnonzero(linked[group[at]]).tolist())
            group += sorted(new)
            left -= new
            at += 1
        yield group
