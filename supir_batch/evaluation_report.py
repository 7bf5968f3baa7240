"""What an evaluation leaves behind: every number (Parquet), the means (Markdown), a picture grid per degradation."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from supir_batch import encode, resample, store
from supir_batch.evaluate import NO_DEGRADATION, SAMPLED, STAGE_1, Comparison, LeftOut
from supir_batch.identity import settings_hash
from supir_batch.types import FloatImage, Settings
from supir_model.metrics import HIGHER_IS_BETTER, METRICS, NO_REFERENCE
from supir_model.training.degradations import BENCHMARKS

SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("degradation", pa.string()),
        ("method", pa.string()),
        ("settings_sha256", pa.string()),  # null for methods that do not sample
        ("seconds", pa.float64()),
        *((metric, pa.float64()) for metric in METRICS),
    ]
)

_LABELS = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "gmsd": "GMSD",
    "gradient": "gradient",
    "lpips": "LPIPS",
    "niqe": "NIQE",
    "musiq": "MUSIQ",
    "maniqa": "MANIQA",
    "clipiqa": "CLIP-IQA",
}
_ARROWS = {True: " ↑", False: " ↓", None: " →1"}
_GRID_ROWS = 16
_CROP = 160  # pixels of the photograph along a side of its crop
_CELL = 320  # pixels of the grid: a crop is shown at twice its size, so that its pixels can be seen
_GAP = 6
_LINE = 32  # height of a line of text

_Pictures = dict[str, Image.Image]  # column of the grid to its picture


@dataclass
class Evaluation:
    """Collects comparisons and writes them; of the pictures it keeps crops only, of some photographs evenly spread.

    photographs: how many there will be.
    """

    photographs: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, dict[str, _Pictures]] = field(default_factory=dict)  # by degradation and photograph
    unavailable: dict[str, str] = field(default_factory=dict)  # metric to reason
    left_out: list[LeftOut] = field(default_factory=list)
    _seen: dict[str, int] = field(default_factory=dict)  # photographs so far, by degradation

    def add(self, found: Comparison | LeftOut) -> None:
        """Keep the numbers and, for the grid, crops."""
        place = self._seen.get(found.degradation, 0)
        self._seen[found.degradation] = place + 1
        if isinstance(found, LeftOut):
            self.left_out.append(found)
            return
        for one in found.results:
            self.rows.append(
                {
                    "image": found.image,
                    "width": one.pixels.shape[1],
                    "height": one.pixels.shape[0],
                    "degradation": found.degradation,
                    "method": one.method,
                    "settings_sha256": None if one.settings is None else settings_hash(one.settings),
                    "seconds": one.seconds,
                    **found.values[one.method],
                }
            )
        self.unavailable |= found.unavailable
        # the first photograph of each of _GRID_ROWS equal shares
        if place == 0 or place * _GRID_ROWS // self.photographs > (place - 1) * _GRID_ROWS // self.photographs:
            self.pictures.setdefault(found.degradation, {})[found.image] = _pictures(found)

    def write(self, folder: str, settings: Settings, command: str) -> str:
        """Write ``evaluation.parquet``, ``evaluation.md`` and ``grid-*.jpg`` to a folder or prefix; returns the table.

        Each file appears whole.
        """
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows, SCHEMA), buffer)
        store.write_atomic(store.join(folder, "evaluation.parquet"), buffer.getvalue())
        for degradation, pictures in self.pictures.items():
            store.write_atomic(store.join(folder, f"grid-{degradation}.jpg"), grid(pictures))
        text = self.markdown(settings, command)
        store.write_atomic(store.join(folder, "evaluation.md"), text.encode())
        return text

    def markdown(self, settings: Settings, command: str) -> str:
        """The means over all images, one table per degradation."""
        lines = [f"# Evaluation of {settings.engine_name}", "", f"    {command}", "", *_conditions(settings), ""]
        for degradation in self._seen:
            rows = [row for row in self.rows if row["degradation"] == degradation]
            lines += [*_table(degradation, rows, self.photographs), ""]
        lines += [
            "Means over the images. PSNR (at most 100), SSIM (Wang et al. 2004, Gaussian window of 11 pixels) and",
            "MS-SSIM over RGB, GMSD (Xue et al. 2014) over luma, all on results rounded to 8 bits. Gradient: energy of",
            "neighbor differences relative to the original's; below 1 is softness, above 1 noise. Seconds are of the",
            "method itself. Noise of a degradation and seed of the sampler follow from the bytes of the photograph.",
        ]
        for reason in dict.fromkeys(self.unavailable.values()):
            names = [_LABELS[name] for name, why in self.unavailable.items() if why == reason]
            lines += ["", f"Unavailable: {', '.join(names)}, because {reason}."]
        lines += [line for one in self.left_out for line in ("", f"Left out ({one.degradation}): {one.reason}")]
        return "\n".join(line.rstrip() for line in lines) + "\n"


def grid(pictures: Mapping[str, _Pictures]) -> bytes:
    """JPEG of one row per photograph, by name, and one labelled column per picture, of at most a cell each."""
    columns = list(dict.fromkeys(label for row in pictures.values() for label in row))
    font, step = ImageFont.load_default(22), _CELL + _GAP
    size = (len(columns) * step + _GAP, _LINE + len(pictures) * (_CELL + _LINE))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((_GAP + column * step, 2), label, fill="black", font=font)
    for row, (name, cells) in enumerate(pictures.items()):
        top = _LINE + row * (_CELL + _LINE)
        for column, label in enumerate(columns):
            if label in cells:
                sheet.paste(cells[label], (_GAP + column * step, top))
        draw.text((_GAP, top + _CELL + 2), name[-100:], fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _pictures(found: Comparison) -> _Pictures:
    """The whole input with the crop framed, then the crop of the input, stage 1, every sampled result, the original."""
    shown = {"input": found.given}
    for one in found.results:
        if one.method == STAGE_1 or one.method.startswith(SAMPLED):
            shown[one.method] = one.pixels
    if found.original is not None:
        shown["original"] = found.original
    top, left, side = _busiest(found.given if found.original is None else found.original)
    pictures = {"whole": _whole(found.given, top, left, side)}
    for label, pixels in shown.items():
        crop = Image.fromarray(encode.quantize(pixels[top : top + side, left : left + side], 8))
        pictures[label.removeprefix(f"{SAMPLED}, ")] = crop.resize((_CELL, _CELL), Image.Resampling.NEAREST)
    return pictures


def _whole(pixels: FloatImage, top: int, left: int, side: int) -> Image.Image:
    small = resample.reduce_to(pixels, _CELL)
    picture, factor = Image.fromarray(encode.quantize(small, 8)), small.shape[1] / pixels.shape[1]
    frame = [round(at * factor) for at in (left, top, left + side - 1, top + side - 1)]
    ImageDraw.Draw(picture).rectangle(frame, outline="red", width=2)
    return picture


def _conditions(settings: Settings) -> list[str]:
    if settings.engine != "supir":
        return [f"- engine {settings.engine}"]
    tau = "off" if settings.restoration_tau is None else f"{settings.restoration_tau:g}"
    if settings.restoration_tau is not None and settings.restoration_to_end:
        tau += " to the end"
    return [
        f"- model {settings.weights}, `{settings.model_sha256}`, precision {settings.precision}",
        f"- preset {settings.preset}: sampler {settings.sampler}, {settings.steps} steps, "
        f"guidance {settings.cfg_start:g} to {settings.cfg_end:g}, control scale {settings.control_scale:g}, "
        f"restoration tau {tau}, churn {settings.churn:g}, eta {settings.eta:g}, noise {settings.noise:g}, "
        f"colors {settings.color_fix}",
        f'- captions: {settings.caption_mode}, then "{settings.positive_prompt}"; '
        f'negative prompt "{settings.negative_prompt}"',
    ]


def _table(degradation: str, rows: Sequence[dict[str, Any]], photographs: int) -> list[str]:
    metrics = NO_REFERENCE if degradation == NO_DEGRADATION else METRICS
    methods = list(dict.fromkeys(row["method"] for row in rows))
    images = len({row["image"] for row in rows})
    count = f"{images}" if images == photographs else f"{images} of {photographs}"
    made = "as they are" if degradation == NO_DEGRADATION else str(BENCHMARKS[degradation])
    head = [f"{_LABELS[m]}{_ARROWS[HIGHER_IS_BETTER[m]]}" for m in metrics]
    lines = [
        f"## {degradation}: {made}, {count} {'image' if photographs == 1 else 'images'}",
        "",
        f"| {' | '.join(['method', *head, 'seconds'])} |",
        "|---|" + "---:|" * (len(metrics) + 1),
    ]
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        cells = [_mean([row.get(key) for row in of_method], key) for key in (*metrics, "seconds")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, "", f"![{degradation}](grid-{degradation}.jpg)"] if rows else lines


def _mean(values: Sequence[float | None], metric: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "unavailable"
    digits = 2 if metric in ("psnr", "gradient", "niqe", "musiq", "seconds") else 3
    missing = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{math.fsum(known) / len(known):.{digits}f}{missing}"


def _busiest(pixels: FloatImage) -> tuple[int, int, int]:
    """Top, left and side of the square with most detail: roots of contrasts are summed, so no single edge decides."""
    height, width = pixels.shape[:2]
    side = min(_CROP, height, width)
    grey = pixels.mean(axis=2, dtype=np.float64)
    detail = np.zeros((height, width))
    detail[1:, 1:] = np.sqrt(np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:])
    sums = np.pad(detail.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(int(squares.argmax()), squares.shape)
    return int(top), int(left), side
