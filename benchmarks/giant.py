"""Memory of one giant image: a 16-bit TIFF of N megapixels, restored with the lanczos engine.

    python benchmarks/giant.py --folder /scratch

Makes the TIFF (noise over a gradient, deflate, tiles of 512 pixels), runs ``supir-batch run`` on it, and looks every
tenth of a second at the memory of each worker, without the object store that all share. The lanczos engine stands for
all: what an engine holds depends on the size of a tile, not of the image.

Prints JSON and a table of the most memory in bytes that a worker held, and exits with 1 if that is above ``--limit``.
``stages`` are the workers' own figures: the most since a stage began with its last tile, as the record of the image
has them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from common import load, table, watch_run
from numpy.typing import NDArray

from supir_batch.runlog import read_log

_TILE = 512


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, default=400)
    parser.add_argument("--upscale", type=float, default=1.0)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for source and output; 50 bytes for each pixel of the output"
    )
    parser.add_argument("--limit", type=float, default=1.5e9, help="bytes of one worker")
    given = parser.parse_args()
    side = math.isqrt(int(given.megapixels * 1e6))
    source = given.folder / "source" / "giant.tif"
    _make(source, side)
    out = given.folder / "restored"
    shutil.rmtree(out, ignore_errors=True)
    sections = {
        "inputs": str(source.parent.resolve()),
        "output": {"uri": str(out.resolve())},
        "engine": {"name": "lanczos", "upscale": given.upscale},
    }
    before, started = load(), time.monotonic()
    samples = watch_run(given.folder / "manifest.yaml", sections, out, every=0.1)
    seconds = time.monotonic() - started
    row = read_log(str(out)).to_pylist()[-1]
    record = json.loads(Path(f"{row['output_uri']}.json").read_text())
    worker = max((p.memory for sample in samples for p in sample.processes if p.name.startswith("ray::")), default=0)
    peaks = {"any": worker} | {f"{stage['stage']}": stage["peak_memory_bytes"] for stage in record["run"]["stages"]}
    measured = {
        "source": [row["source_width"], row["source_height"], row["bit_depth"]],
        "output": [row["output_width"], row["output_height"]],
        "output_bytes": row["output_bytes"],
        "tiles": row["tiles"],
        "seconds": round(seconds, 1),
        "load": before,
        "worker_bytes": worker,
        "stages": {stage["stage"]: stage["peak_memory_bytes"] for stage in record["run"]["stages"]},
    }
    print(json.dumps(measured))
    print(table([{"worker": name, "GB": round(value / 1e9, 2)} for name, value in peaks.items()]))
    sys.exit(max(peaks.values()) > given.limit)


def _make(path: Path, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    ramp = np.linspace(8_000, 56_000, side, dtype=np.float32)

    def tiles() -> Iterator[NDArray[np.uint16]]:
        for top in range(0, side, _TILE):
            for left in range(0, side, _TILE):
                rows, columns = ramp[top : top + _TILE], ramp[left : left + _TILE]
                smooth = np.stack(
                    [rows[:, None] + 0 * columns, 0 * rows[:, None] + columns, (rows[:, None] + columns) / 2], 2
                )
                noisy = np.clip(smooth + generator.normal(0, 500, smooth.shape), 0, 65535)
                yield np.pad(noisy.astype(np.uint16), [(0, _TILE - len(rows)), (0, _TILE - len(columns)), (0, 0)])

    options: dict[str, Any] = {"tile": (_TILE, _TILE), "compression": "deflate", "photometric": "rgb"}
    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint16, metadata=None, **options)


if __name__ == "__main__":
    main()
