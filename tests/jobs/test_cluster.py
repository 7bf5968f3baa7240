"""The pipeline on clusters of several nodes: pools, placement, lost nodes, metrics, jobs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supir_batch.metrics import DEATHS, METRICS, RETRIES
from tests.jobs.cluster import Head, cluster, restorers
from tests.runs import COMMAND, images, log_rows, manifest, photograph, wait_for

pytestmark = pytest.mark.slow

PATIENCE = 600  # seconds; a busy machine is no failure


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with cluster(tmp_path_factory.mktemp("bin")) as made:
        yield made


def archive(folder: Path, count: int, **runtime: object) -> Path:
    (folder / "in").mkdir()
    for i in range(count):
        photograph(folder / f"in/{i:02d}.png", 400, 300, seed=i)
    return manifest(folder, engine={"name": "lanczos", "upscale": 2}, runtime=runtime)


def start(path: Path, head: Head, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "run", str(path), "--json", "--set", f"runtime.address={head.address}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def every_image_is_done_once(path: Path, count: int) -> None:
    done = Counter(row["id"] for row in log_rows(path.parent / "out") if row["status"] == "done")
    assert done == {f"{i:02d}.png": 1 for i in range(count)}
    assert len(images(path.parent / "out")) == count


class Scraper:
    """Reads the Prometheus endpoints while the body runs; ``seen``: the last value of each line of ours."""

    def __init__(self, urls: list[str]) -> None:
        self._urls, self._over = urls, threading.Event()
        self.seen: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._thread = threading.Thread(target=self._scrape)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _scrape(self) -> None:
        while not self._over.wait(0.3):
            text = ""
            for url in self._urls:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    text += answer.read().decode()
            for name, tags, value in re.findall(r"^(ray_supir_batch_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
                self.seen[name, tuple(re.findall(r'(\w+)="([^"]*)"', tags))] = float(value)

    def total(self, name: str, **wanted: str) -> float:
        return sum(
            value for (one, tags), value in self.seen.items() if one == name and wanted.items() <= dict(tags).items()
        )


def test_a_run_over_three_nodes_is_seen_in_prometheus_and_as_json_lines(head: Head, tmp_path: Path) -> None:
    path = archive(tmp_path, 12, images_in_flight=6, max_actors=2)
    (tmp_path / "in/bad.png").write_text("no image")
    nodes = [head.add(1), head.add(1)]
    with Scraper(head.metrics[:1] + head.metrics[-2:]) as scraper:
        driver = start(path, head, "--log-json", "-")
        told, said = driver.communicate(timeout=PATIENCE)
        wait_for(lambda: scraper.total("ray_supir_batch_images_total") == 13, 60, lambda: str(scraper.seen))
    for node in nodes:
        head.cluster.remove_node(node)
    assert driver.returncode == 3, said
    assert json.loads(told)["failed"] == {"not-an-image": 1}

    (run_id,) = {str(row["run_id"]) for row in log_rows(tmp_path / "out")}
    assert {dict(tags)["run_id"] for _, tags in scraper.seen} == {run_id}
    assert scraper.total("ray_supir_batch_images_total", status="done") == 12
    assert scraper.total("ray_supir_batch_images_total", status="failed", cause="not-an-image") == 1
    assert scraper.total("ray_supir_batch_megapixels_total") == pytest.approx(12 * 0.48)
    for stage in ("decode", "restore", "write"):
        assert scraper.total("ray_supir_batch_stage_seconds_count", stage=stage) == 12
    assert scraper.total("ray_supir_batch_busy_seconds_total", stage="restore") > 0
    for metric in METRICS:
        if metric not in (DEATHS, RETRIES):
            assert any(name.startswith(f"ray_{metric.name}") for name, _ in scraper.seen), metric.name

    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["run_id"] for line in lines} == {run_id}
    events = Counter(line["event"] for line in lines)
    assert (events["start"], events["lease"], events["image"], events["end"]) == (1, 1, 13, 1)
    assert {line["id"] for line in lines if line["event"] == "image"} == {p.name for p in (tmp_path / "in").iterdir()}
    assert lines[-1]["exit_code"] == 3


def test_workers_wait_for_the_card_they_ask_for_and_say_so(head: Head, tmp_path: Path) -> None:
    path = archive(tmp_path, 3, accelerator="H100")
    log = tmp_path / "events.jsonl"
    driver = start(path, head, "--log-json", str(log))
    wait_for(lambda: log.exists() and '"warning"' in log.read_text(), PATIENCE, log.read_text)
    assert "a restoring worker asks for 0 GPUs of kind H100, which no node of the cluster has yet" in log.read_text()
    others = head.cluster.list_all_nodes()
    node = head.add(1, **{"accelerator_type:H100": 1})
    wait_for(lambda: restorers(node), PATIENCE)
    assert not [worker for other in others for worker in restorers(other)]
    _, said = driver.communicate(timeout=PATIENCE)
    head.cluster.remove_node(node)
    assert driver.returncode == 0, said
    assert "warning: a restoring worker asks" in said
    every_image_is_done_once(path, 3)


def test_a_node_that_is_lost_costs_no_image(head: Head, tmp_path: Path) -> None:
    path = archive(tmp_path, 30, images_in_flight=8, actors=2)
    nodes = [head.add(1), head.add(1)]
    driver = start(path, head)
    out = tmp_path / "out"
    wait_for(lambda: driver.poll() is not None or (out.exists() and len(images(out)) >= 8), PATIENCE)
    assert driver.poll() is None, driver.communicate()[1]
    stamps = {name: (out / name).stat().st_mtime_ns for name in images(out)}
    head.cluster.remove_node(nodes[0], allow_graceful=False)
    _, said = driver.communicate(timeout=PATIENCE)
    head.cluster.remove_node(nodes[1])
    assert driver.returncode == 0, said
    every_image_is_done_once(path, 30)
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps  # nothing was done twice


def submit(path: Path, head: Head, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "submit", str(path), "--address", head.dashboard, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=cwd)


def test_a_submitted_manifest_runs_as_a_job_and_its_exit_code_is_ours(head: Head, tmp_path: Path) -> None:
    archive(tmp_path, 2)
    (tmp_path / "in/bad.png").write_text("no image")
    (tmp_path / "relative.yaml").write_text("inputs: in\noutput: {uri: out}\nengine: {name: lanczos}\n")
    node = head.add(1)
    ended = submit(Path("relative.yaml"), head, "--limit", "3", "--json", "--set", "engine.upscale=2", cwd=tmp_path)
    head.cluster.remove_node(node)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (2, {"not-an-image": 1})
    assert {row["setting_upscale"] for row in log_rows(tmp_path / "out") if row["status"] == "done"} == {2.0}
    assert "to stop it in order: ray job stop" in ended.stderr


def test_a_job_that_is_stopped_drains(head: Head, tmp_path: Path) -> None:
    path = archive(tmp_path, 40, images_in_flight=4)
    node = head.add(1)
    job = submit(path, head, "--no-follow").stdout.strip()
    wait_for(lambda: (tmp_path / "out").exists() and images(tmp_path / "out"), PATIENCE)
    stopping = urllib.request.Request(f"{head.dashboard}/api/jobs/{job}/stop", method="POST")
    with urllib.request.urlopen(stopping, timeout=60) as answer:
        assert json.load(answer)["stopped"]

    def state() -> dict[str, Any]:
        with urllib.request.urlopen(f"{head.dashboard}/api/jobs/{job}", timeout=60) as answer:
            data: dict[str, Any] = json.load(answer)
        return data

    wait_for(lambda: state()["status"] in ("STOPPED", "FAILED", "SUCCEEDED"), PATIENCE, lambda: str(state()))
    with urllib.request.urlopen(f"{head.dashboard}/api/jobs/{job}/logs", timeout=60) as answer:
        log = json.load(answer)["logs"]
    head.cluster.remove_node(node)
    assert "SIGTERM was received" in log, log
    done = [row["id"] for row in log_rows(tmp_path / "out") if row["status"] == "done"]
    assert len(done) == len(set(done)) == len(images(tmp_path / "out")) < 40
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_what_cannot_be_submitted_says_why(head: Head, tmp_path: Path) -> None:
    path = manifest(tmp_path, engine={"name": "lanczos"})
    unknown = submit(path, head, "--limt", "3")
    assert unknown.returncode == 2
    assert "No such option: --limt" in unknown.stderr
    wrong = submit(path, head, "--set", "engine.upscale=-1")
    assert wrong.returncode == 2
    assert "engine.upscale (from --set)" in wrong.stderr
    nobody = subprocess.run(
        [*COMMAND, "submit", str(path), "--address", "http://127.0.0.1:9"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert nobody.returncode == 4
    assert nobody.stderr.startswith("error: http://127.0.0.1:9: Failed to connect to Ray")
    assert len(nobody.stderr.splitlines()) == 1


GROWS = """
import json, os, sys, threading, time
from supir_batch import pipeline
from supir_batch.events import Listener
from supir_batch.plan import make_plan
from supir_batch.manifest_file import load_manifest

