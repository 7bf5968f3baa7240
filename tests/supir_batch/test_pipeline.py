"""The whole command on real files, as a user runs it: `supir-batch run` in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import pyvips

from supir_batch import audit
from tests.runs import COMMAND, images, log_rows, manifest, photograph, run, wait_for, wait_for_workers_to_end

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path


@pytest.mark.slow
def test_bad_images_fail_alone_and_a_second_run_does_only_what_is_missing(folder: Path) -> None:
    photograph(folder / "in/good.png", 61, 47, seed=1)
    photograph(folder / "in/large.tif", 640, 480, seed=2)
    photograph(folder / "in/cut.jpg", 200, 200, seed=3)
    whole = (folder / "in/cut.jpg").read_bytes()
    (folder / "in/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "in/empty.png").touch()
    (folder / "in/text.jpg").write_text("not a photograph")
    before = {path.name: path.read_bytes() for path in (folder / "in").iterdir()}
    path = manifest(folder, engine={"name": "lanczos", "upscale": 1.5}, tiling={"max_pixels": 200_000, "overlap": 64})

    first = run(path)
    assert first.returncode == 3, first.stderr
    summary = json.loads(first.stdout)
    assert summary["done"] == 2
    assert summary["failed"] == {"truncated": 1, "empty": 1, "not-an-image": 1}
    for name in ("cut.jpg", "empty.png", "text.jpg"):
        assert any(name in line and line.startswith("failed") for line in first.stderr.splitlines()), first.stderr
    out = folder / "out"
    assert pyvips.Image.new_from_file(str(out / "good.png")).width == round(61 * 1.5)
    large = pyvips.Image.new_from_file(str(out / "large.tif"))
    assert (large.width, large.height) == (960, 720)
    assert not [p for p in out.rglob("*") if "_parts" in p.parts and p.is_file()]
    rows = {row["id"]: row for row in log_rows(out)}
    assert {row["status"] for row in rows.values()} == {"done", "failed"}
    assert rows["large.tif"]["tiles"] > 1
    for name in ("good.png", "large.tif"):
        assert rows[name]["audit_psnr"] == 100  # nothing is done to pixels that are only enlarged
        assert rows[name]["audit_invention"] < 0.02
        (picture,) = audit.maps(str(out), rows[name]).values()
        assert Path(picture).is_relative_to(out / "_audit")
        width, height = rows[name]["source_width"], rows[name]["source_height"]
        shown = pyvips.Image.new_from_file(picture)
        assert (shown.width, shown.height) == (-(-width // 8), -(-height // 8))
    assert rows["good.png"]["setting_upscale"] == 1.5
    assert {path.name: path.read_bytes() for path in (folder / "in").iterdir()} == before  # originals untouched

    photograph(folder / "in/text.jpg", 30, 20, seed=4)  # the curator replaces one bad file
    second = run(path)
    summary = json.loads(second.stdout)
    assert (summary["done"], summary["skipped"]) == (1, 2)
    assert sum(summary["failed"].values()) == 2
    done = Counter(row["id"] for row in log_rows(out) if row["status"] == "done")
    assert done == {"good.png": 1, "large.tif": 1, "text.jpg": 1}


@pytest.mark.slow
def test_a_changed_setting_is_new_work_and_says_so(folder: Path) -> None:
    photograph(folder / "in/a.png", 40, 30, seed=1)
    path = manifest(folder, engine={"name": "lanczos"})
    assert run(path).returncode == 0
    again = run(path, "--set", "engine.upscale=2")
    assert again.returncode == 0
    assert "upscale" in again.stderr
    assert json.loads(again.stdout)["done"] == 1
    assert pyvips.Image.new_from_file(str(folder / "out/a.png")).width == 80


@pytest.mark.slow
def test_killed_driver_then_the_same_command_does_every_image_once(folder: Path) -> None:
    count = 24
    for i in range(count):
        photograph(folder / f"in/{i:02d}.png", 500, 400, seed=i)
    path = manifest(folder, engine={"name": "lanczos", "upscale": 2})
    out = folder / "out"
    process = subprocess.Popen(
        [*COMMAND, "run", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: process.poll() is not None or len(images(out)) >= count // 3, 600)  # a busy machine is no failure
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_workers_to_end(process.pid)
    left = images(out)
    assert count // 3 <= len(left) < count
    for name in left:  # an output is whole or absent
        assert pyvips.Image.new_from_file(str(out / name), fail_on="warning").avg() > 0
    stamps = {name: (out / name).stat().st_mtime_ns for name in left}

    summary = json.loads(run(path).stdout)
    assert summary["exit_code"] == 0
    assert summary["done"] + summary["skipped"] == count
    assert {name: (out / name).stat().st_mtime_ns for name in left} == stamps  # nothing was done twice
    assert len(images(out)) == count
    assert not list(out.rglob("*.partial"))
    done = Counter(row["id"] for row in log_rows(out) if row["status"] == "done")
    assert done == {f"{i:02d}.png": 1 for i in range(count)}


@pytest.mark.slow
def test_outputs_do_not_depend_on_workers_batch_or_order(folder: Path) -> None:
    for i, (width, height) in enumerate([(96, 64), (130, 70), (64, 64)]):
        photograph(folder / f"in/{i}.png", width, height, seed=i)
    path = manifest(folder, engine={"steps": 3, "churn": 5.0})
    assert run(path).returncode == 0
    alone = images(folder / "out")
    assert len(alone) == 3
    wide = run(
        path,
        "--set", f"output.uri={folder / 'wide'}",
        "--set", "runtime.actors=2",
        "--set", "runtime.batch=3",
        "--set", "runtime.images_in_flight=2",  # fewer than would fill a batch: nobody may wait for it to be full
    )  # fmt: skip
    assert wide.returncode == 0, wide.stderr
    assert images(folder / "wide") == alone


@pytest.mark.slow
def test_weights_that_cannot_be_loaded_end_the_run_in_one_line(folder: Path) -> None:
    photograph(folder / "in/a.png", 40, 30, seed=1)
    copy = folder / "package"
    shutil.copytree(ROOT / "supir_model", copy / "supir_model")
    shutil.copytree(ROOT / "supir_batch", copy / "supir_batch")
    weights = copy / "supir_model/weights/supir-tiny.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    path = manifest(folder)
    ended = subprocess.run(
        [*COMMAND, "run", str(path)], capture_output=True, text=True, timeout=300, check=False, cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert ended.returncode == 4, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "supir-tiny.safetensors cannot be read" in errors[0]
    assert "Traceback" not in ended.stderr
    assert not images(folder / "out")


LEAVES_EARLY = """
import contextlib, threading, ray
from supir_batch import pipeline
from supir_batch.settings import Runtime

with pipeline._ray(Runtime(), verbose=False):
    before = set(threading.enumerate())
    with contextlib.closing(pipeline._read(ray.data.range(100, override_num_blocks=100))) as tables:
        rows = next(tables).num_rows
    left = [thread.name for thread in set(threading.enumerate()) - before]
print(rows, left)
"""


@pytest.mark.slow
def test_a_stream_that_is_left_leaves_no_thread_that_could_ask_ray_after_its_shutdown() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES_EARLY], capture_output=True, text=True, timeout=300, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "1 []\n"), ended.stderr
