"""One run, seen from the driver process: log what is refused, feed the pipeline, log what ends, stop in order.

The pixels' way is in pipeline.py; here only run-log rows pass.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from supir_batch import __version__, checksums, runlog, store
from supir_batch.errors import StoreError
from supir_batch.plan import Plan, RefusedJob
from supir_batch.progress import progress
from supir_batch.settings import Manifest, explain
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
    stopped_by: int | None = None  # signal number
    error: Exception | None = None  # what ended the run early

    @property
    def exit_code(self) -> int:
        """0 all done, 3 some failed, 4 stopped early and resumable, 128 + signal."""
        return exit_code(self.stopped_by, self.error is not None or self.left > 0, bool(self.failed))


class Stopped(BaseException):
    """A signal asked the run to stop; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def execute(manifest: Manifest, manifest_uri: str, plan: Plan, limit: int | None = None) -> Summary:
    """Do the plan's work, at most ``limit`` images of it.

    Every image ends as a row of the run log. A signal or an error that is not one image's ends the run early, after
    the rows so far are safely written; the summary then says so. Raises ManifestError, before any work, if a foreign
    file lies where the list of hashes goes.
    """
    checksums.refuse_foreign(plan.output_uri)
    jobs = [entry.job for entry in plan.todo][:limit]
    started = time.monotonic()
    if not jobs and not plan.refused:
        checksums.renew(plan.output_uri)  # a killed run left none
        return Summary(plan.output_uri, "", 0, 0, {}, len(plan.done), len(plan.todo), 0.0)
    run_id = runlog.new_run_id()
    folder = runlog.run_folder(plan.output_uri, run_id)
    store.remove_partials(plan.output_uri)
    checksums.remove(plan.output_uri)
    store.write_atomic(store.join(folder, "manifest.yaml"), _annotated(manifest, manifest_uri))

    counted: set[str] = set()
    rows: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    stopped_by: int | None = None
    stop_error: Exception | None = None
    with runlog.RunLog(plan.output_uri, run_id) as log, progress(len(jobs) + len(plan.refused)) as display:

        def on_row(row: dict[str, Any]) -> None:
            log.append(row)
            if row["id"] in counted:  # two writers committed it
                return
            counted.add(row["id"])
            rows["recovered" if row["status"] == "done" and row["recovered"] else row["status"]] += 1
            if row["status"] == "failed":
                failed[row["failure_kind"]] += 1
            display.update(row)

        for refused in plan.refused:
            on_row(runlog.to_row(_refusal(refused), run_id))
        log.flush()
        try:
            if jobs:
                _stream(manifest, run_id, jobs, on_row)
        except (Stopped, KeyboardInterrupt, SystemExit) as stop:
            stopped_by = signal_number(stop)
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
        stopped_by=stopped_by,
        error=stop_error,
    )


def _stream(manifest: Manifest, run_id: str, jobs: list[Any], on_row: Callable[[dict[str, Any]], None]) -> None:
    from supir_batch import pipeline  # noqa: PLC0415 (Ray takes seconds; only a run that has work needs it)

    with signals():
        pipeline.run(jobs, manifest.runtime, on_row, run_id)


@contextmanager
def signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise :class:`Stopped` here; a second one meets the previous handler."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        raise Stopped(number)

    for number in numbers:
        signal.signal(number, stop)
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
