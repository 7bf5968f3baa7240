"""Runs that are asked to stop, runs under which Ray dies, and two runs for one output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import COMMAND, images, log_rows, manifest, photograph, run, wait_for, wait_for_workers_to_end

COUNT = 40


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Images enough for a run that can be met half way."""
    (tmp_path / "in").mkdir()
    for i in range(COUNT):
        photograph(tmp_path / f"in/{i:02d}.png", 400, 300, seed=i)
    return manifest(tmp_path, engine={"name": "lanczos", "upscale": 2}, runtime={"images_in_flight": 4})


def started(path: Path) -> subprocess.Popen[str]:
    """A run in a session of its own, as a terminal would start it, once it holds the output."""
    process = subprocess.Popen(
        [*COMMAND, "run", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(process, lambda: any((path.parent / "out/_runs/_lease").glob("lease-*.json")))
    return process


def at_work(path: Path) -> subprocess.Popen[str]:
    """A run as above, once its first outputs are there."""
    process = started(path)
    wait_until(process, lambda: len(images(path.parent / "out")) >= 3)
    return process


def wait_until(process: subprocess.Popen[str], sign: Callable[[], bool]) -> None:
    """Until a run that goes on shows a sign."""
    wait_for(lambda: process.poll() is not None or sign(), 180)
    assert process.poll() is None, process.communicate()


def assert_whole(path: Path) -> None:
    """The same command again, undisturbed, ends with every image done once and nothing left behind."""
    out = path.parent / "out"
    ended = run(path)
    assert ended.returncode == 0, ended.stderr
    assert len(images(out)) == COUNT
    assert set(Counter(row["id"] for row in log_rows(out) if row["status"] == "done").values()) == {1}
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_lets_what_is_on_its_way_finish(archive: Path, number: signal.Signals) -> None:
    out = archive.parent / "out"
    process = at_work(archive)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 4, stderr
    summary = json.loads(stdout)
    assert summary["stopped_because"] == f"{number.name} was received"
    assert "images on their way are finished first" in stderr
    assert summary["left"] > 0
    assert summary["done"] == len(images(out)) == len(log_rows(out)), "committed and logged are the same"
    assert not list(out.rglob("*.partial"))
    assert_whole(archive)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(archive: Path) -> None:
    process = at_work(archive)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, 4), stderr  # 4: it was done with what was on its way before the second came
    wait_for_workers_to_end(process.pid)
    assert_whole(archive)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "words"), [("raylet", "Ray on this machine"), ("gcs_server", "Ray's head")])
def test_a_run_says_that_ray_has_died_under_it_and_is_resumed(archive: Path, program: str, words: str) -> None:
    out = archive.parent / "out"
    process = at_work(archive)
    (ray,) = [
        int(child)
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if Path(f"/proc/{child}/comm").read_text().strip() == program
    ]
    os.kill(ray, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 4, stderr
    assert re.search(rf"^error: {words} \(.*\) has not answered for \d+ s: .*refused; the same", stderr, re.M), stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["done"] == len(log_rows(out)), "what came out of Ray is logged"
    wait_for_workers_to_end(process.pid, 5)  # Ray's agents look for its head for minutes
    assert_whole(archive)


@pytest.mark.slow
def test_limits_of_time_and_failures_end_a_run_that_can_be_resumed(archive: Path) -> None:
    for i in range(0, COUNT, 2):
        (archive.parent / f"in/{i:02d}.png").write_bytes(b"not an image")
    bad = run(archive, "--max-failures", "10%")
    assert bad.returncode == 4, bad.stderr
    summary = json.loads(bad.stdout)
    assert summary["left"] > 0
    assert "more than --max-failures allows" in summary["stopped_because"]
    assert 4 < sum(summary["failed"].values()) <= 4 + 4 + 1
    for i in range(0, COUNT, 2):
        photograph(archive.parent / f"in/{i:02d}.png", 400, 300, seed=i)
    late = run(archive, "--max-duration", "1s")
    assert late.returncode == 4, late.stderr
    assert json.loads(late.stdout)["stopped_because"] == "--max-duration is over"
    assert_whole(archive)


@pytest.mark.slow
def test_a_second_driver_is_refused_until_the_first_is_dead(archive: Path) -> None:
    first = started(archive)
    second = run(archive)
    assert second.returncode == 5, second.stderr
    assert f"(process {first.pid})" in second.stderr
    assert "is writing here" in second.stderr
    wait_until(first, lambda: len(images(archive.parent / "out")) >= 3)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    began = time.monotonic()
    third = run(archive, "--limit", "1")
    assert third.returncode == 4, third.stderr
    assert time.monotonic() - began < 60, "taken over and one image done within a minute"
    wait_for_workers_to_end(first.pid)
    assert_whole(archive)
