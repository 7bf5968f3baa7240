"""The whole flow: jobs in, one run-log row per image out.

    jobs ─▶ preview ─▶ caption ─▶ decode + tile ─▶ restore ─▶ write ─▶ rows
            CPU tasks  actors     CPU tasks        actors     CPU tasks

Up to the caption a row of the stream is an image: its ticket (everything known about it) and a preview, if it must be
captioned. From there on it is a tile: its ticket and its pixels. So an image is captioned once, into however many
tiles it is cut, and no full-size pixels wait for a captioner; the price is that its source is read twice.

One row is one block, because a block is Ray's unit of retry and of memory. An error inside a stage becomes a failure on
the ticket and flows on to the log; it never reaches Ray, so one bad image cannot stop the others.
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
from typing import Any, Generic, TypeVar

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from supir_batch import captions, engine, runlog
from supir_batch.captioner import Captioner, load_captioner
from supir_batch.decode import decode, preview
from supir_batch.engine import Device, Engine
from supir_batch.errors import EngineError
from supir_batch.settings import Runtime
from supir_batch.stage import Stopwatch, failure_of
from supir_batch.types import Job, ModelRef, Outcome, TileTicket
from supir_batch.write import write

Row = dict[str, Any]  # ticket: pickled TileTicket; preview, or pixels and alpha: float32 arrays, empty once used up

_EMPTY = np.zeros((0, 0, 3), np.float32)


def run(jobs: Sequence[Job], runtime: Runtime, on_row: Callable[[Row], None], run_id: str) -> None:
    """Do all jobs; ``on_row`` gets the run-log row (``runlog.SCHEMA``) of every image as it ends, in any order.

    An exception raised by ``on_row`` stops the run; what was committed until then stays. Raises EngineError if the
    engine or the captioner cannot be loaded.
    """
    if not jobs:
        return
    captioned = any(_wants_caption(job) for job in jobs)
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
    wanted = [job for job in jobs if _wants_caption(job)]
    if not wanted:
        return
    with _ray(runtime):
        images = _captioned(_images(wanted), wanted, runtime, restoring=False)
        _collect(images.map(caption_row_stage, fn_args=(run_id,), num_cpus=0.5), on_row)


def _images(jobs: Sequence[Job]) -> ray.data.Dataset:
    tickets = [{"ticket": pickle.dumps(TileTicket(job)), "preview": _EMPTY} for job in jobs]
    return ray.data.from_items(tickets, override_num_blocks=len(jobs))


def _captioned(images: ray.data.Dataset, jobs: Sequence[Job], runtime: Runtime, restoring: bool) -> ray.data.Dataset:
    share = runtime.caption_gpus_per_actor
    return images.map(preview_stage, fn_args=(restoring,), num_cpus=0.5).map_batches(
        CaptionStage,
        compute=ActorPoolStrategy(size=runtime.caption_actors),
        # the captioner and its options are the manifest's, the same for every job that wants a caption
        fn_constructor_args=(next(job for job in jobs if _wants_caption(job)), runtime.device),
        num_gpus=runtime.gpus_per_actor / 2 if share is None else share,
        num_cpus=0,
        batch_size=runtime.caption_batch,
    )


def _collect(rows: ray.data.Dataset, on_row: Callable[[Row], None]) -> None:
    logged: set[str] = set()
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in table.to_pylist():
            if row["failure_kind"] == EngineError.kind:
                raise EngineError(row["failure_message"])
            if row["id"] not in logged:  # two writers may both see the last part of a cut image arrive
                logged.add(row["id"])
                on_row(row)


def _wants_caption(job: Job) -> bool:
    return job.settings.prompt is None


def preview_stage(row: Row, restoring: bool) -> Row:
    """Job to what the captioner must see of it; images that came with a prompt pass."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    if not _wants_caption(ticket.job):
        return row
    seen = preview(ticket.job, restoring)
    return {"ticket": pickle.dumps(seen.ticket), "preview": seen.pixels}


