"""Runs of the real command in processes of their own, and what they leave: for tests of whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyvips

from supir_batch.plan import OWN_FOLDERS

COMMAND = [sys.executable, "-m", "supir_batch"]


def photograph(path: Path, width: int, height: int, seed: int) -> None:
    """A smooth random picture with an edge: something every format and engine can work with."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 215, (4, 4, 3), dtype=np.uint8)
    image = pyvips.Image.new_from_array(coarse).resize(width / 4, vscale=height / 4, kernel="cubic")
    pixels = image.numpy()[:height, :width].copy()
    pixels[:, width // 3] = 255
    pyvips.Image.new_from_array(pixels).write_to_file(str(path))


def manifest(folder: Path, **sections: object) -> Path:
    data = {"inputs": str(folder / "in"), "output": {"uri": str(folder / "out")}} | sections
    path = folder / "manifest.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def run(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "run", str(path), "--json", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def log_rows(output: Path) -> list[dict[str, object]]:
    parts = sorted(str(path) for path in (output / "_runs").rglob("*.parquet"))
    return list(ds.dataset(parts).to_table().to_pylist()) if parts else []


def images(output: Path) -> dict[str, bytes]:
    found = {path.relative_to(output): path for path in sorted(output.rglob("*")) if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in found.items()
        if path.suffix in {".png", ".jpg", ".tif"} and name.parts[0] not in OWN_FOLDERS
    }


def wait_for_workers_to_end(driver: int, seconds: float = 60) -> None:
    """Ray's processes notice the driver's death by themselves; they share its session. What is left then is ended."""
    deadline = time.monotonic() + seconds
    while (left := left_of(driver)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def left_of(session: int) -> dict[int, str]:
    """Processes of a session that are still there."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(path.name)] = (path / "cmdline").read_text(errors="replace").replace("\0", " ")[:100]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for(what: Callable[[], Any], seconds: float, why: Callable[[], str] = lambda: "") -> Any:
    """The first truth that ``what`` returns."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {seconds} s: {why()}"
        time.sleep(0.02)
    return found
