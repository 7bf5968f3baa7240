"""One run, seen from the driver process: log what is refused, feed the pipeline, log what ends, stop in order.

The pixels' way is in pipeline.py; here only run-log rows pass.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from supir_batch import __version__, checksums, lease, runlog, signing, store
from supir_batch.alongside import alongside
from supir_batch.engine import LoadEngine
from supir_batch.errors import StoreError, SupirBatchError
from supir_batch.events import Events, Listener, Talk
from supir_batch.plan import Plan, RefusedJob
from supir_batch.resolve import explain
from supir_batch.settings import Manifest
from supir_batch.types import Outcome, TileTicket

EXIT_DONE, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_STOPPED = 0, 2, 3, 4


def exit_code(stopped_by: int | None, unfinished: bool, some_failed: bool) -> int:
    """0 all done, 3 some failed, 4 stopped early and resumable, 128 + signal."""
    if stopped_by is not None:
        return 128 + stopped_by
    if unfinished:
        return EXIT_STOPPED
    return EXIT_SOME_FAILED if some_failed else EXIT_DONE


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``log_uri`` is empty when there was nothing to do and nothing was written."""

    output_uri: str
    log_uri: str
    done: int  # outputs that count since this run; ``recovered`` of them were already committed by a killed run
    recovered: int
    failed: Mapping[str, int]  # by kind, refused inputs included
    skipped: int  # done by earlier runs
    left: int  # still to do
    seconds: float
    stopped_by: int | None = None  # signal number, of the second signal: the first lets images in flight finish
    error: Exception | None = None  # what ended the run early
    quarantined: int = 0  # not tried again; a retry does
    reason: str = ""  # why the run let no more images in; "" if it did not stop by itself or by a first signal

    @property
    def exit_code(self) -> int:
        """0 all done, 3 some failed, 4 stopped early and resumable, 128 + signal."""
        some_failed = bool(self.failed) or self.quarantined > 0
        return exit_code(self.stopped_by, self.error is not None or self.left > 0, some_failed)


@dataclass(frozen=True)
class Limits:
    """When a run ends early; None: never. ``failures`` is a number of images, or with ``share`` their share of all."""

    images: int | None = None
    seconds: float | None = None
    failures: float | None = None
    share: bool = False

    def too_many(self, failed: int, jobs: int) -> bool:
        """Whether ``failed`` of ``jobs`` images are more than may fail."""
        return self.failures is not None and failed > (self.failures * jobs if self.share else self.failures)


class Stop(threading.Event):
    """Set once, with the reason, when no more images are to be let in."""

    reason = ""

    def because(self, reason: str) -> None:
        """Stop, unless it has been said before."""
        if not self.is_set():
            self.reason = reason
            self.set()


