"""One driver per output, seen with holders that live, die, hang, race, and live on other machines."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from supir_batch import lease, store
from supir_batch.errors import LeaseError
from supir_batch.lease import Holder, held

ELSEWHERE = Holder("run-elsewhere", "ada", "machine-elsewhere", 1, "token", "2026-01-01T00:00:00+00:00")

HOLD = """
import sys, time
from supir_batch import lease
with lease.held(sys.argv[1], "run-first", lambda: None):
    print("held", flush=True)
    time.sleep(600)
"""


def nothing() -> None:
    pytest.fail("the lease was lost")


def write(output: Path, number: int, holder: Holder) -> None:
    store.write_atomic(lease._uri(str(output), number), json.dumps(asdict(holder)).encode())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.1)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 1.5)


def test_a_living_holder_is_named_and_a_killed_one_gives_way_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(LeaseError, match=rf"run run-first is writing here.*process {first.pid}.*wait until it ends"),
            held(str(tmp_path), "run-second", nothing),
        ):
            pytest.fail("two hold it")
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        began = time.monotonic()
        with held(str(tmp_path), "run-second", nothing):
            assert time.monotonic() - began < 5


def test_what_was_released_is_free(tmp_path: Path) -> None:
    for run in ("first", "second", "third"):
        began = time.monotonic()
        with held(str(tmp_path), run, nothing):
            assert time.monotonic() - began < 5
    assert len(list((tmp_path / "_runs").rglob("lease-*.json"))) == 1


@pytest.mark.usefixtures("quick")
def test_a_holder_elsewhere_that_no_longer_renews_is_succeeded(tmp_path: Path) -> None:
    write(tmp_path, 7, replace(ELSEWHERE, renewals=3))
    began = time.monotonic()
    with held(str(tmp_path), "run", nothing):
        assert time.monotonic() - began >= lease.DEAD_AFTER_S
        assert [path.name for path in (tmp_path / "_runs").rglob("lease-*.json")] == ["lease-000008.json"]


@pytest.mark.usefixtures("quick")
def test_a_holder_elsewhere_that_renews_keeps_it(tmp_path: Path) -> None:
    write(tmp_path, 1, ELSEWHERE)
    threading.Timer(1.0, write, (tmp_path, 1, replace(ELSEWHERE, renewals=1))).start()
    with (
        pytest.raises(LeaseError, match=r"run-elsewhere .* by ada on machine-elsewhere"),
        held(str(tmp_path), "run", nothing),
    ):
        pytest.fail("two hold it")


@pytest.mark.usefixtures("quick")
def test_who_is_succeeded_hears_of_it(tmp_path: Path) -> None:
    lost = threading.Event()
    with held(str(tmp_path), "run", lost.set):
        assert not lost.wait(0.5)
        write(tmp_path, 2, ELSEWHERE)
        assert lost.wait(5)


@pytest.mark.usefixtures("quick")
def test_who_cannot_renew_stops_before_others_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(uri: str, data: bytes) -> None:
        raise store.TransientStoreError(f"{uri}: cannot write it")

    lost = threading.Event()
    with held(str(tmp_path), "run", lost.set):
        monkeypatch.setattr(store, "write_atomic", unreachable)
        assert lost.wait(10)


def test_a_file_that_is_no_lease_is_succeeded(tmp_path: Path) -> None:
    store.write_atomic(lease._uri(str(tmp_path), 3), b"{half a lea")
    with held(str(tmp_path), "run", nothing):
        assert (tmp_path / "_runs/_lease/lease-000004.json").exists()


def _race(output: str, barrier: threading.Barrier, won: Queue[str], number: int) -> None:
    lease.RENEWED_EVERY_S, lease.DEAD_AFTER_S = 0.1, 1.5
    barrier.wait()
    try:
        with held(output, f"run-{number}", lambda: None):
            won.put(f"run-{number}")
            time.sleep(8)
    except LeaseError:
        pass


@pytest.mark.slow
def test_of_many_who_race_for_a_dead_holders_lease_one_wins(tmp_path: Path) -> None:
    write(tmp_path, 1, ELSEWHERE)
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(6), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), barrier, won, i)) for i in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    winners = [won.get(timeout=5)]
    time.sleep(0.2)
    assert won.empty(), f"{winners} and more hold it"
