"""The fidelity audit: how true a restored image is to its source, and where it shows what the source does not.

It judges nothing and refuses nothing (that is the gate's work): it measures, so that a curator knows where to look.
Each tile is measured when it is restored, and answers for the cells whose centers are nearer to it than to its
neighbors; an image's scores are made of its cells, however it was cut. A *cell* is a square of ``CELL`` x ``CELL``
pixels of the source. Before and after are compared at the output's size, ``before`` being the source enlarged as the
engine got it. Of an output that is smaller than its source, pixels of the output stand for those of the source.

*Consistency.* Both are reduced to the source's size (Lanczos-3, area-correct) and compared: PSNR of luma (100 dB at
most), SSIM of luma with the cells as windows, and Delta E 2000 between the mean colors of each cell.

*Invention.* The detail of ``after`` is what two passes of a box that reaches 4 source pixels to either side smooth
away, in luma: structures finer than about 15 source pixels. Boxes that reach 1, 2, 4 and 8 pixels split ``before`` into
four bands. In each window of 3 x 3 cells the detail is fitted by the four bands (least squares), which is what a local
linear filter could make of the source: sharpening, blurring, more contrast. The residual is what the source does not
explain; all structure above the band limit of the source is in it, because the bands have nothing there. For each cell,
over its pixels,

    invention = sum(residual^2) / (sum(detail^2) + count * VISIBLE^2)        from 0 to 1

is the share of its visible detail that the source does not explain. ``VISIBLE`` keeps flat areas at 0. The fit is
damped by ``ROUNDING``, so that rounded values of a flat source explain nothing.

*Sharpness gain.* Root mean square of what two passes of a box that reaches 1 source pixel smooth away, after over
before: 1 is as sharp as the enlarged source. Noise counts like any other structure.

*Spread.* Of some restorations with different seeds: the standard deviation of luma of each pixel; of a cell, the root
of the mean variance of its pixels.

Maps have one pixel of 8 bits for each cell. docs/audit.md has pictures, and what the numbers are on known cases.

Sources: Wang et al. 2004 (SSIM), CIE 142 (Delta E 2000), He et al. 2013 (the local linear model of guided filters).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.color import deltaE_ciede2000, rgb2lab

from supir_batch import color, resample, store
from supir_batch.plan import AUDIT_FOLDER
from supir_batch.types import AuditScores, FloatImage, ImageFacts, Region, TileAudit, TileBox

CELL = 8
"""Side of a cell, pixels of the source."""

VISIBLE = 2.5 / 255
"""Root mean square of detail, in luma, below which it does not count."""

ROUNDING = 0.29 / 255
"""Root mean square of the error of rounding to 8 bits."""

Plane = NDArray[np.float32]
Sums = NDArray[np.float64]  # of cells: [rows, columns] or [rows, columns, C]
Map = NDArray[np.uint8]  # [rows, columns] of cells

_BANDS = (1, 2, 4, 8)  # source pixels: how far a box reaches to either side
_DETAIL = 4
_MOST_PSNR = 100.0
_C1, _C2 = 0.01**2, 0.03**2  # of SSIM, for values in [0, 1]
_INVENTION, _SPREAD, _DELTA_E = 1 / 255, 0.25 / 255, 0.1  # what a level of the maps stands for
_TEXTS = {
    "invention": "share of the visible detail that the source does not explain, 0 to 1",
    "uncertainty": "standard deviation of luma over restorations with different seeds, 0 to 0.25",
}


def measure(
    before: FloatImage,
    after: FloatImage,
    facts: ImageFacts,
    box: TileBox,
    overlap: int,
    others: Iterable[FloatImage] = (),
) -> TileAudit:
    """Measure one tile: [h, w, 3] sRGB, ``before`` in [0, 1], ``after`` without the source's tone, which is added here.

    ``overlap`` is what the tile shares with each neighbor, in pixels. ``others`` are restorations with other seeds,
    which are taken one at a time. Values outside [0, 1] are clipped, as the writer will. Raises ValueError for
    different shapes.
    """
    shown_y, source_y = _axes(box.y, box.height, facts.work_height, facts.output_height, facts.height, overlap)
    shown_x, source_x = _axes(box.x, box.width, facts.work_width, facts.output_width, facts.width, overlap)

    def shown(image: FloatImage) -> FloatImage:
        if image.shape != (box.height, box.width, 3):
            raise ValueError(f"a tile of {(box.height, box.width, 3)} cannot be measured with pixels of {image.shape}")
        return _resized(np.clip(image, 0.0, 1.0), shown_y, shown_x)

    before, after = shown(before), shown(after)
    old, new = _luma(before), _luma(after)
    count = shown_y.counts[:, None] * shown_x.counts
    tone = color.Tone(facts.tone, facts.tone_curve)
    colors = [_cell_sums(image, shown_y, shown_x) / count[..., None] for image in (before, after)]
    colors[1] = color.apply_tone(colors[1].astype(np.float32), tone)
    invention, sharp_old, sharp_new = _invention(old, new, shown_y, shown_x)
    reduced = [_resized(plane[..., None], source_y, source_x, shown_y, shown_x)[..., 0] for plane in (old, new)]
    error, similarity = _consistency(reduced[0], reduced[1], source_y, source_x)
    spread = _spread([new, *(_luma(shown(image)) for image in others)], shown_y, shown_x)
    return TileAudit(
        row=shown_y.first,
        column=shown_x.first,
        rows=len(shown_y.counts),
        columns=len(shown_x.counts),
        pixels=int(source_y.counts.sum() * source_x.counts.sum()),
        squared_error=error,
        similarity=similarity,
        sharp_before=sharp_old,
        sharp_after=sharp_new,
        delta_e=_levels(deltaE_ciede2000(*(rgb2lab(image) for image in colors)), _DELTA_E),
        invention=_levels(invention, _INVENTION),
        spread=b"" if spread is None else _levels(spread, _SPREAD),
    )


def combine(tiles: Sequence[TileAudit], facts: ImageFacts) -> tuple[AuditScores, dict[str, Map]]:
    """The scores of an image from its tiles, in any order, and its maps by name: ``invention``, and ``uncertainty``
    where all tiles have one."""
    rows, columns = (
        -(-min(source, work, output) // CELL)
        for source, work, output in (
            (facts.height, facts.work_height, facts.output_height),
            (facts.width, facts.work_width, facts.output_width),
        )
    )

    def whole(name: str) -> Map:
        found = np.zeros((rows, columns), np.uint8)
        for tile in tiles:
            part = np.frombuffer(getattr(tile, name), np.uint8).reshape(tile.rows, tile.columns)
            found[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] = part
        return found

    def total(name: str) -> float:
        return sum(float(getattr(tile, name)) for tile in sorted(tiles, key=lambda tile: (tile.row, tile.column)))

    maps = {"invention": whole("invention")}
    if all(tile.spread for tile in tiles if tile.rows * tile.columns):
        maps["uncertainty"] = whole("spread")
    delta_e, pixels = whole("delta_e"), total("pixels")
    error = total("squared_error") / pixels
    sharp_before = total("sharp_before")
    scores = AuditScores(
        psnr=_MOST_PSNR if error == 0 else min(_MOST_PSNR, -10 * float(np.log10(error))),
        ssim=total("similarity") / pixels,
        delta_e=float(delta_e.mean()) * _DELTA_E,
        delta_e_90=float(np.percentile(delta_e, 90)) * _DELTA_E,
        sharpness=float(np.sqrt(total("sharp_after") / sharp_before)) if sharp_before else None,
        invention=float(maps["invention"].mean()) * _INVENTION,
        invented=float((maps["invention"] > 127).mean()),
        spread=float(maps["uncertainty"].mean()) * _SPREAD if "uncertainty" in maps else None,
        regions=None
        if facts.regions is None
        else tuple(replace(region, invention=_within(region, maps["invention"], facts)) for region in facts.regions),
    )
    return scores, maps


def picture(name: str, values: Map) -> bytes:
    """The map of this name as a PNG file whose text says what it is."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text("Title", f"{name} map")
    text.add_text("Description", f"{_TEXTS[name]}, as grey 0 to 255; one pixel for {CELL} x {CELL} of the source")
    Image.fromarray(values).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def picture_uri(output_uri: str, path: str, name: str) -> str:
    """Where the picture of the map ``name`` of the output at ``path`` below ``output_uri`` lies."""
    return store.place(output_uri, AUDIT_FOLDER, f"{path}.{name}.png")


