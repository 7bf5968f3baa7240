"""The batch script, run as it is, with Slurm's two commands replaced by ones that start a step on this machine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import images, left_of, log_rows, manifest, photograph, wait_for

SCRIPT = Path(__file__).parents[2] / "jobs/slurm.sbatch"

SRUN = """#!/bin/bash
echo "$*" >> {calls}
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on two nodes, both of them this machine."""
    tools = {
        "srun": SRUN.format(calls=tmp_path / "srun.txt"),
        "scontrol": '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "localhost\\nlocalhost\\n"\n',
        "supir-batch": f'#!/bin/sh\nexec {sys.executable} -m supir_batch "$@"\n',
        "ray": f'#!/bin/sh\nexec {sys.executable} -c "from ray.scripts.scripts import main; main()" "$@"\n',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(random.randrange(10_000)),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 3600),
    }


@contextmanager
def job(path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The batch script at work; whatever it leaves is ended with the body."""
    command = ["bash", str(SCRIPT), str(path), "--max-failures", "50%"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield started
    finally:
        for pid in left_of(started.pid):
            os.kill(pid, signal.SIGKILL)
        started.communicate()


@pytest.mark.slow
def test_a_night_on_two_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        photograph(tmp_path / f"in/{i}.png", 64, 48, seed=i)
    path = manifest(tmp_path, engine={"name": "lanczos", "upscale": 2})
    with job(path, slurm) as started:
        told, said = started.communicate(timeout=600)
        wait_for(lambda: not left_of(started.pid), 120, lambda: str(left_of(started.pid)))
    assert started.returncode == 0, said
    assert json.loads(told.splitlines()[-1])["done"] == 4
    assert len(images(tmp_path / "out")) == 4
    head, worker = (tmp_path / "srun.txt").read_text().splitlines()
    assert "ray start --head" in head
    assert f"ray start --address=localhost:{20000 + int(slurm['SLURM_JOB_ID'])}" in worker


@pytest.mark.slow
def test_a_job_that_is_ended_early_drains(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        photograph(tmp_path / f"in/{i:02d}.png", 400, 300, seed=i)
    path, out = manifest(tmp_path, engine={"name": "lanczos", "upscale": 2}, runtime={"images_in_flight": 4}), "out"
    with job(path, slurm) as started:
        wait_for(lambda: started.poll() is not None or ((tmp_path / out).exists() and images(tmp_path / out)), 600)
        started.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
        _, said = started.communicate(timeout=600)
        wait_for(lambda: not left_of(started.pid), 120, lambda: str(left_of(started.pid)))
    assert started.returncode == 4, said
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert "SIGTERM was received" in next(event for event in events if event["event"] == "drain")["message"]
    done = [row["id"] for row in log_rows(tmp_path / out) if row["status"] == "done"]
    assert len(done) == len(set(done)) == len(images(tmp_path / out)) < 40


def test_a_job_with_too_little_time_says_so(slurm: dict[str, str], tmp_path: Path) -> None:
    with job(manifest(tmp_path), slurm | {"SLURM_JOB_END_TIME": str(int(time.time()) + 60)}) as started:
        _, said = started.communicate(timeout=60)
    assert started.returncode == 2
    assert "less than 900 s are left" in said
    assert not (tmp_path / "srun.txt").exists()
