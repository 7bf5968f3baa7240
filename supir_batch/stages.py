"""What happens to the rows of the stream at each of its stages; :mod:`supir_batch.pipeline` puts them in order.

Stages take and give batches: columns by name. ``ticket`` is a pickled TileTicket; in the blank row, which says that
nothing more was let in, it is empty. ``preview``, or ``pixels`` and ``carried``, are float32 arrays, empty once used.
Whatever goes wrong in a stage becomes a failure on the ticket, so nothing here raises; what kills or hangs the worker
is left to :mod:`supir_batch.isolation`. Nothing here knows that Ray calls it.

A worker may die after Ray has taken some of its output, and Ray then counts on the second attempt giving the same rows
in the same order. So what is begun again does not ask whether a part of it was done meanwhile, until it is written.
"""

from __future__ import annotations

import dataclasses
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from supir_batch import audit, captions, engine, gate, runlog
from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.captioner import Captioner, load_captioner
from supir_batch.color import Tone
from supir_batch.decode import decode, preview
from supir_batch.engine import Device, Engine, LoadEngine
from supir_batch.errors import EngineError
from supir_batch.identity import sample_seeds, second_seed
from supir_batch.isolation import Guards, Item
from supir_batch.types import FloatImage, Job, ModelRef, Outcome, TileTicket
from supir_batch.write import refused, write

Batch = dict[str, Any]

_EMPTY = np.zeros((0, 0, 3), np.float32)
_BLANK = b""


class Admission(Protocol):
    """Lets images into the stream as others leave it."""

    def admit(self, images: Sequence[str]) -> bool:
        """Wait until these images, by id, may be on their way; False if the run is to stop and they must not."""


def wants_caption(job: Job) -> bool:
    """Whether the prompt of the image is left to the captioner."""
    return job.settings.prompt is None


def pack(jobs: Sequence[Job]) -> dict[str, Any]:
    """The row with which some jobs enter the stream together."""
    return {"jobs": pickle.dumps(list(jobs))}


def feed_stage(batch: Batch, admission: Admission) -> Batch:
    """Jobs to images, once they may be on their way."""
    jobs: list[Job] = [job for packed in batch["jobs"] for job in pickle.loads(packed)]
    if not admission.admit([job.source.id for job in jobs]):
        return _images([_BLANK], [_EMPTY])
    return _images([pickle.dumps(TileTicket(job)) for job in jobs], [_EMPTY] * len(jobs))


def preview_stage(batch: Batch, guards: Guards, restoring: bool) -> Iterator[Batch]:
    """Images to what the captioner must see of them; those that came with a prompt pass."""
    tickets = _tickets(batch)
    with guards.of("decode") as guard:
        for group in guard.groups([_item(ticket) for ticket in tickets]):
            for ticket in (tickets[i] for i in group.members):
                if group.refused is not None:
                    failure = failure_of("decode", ticket.job.source, group.refused)
                    yield _images([pickle.dumps(dataclasses.replace(ticket, failure=failure))], [_EMPTY])
                elif not wants_caption(ticket.job):
                    yield _images([pickle.dumps(ticket)], [_EMPTY])
                else:
                    with guard.deadline():
                        seen = preview(ticket.job, restoring, look=not group.again)
                    yield _images([pickle.dumps(seen.ticket)], [seen.pixels])
    if _BLANK in batch["ticket"]:
        yield _images([_BLANK], [_EMPTY])


def caption_row_stage(batch: Batch, run_id: str) -> pa.Table:
    """Captioned images to their run-log rows."""
    outcomes = [Outcome(ticket, "done" if ticket.failure is None else "failed") for ticket in _tickets(batch)]
    return _rows(batch, outcomes, run_id)


def decode_stage(batch: Batch, guards: Guards) -> Iterator[Batch]:
    """Images to tiles, one at a time: all tiles of a giant are more than memory holds."""
    tickets = _tickets(batch)
    with guards.of("decode") as guard:
        for group in guard.groups([_item(ticket) for ticket in tickets]):
            for ticket in (tickets[i] for i in group.members):
                if group.refused is not None:
                    failure = failure_of("decode", ticket.job.source, group.refused)
                    yield _tile(dataclasses.replace(ticket, failure=failure), _EMPTY, _EMPTY)
                    continue
                seen = ticket if wants_caption(ticket.job) else None
                tiles = decode(ticket.job, engine.alignment(ticket.job.model), seen, look=not group.again)
                while True:
                    with guard.deadline():
                        tile = next(tiles, None)
                    if tile is None:
                        break
                    yield _tile(tile.ticket, tile.pixels, tile.carried)
    if _BLANK in batch["ticket"]:
        yield {"ticket": [_BLANK], "pixels": _EMPTY[None], "carried": _EMPTY[None]}


Model = TypeVar("Model", Captioner, Engine)