def write(output_uri: str, path: str, maps: Mapping[str, Map]) -> None:
    """Put the pictures of an output's maps where they belong, and remove those of an earlier output.

    Raises StoreError.
    """
    for name in _TEXTS:
        uri = picture_uri(output_uri, path, name)
        if name in maps:
            store.write_atomic(uri, picture(name, maps[name]))
        elif store.exists(uri):  # a role that may only put objects may not delete what does not exist either
            store.delete(uri)


def maps(output_uri: str, row: Mapping[str, Any]) -> dict[str, str]:
    """The pictures there are of the output that a row of the run log speaks of: URI by name of the map.

    ``row`` needs ``output_path``, ``audit_invention`` and ``audit_spread``.
    """
    measured = {"invention": row["audit_invention"], "uncertainty": row["audit_spread"]}
    if row["output_path"] is None:
        return {}
    found = {name: picture_uri(output_uri, row["output_path"], name) for name in measured if measured[name] is not None}
    return {name: uri for name, uri in found.items() if store.exists(uri)}


# --- geometry ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """One axis of a tile, with pixels of some size, and the cells on it.

    ``place`` is what of the tile's own pixels becomes the ``length`` pixels. ``edges`` bound the cells, in these
    pixels; besides those that are the tile's to answer for (``mine``) a neighbor at either end, to fit windows. Where
    all cells are of one size (``side``, else 0), ``missing`` is what the first and the last lack of it.
    """

    scale: float  # pixels for one of the source
    place: tuple[float, float]
    length: int
    edges: NDArray[np.int64]
    mine: slice
    first: int  # of the image's cells: where ``mine`` begins
    side: int
    missing: tuple[int, int]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Pixels of each of ``mine``."""
        return np.diff(self.edges)[self.mine]


