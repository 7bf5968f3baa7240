"""Whole images through the model: seconds by size and steps, by stage, and how busy a stream of them keeps the card.

    python benchmarks/gpu_image.py --folder /scratch
    python benchmarks/gpu_image.py --folder /scratch --sizes 2048 --stream 0 --memory-gb 12

A model of random weights is written to ``--folder`` in the project's own format and loaded from there, as a worker
does: ``load``. ``first window`` is the time from the beginning of the load until the networks have seen the first
windows; files and compiled programs that the system still holds make both look better than on a new machine.

``--together`` images are restored in one call, and as many windows seen by the networks at once, as ``runtime.batch``
of a manifest has it; for each such number the model is loaded anew. With the largest, text, encoding, decoding and
transfers are measured on their own, and ``sample`` is the rest of an image. Then ``--stream`` images of mixed sizes are
read from JPEG, restored and written as PNG, reading and writing in threads beside the card. ``busy`` is the share of
wall time, waiting for images included, in which the card has kernels or copies (a CPU: in which it is inside the
networks); the profiler sees two calls in the middle of the stream, as it could not hold more.

Prints JSON and tables, and exits with 1 if a target is missed, at full width on a card.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import table
from gpu import (
    Setup,
    arguments,
    busy,
    digits,
    draw_networks,
    image_flops,
    machine,
    matmul_rate,
    once,
    peak_memory,
    picture,
    report,
    restore,
    setup_of,
    stages,
    write_model,
)
from PIL import Image
from torch import Tensor

from supir_model.model import SupirModel

SECONDS = 2.4  # of a 1024 x 1024 image with 50 steps in a call of several, on an H200
BUSY = 0.97

_MIX = ((1024, 1024), (1536, 1024), (1024, 1280), (2048, 1536))  # width, height in the stream
_PROFILED = 2  # calls in the middle of the stream


def main() -> None:
    """Parse the command line, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the model and images; 15 GB at full width")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048], help="sides; an eighth if reduced")
    parser.add_argument("--steps", type=int, nargs="+", help="default: 50 20, reduced 5 2")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 4], help="images in one call")
    parser.add_argument("--stream", type=int, help="images of mixed sizes; default: 64, reduced 8")
    parser.add_argument("--memory-gb", type=float, help="do as if the card had no more")
    given = parser.parse_args()
    setup = setup_of(given)
    steps = given.steps or ([50, 20] if setup.full else [5, 2])
    stream = given.stream if given.stream is not None else (64 if setup.full else 8)
    matmul = matmul_rate(setup.device, setup.dtype)
    _write_model(setup, given.folder / "model", given.memory_gb)
    sides = [setup.scaled(size) for size in given.sizes]
    measured: dict[str, Any] = {"machine": machine(setup), "matmul_tflops": digits(matmul / 1e12)}
    loading: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    streams: list[dict[str, Any]] = []
    for together in sorted(given.together):
        model, seconds = _load(setup, given.folder / "model", together)
        loading.append(seconds)
        rows += [_case(model, setup, *case, together, matmul) for case in itertools.product(sides, steps)]
        if together == max(given.together):
            if not model.ladder.rung.offload:  # else the VAE is not on the card by itself
                outside = [_outside(model, setup, side, rows) for side in sides]
            if stream:
                streams.append(_stream(model, setup, given.folder, stream, steps[0], together))
        del model  # before the next one measures how much memory is free
    measured |= {"load": loading, "images": rows, "stages": outside, "streams": streams}
    held = report(measured, _targets(measured, setup), setup.judged)
    for part in (loading, rows, outside, streams):
        if part:
            print(f"{table(part)}\n")
    sys.exit(not held)


def _targets(measured: dict[str, Any], setup: Setup) -> list[tuple[str, bool]]:
    """What was measured against what was wanted; the seconds are of one card, and of no other."""
    found = []
    whole = [row["s per image"] for row in measured["images"] if (row["side"], row["steps"]) == (1024, 50)]
    if not setup.judged or (whole and "H200" in measured["machine"]["device"]):
        text = f"a 1024 x 1024 image with 50 steps takes at most {SECONDS} s on an H200"
        found.append((text, min(whole, default=float("inf")) <= SECONDS))
    for stream in measured["streams"]:
        found.append((f"the card is busy for {BUSY:.0%} of the stream", stream["busy"] >= BUSY))
    return found


def _write_model(setup: Setup, folder: Path, memory_gb: float | None) -> None:
    """A model of random weights; from then on the card has no more memory than asked for."""
    shutil.rmtree(folder, ignore_errors=True)
    write_model(draw_networks(setup, setup.precision), folder)
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
        if memory_gb:
            total = torch.cuda.get_device_properties(setup.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total), setup.device)


