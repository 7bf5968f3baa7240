"""What the frame costs: the lanczos engine on many small images against a bare loop that does the same by hand.

    python benchmarks/pipeline_overhead.py --folder /scratch

The images are photographs of 512 x 384 pixels, enlarged by 2. The bare loop, in one process, decodes with libvips,
resizes with Pillow and encodes with libvips, with the settings of the pipeline, and writes the file: no hash, no
metadata, no record, no gate, no check, no flush to the disk. The audit, which is no part of restoring, is switched off
(benchmarks/audit_cost.py measures it). Both are measured in turns. Of each turn the first images (``--skip``, which
hold Ray's start) do not count; the last ones, when the stream runs empty, do.

Prints JSON and a table, and exits with 1 if the median ratio of times per image is above ``--limit``. Where other
processes compete for the cores the ratio of processor time says more; half of it is what two free cores could reach.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyvips
from common import load, make_photographs, outputs, table, watch_run
from PIL import Image

_UPSCALE = 2


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for sources and outputs; 5 GB for 2,000 images")
    parser.add_argument("--images", type=int, default=2000, help="in all turns together")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--skip", type=int, default=64, help="first images of a turn that do not count")
    parser.add_argument("--format", choices=("png", "jpg", "tif"), default="png")
    parser.add_argument("--limit", type=float, default=1.15)
    given = parser.parse_args()
    each = given.images // given.turns
    if each <= given.skip:
        parser.error(f"{each} images in a turn, of which the first {given.skip} do not count; more images, fewer turns")
    turns = []
    for turn in range(given.turns):
        folder = given.folder / f"{given.format}-{turn}"
        shutil.rmtree(folder, ignore_errors=True)
        paths = make_photographs(folder / "in", each, given.format)
        bare = _bare(paths, folder / "bare", given.skip)
        before = load()
        frame = _frame(folder, each, given.skip)
        turns.append(
            {
                "bare ms": round(bare[0] * 1e3, 1),
                "frame ms": round(frame[0] * 1e3, 1),
                "ratio": round(frame[0] / bare[0], 3),
                "bare processor ms": round(bare[1] * 1e3, 1),
                "frame processor ms": round(frame[1] * 1e3, 1),
                "processor ratio": round(frame[1] / bare[1], 3),
                "load": before,
            }
        )
        shutil.rmtree(folder)
    ratio = statistics.median(turn["ratio"] for turn in turns)
    print(json.dumps({"format": given.format, "images": each * given.turns, "ratio": ratio, "turns": turns}))
    print(table(turns))
    sys.exit(ratio > given.limit)


def _bare(paths: Sequence[Path], folder: Path, skip: int) -> tuple[float, float]:
    """Seconds and processor seconds per image of the bare loop."""
    folder.mkdir()
    for i, path in enumerate(paths):
        if i == skip:
            started, used = time.perf_counter(), time.process_time()
        levels = pyvips.Image.new_from_file(str(path), access="sequential").numpy()
        image = Image.fromarray(levels)
        image = image.resize((image.width * _UPSCALE, image.height * _UPSCALE), Image.Resampling.LANCZOS)
        _save(pyvips.Image.new_from_array(np.asarray(image)), folder / path.name)
    count = len(paths) - skip
    return (time.perf_counter() - started) / count, (time.process_time() - used) / count


def _save(image: pyvips.Image, path: Path) -> None:
    """As supir-batch does by default."""
    if path.suffix == ".png":
        image.pngsave(str(path), compression=6)
    elif path.suffix == ".jpg":
        image.jpegsave(str(path), Q=95, subsample_mode="off", optimize_coding=True)
    else:
        image.tiffsave(str(path), compression="deflate", predictor="horizontal")


def _frame(folder: Path, count: int, skip: int) -> tuple[float, float]:
    """Seconds and processor seconds per image of ``supir-batch run``."""
    out = folder / "out"
    sections = {
        "inputs": str((folder / "in").resolve()),
        "output": {"uri": str(out.resolve())},
        "engine": {"name": "lanczos", "upscale": _UPSCALE},
        "audit": {"enabled": False},
    }
    samples = watch_run(folder / "manifest.yaml", sections, out, every=0.5)
    moments = sorted(path.stat().st_mtime for path in outputs(out))
    if len(moments) != count:
        raise SystemExit(f"{out}: holds {len(moments)} images instead of {count}")
    first = next(sample for sample in samples if sample.images >= skip)
    last = next((sample for sample in samples if sample.images == count), samples[-1])
    seconds = (moments[-1] - moments[skip - 1]) / (count - skip)
    return seconds, (last.seconds - first.seconds) / (last.images - first.images)


if __name__ == "__main__":
    main()
