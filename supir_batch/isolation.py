"""Workers that die or hang: whose fault it was, what is tried again, and when to stop trying.

Native code (decoders, GPU kernels) can end its process, and no ``except`` sees it. So a stage tells a ledger outside of
the process which items it is about to touch, and when it has done so. An item that is begun again without having been
ended was in a worker that died. What died in company is tried again alone; what died twice is not tried again. A node
that is lost is nobody's fault and does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from supir_batch.errors import ImageError

MAX_DEATHS = 2

Item = tuple[str, int]  # id of the image, index of the tile

# first words of what faulthandler writes
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating": "SIGFPE",
    "Illegal instruction": "SIGILL",
}


@dataclass(frozen=True)
class Worker:
    """A process of the cluster."""

    node: str
    pid: int


@dataclass(frozen=True)
class Begun:
    """The ledger's answer to a stage that wants to begin with some items.

    ``opened``: it may, with all of them; otherwise one after the other. ``again``: some of them were begun before in
    this run. ``deaths``: the workers that died in each of them. ``lost``: how many of them were begun and not ended.
    """

    opened: bool
    again: bool
    deaths: tuple[tuple[Worker, ...], ...]
    lost: int = 0


class Ledger(Protocol):
    """What a stage sees of :class:`Book`, wherever that is kept."""

    def begin(self, stage: str, items: Sequence[Item]) -> Begun:
        """Ask to begin with ``items``."""

    def end(self, stage: str, items: Sequence[Item]) -> None:
        """Say that the worker lives and has done with ``items``."""


@dataclass
class _Entry:
    open_in: Worker | None = None
    deaths: tuple[Worker, ...] = ()


@dataclass
class Book:
    """Which items are begun, by whom, and in which workers died. Kept by one process for the whole run."""

    is_lost: Callable[[str], bool]  # whether a node is gone
    _entries: dict[str, dict[tuple[str, int], _Entry]] = field(default_factory=dict)  # by image, then stage and tile

    def begin(self, stage: str, items: Sequence[Item], worker: Worker) -> Begun:
        """See :class:`Begun`. Several items open only together, and only if no worker died in any of them."""
        known = [self._entries.get(image, {}).get((stage, tile)) for image, tile in items]
        lost = 0
        for entry in known:
            if entry is not None and entry.open_in is not None:
                lost += 1
                if not self.is_lost(entry.open_in.node):
                    entry.deaths += (entry.open_in,)
                entry.open_in = None
        deaths = tuple(() if entry is None else entry.deaths for entry in known)
        opened = not any(deaths) or (len(items) == 1 and len(deaths[0]) < MAX_DEATHS)
        if opened:
            for image, tile in items:
                self._entries.setdefault(image, {}).setdefault((stage, tile), _Entry()).open_in = worker
        return Begun(opened, any(entry is not None for entry in known), deaths, lost)

    def end(self, stage: str, items: Sequence[Item]) -> None:
        """The items were done with; one that is not known was retired meanwhile."""
        for image, tile in items:
            if (entry := self._entries.get(image, {}).get((stage, tile))) is not None:
                entry.open_in = None

    def retire(self, image: str) -> None:
        """Forget an image that has come to its end."""
        self._entries.pop(image, None)


@dataclass(frozen=True)
class Group:
    """Items, by index, that a stage may touch now; or one with which it must not begin any more: ``refused``."""

    members: tuple[int, ...]
    again: bool  # some of what came along was begun before in this run: look what is there before doing it twice
    refused: ImageError | None = None


class Guard:
    """One stage in one process, while it works on one batch; a context manager."""

    def __init__(self, stage: str, ledger: Ledger, run_id: str, deadline_seconds: float) -> None:
        self._stage, self._ledger, self._deadline = stage, ledger, deadline_seconds
        self._note = notes_folder(run_id) / str(os.getpid())

    def __enter__(self) -> Guard:
        self._note.parent.mkdir(exist_ok=True)
        self._was_enabled = faulthandler.is_enabled()
        self._file = self._note.open("w")
        faulthandler.enable(self._file, all_threads=False)
        return self

    def __exit__(self, *exc: object) -> None:
        faulthandler.disable()
        if self._was_enabled:
            faulthandler.enable(all_threads=False)
        self._file.close()
        self._note.unlink(missing_ok=True)

    def groups(self, items: Sequence[Item]) -> Iterator[Group]:
        """All items in order, together or alone as the ledger says; the next group is asked for when one is done."""
        begun = self._ledger.begin(self._stage, items)
        if begun.opened:
            yield Group(tuple(range(len(items))), begun.again)
            self._ledger.end(self._stage, items)
            return
        for index, (item, deaths) in enumerate(zip(items, begun.deaths, strict=True)):
            if len(deaths) >= MAX_DEATHS:
                yield Group((index,), True, self._refusal(deaths))
                continue
            if len(items) > 1:
                self._ledger.begin(self._stage, [item])
            yield Group((index,), True)
            self._ledger.end(self._stage, [item])

    @contextmanager
    def deadline(self, count: int = 1) -> Iterator[None]:
        """End this process if the body, which works on ``count`` items, takes longer than they may.

        It is ended even if native code hangs and never gives the interpreter back.
        """
        faulthandler.dump_traceback_later(self._deadline * count, exit=True, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _refusal(self, deaths: Sequence[Worker]) -> ImageError:
        causes = [_cause(self._note.with_name(str(worker.pid))) for worker in deaths]
        advice = "it was set aside: look at the file, then use supir-batch retry"
        if all(cause == _HANG for cause in causes):
            limit = f"{self._deadline:g} s (runtime.deadline_seconds)"
            return ImageError("hang", f"stage {self._stage} did not end within {limit}, {len(deaths)} times; {advice}")
        told = ", ".join(dict.fromkeys(causes))
        return ImageError("poison", f"{len(deaths)} workers died in stage {self._stage} of it ({told}); {advice}")


@dataclass(frozen=True)
class Guards:
    """What every stage of a run is given to guard its work with."""

    ledger: Ledger
    run_id: str
    deadline_seconds: float  # that a stage may take for one item

    def of(self, stage: str) -> Guard:
        """The guard of one stage for one batch."""
        return Guard(stage, self.ledger, self.run_id, self.deadline_seconds)


def notes_folder(run_id: str) -> Path:
    """Where the workers of one machine leave word of what ended them."""
    return Path(tempfile.gettempdir()) / f"supir-batch-{run_id}"


def remove_notes(run_id: str) -> None:
    """Forget what the workers of this machine left."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(notes_folder(run_id))


_HANG = "hang"


def _cause(note: Path) -> str:
    """What ended the process that left ``note``; a process that is killed from outside leaves an empty one."""
    try:
        text = note.read_text(errors="replace")
    except FileNotFoundError:
        return "on another machine, see its Ray logs"
    if text.startswith("Timeout"):
        return _HANG
    found = re.match(r"Fatal Python error: (.*)", text)
    if found is None:
        return "SIGKILL, as when memory runs out"
    return next((name for words, name in _SIGNALS.items() if found[1].startswith(words)), found[1])