def _load(setup: Setup, folder: Path, together: int) -> tuple[SupirModel, dict[str, Any]]:
    """The model as a worker loads it, and the seconds until it works."""
    gc.collect()  # the one before
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    started = perf_counter()
    model = SupirModel.load(folder, str(setup.device), setup.precision, together)
    loaded = perf_counter() - started
    side = setup.scaled(1024)
    restore(model, [picture(side, side)], 1)
    if model.seconds_to_first_window is None:
        raise SystemExit("an image was restored, and no window was seen")
    return model, {"together": together, **_rounded({"load": loaded, "first window": model.seconds_to_first_window})}


def _case(model: SupirModel, setup: Setup, side: int, steps: int, together: int, matmul: float) -> dict[str, Any]:
    images = [picture(side, side, seed) for seed in range(together)]
    restore(model, images, 1)
    with peak_memory(setup.device) as memory:
        seconds = once(lambda: restore(model, images, steps), setup.device) / together
    rate = image_flops(setup.config, side, side, steps) / seconds
    return {
        "side": side,
        "steps": steps,
        "together": together,
        "s per image": digits(seconds),
        "images per hour": digits(3600 / seconds),
        "TFLOP/s": digits(rate / 1e12),
        "share": digits(rate / matmul),
        "peak memory GB": digits(memory["peak_memory_bytes"] / 1e9),
        "how": model.execution,
    }


def _outside(model: SupirModel, setup: Setup, side: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of one image outside of sampling, and of sampling for each number of steps among ``rows``."""
    seconds = stages(model, setup, picture(side, side))
    last = {row["steps"]: row["s per image"] for row in rows if row["side"] == side}
    sampling = {f"sample {steps}": whole - sum(seconds.values()) for steps, whole in last.items()}
    return {"side": side, **_rounded(seconds | sampling)}


def _stream(model: SupirModel, setup: Setup, folder: Path, count: int, steps: int, together: int) -> dict[str, Any]:
    """Images of mixed sizes from file to file, ``together`` in a call, reading and writing beside the card."""
    sources = _write_sources(setup, folder / "in", count)
    output = folder / "out"
    output.mkdir(exist_ok=True)
    restore(model, [_read(source) for source in sources[:together]], 1)
    calls = -(-count // together)
    profiled = range(max(0, (calls - _PROFILED) // 2), min(calls, (calls - _PROFILED) // 2 + _PROFILED))
    with ThreadPoolExecutor() as threads, peak_memory(setup.device) as memory:
        started = perf_counter()
        groups = _read_ahead(threads, sources, together)
        written: list[Future[None]] = []

        def restore_next() -> None:
            paths, images = next(groups)
            restored = restore(model, images, steps)
            for path, image in zip(paths, restored, strict=True):
                written.append(threads.submit(_write, output / f"{path.stem}.png", image))

        for _ in range(profiled.start):
            restore_next()
        paused = perf_counter()
        with busy(model) as seen:
            for _ in profiled:
                restore_next()
        # the profiler's own time, before and after its block, is not the stream's
        started += perf_counter() - paused - seen["seconds"]
        for _ in range(profiled.stop, calls):
            restore_next()
        for one in written:
            one.result()
        seconds = perf_counter() - started
    return {
        "images": count,
        "sizes": " ".join(f"{setup.scaled(width)}x{setup.scaled(height)}" for width, height in _MIX),
        "steps": steps,
        "together": together,
        "seconds": digits(seconds),
        "images per hour": digits(3600 * count / seconds),
        "busy": digits(seen["share"]),
        "peak memory GB": digits(memory["peak_memory_bytes"] / 1e9),
    }


def _read_ahead(
    threads: ThreadPoolExecutor, sources: Sequence[Path], together: int
) -> Iterator[tuple[Sequence[Path], list[Tensor]]]:
    """Groups of images in order; the next two groups are being read while one is out."""
    groups = [sources[i : i + together] for i in range(0, len(sources), together)]
    ahead: list[list[Future[Tensor]]] = []
    for i, group in enumerate(groups):
        ahead += [[threads.submit(_read, path) for path in later] for later in groups[i + len(ahead) : i + 3]]
        yield group, [image.result() for image in ahead.pop(0)]


def _write_sources(setup: Setup, folder: Path, count: int) -> list[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [folder / f"{i:04d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        width, height = (setup.scaled(side) for side in _MIX[i % len(_MIX)])
        _image(picture(height, width, i)).save(path, quality=95)
    return paths


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        samples = torch.from_numpy(np.array(image))  # uint8 [height, width, 3]
    return samples.permute(2, 0, 1).float() / 127.5 - 1


def _write(path: Path, image: Tensor) -> None:
    _image(image).save(path)


def _image(tensor: Tensor) -> Image.Image:
    samples = ((tensor + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(samples.permute(1, 2, 0).contiguous().numpy())


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{stage} s": digits(value) for stage, value in seconds.items()}


if __name__ == "__main__":
    main()