class Stopped(BaseException):
    """A second signal asked the run to stop at once; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def execute(
    manifest: Manifest, manifest_uri: str, plan: Plan, limits: Limits, talk: Talk, load: LoadEngine | None = None
) -> Summary:
    """Do the plan's work, within ``limits``; ``talk`` says how to tell of it.

    ``load`` gets the engine in each restoring worker. For one that is not of this package the plan's jobs must have
    settings of their own that say so, because log, records and fingerprints are made of them: docs/extending.md.

    Every image ends as a row of the run log. A first signal, a limit, or an error that is not one image's ends the run
    early, after the rows so far are safely written; the summary then says so. Raises, before any work, ManifestError
    if a foreign file lies where the list of hashes goes, and LeaseError if another run is writing to the output.
    """
    run_id, stop = runlog.new_run_id(), Stop()
    events = Events(talk, run_id)
    events.tell(
        "info",
        "start",
        f"{len(plan.todo)} to do, {len(plan.done)} done before, {len(plan.refused)} refused; output {plan.output_uri}",
        {"manifest": manifest_uri, "output": plan.output_uri, "todo": len(plan.todo), "version": __version__},
    )
    try:
        checksums.refuse_foreign(plan.output_uri)
        if plan.todo and manifest.signing.files is not None and (warning := signing.check(manifest.signing.files)):
            events.warn(warning)
        with lease.held(plan.output_uri, run_id, lambda: stop.because("another run has taken over the output")):
            events.tell("info", "lease", f"holds the lease of {plan.output_uri}")
            with _telling(stop, events):
                summary = _execute(manifest, manifest_uri, plan, limits, run_id, stop, events, talk, load)
    except SupirBatchError as error:
        events.tell("error", "error", str(error))
        raise
    if summary.error is not None:
        events.tell("error", "error", str(summary.error))
    counts = {"done": summary.done, "failed": dict(summary.failed), "left": summary.left}
    ended = f"{summary.done} done, {sum(summary.failed.values())} failed, {summary.left} left"
    events.tell("info", "end", ended, {**counts, "reason": summary.reason, "exit_code": summary.exit_code})
    return summary


@contextmanager
def _telling(stop: Stop, events: Events) -> Iterator[None]:
    """Tell when a run is asked to stop: in a thread, because a signal may come in the middle of a line."""

    def tell(over: threading.Event) -> None:
        while not over.is_set():
            if stop.wait(0.2):
                events.tell("warning", "drain", f"stopping: {stop.reason}; images on their way are finished first")
                return

    with alongside(tell, "events"):
        yield


def _execute(
    manifest: Manifest,
    manifest_uri: str,
    plan: Plan,
    limits: Limits,
    run_id: str,
    stop: Stop,
    events: Events,
    talk: Talk,
    load: LoadEngine | None,
) -> Summary:
    jobs = [entry.job for entry in plan.todo[: limits.images]]
    started = time.monotonic()
    if not jobs and not plan.refused:
        checksums.renew(plan.output_uri)  # a killed run left none
        return Summary(
            plan.output_uri, "", 0, 0, {}, len(plan.done), len(plan.todo), 0.0, quarantined=len(plan.quarantined)
        )
    folder = runlog.run_folder(plan.output_uri, run_id)
    store.remove_partials(plan.output_uri)
    runlog.compact(plan.output_uri)
    checksums.remove(plan.output_uri)
    store.write_atomic(store.join(folder, "manifest.yaml"), _annotated(manifest, manifest_uri))

    counted: set[str] = set()
    rows: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    stopped_by: int | None = None
    stop_error: Exception | None = None
    with runlog.RunLog(plan.output_uri, run_id) as log, events.progress(len(jobs) + len(plan.refused)) as displays:

        def on_row(row: dict[str, Any]) -> None:
            log.append(row)
            if row["id"] in counted:  # two writers committed it
                return
            counted.add(row["id"])
            rows["recovered" if row["status"] == "done" and row["recovered"] else row["status"]] += 1
            if row["status"] == "failed":
                failed[row["failure_kind"]] += 1
                if limits.too_many(rows["failed"], len(jobs) + len(plan.refused)):
                    stop.because(f"{rows['failed']} images failed, more than --max-failures allows")
            for display in displays:
                display.update(row)

        for refused in plan.refused:
            on_row(runlog.to_row(_refusal(refused), run_id))
        log.flush()
        try:
            if jobs:
                from supir_batch import pipeline  # noqa: PLC0415 (Ray takes seconds; only a run with work needs it)

                listener = Listener(on_row, events.warn, talk.verbose)
                with signals(stop, talk.people), _timer(limits.seconds, stop):
                    pipeline.run(jobs, manifest.runtime, listener, run_id, stop, load)
        except (Stopped, KeyboardInterrupt, SystemExit) as signaled:
            stopped_by = signal_number(signaled)
        except Exception as error:
            stop_error = error
    try:
        checksums.renew(plan.output_uri)
    except StoreError as error:
        stop_error = stop_error or error
    done = rows["done"] + rows["recovered"]
    attempted = done + rows["failed"] - len(plan.refused)
    return Summary(
        output_uri=plan.output_uri,
        log_uri=folder,
        done=done,
        recovered=rows["recovered"],
        failed=dict(failed.most_common()),
        skipped=len(plan.done),
        left=len(plan.todo) - attempted,
        seconds=time.monotonic() - started,
        quarantined=len(plan.quarantined),
        stopped_by=stopped_by,
        error=stop_error,
        reason=stop.reason,
    )


@contextmanager
def _timer(seconds: float | None, stop: Stop) -> Iterator[None]:
    """Stop after some seconds of the body."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, stop.because, ["--max-duration is over"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def signals(stop: Stop, people: bool = True) -> Iterator[None]:
    """Let a first SIGINT or SIGTERM set ``stop``, a second raise :class:`Stopped`; a third meets the handler before.

    With ``people`` the first is answered on stderr.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def at_once(number: int, frame: FrameType | None) -> None:
        restore()
        raise Stopped(number)

    def in_order(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, at_once)
        stop.because(f"{signal.Signals(number).name} was received")
        if not people:
            return
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
            os.write(2, b"stopping: images on their way are finished first; signal again to stop at once\n")

    for number in numbers:
        signal.signal(number, in_order)
    try:
        yield
    finally:
        restore()


def signal_number(stop: BaseException) -> int:
    """Which signal ``stop`` (Stopped, KeyboardInterrupt or SystemExit) stands for."""
    if isinstance(stop, Stopped):
        return stop.number
    # Ray replaces the handler of SIGTERM on the driver by one that raises SystemExit.
    return signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT


def _refusal(refused: RefusedJob) -> Outcome:
    now = datetime.now(UTC).isoformat()
    ticket = TileTicket(job=refused.job, failure=refused.failure, started_at=now)
    return Outcome(ticket=ticket, status="failed", finished_at=now)


def _annotated(manifest: Manifest, manifest_uri: str) -> bytes:
    """The manifest as it was, headed by what flags and environment laid over it, as YAML comments."""
    notes = [f"# supir-batch {__version__} ran {os.path.basename(manifest_uri)}"]
    notes += [f"# {key} = {value!r} ({origin})" for key, value, origin in explain(manifest) if origin in _LAYERS]
    # repr keeps a value with line breaks on its comment line
    return "\n".join([*notes, ""]).encode() + store.read_bytes(manifest_uri)


_LAYERS = ("environment", "flag")