def caption_row_stage(row: Row, run_id: str) -> Row:
    """Captioned image to its run-log row."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    return runlog.to_row(Outcome(ticket, "done" if ticket.failure is None else "failed"), run_id)


def decode_stage(row: Row) -> list[Row]:
    """Image to tiles."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    seen = ticket if _wants_caption(ticket.job) else None
    return [
        {"ticket": pickle.dumps(tile.ticket), "pixels": tile.pixels, "alpha": tile.alpha}
        for tile in decode(ticket.job, engine.alignment(ticket.job.model), seen)
    ]


Model = TypeVar("Model", Captioner, Engine)


class _ModelStage(ABC, Generic[Model]):
    """An actor's stage: loads a model once, then works on batches of rows."""

    name: str
    _loaded: Model | EngineError | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tickets: list[TileTicket] = [pickle.loads(ticket) for ticket in batch["ticket"]]
        working = [i for i, ticket in enumerate(tickets) if ticket.has_work and self.wanted(batch, i)]
        if not working:
            return batch
        loaded = self.ready()
        watch = Stopwatch(self.name, "" if isinstance(loaded, EngineError) else loaded.device)
        try:
            if isinstance(loaded, EngineError):
                raise loaded
            self.work(loaded, tickets, batch, working)
        except Exception as error:  # whatever it is, it concerns these rows alone
            for i in working:
                failure = failure_of(self.name, tickets[i].job.source, error)
                tickets[i] = dataclasses.replace(tickets[i], failure=failure)
        for i in working:
            tickets[i] = watch.record(tickets[i], share=len(working))
        return batch | {"ticket": np.array([pickle.dumps(ticket) for ticket in tickets], dtype=object)}

    def ready(self) -> Model | EngineError:
        """The model, or why there is none: an exception in a constructor would make Ray try again and again."""
        if self._loaded is None:
            try:
                self._loaded = self.load()
            except Exception as error:
                self._loaded = EngineError(f"{type(error).__name__}: {error}")
        return self._loaded

    @abstractmethod
    def load(self) -> Model:
        """The model, ready to work."""

    def wanted(self, batch: dict[str, Any], index: int) -> bool:
        """Whether this stage has something to do for a row that still has work."""
        return True

    @abstractmethod
    def work(self, loaded: Model, tickets: list[TileTicket], batch: dict[str, Any], working: list[int]) -> None:
        """Advance the rows at the indices ``working`` in place."""


class CaptionStage(_ModelStage[Captioner]):
    """Captions images, and keeps what may be needed again. Where all captions are kept, no captioner is loaded."""

    name = "caption"

    def __init__(self, job: Job, device: Device) -> None:
        self._job, self._device = job, device

    def load(self) -> Captioner:
        """The captioner of the run."""
        return load_captioner(self._job, self._device)

    def wanted(self, batch: dict[str, Any], index: int) -> bool:
        """Images that came with a prompt, or whose caption was kept, bring no preview."""
        return bool(batch["preview"][index].size)

    def work(self, loaded: Captioner, tickets: list[TileTicket], batch: dict[str, Any], working: list[int]) -> None:
        """Fill in ``caption`` and drop the previews. What fails together is tried alone, so innocents do not fail."""
        previews = list(batch["preview"])
        batch["preview"] = [_EMPTY] * len(tickets)
        try:
            said = loaded.caption([tickets[i] for i in working], [previews[i] for i in working])
        except Exception:
            if len(working) == 1:
                raise
            said = None
        for place, i in enumerate(working):
            try:
                text = said[place] if said else loaded.caption([tickets[i]], [previews[i]])[0]
                tickets[i] = dataclasses.replace(tickets[i], caption=text)
                captions.keep(tickets[i])
            except Exception as error:
                failure = failure_of(self.name, tickets[i].job.source, error)
                tickets[i] = dataclasses.replace(tickets[i], failure=failure)


class RestoreStage(_ModelStage[Engine]):
    """Restores tiles; the engine is loaded before the first arrives."""

    name = "restore"

    def __init__(self, model: ModelRef | None, device: Device) -> None:
        self._model, self._device = model, device
        self.ready()

    def load(self) -> Engine:
        """The engine of the run."""
        return engine.load_engine(self._model, self._device)

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
