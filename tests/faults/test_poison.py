"""Images that end or hang whatever touches them: each costs itself, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.runs import COMMAND, images, log_rows, manifest, photograph

# Loaded by every Python process of the run, because it lies on its path: makes real native faults in the real decoder.
POISON = """
import ctypes, importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "supir_batch.readers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_poisoned(module):
            load(module)
            read = module.read

            def poisoned(path, header):
                if "segfault" in path.name:
                    ctypes.string_at(0)
                if "endless" in path.name:
                    ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock
                return read(path, header)

            module.read = poisoned

        spec.loader.exec_module = load_poisoned
        return spec

sys.meta_path.insert(0, Finder())
"""


def poisoned_run(folder: Path, path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(POISON)
    python_path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*COMMAND, *flags[:1], str(path), "--json", *flags[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": python_path},
    )


@pytest.mark.slow
def test_a_decoder_that_segfaults_costs_its_image_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(199):
        photograph(tmp_path / f"in/{i:03d}.png", 48, 32, seed=i)
    photograph(tmp_path / "in/100-segfault.png", 48, 32, seed=200)
    path = manifest(tmp_path, engine={"name": "lanczos", "upscale": 2})
    ended = poisoned_run(tmp_path, path, "run")
    assert ended.returncode == 3, ended.stderr
    summary = json.loads(ended.stdout)
    assert (summary["done"], summary["failed"]) == (199, {"poison": 1})
    assert len(images(tmp_path / "out")) == 199
    rows = log_rows(tmp_path / "out")
    assert sorted(str(row["id"]) for row in rows) == sorted(p.name for p in (tmp_path / "in").iterdir())
    (bad,) = [row for row in rows if row["status"] == "failed"]
    assert bad["id"] == "100-segfault.png"
    assert "2 workers died in stage decode of it (SIGSEGV)" in str(bad["failure_message"])


@pytest.mark.slow
def test_a_decoder_that_hangs_is_ended_at_its_deadline(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        photograph(tmp_path / f"in/{i}.png", 48, 32, seed=i)
    photograph(tmp_path / "in/endless.png", 48, 32, seed=3)
    path = manifest(tmp_path, engine={"name": "lanczos"}, runtime={"deadline_seconds": 3.0})
    ended = poisoned_run(tmp_path, path, "run")
    assert ended.returncode == 3, ended.stderr
    assert json.loads(ended.stdout)["failed"] == {"hang": 1}
    assert len(images(tmp_path / "out")) == 3
    assert "did not end within 3 s" in ended.stderr