class _ModelStage(ABC, Generic[Model]):
    """An actor's stage: loads a model once, then works on batches of rows."""

    name: str

    def __init__(self, guards: Guards) -> None:
        self._guards = guards
        self._loaded: Model | EngineError | None = None

    def __call__(self, batch: Batch) -> Batch:
        tickets: dict[int, TileTicket] = {i: pickle.loads(one) for i, one in enumerate(batch["ticket"]) if one}
        working = [i for i, ticket in tickets.items() if ticket.has_work and self.wanted(batch, i)]
        if not working:
            return batch
        loaded = self.ready()
        with self._guards.of(self.name) as guard:
            for group in guard.groups([_item(tickets[i]) for i in working]):
                members = [working[k] for k in group.members]
                watch = Stopwatch(self.name, "" if isinstance(loaded, EngineError) else loaded.device)
                try:
                    if group.refused is not None:
                        raise group.refused
                    if isinstance(loaded, EngineError):
                        raise loaded
                    with guard.deadline(sum(self.effort(tickets[i]) for i in members)):
                        self.work(loaded, tickets, batch, members)
                except Exception as error:  # whatever it is, it concerns these rows alone
                    self._fail(tickets, members, error)
                for i in members:
                    tickets[i] = watch.record(tickets[i], share=len(members))
        pickled = [pickle.dumps(tickets[i]) if i in tickets else _BLANK for i in range(len(batch["ticket"]))]
        return batch | {"ticket": np.array(pickled, dtype=object)}

    def ready(self) -> Model | EngineError:
        """The model, or why there is none: an exception in a constructor would make Ray try again and again."""
        if self._loaded is None:
            try:
                self._loaded = self.load()
            except Exception as error:
                self._loaded = EngineError(f"{type(error).__name__}: {error}")
        return self._loaded

    def _fail(self, tickets: dict[int, TileTicket], indices: Sequence[int], error: Exception) -> None:
        for i in indices:
            failure = failure_of(self.name, tickets[i].job.source, error)
            tickets[i] = dataclasses.replace(tickets[i], failure=failure)

    @abstractmethod
    def load(self) -> Model:
        """The model, ready to work."""

    def wanted(self, batch: Batch, index: int) -> bool:
        """Whether this stage has something to do for a row that still has work."""
        return True

    def effort(self, ticket: TileTicket) -> int:
        """How many times as long as a row usually takes this one may take."""
        return 1

    @abstractmethod
    def work(self, loaded: Model, tickets: dict[int, TileTicket], batch: Batch, working: list[int]) -> None:
        """Advance the rows at the indices ``working`` in place."""


class CaptionStage(_ModelStage[Captioner]):
    """Captions images, and keeps what may be needed again. Where all captions are kept, no captioner is loaded."""

    name = "caption"

    def __init__(self, guards: Guards, job: Job, device: Device) -> None:
        super().__init__(guards)
        self._job, self._device = job, device

    def load(self) -> Captioner:
        """The captioner of the run."""
        return load_captioner(self._job, self._device)

    def wanted(self, batch: Batch, index: int) -> bool:
        """Images that came with a prompt, or whose caption was kept, bring no preview."""
        return bool(batch["preview"][index].size)

    def work(self, loaded: Captioner, tickets: dict[int, TileTicket], batch: Batch, working: list[int]) -> None:
        """Fill in ``caption`` and drop the previews. What fails together is tried alone, so innocents do not fail."""
        previews = list(batch["preview"])
        batch["preview"] = [_EMPTY] * len(previews)
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
                self._fail(tickets, [i], error)


class RestoreStage(_ModelStage[Engine]):
    """Restores tiles, ``together`` at once; the engine is loaded before the first arrives.

    While the engine has some, those before them are measured in another thread, so that a card need not wait for that.
    """

    name = "restore"

    def __init__(
        self,
        guards: Guards,
        model: ModelRef | None,
        device: Device,
        load: LoadEngine = engine.load_engine,
        together: int = 1,
    ) -> None:
        super().__init__(guards)
        self._model, self._device, self._load, self._together = model, device, load, together
        self.ready()

    def load(self) -> Engine:
        """The engine of the run."""
        return self._load(self._model, self._device)

    def effort(self, ticket: TileTicket) -> int:
        """As many restorations as the audit wants."""
        return _samples(ticket)

    def work(self, loaded: Engine, tickets: dict[int, TileTicket], batch: Batch, working: list[int]) -> None:
        """Fill in the prompt and replace the pixels."""
        for i in working:
            caption = tickets[i].caption or tickets[i].job.settings.prompt or ""
            prompt = engine.full_prompt(tickets[i].job.settings, caption)
            tickets[i] = dataclasses.replace(tickets[i], caption=caption, prompt=prompt)
        before = list(batch["pixels"])
        pixels = list(before)
        with ThreadPoolExecutor(1, "measure") as beside:
            measured: dict[int, tuple[FloatImage, Future[TileTicket]]] = {}
            for start in range(0, len(working), self._together):
                some = working[start : start + self._together]
                try:
                    restored = loaded.restore([tickets[i] for i in some], [before[i] for i in some])
                except Exception as error:  # whatever it is, it concerns these tiles alone
                    self._fail(tickets, some, error)
                    continue
                for i, tile in zip(some, restored, strict=True):
                    tickets[i] = dataclasses.replace(tickets[i], execution=loaded.execution)
                    measured[i] = tile, beside.submit(_measured, tickets[i], before[i], tile)
            for i, (tile, ticket) in measured.items():
                try:
                    tickets[i], pixels[i] = _settled(loaded, ticket.result(), before[i], tile)
                except Exception as error:
                    self._fail(tickets, [i], error)
        if any(new is not old for new, old in zip(pixels, before, strict=True)):  # else no copy of all is made
            batch["pixels"] = pixels


