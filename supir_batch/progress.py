"""How far a run is, on stderr: a bar on a terminal, one plain line a minute elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar


class Progress(Protocol):
    """A context manager that is told of every run-log row."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def update(self, row: Mapping[str, Any]) -> None:
        """Count one finished image."""


def progress(total: int) -> Progress:
    """The display that fits stderr, for ``total`` images."""
    return BarProgress(total) if sys.stderr.isatty() else LineProgress(total)


class Tally:
    """Images, failures and restored megapixels since the start; the same numbers for both displays."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.images = 0
        self.failed = 0
        self.megapixels = 0.0
        self._started = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one finished image; what was only found again adds no megapixels."""
        self.images += 1
        if row["status"] == "failed":
            self.failed += 1
        elif not row["recovered"]:
            self.megapixels += (row["output_width"] or 0) * (row["output_height"] or 0) / 1e6

    @property
    def megapixels_per_second(self) -> float:
        """Output megapixels per second since the start."""
        return self.megapixels / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """One plain line: ``12/100 images, 0.52 megapixels/s, 1 failed, about 4 min left``."""
        parts = [f"{self.images}/{self.total} images", f"{self.megapixels_per_second:.2f} megapixels/s"]
        parts.append(f"{self.failed} failed")
        if 0 < self.images < self.total:
            seconds = (time.monotonic() - self._started) / self.images * (self.total - self.images)
            parts.append(f"about {duration(seconds)} left")
        return ", ".join(parts)


class BarProgress:
    """A bar with images, megapixels/s, failures and remaining time; failures are printed above it."""

    def __init__(self, total: int) -> None:
        self._tally = Tally(total)
        self._bar = RichBar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("images, {task.fields[rate]:.2f} megapixels/s, {task.fields[failed]} failed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total, rate=0.0, failed=0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Count one finished image."""
        self._tally.add(row)
        if row["status"] == "failed":
            self._bar.console.print(f"failed: {row['failure_message']}", markup=False, highlight=False)
        self._bar.update(
            self._task,
            completed=self._tally.images,
            rate=self._tally.megapixels_per_second,
            failed=self._tally.failed,
        )


class LineProgress:
    """One line every ``seconds``, also while no image finishes; failures at once."""

    def __init__(self, total: int, seconds: float = 60.0) -> None:
        self._tally = Tally(total)
        self._seconds = seconds
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._ticker.join()

    def update(self, row: Mapping[str, Any]) -> None:
        """Count one finished image."""
        self._tally.add(row)
        if row["status"] == "failed":
            print(f"failed: {row['failure_message']}", file=sys.stderr, flush=True)

    def say(self) -> None:
        """Tell how far the run is."""
        print(self._tally.line(), file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self._over.wait(self._seconds):
            self.say()


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
