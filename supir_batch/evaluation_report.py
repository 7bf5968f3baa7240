"""What an evaluation leaves behind: every number (Parquet), the means (Markdown), a picture grid per degradation."""

from __future__ import annotations

import io
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from supir_batch import store
from supir_batch.evaluate import NO_DEGRADATION, SAMPLED, STAGE_1, Comparison
from supir_batch.settings import settings_hash
from supir_batch.types import FloatImage, Settings
from supir_model.metrics import FULL_REFERENCE, HIGHER_IS_BETTER, METRICS
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
_GRID_ROWS = 6
_CELL = 256  # pixels
_GAP = 4


_Crops = dict[str, FloatImage]  # column of the grid to its picture


@dataclass
class Evaluation:
    """Collects comparisons and writes them; of the pictures it keeps crops only."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    crops: dict[str, list[_Crops]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def add(self, comparison: Comparison) -> None:
        """Keep the numbers and, for the grid, a crop."""
        for one in comparison.results:
            self.rows.append(
                {
                    "image": comparison.image,
                    "width": one.pixels.shape[1],
                    "height": one.pixels.shape[0],
                    "degradation": comparison.degradation,
                    "method": one.method,
                    "settings_sha256": None if one.settings is None else settings_hash(one.settings),
                    "seconds": one.seconds,
                    **comparison.values[one.method],
                }
            )
        self.unavailable |= comparison.unavailable
        by_method = {one.method: one.pixels for one in comparison.results}
        given = by_method.get("lanczos", by_method.get("input"))
        assert given is not None  # every comparison begins with one of them
        columns = {"input": given, STAGE_1: by_method.get(STAGE_1), SAMPLED: by_method.get(SAMPLED)}
        shown = {name: pixels for name, pixels in columns.items() if pixels is not None}
        if comparison.original is not None:
            shown["original"] = comparison.original
        top, left = _busiest(comparison.original if comparison.original is not None else given)
        crops = {name: np.array(pixels[top : top + _CELL, left : left + _CELL]) for name, pixels in shown.items()}
        self.crops.setdefault(comparison.degradation, []).append(crops)

    def write(self, folder: str, settings: Settings, command: str) -> str:
        """Write ``evaluation.parquet``, ``evaluation.md`` and ``grid-*.jpg`` to a folder or prefix; returns the table.

        Each file appears whole.
        """
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows, SCHEMA), buffer)
        store.write_atomic(store.join(folder, "evaluation.parquet"), buffer.getvalue())
        for degradation, crops in self.crops.items():
            store.write_atomic(store.join(folder, f"grid-{degradation}.jpg"), grid(_spread(crops, _GRID_ROWS)))
        text = self.markdown(settings, command)
        store.write_atomic(store.join(folder, "evaluation.md"), text.encode())
        return text

    def markdown(self, settings: Settings, command: str) -> str:
        """The means over all images, one table per degradation."""
        lines = [f"# Evaluation of {settings.engine_name}", "", f"    {command}", "", *_conditions(settings), ""]
        for degradation in self.crops:
            rows = [row for row in self.rows if row["degradation"] == degradation]
            lines += [*_table(degradation, rows, self.unavailable), ""]
        lines += [
            "Means over the images. PSNR, SSIM (Wang et al. 2004, Gaussian window of 11 pixels) and MS-SSIM over RGB, ",
            "GMSD (Xue et al. 2014) over luma, all on results rounded to 8 bits. Gradient: energy of neighbor",
            "differences relative to the original's; below 1 is softness, above 1 noise. Seconds are of the method",
            "itself.",
        ]
        for reason in dict.fromkeys(self.unavailable.values()):
            names = [_LABELS[name] for name, why in self.unavailable.items() if why == reason]
            lines += ["", f"Unavailable: {', '.join(names)}, because {reason}."]
        return "\n".join(line.rstrip() for line in lines) + "\n"


def grid(crops: Sequence[_Crops]) -> bytes:
    """JPEG of one row per image and one labelled column per method; crops are [h, w, 3] in [0, 1]."""
    names = list(crops[0])
    header, font = 20, ImageFont.load_default(13)
    width = len(names) * (_CELL + _GAP) - _GAP
    sheet = Image.new("RGB", (width, header + len(crops) * (_CELL + _GAP) - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((column * (_CELL + _GAP) + 4, 2), name, fill="black", font=font)
        for row, images in enumerate(crops):
            pixels = (np.clip(images[name], 0, 1) * 255).round().astype(np.uint8)
            sheet.paste(Image.fromarray(pixels), (column * (_CELL + _GAP), header + row * (_CELL + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _conditions(settings: Settings) -> list[str]:
    if settings.engine != "supir":
        return [f"- engine {settings.engine}"]
    tau = "off" if settings.restoration_tau is None else f"{settings.restoration_tau:g}"
    return [
        f"- model {settings.weights}, `{settings.model_sha256}`, precision {settings.precision}",
        f"- preset {settings.preset}: sampler {settings.sampler}, {settings.steps} steps, "
        f"guidance {settings.cfg_start:g} to {settings.cfg_end:g}, control scale {settings.control_scale:g}, "
        f"restoration tau {tau}, churn {settings.churn:g}, eta {settings.eta:g}, noise {settings.noise:g}, "
        f"colors {settings.color_fix}",
        f"- captions: {settings.caption_mode}",
    ]


def _table(degradation: str, rows: Sequence[dict[str, Any]], unavailable: Container[str]) -> list[str]:
    possible = [m for m in METRICS if degradation != NO_DEGRADATION or m not in FULL_REFERENCE]
    metrics = [m for m in possible if m not in unavailable]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    images = len({row["image"] for row in rows})
    made = "as they are" if degradation == NO_DEGRADATION else str(BENCHMARKS[degradation])
    head = [f"{_LABELS[m]}{_ARROWS[HIGHER_IS_BETTER[m]]}" for m in metrics]
    lines = [
        f"## {degradation}: {made}, {images} {'image' if images == 1 else 'images'}",
        "",
        f"| {' | '.join(['method', *head, 'seconds'])} |",
        "|---|" + "---:|" * (len(metrics) + 1),
    ]
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        cells = [_mean([row[key] for row in of_method], key) for key in (*metrics, "seconds")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float | None], metric: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 2 if metric in ("psnr", "gradient", "niqe", "musiq", "seconds") else 3
    missing = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{math.fsum(known) / len(known):.{digits}f}{missing}"


def _busiest(pixels: FloatImage) -> tuple[int, int]:
    """Where the cell-sized crop with the most contrast between neighbors begins, on a coarse raster."""
    height, width = pixels.shape[:2]
    luma = pixels.mean(axis=2)
    busy = np.abs(np.diff(luma, axis=0))[:, :-1] + np.abs(np.diff(luma, axis=1))[:-1]

    def starts(side: int) -> range:
        return range(0, max(1, side - _CELL + 1), _CELL // 4)

    corners = [(top, left) for top in starts(height) for left in starts(width)]
    return max(corners, key=lambda at: float(busy[at[0] : at[0] + _CELL, at[1] : at[1] + _CELL].sum()))


def _spread(items: Sequence[_Crops], count: int) -> Sequence[_Crops]:
    """At most ``count`` of them, evenly spaced."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]