def _axes(start: int, length: int, work: int, output: int, source: int, overlap: int) -> tuple[_Axis, _Axis]:
    """The axis of a tile at the size that is shown, and at the source's; of these sizes the smaller ones."""
    shown = min(work, output)
    grid = min(source, shown)
    bounds = np.minimum(np.arange(-(-grid // CELL) + 1) * CELL, grid)
    centers = (bounds[:-1] + bounds[1:]) * work / (2 * grid)
    begin = start + overlap // 2 if start > 0 else 0
    end = start + length - (overlap - overlap // 2) if start + length < work else work
    own = np.flatnonzero((begin <= centers) & (centers < end))
    first, last = (int(own[0]), int(own[-1]) + 1) if own.size else (0, 0)

    def axis(size: int) -> _Axis:
        low, high = -(-start * size // work), (start + length) * size // work
        if low >= high:  # less than a pixel
            low = min(start * size // work, size - 1)
            high = low + 1
        place = (max(0.0, low * work / size - start), min(float(length), high * work / size - start))
        edges = np.rint(bounds * (size / grid)).astype(np.int64)
        before = int(first > 0 and edges[first] > low)
        after = int(last < len(bounds) - 1 and edges[last] < high)
        whole = edges[first - before : last + after + 1]
        used = np.clip(whole, low, high)
        sides = np.diff(whole)
        even = len(sides) > 0 and (sides[:-1] == sides[0]).all() and sides[-1] <= sides[0]
        missing = used[0] - whole[0], whole[0] + len(sides) * sides[0] - used[-1] if even else 0
        return _Axis(
            scale=size / grid,
            place=place,
            length=high - low,
            edges=used - low,
            mine=slice(before, before + last - first),
            first=first,
            side=int(sides[0]) if even else 0,
            missing=(int(missing[0]), int(missing[1])),
        )

    return axis(shown), axis(grid)


def _resized(
    image: FloatImage, down: _Axis, across: _Axis, of_down: _Axis | None = None, of_across: _Axis | None = None
) -> FloatImage:
    """A tile [h, w, C] at the size of the axes; it has its own size, or that of the axes ``of_...``."""
    top, bottom = _moved(down, of_down)
    left, right = _moved(across, of_across)
    return resample.resize_part(image, (left, top, right, bottom), across.length, down.length, clip=False)


def _moved(axis: _Axis, of: _Axis | None) -> tuple[float, float]:
    if of is None:
        return axis.place
    factor = of.length / (of.place[1] - of.place[0])
    low, high = ((one - of.place[0]) * factor for one in axis.place)
    return max(0.0, low), min(float(of.length), high)


# --- measures ------------------------------------------------------------------------------------------------------


def _luma(image: FloatImage) -> Plane:
    return np.asarray(cv2.transform(image, color.LUMA[None]), np.float32)


def _cell_sums(plane: FloatImage, down: _Axis, across: _Axis, neighbors: bool = False) -> Sums:
    """Sums of [h, w] or [h, w, C] over the cells, with or without those that are not the tile's own."""
    if down.side and across.side:  # four times as fast as the integral
        plane = plane[down.edges[0] : down.edges[-1], across.edges[0] : across.edges[-1]]
        if any((*down.missing, *across.missing)):
            plane = cv2.copyMakeBorder(plane, *down.missing, *across.missing, cv2.BORDER_CONSTANT)
        size = (len(across.edges) - 1, len(down.edges) - 1)
        found: Sums = cv2.resize(plane, size, interpolation=cv2.INTER_AREA).astype(np.float64)
        found *= down.side * across.side
    else:
        total = cv2.integral(plane, sdepth=cv2.CV_64F)
        found = np.diff(np.diff(total[np.ix_(down.edges, across.edges)], axis=0), axis=1)
    return found if neighbors else found[down.mine, across.mine]


def _smooth(plane: Plane, reach: int, down: _Axis, across: _Axis) -> Plane:
    """Two passes of a box that reaches so many source pixels to either side."""
    size = (2 * round(reach * across.scale) + 1, 2 * round(reach * down.scale) + 1)
    once = cv2.blur(plane, size, borderType=cv2.BORDER_REFLECT)
    return np.asarray(cv2.blur(once, size, borderType=cv2.BORDER_REFLECT), np.float32)


def _invention(old: Plane, new: Plane, down: _Axis, across: _Axis) -> tuple[Sums, float, float]:
    """Invention of each cell, and the sums of squares of the finest band before and after."""
    smoothed = [old, *(_smooth(old, reach, down, across) for reach in _BANDS)]
    bands = [finer - coarser for finer, coarser in itertools.pairwise(smoothed)]
    detail = new - _smooth(new, _DETAIL, down, across)
    finest = new - _smooth(new, _BANDS[0], down, across)

    def sums(one: Plane, other: Plane) -> Sums:
        return _cell_sums(one * other, down, across, neighbors=True)

    size = len(bands)
    counts = np.diff(down.edges)[:, None] * np.diff(across.edges).astype(np.float64)
    gram = np.empty((*counts.shape, size, size))
    for i in range(size):
        for j in range(i + 1):
            gram[..., i, j] = gram[..., j, i] = sums(bands[i], bands[j])
    cross = np.stack([sums(band, detail) for band in bands], axis=-1)
    energy = sums(detail, detail)

    damped = _windows(gram.reshape(*counts.shape, -1)).reshape(gram.shape)
    damped += (_windows(counts[..., None]) * ROUNDING**2)[..., None] * np.eye(size)
    weights = np.linalg.solve(damped, _windows(cross)[..., None])[..., 0]
    explained = 2 * (weights * cross).sum(-1) - np.einsum("...i,...ij,...j", weights, gram, weights)
    invention = np.clip(energy - explained, 0.0, None) / (energy + counts * VISIBLE**2)
    mine = down.mine, across.mine
    sharp_new = _cell_sums(finest * finest, down, across).sum()
    return np.minimum(invention[mine], 1.0), float(gram[(*mine, 0, 0)].sum()), float(sharp_new)


def _windows(sums: Sums) -> Sums:
    """Sums over 3 x 3 cells, of [rows, columns, C]."""
    found = cv2.boxFilter(sums, -1, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(found).reshape(sums.shape)


def _consistency(old: Plane, new: Plane, down: _Axis, across: _Axis) -> tuple[float, float]:
    """Sum of squared differences, and sum of SSIM, each over the pixels of the tile's own cells."""
    count = down.counts[:, None] * across.counts.astype(np.float64)

    def mean(plane: Plane) -> Sums:
        return _cell_sums(plane, down, across) / count

    mean_old, mean_new, error = mean(old), mean(new), mean((new - old) ** 2)
    squares = mean(old * old), mean(new * new)
    variances = squares[0] - mean_old**2 + squares[1] - mean_new**2
    covariance = (squares[0] + squares[1] - error) / 2 - mean_old * mean_new
    likeness = (2 * mean_old * mean_new + _C1) / (mean_old**2 + mean_new**2 + _C1)
    similarity = likeness * (2 * covariance + _C2) / (variances + _C2)
    return float((error * count).sum()), float((similarity * count).sum())


def _spread(restored: Sequence[Plane], down: _Axis, across: _Axis) -> Sums | None:
    """Of each cell, the standard deviation over restorations; None for a single one."""
    if len(restored) < 2:
        return None
    variance = np.var(np.stack(restored), axis=0, ddof=1, dtype=np.float32)
    count = down.counts[:, None] * across.counts
    found: Sums = np.sqrt(np.clip(_cell_sums(variance, down, across), 0.0, None) / count)
    return found


def _levels(values: Sums, level: float) -> bytes:
    return np.clip(np.rint(values / level), 0, 255).astype(np.uint8).tobytes()


def _within(region: Region, values: Map, facts: ImageFacts) -> float:
    """Mean of the map over the cells that a region touches."""
    rows, columns = values.shape
    # a cell of an output that is smaller than its source has more than CELL of its pixels
    down = CELL * max(1.0, facts.height / min(facts.work_height, facts.output_height))
    across = CELL * max(1.0, facts.width / min(facts.work_width, facts.output_width))
    top, left = min(int(region.y / down), rows - 1), min(int(region.x / across), columns - 1)
    bottom, right = int(np.ceil((region.y + region.height) / down)), int(np.ceil((region.x + region.width) / across))
    return float(values[top : max(bottom, top + 1), left : max(right, left + 1)].mean()) * _INVENTION
