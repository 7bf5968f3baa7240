"""The whole flow: jobs in, one run-log row per image out.

    jobs ─▶ preview ─▶ caption ─▶ decode + tile ─▶ restore ─▶ write ─▶ rows
            CPU tasks  actors     CPU tasks        actors     CPU tasks

Up to the caption a row of the stream is an image: its ticket (everything known about it) and a preview, if it must be
captioned. From there on it is a tile: its ticket and its pixels. So an image is captioned once, into however many
tiles it is cut, and no full-size pixels wait for a captioner; the price is that its source is read twice.

One row is one block, because a block is Ray's unit of retry and of memory. An error inside a stage becomes a failure on
the ticket and flows on to the log; it never reaches Ray, so one bad image cannot stop the others. The stages themselves
are in stages.py.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from supir_batch.errors import EngineError
from supir_batch.settings import Runtime
from supir_batch.stages import (
    CaptionStage,
    RestoreStage,
    Row,
    caption_row_stage,
    decode_stage,
    new_row,
    preview_stage,
    wants_caption,
    write_stage,
)
from supir_batch.types import Job


def run(jobs: Sequence[Job], runtime: Runtime, on_row: Callable[[Row], None], run_id: str) -> None:
    """Do all jobs; ``on_row`` gets the run-log row (``runlog.SCHEMA``) of every image as it ends, in any order.

    An image gets a second row only if two writers committed it; the row that finished later is true.

    An exception raised by ``on_row`` stops the run; what was committed until then stays. Raises EngineError if the
    engine or the captioner cannot be loaded.
    """
    if not jobs:
        return
    captioned = any(wants_caption(job) for job in jobs)
    gpus = runtime.gpus_per_actor
    if captioned and runtime.caption_gpus_per_actor is None:
        gpus /= 2  # a captioner and a restorer share what one worker may have
    with _ray(runtime):
        images = _images(jobs)
        if captioned:
            images = _captioned(images, jobs, runtime, restoring=True)
        tiles = images.flat_map(decode_stage, num_cpus=0.5)
        tiles = tiles.repartition(target_num_rows_per_block=1)
        tiles = tiles.map_batches(
            RestoreStage,
            compute=ActorPoolStrategy(size=runtime.actors),
            # engine, weights and license are the manifest's, the same for every job
            fn_constructor_args=(jobs[0].model, runtime.device),
            num_gpus=gpus,
            num_cpus=0,  # so that waiting models never starve the CPU stages
            batch_size=runtime.batch,
        )
        _collect(tiles.flat_map(write_stage, fn_args=(run_id,), num_cpus=0.5), on_row)


def caption(jobs: Sequence[Job], runtime: Runtime, on_row: Callable[[Row], None], run_id: str) -> None:
    """Caption the images of those jobs whose prompt is left to the captioner, and restore nothing.

    ``on_row`` gets a run-log row for each, with its caption or its failure, in any order. Raises EngineError if the
    captioner cannot be loaded.
    """
    wanted = [job for job in jobs if wants_caption(job)]
    if not wanted:
        return
    with _ray(runtime):
        images = _captioned(_images(wanted), wanted, runtime, restoring=False)
        _collect(images.map(caption_row_stage, fn_args=(run_id,), num_cpus=0.5), on_row)


def _images(jobs: Sequence[Job]) -> ray.data.Dataset:
    return ray.data.from_items([new_row(job) for job in jobs], override_num_blocks=len(jobs))


def _captioned(images: ray.data.Dataset, jobs: Sequence[Job], runtime: Runtime, restoring: bool) -> ray.data.Dataset:
    share = runtime.caption_gpus_per_actor
    return images.map(preview_stage, fn_args=(restoring,), num_cpus=0.5).map_batches(
        CaptionStage,
        compute=ActorPoolStrategy(size=runtime.caption_actors),
        # the captioner and its options are the manifest's, the same for every job that wants a caption
        fn_constructor_args=(next(job for job in jobs if wants_caption(job)), runtime.device),
        num_gpus=runtime.gpus_per_actor / 2 if share is None else share,
        num_cpus=0,
        batch_size=runtime.caption_batch,
    )


def _collect(rows: ray.data.Dataset, on_row: Callable[[Row], None]) -> None:
    logged: dict[str, str | None] = {}
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in table.to_pylist():
            if row["failure_kind"] == EngineError.kind:
                raise EngineError(row["failure_message"])
            # two writers may both see the last part of a cut image arrive, and the later write over the earlier
            if row["id"] not in logged or (row["status"] == "done" and row["record_sha256"] != logged[row["id"]]):
                logged[row["id"]] = row["record_sha256"]
                on_row(row)


@contextmanager
def _stderr_only_on_failure() -> Iterator[None]:
    """Hold back what native code writes to stderr, and show it if the body fails."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def _ray(runtime: Runtime) -> Iterator[None]:
    """A local Ray, or a connection to a cluster, that says nothing unless something is wrong."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # threads of several workers share the cores; spinning ones would take them from each other
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray's C++ side reports harmless things as errors on stderr
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _stderr_only_on_failure():  # ... and that its log level was set
        ray.init(
            address=runtime.address or "local",
            num_cpus=None if runtime.address else runtime.cpus,
            include_dashboard=None if runtime.address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
