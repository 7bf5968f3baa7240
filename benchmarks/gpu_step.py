"""One evaluation of control encoder and UNet, by batch size: milliseconds, and how much of the device that uses.

    python benchmarks/gpu_step.py
    python benchmarks/gpu_step.py --profile step.txt

A batch counts rows: a window is two of them, as guidance evaluates it with and without its prompt. FLOPs are counted on
the networks without computing them, as the specification does: with the projections of the text, less than 1%, which
the engine does once for all steps. ``share`` is of the device's own rate for large square matrices in the same number
format, measured in the same run. On a card every batch size is compiled first, which takes minutes where torch's cache
does not have it. ``--profile`` writes where the time of the largest batch goes, by kernel.

Prints JSON and a table, and exits with 1 if no batch reaches the target, at full width on a card.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import table
from gpu import (
    Setup,
    arguments,
    build,
    digits,
    machine,
    matmul_rate,
    network_call,
    peak_memory,
    report,
    seconds_of,
    setup_of,
    step_flops,
)
from torch.profiler import ProfilerActivity, profile

from supir_model.model import SupirModel

SHARE = 0.55  # of the device's own matrix rate

_PROFILED = 3  # evaluations


def main() -> None:
    """Parse the command line, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="rows, rising; default: 2 8 16, reduced 1 2 4")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least so long for each batch size")
    parser.add_argument("--profile", type=Path, help="text file to write")
    given = parser.parse_args()
    setup = setup_of(given)
    batches = given.batches or ([2, 8, 16] if setup.full else [1, 2, 4])
    matmul = matmul_rate(setup.device, setup.dtype)
    model = build(setup)
    rows = []
    for batch in batches:
        try:
            rows.append(_measure(model, setup, batch, matmul, given.seconds))
        except torch.OutOfMemoryError as error:
            print(f"a batch of {batch} does not fit, nor is a larger one tried: {error}", file=sys.stderr)
            break
    if not rows:
        raise SystemExit("not one batch fits into memory; give smaller ones by --batches")
    if given.profile:
        given.profile.write_text(_profile(model, setup, rows[-1]["batch"]))
    measured = {"machine": machine(setup), "matmul_tflops": digits(matmul / 1e12), "batches": rows}
    held = report(
        measured,
        [(f"control and UNet reach {SHARE:.0%} of the matrix rate", max(row["share"] for row in rows) >= SHARE)],
        setup.judged,
    )
    print(table(rows))
    sys.exit(not held)


def _measure(model: SupirModel, setup: Setup, batch: int, matmul: float, least: float) -> dict[str, Any]:
    window = setup.config.window
    with peak_memory(setup.device) as memory:
        seconds = seconds_of(network_call(model, setup, batch), setup.device, least)
    arithmetic = step_flops(setup.config, batch, window, window)
    return {
        "batch": batch,
        "ms": round(seconds * 1e3, 2),
        "TFLOP": digits(arithmetic / 1e12),
        "TFLOP/s": digits(arithmetic / seconds / 1e12),
        "share": digits(arithmetic / seconds / matmul),
        "peak memory GB": round(memory["peak_memory_bytes"] / 1e9, 2),
    }


def _profile(model: SupirModel, setup: Setup, batch: int) -> str:
    call = network_call(model, setup, batch)
    call()
    on_card = setup.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities) as profiler:
        for _ in range(_PROFILED):
            call()
        if on_card:
            torch.cuda.synchronize(setup.device)
    by = "self_device_time_total" if on_card else "self_cpu_time_total"
    lines = [f"{key}: {value}" for key, value in machine(setup).items()]
    spent = profiler.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=100)
    return "\n".join([*lines, f"{_PROFILED} evaluations of {batch} rows", "", spent])


if __name__ == "__main__":
    main()
