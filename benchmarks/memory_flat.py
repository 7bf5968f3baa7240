"""Whether workers grow: their memory over a run of many small images.

    python benchmarks/memory_flat.py --folder /scratch

Small photographs pass through the lanczos engine by ``supir-batch run``; ``--photographs`` different ones are linked
as often as needed, each under a name of its own. Every two seconds the memory of each process that works on pixels is
noted, without the object store that all share. A line through its samples, of the time after ``--skip`` images, gives
bytes per image; its uncertainty (twice the standard error) is told by ten parts of the run, because samples that follow
each other are not independent.

Prints JSON and a table, and exits with 1 if a worker surely grows by more than ``--limit`` bytes per image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import load, make_photographs, table, watch_run

_PARTS = 10  # of a run; the fewest samples that have a slope


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for sources and outputs; 60 kB for each image")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--photographs", type=int, default=200, help="different ones")
    parser.add_argument("--skip", type=int, default=1000, help="first images, in which workers fill their caches")
    parser.add_argument("--limit", type=float, default=2000.0, help="bytes per image, of one worker")
    given = parser.parse_args()
    folder: Path = given.folder / "in"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photographs = make_photographs(given.folder / "photographs", given.photographs, "jpg")
    for i in range(given.images):
        os.link(photographs[i % len(photographs)], folder / f"{i:06d}.jpg")
    out = given.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    sections = {
        "inputs": str(folder.resolve()),
        "output": {"uri": str(out.resolve())},
        "engine": {"name": "lanczos", "upscale": 1},
    }
    before = load()
    samples = watch_run(given.folder / "manifest.yaml", sections, out, every=2.0)
    names, points = dict[int, str](), defaultdict[int, list[tuple[int, int]]](list)
    for sample in samples:
        for process in sample.processes:
            if given.skip <= sample.images < given.images:
                points[process.pid].append((sample.images, process.memory))
                if any(stage in process.name for stage in ("decode_stage", "write_stage", "RestoreStage")):
                    names[process.pid] = "restore" if "RestoreStage" in process.name else "decode, write"
                elif "supir_batch run" in process.name:
                    names[process.pid] = "driver"
    rows = [
        {
            "worker": names[pid],
            "images": f"{points[pid][0][0]} to {points[pid][-1][0]}",
            "MB at first": round(points[pid][0][1] / 1e6, 1),
            "MB at last": round(points[pid][-1][1] / 1e6, 1),
            "bytes per image": round(slope),
            "uncertainty": round(uncertainty),
        }
        for pid in sorted(names)
        if len(points[pid]) >= _PARTS
        for slope, uncertainty in [_slope(np.array(points[pid], dtype=np.float64))]
    ]
    if not rows:
        raise SystemExit(f"no worker was seen {_PARTS} times after {given.skip} images; give more images")
    print(json.dumps({"images": given.images, "load": before, "workers": rows}))
    print(table(rows))
    sys.exit(any(row["bytes per image"] - row["uncertainty"] > given.limit for row in rows))


def _slope(points: np.ndarray) -> tuple[float, float]:
    """Slope of a line through (images, bytes), and twice its standard error, from the means of parts of the run."""
    x, y = np.array([part.mean(axis=0) for part in np.array_split(points, _PARTS)]).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), 2 * float(np.sqrt(covariance[0, 0]))


if __name__ == "__main__":
    main()