def _measured(ticket: TileTicket, before: FloatImage, after: FloatImage) -> TileTicket:
    """The ticket with the scores of its restored tile, and with the audit if that needs no other restoration."""
    if ticket.facts is None:
        raise ValueError("the ticket carries no image facts")
    scores = gate.measure(before, after, Tone(ticket.facts.tone, ticket.facts.tone_curve))
    scored = dataclasses.replace(ticket, scores=scores)
    if gate.complaints(scores, ticket.job.settings.gate) or _samples(ticket) > 1:
        return scored
    return _audited(scored, before, after, ())


def _settled(
    engine: Engine, ticket: TileTicket, before: FloatImage, after: FloatImage
) -> tuple[TileTicket, FloatImage]:
    """What is still to do for a measured tile: one that went wrong gets a second and last attempt, whatever that is
    like, and others are restored with the seeds that the audit compares."""
    if ticket.scores is not None and gate.complaints(ticket.scores, ticket.job.settings.gate):
        again = dataclasses.replace(ticket, again=True, seed=second_seed(ticket.seed))
        another = engine.restore_again(again, before)
        if another is not None:
            ticket, after = _measured(again, before, another), another
    if ticket.tile_audit is not None:
        return ticket, after
    seeds = sample_seeds(ticket.seed, _samples(ticket) - 1)
    others = (engine.restore([dataclasses.replace(ticket, seed=seed)], [before])[0] for seed in seeds)
    return _audited(ticket, before, after, others), after


def _samples(ticket: TileTicket) -> int:
    """With how many seeds the tile is to be restored: more than one only where a region was flagged."""
    flagged = ticket.facts is not None and ticket.facts.regions
    return max(1, ticket.job.settings.audit_samples) if flagged else 1


def _audited(ticket: TileTicket, before: FloatImage, after: FloatImage, others: Iterable[FloatImage]) -> TileTicket:
    """The ticket with the audit of its tile, if one is wanted; ``others`` are restorations with other seeds."""
    if ticket.facts is None or ticket.box is None:
        raise ValueError("the ticket carries no image facts or no tile box")
    chosen = ticket.job.settings
    if not chosen.audit_enabled or ticket.scores is None or not ticket.scores.finite:
        return ticket
    measured = audit.measure(before, after, ticket.facts, ticket.box, chosen.overlap, others)
    return dataclasses.replace(ticket, tile_audit=measured)


def write_stage(batch: Batch, guards: Guards) -> pa.Table:
    """Tiles to the run-log rows of the images that they complete."""
    outcomes = []
    places = [i for i, ticket in enumerate(batch["ticket"]) if ticket]
    tickets = _tickets(batch)
    with guards.of("write") as guard:
        for group in guard.groups([_item(ticket) for ticket in tickets]):
            for k in group.members:
                if group.refused is not None:
                    outcome: Outcome | None = refused(tickets[k], group.refused)
                else:
                    with guard.deadline():
                        pixels, carried = batch["pixels"][places[k]], batch["carried"][places[k]]
                        outcome = write(tickets[k], pixels, carried, look=group.again)
                if outcome is not None:
                    outcomes.append(outcome)
    return _rows(batch, outcomes, guards.run_id)


# --- batches -------------------------------------------------------------------------------------------------------


def _tickets(batch: Batch) -> list[TileTicket]:
    return [pickle.loads(ticket) for ticket in batch["ticket"] if ticket]


def _item(ticket: TileTicket) -> Item:
    return ticket.job.source.id, 0 if ticket.box is None else ticket.box.index


def _images(tickets: Sequence[bytes], previews: Sequence[FloatImage]) -> Batch:
    return {"ticket": list(tickets), "preview": np.stack(previews)}


def _tile(ticket: TileTicket, pixels: FloatImage, carried: FloatImage) -> Batch:
    return {"ticket": [pickle.dumps(ticket)], "pixels": pixels[None], "carried": carried[None]}


def _rows(batch: Batch, outcomes: Sequence[Outcome], run_id: str) -> pa.Table:
    """Run-log rows; one that is empty stands for the blank one."""
    rows = [runlog.to_row(outcome, run_id) for outcome in outcomes]
    if _BLANK in batch["ticket"]:
        rows.append({})
    return pa.Table.from_pylist(rows, schema=runlog.SCHEMA)
