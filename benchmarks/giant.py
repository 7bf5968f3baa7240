"""Memory of one giant image: a 16-bit TIFF of N megapixels, enlarged by 2 with the lanczos engine.

    python benchmarks/giant.py --megapixels 100 --folder /scratch

Makes the TIFF (noise over a gradient, deflate, tiles of 512 pixels), runs ``supir-batch run`` on it, and prints one
line of JSON: sizes, seconds, and the most memory in bytes that a worker held in each stage of the last tile, as the
record beside the output has it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from supir_batch.runlog import read_log

_TILE = 512


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, default=100)
    parser.add_argument("--folder", type=Path, required=True, help="for source and output; 5 GB for 100 megapixels")
    given = parser.parse_args()
    side = math.isqrt(int(given.megapixels * 1e6))
    source = given.folder / "source" / "giant.tif"
    _make(source, side)
    restored = given.folder / "restored"
    manifest = given.folder / "manifest.yaml"
    manifest.write_text(
        f"inputs: {source.parent.resolve()}\noutput: {{uri: {restored.resolve()}}}\n"
        "engine: {name: lanczos, upscale: 2}\n"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "supir_batch", "run", str(manifest)], check=True, stdout=sys.stderr)
    row = read_log(str(restored)).to_pylist()[-1]
    record = json.loads(Path(f"{row['output_uri']}.json").read_text())
    measured = {
        "source": [row["source_width"], row["source_height"], row["bit_depth"]],
        "output": [row["output_width"], row["output_height"]],
        "output_bytes": row["output_bytes"],
        "tiles": row["tiles"],
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": {stage["stage"]: stage["peak_memory_bytes"] for stage in record["run"]["stages"]},
    }
    print(json.dumps(measured))


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
