"""Captions as a list that people edit and feed back: every image of a manifest with its prompt, as CSV or Parquet.

The columns are those that :mod:`supir_batch.manifest` reads, so the list is an input as it stands.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from supir_batch import runlog, store
from supir_batch.captions import CAPTIONS_FOLDER
from supir_batch.driver import Stop, Stopped, exit_code, signal_number, signals
from supir_batch.errors import ManifestError
from supir_batch.events import Listener
from supir_batch.plan import Plan
from supir_batch.progress import progress
from supir_batch.settings import Manifest
from supir_batch.types import Failure, Job, Outcome, TileTicket

COLUMNS = pa.schema(
    [
        ("uri", pa.string()),
        ("id", pa.string()),
        ("relative", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("material", pa.string()),
        ("upscale", pa.float64()),
        ("seed", pa.int64()),
        ("sha256", pa.string()),
        ("page", pa.int64()),
    ]
)
"""Columns of a list; what the manifest's own list said about an image is passed on."""


@dataclass(frozen=True)
class CaptionSummary:
    """How captioning ended. ``list_uri`` is empty when it was stopped: then no list is written."""

    list_uri: str
    captioned: int
    given: int  # came with a prompt
    failed: Mapping[str, int]  # by kind, refused inputs included
    failures: tuple[tuple[str, str, str], ...]  # id, kind, message
    left: int
    seconds: float
    stopped_by: int | None = None  # signal number
    error: Exception | None = None

    @property
    def exit_code(self) -> int:
        """As of a run: 0 all done, 3 some failed, 4 stopped early and resumable, 128 + signal."""
        return exit_code(self.stopped_by, self.error is not None or self.left > 0, bool(self.failed))


def check_target(manifest: Manifest, list_uri: str) -> None:
    """Refuse, before any work, a list that could not be fed back or would replace one. Raises ManifestError."""
    if manifest.engine.name != "supir":
        raise ManifestError(f"engine '{manifest.engine.name}' reads no captions; caption needs engine.name supir")
    if not list_uri.lower().endswith((".csv", ".parquet")):
        raise ManifestError(f"--output {list_uri}: must end in .csv or .parquet")
    if store.exists(list_uri):
        raise ManifestError(
            f"--output {list_uri}: exists already and may hold someone's edits; move it away or name another file"
        )


def write_captions(manifest: Manifest, plan: Plan, list_uri: str) -> CaptionSummary:
    """Caption what the plan's images lack, done ones too, and write the list of all of them to ``list_uri``.

    An image that fails keeps its row, without a prompt. When a signal or an error that is not one image's stops the
    work, no list is written; captions of mode ``llava`` are kept, and the same call goes on from there.
    """
    started = time.monotonic()
    jobs = sorted((entry.job for entries in (plan.todo, plan.done, plan.quarantined) for entry in entries), key=_place)
    wanted = [job for job in jobs if job.settings.prompt is None]
    prompts = {job.source.id: job.settings.prompt for job in jobs if job.settings.prompt is not None}
    given = len(prompts)
    failures: list[tuple[str, str, str]] = []
    stopped_by: int | None = None
    stop_error: Exception | None = None
    run_id = runlog.new_run_id()
    store.remove_partials(store.join(plan.output_uri, CAPTIONS_FOLDER))
    with progress(len(wanted) + len(plan.refused)) as display:

        def on_row(row: dict[str, Any]) -> None:
            if row["status"] == "done":
                prompts[row["id"]] = row["caption"] or ""
            else:
                failures.append((row["id"], row["failure_kind"], row["failure_message"]))
            display.update(row | {"output_width": None})  # nothing was restored

        for job, failure in plan.refused:
            on_row(_refusal(job, failure, run_id))
        try:
            if wanted:
                from supir_batch import pipeline  # noqa: PLC0415 (Ray takes seconds)

                with signals(asked := Stop()):
                    pipeline.caption(wanted, manifest.runtime, Listener(on_row, _warn), run_id, asked)
        except (Stopped, KeyboardInterrupt, SystemExit) as stop:
            stopped_by = signal_number(stop)
        except Exception as error:
            stop_error = error
    left = len(jobs) + len(plan.refused) - len(prompts) - len(failures)
    whole = stopped_by is None and stop_error is None and not left
    if whole:
        every_job = sorted((*jobs, *(entry.job for entry in plan.refused)), key=_place)
        store.write_atomic(list_uri, _table([_row(job, prompts.get(job.source.id)) for job in every_job], list_uri))
    return CaptionSummary(
        list_uri=list_uri if whole else "",
        captioned=len(prompts) - given,
        given=given,
        failed=dict(Counter(kind for _, kind, _ in failures).most_common()),
        failures=tuple(failures),
        left=left,
        seconds=time.monotonic() - started,
        stopped_by=stopped_by,
        error=stop_error,
    )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _place(job: Job) -> tuple[str, int, str]:
    """Rows of a list in their order, other images by name."""
    numbered = re.fullmatch(r"(.*):(\d+)", job.source.origin)
    return (numbered[1], int(numbered[2]), "") if numbered else (job.source.origin, 0, job.source.relative)


def _refusal(job: Job, failure: Failure, run_id: str) -> dict[str, Any]:
    return runlog.to_row(Outcome(TileTicket(job=job, failure=failure), "failed"), run_id)


def _row(job: Job, prompt: str | None) -> dict[str, Any]:
    source = dataclasses.asdict(job.source)
    return {name: source[name] for name in COLUMNS.names} | {"prompt": prompt}


def _table(rows: list[dict[str, Any]], list_uri: str) -> bytes:
    if list_uri.lower().endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), sink, compression="zstd")
        return bytes(sink.getvalue().to_pybytes())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS.names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")  # the mark makes spreadsheets read it as UTF-8
