"""What the benchmarks share: photographs to work on, runs of the real command, what processes use, tables."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 512, 384  # of the photographs

_SAVE = {"png": {"compression": 6}, "jpg": {"Q": 90}, "tif": {"compression": "deflate", "predictor": "horizontal"}}


def make_photographs(folder: Path, count: int, extension: str) -> list[Path]:
    """Different ``WIDTH`` x ``HEIGHT`` cuts from four photographs of scikit-image; what is there already is kept."""
    import pyvips  # noqa: PLC0415  (only here: a machine that lends its card may have neither)
    from skimage import data  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    whole = [pyvips.Image.new_from_array(image()) for image in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        image = whole[i % len(whole)]
        share = rng.uniform(0.6, 1.0) * min(image.width / WIDTH, image.height / HEIGHT)  # of the cut in the whole
        width, height = int(WIDTH * share), int(HEIGHT * share)
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        path = folder / f"{i:06d}.{extension}"
        if not path.exists():
            cut = image.crop(int(left), int(top), width, height)
            cut.thumbnail_image(WIDTH, height=HEIGHT, size="force").write_to_file(str(path), **_SAVE[extension])
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Process:
    """One process: processor time so far, and memory of its own (without what it shares with others), in bytes."""

    pid: int
    name: str
    seconds: float
    memory: int


def processes(session: int) -> Iterator[Process]:
    """The processes that a command and its Ray started: those of its session (Linux)."""
    tick = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
            own = sum(int(status[key].split()[0]) for key in ("RssAnon", "RssFile") if key in status)
            name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            yield Process(int(entry.name), name, (int(fields[11]) + int(fields[12])) / tick, own * 1024)


@dataclass(frozen=True)
class Sample:
    """A look at a run: how many images were there, its processes, and processor time until then, of ended ones too."""

    images: int
    processes: tuple[Process, ...]
    seconds: float


def watch_run(manifest: Path, sections: Mapping[str, object], output: Path, every: float) -> list[Sample]:
    """Write ``manifest``, run it by the real command, and look at it ``every`` so many seconds until it ends."""
    manifest.write_text(json.dumps(sections))  # JSON is YAML
    command = [sys.executable, "-m", "supir_batch", "run", str(manifest)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    samples, used = [], dict[int, float]()
    while run.poll() is None:
        found = tuple(processes(run.pid))
        used |= {process.pid: process.seconds for process in found}
        samples.append(Sample(len(outputs(output)), found, sum(used.values())))
        time.sleep(every)
    if run.returncode:
        raise SystemExit(f"supir-batch run {manifest} exited with {run.returncode}")
    return samples


def outputs(folder: Path) -> list[Path]:
    """The images in an output, without what lies beside them."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.suffix in {".png", ".jpg", ".tif"} and path.name[0] != "."]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load() -> float:
    """How many processes want to run on this machine at present: figures of a busy one mean little."""
    return round(os.getloadavg()[0], 1)
