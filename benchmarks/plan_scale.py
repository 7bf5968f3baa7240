"""Planning at scale: a list of N images against a run log of N done rows, and against none.

    python benchmarks/plan_scale.py --folder /scratch

Makes its data in the folder: a list as Parquet and as CSV (``uri``, ``sha256``), N outputs with their records (empty
files), and a log in parts of 256 rows as runs leave it. Merges the parts, as the next run would, then plans; each in a
process of its own, whose peak memory counts. Prints one line of JSON and a table; exits 1 when planning took more than
10 seconds or 1 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from supir_batch import runlog
from supir_batch.bookkeeping import peak_memory_bytes
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import make_plan
from supir_batch.types import Outcome, TileTicket

_SECONDS, _BYTES = 10, 10**9
_PART = 256


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for lists, log and outputs: 4 GB, 2 N + 1 files")
    parser.add_argument("--images", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in the child: compact, or a manifest
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(_measure(given.folder, given.measure)))
        return
    _make(given.folder, given.images)
    asked = ["compact"] + [f"{kind}-{state}" for kind in ("parquet", "csv") for state in ("done", "new")]
    measured = {}
    for one in asked:
        command = [sys.executable, __file__, "--folder", str(given.folder), "--measure", one]
        measured[one] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps({"images": given.images, **measured}))
    print(f"\n| {given.images:,} images | seconds | of a core | peak memory | to do | done |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, one in measured.items():
        counts = f"{one.get('todo', '')} | {one.get('done', '')}"
        times = f"{one['seconds']:.1f} | {one['cpu_seconds']:.1f}"
        print(f"| {name} | {times} | {one['peak_bytes'] / 1e6:.0f} MB | {counts} |")
    plans = [one for name, one in measured.items() if name != "compact"]
    sys.exit(any(one["seconds"] > _SECONDS or one["peak_bytes"] > _BYTES for one in plans))


def _measure(folder: Path, what: str) -> dict[str, Any]:
    started, processed, counts = time.perf_counter(), time.process_time(), {}
    if what == "compact":
        counts = {"parts": runlog.compact(str(folder / "done"))}
    else:
        uri = str(folder / f"{what}.yaml")
        plan = make_plan(load_manifest(uri), uri, "")
        counts = {"todo": len(plan.todo), "done": len(plan.done), "refused": len(plan.refused)}
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processed}
    return {key: round(value, 2) for key, value in seconds.items()} | {"peak_bytes": peak_memory_bytes(), **counts}


def _make(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"masters/box-{i // 1000:04d}/scan-{i:07d}.tif" for i in range(count)]
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    table = pa.table({"uri": names, "sha256": hashes})
    pq.write_table(table, folder / "list.parquet")
    pa.csv.write_csv(table, folder / "list.csv")
    for kind in ("parquet", "csv"):
        for state in ("done", "new"):
            (folder / f"{kind}-{state}.yaml").write_text(
                f"inputs: list.{kind}\noutput: {{uri: {state}}}\nengine: {{name: lanczos, upscale: 2}}\n"
            )
    uri = str(folder / "parquet-new.yaml")
    job = next(iter(make_plan(load_manifest(uri), uri, "").todo)).job
    output = folder / "done"
    for name in names:
        place = output / name
        if name.endswith("000.tif"):
            place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        place.with_name(f"{place.name}.json").touch()
    job = replace(job, output_root=str(output))
    row = runlog.to_row(Outcome(TileTicket(job=job), "done", f"{output}/x.tif", "0" * 64, 10**7), "run")
    run = output / "_runs" / "20260131T200000Z-000000"
    run.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, _PART):
        mine, digests = names[start : start + _PART], hashes[start : start + _PART]
        varying = {"id": mine, "uri": [str(folder / name) for name in mine], "output_path": mine}
        varying |= dict.fromkeys(("source_sha256", "fingerprint", "output_sha256", "record_sha256"), digests)
        varying["output_uri"] = [str(output / name) for name in mine]
        varying["finished_at"] = list(range(start, start + len(mine)))
        columns = [
            pa.array(varying[field.name], field.type)
            if field.name in varying
            else pa.repeat(pa.scalar(row[field.name], field.type), len(mine))
            for field in runlog.SCHEMA
        ]
        part = pa.Table.from_arrays(columns, schema=runlog.SCHEMA)
        pq.write_table(part, run / f"part-{start // _PART:05d}.parquet", compression="zstd")


if __name__ == "__main__":
    main()
