"""The whole flow: jobs in, one run-log row per image out.

    jobs ─▶ decode + tile ─▶ caption ─▶ restore ─▶ write ─▶ rows
            CPU tasks        actors     actors     CPU tasks

A row of the stream is one tile: its ticket (everything known about it) and its pixels. One tile is one block, because
a block is Ray's unit of retry and of memory. An error inside a stage becomes a failure on the ticket and flows on to
the log; it never reaches Ray, so one bad image cannot stop the others.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from supir_batch import engine, runlog
from supir_batch.decode import decode
from supir_batch.engine import Device, Engine
from supir_batch.errors import EngineError
from supir_batch.settings import Runtime
from supir_batch.stage import Stopwatch, failure_of
from supir_batch.types import Job, ModelRef, TileTicket
from supir_batch.write import write

Row = dict[str, Any]  # ticket: pickled TileTicket; pixels, alpha, preview: float32 arrays, empty once used up

_EMPTY = np.zeros((0, 0, 3), np.float32)


def run(jobs: Sequence[Job], runtime: Runtime, on_row: Callable[[Row], None], run_id: str) -> None:
    """Do all jobs; ``on_row`` gets the run-log row (``runlog.SCHEMA``) of every image as it ends, in any order.

    An exception raised by ``on_row`` stops the run; what was committed until then stays. Raises EngineError if the
    engine cannot be loaded.
    """
    if not jobs:
        return
    captioned = any(job.settings.prompt is None for job in jobs)
    actors: Row = {
        "compute": ActorPoolStrategy(size=runtime.actors),
        # engine, weights and license are the manifest's, the same for every job
        "fn_constructor_args": (jobs[0].model, runtime.device),
        # a captioner and a restorer share what one worker may have
        "num_gpus": runtime.gpus_per_actor / (2 if captioned else 1),
        "num_cpus": 0,  # so that waiting models never starve the CPU stages
        "batch_size": runtime.batch,
    }
    with _ray(runtime):
        tiles = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs))
        tiles = tiles.flat_map(decode_stage, num_cpus=0.5)
        tiles = tiles.repartition(target_num_rows_per_block=1)
        if captioned:
            tiles = tiles.map_batches(CaptionStage, **actors)
        tiles = tiles.map_batches(RestoreStage, **actors)
        rows = tiles.flat_map(write_stage, fn_args=(run_id,), num_cpus=0.5)
        logged: set[str] = set()
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                if row["failure_kind"] == EngineError.kind:
                    raise EngineError(row["failure_message"])
                if row["id"] not in logged:  # two writers may both see the last part of a cut image arrive
                    logged.add(row["id"])
                    on_row(row)


def decode_stage(row: Row) -> list[Row]:
    """Job to tiles."""
    job: Job = pickle.loads(row["job"])
    return [
        {
            "ticket": pickle.dumps(tile.ticket),
            "pixels": tile.pixels,
            "alpha": tile.alpha,
            "preview": tile.preview,
        }
        for tile in decode(job, engine.alignment(job.model))
    ]


class _ModelStage(ABC):
    """An actor's stage: loads the engine once, then works on batches of tiles."""

    name: str

    def __init__(self, model: ModelRef | None, device: Device) -> None:
        self._engine: Engine | EngineError
        try:
            self._engine = engine.load_engine(model, device)
        except Exception as error:  # kept for the first tile: an exception here would make Ray try again and again
            self._engine = EngineError(f"{type(error).__name__}: {error}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tickets: list[TileTicket] = [pickle.loads(ticket) for ticket in batch["ticket"]]
        working = [i for i, ticket in enumerate(tickets) if ticket.has_work and self.wanted(ticket)]
        loaded = self._engine
        watch = Stopwatch(self.name, "" if isinstance(loaded, EngineError) else loaded.device)
        try:
            if isinstance(loaded, EngineError):
                raise loaded
            self.work(loaded, tickets, batch, working)
        except Exception as error:  # whatever it is, it concerns these tiles alone
            for i in working:
                failure = failure_of(self.name, tickets[i].job.source, error)
                tickets[i] = dataclasses.replace(tickets[i], failure=failure)
        for i in working:
            tickets[i] = watch.record(tickets[i], share=len(working))
        return batch | {"ticket": np.array([pickle.dumps(ticket) for ticket in tickets], dtype=object)}

    def wanted(self, ticket: TileTicket) -> bool:
        """Whether this stage has something to do for a tile that still has work."""
        return True

    @abstractmethod
    def work(self, loaded: Engine, tickets: list[TileTicket], batch: dict[str, Any], working: list[int]) -> None:
        """Advance the tiles at the indices ``working`` in place."""


class CaptionStage(_ModelStage):
    """Captions images whose manifest leaves that to the engine."""

    name = "caption"

    def wanted(self, ticket: TileTicket) -> bool:
        """Images that came with a prompt keep it."""
        return ticket.job.settings.prompt is None

    def work(self, loaded: Engine, tickets: list[TileTicket], batch: dict[str, Any], working: list[int]) -> None:
        """Fill in ``caption``."""
        for i in working:
            tickets[i] = dataclasses.replace(tickets[i], caption=loaded.caption(tickets[i], batch["preview"][i]))


class RestoreStage(_ModelStage):
    """Restores tiles."""

    name = "restore"

    def work(self, loaded: Engine, tickets: list[TileTicket], batch: dict[str, Any], working: list[int]) -> None:
        """Fill in the prompt and replace the pixels."""
        for i in working:
            caption = tickets[i].caption or tickets[i].job.settings.prompt or ""
            prompt = engine.full_prompt(tickets[i].job.settings, caption)
            tickets[i] = dataclasses.replace(tickets[i], caption=caption, prompt=prompt)
        pixels = list(batch["pixels"])
        restored = loaded.restore([tickets[i] for i in working], [pixels[i] for i in working])
        for i, tile in zip(working, restored, strict=True):
            pixels[i] = tile
        batch["pixels"] = pixels
        batch["preview"] = [_EMPTY] * len(tickets)


def write_stage(row: Row, run_id: str) -> list[Row]:
    """Tile to the run-log row of its image, or to nothing while other tiles of the image are still on their way."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    outcome = write(ticket, row["pixels"], row["alpha"])
    return [] if outcome is None else [runlog.to_row(outcome, run_id)]


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
