"""What the audit costs: its processor time against that of decoding, gate and writing of the same lanczos image.

    python benchmarks/audit_cost.py --folder /scratch

Photographs of 512 x 384 pixels, enlarged by 2, go through the stages' own functions in one process on one core: decode,
gate, audit, write (with the maps, the record and the check that every output gets). The times of each are added up over
all images, so that other work on the machine hits all of them alike. Nothing is looked for (``regions``), as nothing is
generated; that is measured on the same photographs by itself. Prints a table, and the audit's share of the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import make_photographs, table

os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")  # as in the workers of a run
os.environ.setdefault("VIPS_CONCURRENCY", "1")

from supir_batch import audit, gate, write
from supir_batch.color import Tone
from supir_batch.decode import decode
from supir_batch.identity import settings_hash
from supir_batch.resolve import resolve
from supir_batch.settings import Manifest
from supir_batch.types import Job, Source

_UPSCALE = 2.0


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for sources and outputs")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--format", choices=("png", "jpg", "tif"), default="png")
    given = parser.parse_args()
    folder = given.folder / "audit-cost"
    shutil.rmtree(folder, ignore_errors=True)
    paths = make_photographs(folder / "in", given.images, given.format)
    manifest = Manifest.model_validate(
        {"inputs": [str(folder)], "output": {"uri": str(folder)}, "engine": {"name": "lanczos", "upscale": _UPSCALE}}
    )
    spent: Counter[str] = Counter()
    megapixels = 0.0
    for path in paths:
        megapixels += _one(path, folder / "out", manifest, spent)
    shutil.rmtree(folder)
    rest = spent["decode"] + spent["gate"] + spent["write"]
    print(table([{"step": step, "ms per megapixel": round(1e3 * spent[step] / megapixels, 1)} for step in spent]))
    print(f"audit / (decode + gate + write) = {spent['audit'] / rest:.2f}, of {megapixels:.0f} megapixels of outputs")


def _one(path: Path, output: Path, manifest: Manifest, spent: Counter[str]) -> float:
    """Restore one photograph; returns the megapixels of its output."""
    source = Source(path.stem, str(path), "benchmark", path.name, "v", path.stat().st_size)
    chosen = resolve(manifest, source, "")
    job = Job(source, chosen, settings_hash(chosen), str(output / path.stem), str(output))
    with _timed(spent, "decode"):
        (tile,) = decode(job, 1)
    ticket = tile.ticket
    if ticket.facts is None or ticket.box is None:
        raise SystemExit(f"{path}: {ticket.failure}")
    with _timed(spent, "gate"):
        scores = gate.measure(tile.pixels, tile.pixels, Tone(ticket.facts.tone, ticket.facts.tone_curve))
    with _timed(spent, "audit"):
        measured = audit.measure(tile.pixels, tile.pixels, ticket.facts, ticket.box, chosen.overlap)
    with _timed(spent, "write"):
        outcome = write.write(dataclasses.replace(ticket, scores=scores), tile.pixels, tile.carried, look=False)
    with _timed(spent, "audit"):  # what is left of it in the writer
        _, maps = audit.combine([measured], ticket.facts)
        audit.write(str(output), path.name, maps)
    if outcome is None or outcome.status != "done":
        raise SystemExit(f"{path}: {outcome and outcome.ticket.failure}")
    return ticket.facts.output_width * ticket.facts.output_height / 1e6


@contextmanager
def _timed(spent: Counter[str], step: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[step] += time.process_time() - started


if __name__ == "__main__":
    main()