class Slow:
    def __init__(self):
        self.device, self.execution = str(os.getpid()), ""

    def restore(self, tickets, tiles):
        time.sleep(2)
        return list(tiles)

    def restore_again(self, ticket, tile):
        return None

manifest, rows = load_manifest(sys.argv[1]), []
jobs = [entry.job for entry in make_plan(manifest, sys.argv[1], "").todo]
pipeline.run(jobs, manifest.runtime, Listener(rows.append, print), "r", threading.Event(), lambda *given: Slow())
print(json.dumps([row["device"] for row in rows]))
"""


@pytest.mark.parametrize("limit", [None, 3])
def test_a_pool_grows_to_its_limit_while_work_waits(tmp_path: Path, limit: int | None) -> None:
    path = archive(tmp_path, 30, max_actors=limit)
    command = [sys.executable, "-c", GROWS, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    workers = json.loads(ended.stdout.splitlines()[-1])
    assert len(workers) == 30
    assert len(set(workers)) == (limit or 1)


def test_this_machine_alone_does_not_wait_for_cards_it_does_not_have(tmp_path: Path) -> None:
    path = archive(tmp_path, 1, gpus_per_actor=4)
    ended = subprocess.run(
        [*COMMAND, "run", str(path)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )  # fmt: skip
    assert ended.returncode == 4
    assert "a restoring worker asks for 4 GPUs, which this machine does not have" in ended.stderr
