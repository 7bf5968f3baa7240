"""What happens to a run, told while it happens: to people in words on stderr, as JSON lines, or both.

Every line has ``ts`` (UTC), ``level``, ``event``, ``run_id`` and ``message``; events: start, lease, image, progress,
drain, warning, error, end. A line about an image has its ``id`` and how it ended.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, TextIO

from supir_batch.progress import LineProgress, Progress, progress

Level = Literal["info", "warning", "error"]

_OF_AN_IMAGE = ("id", "uri", "status", "recovered", "failure_stage", "failure_kind", "output_uri", "notes")


@dataclass(frozen=True)
class Talk:
    """How a run is to tell: in words on stderr (``people``), as JSON lines; with ``verbose``, Ray's own words too."""

    people: bool = True
    lines: TextIO | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Listener:
    """Who hears of the stream: ``on_row`` of every image, ``on_warning`` of what somebody should look after.

    With ``verbose`` what Ray says goes to stderr.
    """

    on_row: Callable[[dict[str, Any]], None]  # a row of the run log
    on_warning: Callable[[str], None]
    verbose: bool = False


class Events:
    """The events of one run; may be told from several threads."""

    def __init__(self, talk: Talk, run_id: str) -> None:
        self._talk, self._run_id = talk, run_id
        self._lock = threading.Lock()

    def tell(self, level: Level, event: str, message: str, details: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write one JSON line, if they are wanted."""
        if self._talk.lines is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"ts": now, "level": level, "event": event, "run_id": self._run_id, "message": message, **details}
        with self._lock:
            self._talk.lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._talk.lines.flush()

    def warn(self, message: str) -> None:
        """A warning, in every way there is."""
        if self._talk.people:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self.tell("warning", "warning", message)

    @contextmanager
    def progress(self, total: int) -> Iterator[list[Progress]]:
        """What shows the progress of ``total`` images, each to be told of every row."""
        with ExitStack() as stack:
            shown = [stack.enter_context(progress(total))] if self._talk.people else []
            lines = [stack.enter_context(_EventProgress(total, self))] if self._talk.lines is not None else []
            yield [*shown, *lines]


class _EventProgress(LineProgress):
    """One JSON line for every image, and one a minute."""

    def __init__(self, total: int, events: Events) -> None:
        super().__init__(total)
        self._events = events

    def update(self, row: Mapping[str, Any]) -> None:
        """Tell how an image ended."""
        self._tally.add(row)
        details = {key: row[key] for key in _OF_AN_IMAGE if row[key]}
        details["seconds"] = {
            key.removeprefix("seconds_"): round(value, 3)
            for key, value in row.items()
            if key.startswith("seconds_") and value is not None
        }
        failed = row["status"] == "failed"
        message = row["failure_message"] if failed else f"{row['uri']}: {row['status']}"
        self._events.tell("error" if failed else "info", "image", message, details)

    def say(self) -> None:
        """Tell how far the run is."""
        self._events.tell("info", "progress", self._tally.line())
