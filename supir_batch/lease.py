"""One driver per output: a lease that its holder renews, and that another takes over once nobody does.

Leases are numbered objects below ``<output>/_runs/``; the highest number counts. Taking one over is creating the next
number, which only one can do (``store.create``), so two that see the same dead holder cannot both win. Whether a holder
lives is seen by watching it renew, never by comparing clocks of two machines.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from supir_batch import store
from supir_batch.alongside import alongside
from supir_batch.errors import LeaseError, StoreError
from supir_batch.runlog import RUNS_FOLDER

RENEWED_EVERY_S = 5.0
DEAD_AFTER_S = 30.0  # without a renewal


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; ``renewals`` counts up while the holder lives."""

    run_id: str
    user: str
    machine: str
    pid: int
    token: str
    started_at: str  # UTC, ISO 8601
    renewals: int = 0
    released: bool = False


@contextmanager
def held(output_uri: str, run_id: str, on_loss: Callable[[], None]) -> Iterator[None]:
    """Hold the lease of an output while the body runs; ``on_loss`` is called, in a thread, if another takes it over.

    Waits up to ``DEAD_AFTER_S`` to see whether an earlier holder lives. Raises LeaseError, which names it, if it does.
    """
    ours = Holder(run_id, _user(), _machine(), os.getpid(), secrets.token_hex(8), datetime.now(UTC).isoformat())
    number = _take(output_uri, ours)
    uri, renewed_at = _uri(output_uri, number), time.monotonic()

    def renew(over: threading.Event) -> None:
        nonlocal renewed_at
        current = ours
        while not over.wait(RENEWED_EVERY_S):
            current = replace(current, renewals=current.renewals + 1)
            with contextlib.suppress(StoreError):  # a store that cannot be reached may be reached the next time
                if max(_numbers(output_uri)) > number:
                    renewed_at = -math.inf
                    return
                began = time.monotonic()
                store.write_atomic(uri, _text(current))
                renewed_at = began

    def watch(over: threading.Event) -> None:
        """Apart from renewing, which in an outage tries for longer than others wait before they take us for dead."""
        while not over.wait(RENEWED_EVERY_S / 5):
            if time.monotonic() - renewed_at > DEAD_AFTER_S:
                on_loss()
                return

    try:
        with alongside(renew, "lease"), alongside(watch, "lease"):
            yield
    finally:
        with contextlib.suppress(StoreError):  # then the next run watches for a while, and takes it over
            store.write_atomic(uri, _text(replace(ours, released=True)))


def _take(output_uri: str, ours: Holder) -> int:
    """Create the next lease, once nobody holds the one before; returns its number."""
    while True:
        numbers = _numbers(output_uri)
        newest = max(numbers, default=0)
        if newest and (holder := _living(output_uri, newest)) is not None:
            raise LeaseError(
                f"{output_uri}: run {holder.run_id} is writing here, begun at {holder.started_at} by {holder.user} on "
                f"{holder.machine} (process {holder.pid}); wait until it ends, or stop it"
            )
        if store.create(_uri(output_uri, newest + 1), _text(ours)):
            for number in numbers:
                store.delete(_uri(output_uri, number))
            return newest + 1


def _living(output_uri: str, number: int) -> Holder | None:
    """The holder of a lease if it is seen to live; None if it released it or does not renew it."""
    first = _read(output_uri, number)
    if first is None or first.released or _is_dead_here(first):
        return None
    seen_at = time.monotonic()
    while time.monotonic() - seen_at < DEAD_AFTER_S:
        time.sleep(0.5)
        now = _read(output_uri, number)
        if now is None or now.released:
            return None
        if now.renewals != first.renewals:
            return now
        if _is_dead_here(now):
            return None
    return None


def _is_dead_here(holder: Holder) -> bool:
    """Whether the holder was a process of this machine and is gone; a number that was given anew is watched instead."""
    if holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _read(output_uri: str, number: int) -> Holder | None:
    """Who holds a lease; None if it is gone, or is not one that this program wrote."""
    uri = _uri(output_uri, number)
    if not store.exists(uri):
        return None
    try:
        return Holder(**json.loads(store.read_bytes(uri)))
    except (ValueError, TypeError):
        return None


def _numbers(output_uri: str) -> list[int]:
    found = (re.fullmatch(r"lease-(\d+)\.json", store.name(one.uri)) for one in store.list_tree(_folder(output_uri)))
    return [int(match[1]) for match in found if match is not None]


def _uri(output_uri: str, number: int) -> str:
    return store.join(_folder(output_uri), f"lease-{number:06d}.json")


def _folder(output_uri: str) -> str:
    return store.join(output_uri, RUNS_FOLDER, "_lease")


def _text(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder)) + "\n").encode()


def _machine() -> str:
    """This machine's name, and where the system says so which of its containers, which number processes anew."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
