"""Throughput against the number of restoring workers, whose engine sleeps instead of computing.

    python benchmarks/scale_out.py --folder /scratch

A worker with a card of its own restores one window after the other, each in the same time. Here it sleeps for that
time, so that one machine can have many of them; all else is the real pipeline: reading, tiles, the ledger, the gate,
writing, the run log. The images have one window each. Every worker notes when it slept; ``efficiency`` is the share of
the time of all workers in which they did, without the first and the last fifth of the run. Rows that reach the driver
would tell less: they come a block at a time.

Prints JSON and a table, and exits with 1 if the largest number of workers is less than ``--limit`` efficient.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import load, make_photographs, table

from supir_batch import pipeline, runlog
from supir_batch.engine import Device, LanczosEngine
from supir_batch.events import Listener
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import make_plan
from supir_batch.types import FloatImage, ModelRef, TileTicket


class SleepingEngine(LanczosEngine):
    """Takes as long as a card would, and leaves the cores to others."""

    def __init__(self, seconds: float, notes: Path) -> None:
        self._seconds, self._note = seconds, notes / str(os.getpid())

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        """The tiles themselves, after some seconds for each."""
        began = time.time()
        time.sleep(self._seconds * len(tiles))
        with self._note.open("a") as file:
            file.write(f"{began} {time.time()}\n")
        return super().restore(tickets, tiles)


def load_sleeping(seconds: float, notes: Path, model: ModelRef | None, device: Device) -> SleepingEngine:
    """The engine, as the pipeline asks for it."""
    return SleepingEngine(seconds, notes)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for sources and outputs; 1 GB")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="of one window")
    parser.add_argument("--images", type=int, default=40, help="for each worker")
    parser.add_argument("--limit", type=float, default=0.95)
    given = parser.parse_args()
    make_photographs(given.folder / "in", max(given.workers) * given.images, "jpg")
    rows = []
    for workers in given.workers:
        before = load()
        efficiency = _efficiency(given.folder, workers, workers * given.images, given.seconds)
        rows.append(
            {
                "workers": workers,
                "windows per second": round(efficiency * workers / given.seconds, 3),
                "efficiency": round(efficiency, 3),
                "load": before,
            }
        )
    print(json.dumps({"seconds": given.seconds, "images per worker": given.images, "runs": rows}))
    print(table(rows))
    sys.exit(rows[-1]["efficiency"] < given.limit)


def _efficiency(folder: Path, workers: int, images: int, seconds: float) -> float:
    """Share of the workers' time in which they slept, in the middle of the run."""
    out, notes = folder / f"out-{workers}", folder / f"notes-{workers}"
    for made in (out, notes):
        shutil.rmtree(made, ignore_errors=True)
    notes.mkdir()
    manifest = folder / "manifest.yaml"
    sections: dict[str, Any] = {
        "inputs": str((folder / "in").resolve()),
        "output": {"uri": str(out.resolve())},
        "engine": {"name": "lanczos", "upscale": 1},
        "runtime": {"actors": workers},
    }
    manifest.write_text(json.dumps(sections))
    loaded = load_manifest(str(manifest))
    jobs = [todo.job for todo in make_plan(loaded, str(manifest), "").todo][:images]

    def on_row(row: dict[str, Any]) -> None:
        if row["status"] != "done":
            raise SystemExit(row["failure_message"])

    sleeping = functools.partial(load_sleeping, seconds, notes.resolve())
    listener = Listener(on_row, lambda text: print(text, file=sys.stderr))
    pipeline.run(jobs, loaded.runtime, listener, runlog.new_run_id(), threading.Event(), sleeping)
    shutil.rmtree(out)
    lines = [line.split() for note in notes.iterdir() for line in note.read_text().splitlines()]
    slept = [(float(began), float(ended)) for began, ended in lines]
    first, last = min(began for began, _ in slept), max(ended for _, ended in slept)
    low, high = first + 0.2 * (last - first), last - 0.2 * (last - first)
    inside = sum(max(0.0, min(ended, high) - max(began, low)) for began, ended in slept)
    return inside / (workers * (high - low))


if __name__ == "__main__":
    main()
