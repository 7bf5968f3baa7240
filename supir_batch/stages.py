"""What happens to one row of the stream at each of its stages; :mod:`supir_batch.pipeline` puts them in order.

A row holds a pickled ticket and arrays. Whatever goes wrong in a stage becomes a failure on the ticket, so nothing here
raises, and nothing here knows that Ray calls it.
"""

from __future__ import annotations

import dataclasses
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from supir_batch import captions, engine, gate, runlog
from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.captioner import Captioner, load_captioner
from supir_batch.color import Tone
from supir_batch.decode import decode, preview
from supir_batch.engine import Device, Engine
from supir_batch.errors import EngineError
from supir_batch.settings import second_seed
from supir_batch.types import FloatImage, Job, ModelRef, Outcome, TileTicket
from supir_batch.write import write

Row = dict[str, Any]  # ticket: pickled TileTicket; preview, or pixels and carried: float32 arrays, empty once used up

_EMPTY = np.zeros((0, 0, 3), np.float32)


def wants_caption(job: Job) -> bool:
    """Whether the prompt of the image is left to the captioner."""
    return job.settings.prompt is None


def new_row(job: Job) -> Row:
    """The row with which an image enters the stream."""
    return {"ticket": pickle.dumps(TileTicket(job)), "preview": _EMPTY}


def preview_stage(row: Row, restoring: bool) -> Row:
    """Job to what the captioner must see of it; images that came with a prompt pass."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    if not wants_caption(ticket.job):
        return row
    seen = preview(ticket.job, restoring)
    return {"ticket": pickle.dumps(seen.ticket), "preview": seen.pixels}


def caption_row_stage(row: Row, run_id: str) -> Row:
    """Captioned image to its run-log row."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    return runlog.to_row(Outcome(ticket, "done" if ticket.failure is None else "failed"), run_id)


def decode_stage(row: Row) -> Iterator[Row]:
    """Image to tiles, one at a time: all tiles of a giant are more than memory holds."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    seen = ticket if wants_caption(ticket.job) else None
    for tile in decode(ticket.job, engine.alignment(ticket.job.model), seen):
        yield {"ticket": pickle.dumps(tile.ticket), "pixels": tile.pixels, "carried": tile.carried}


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
            try:
                tickets[i], pixels[i] = _through_gate(loaded, tickets[i], pixels[i], tile)
            except Exception as error:  # of a second attempt, which is this tile's alone
                failure = failure_of(self.name, tickets[i].job.source, error)
                tickets[i] = dataclasses.replace(tickets[i], failure=failure)
        batch["pixels"] = pixels


def _through_gate(
    engine: Engine, ticket: TileTicket, before: FloatImage, after: FloatImage
) -> tuple[TileTicket, FloatImage]:
    """Measure a restored tile; one that went wrong gets a second and last attempt, whatever that is like."""
    if ticket.facts is None:
        raise ValueError("the ticket carries no image facts")
    tone = Tone(ticket.facts.tone, ticket.facts.tone_curve)
    first = dataclasses.replace(ticket, scores=(scores := gate.measure(before, after, tone)))
    if not gate.complaints(scores, ticket.job.settings.gate):
        return first, after
    again = dataclasses.replace(ticket, again=True, seed=second_seed(ticket.seed))
    another = engine.restore_again(again, before)
    if another is None:
        return first, after
    return dataclasses.replace(again, scores=gate.measure(before, another, tone)), another


def write_stage(row: Row, run_id: str) -> list[Row]:
    """Tile to the run-log row of its image, or to nothing while other tiles of the image are still on their way."""
    ticket: TileTicket = pickle.loads(row["ticket"])
    outcome = write(ticket, row["pixels"], row["carried"])
    return [] if outcome is None else [runlog.to_row(outcome, run_id)]
