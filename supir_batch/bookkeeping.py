"""What every stage does besides its work: measure itself, and turn whatever goes wrong into a failure that flows on."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import sys
import time
from pathlib import Path

from supir_batch.errors import SupirBatchError
from supir_batch.types import Failure, Source, StageRecord, TileTicket


class Stopwatch:
    """Measures one stage from its construction on."""

    def __init__(self, stage: str, device: str = "cpu") -> None:
        self._stage, self._device, self._started = stage, device, time.perf_counter()
        _forget_peak()

    def record(self, ticket: TileTicket, share: int = 1) -> TileTicket:
        """The ticket with this stage's record appended; ``share`` tiles split the time since construction."""
        seconds = (time.perf_counter() - self._started) / share
        record = StageRecord(self._stage, seconds, peak_memory_bytes(), self._device)
        return dataclasses.replace(ticket, records=(*ticket.records, record))


def failure_of(stage: str, source: Source, error: Exception) -> Failure:
    """The failure that ``error`` means for the image of ``source``; the message names the row and the image.

    Errors raised on purpose keep their words; any other is ``internal`` and names its type.
    """
    if isinstance(error, SupirBatchError):
        kind, message = error.kind, str(error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: of a GPU
        kind, message = "out-of-memory", "not enough memory; lower tiling.max_pixels or use a larger machine"
    else:
        kind, message = "internal", f"{type(error).__name__}: {error}"
    if source.uri not in message:
        message = f"{source.uri}: {message}"
    return Failure(stage, kind, f"{source.origin}: {message}", getattr(error, "retryable", False))


def _forget_peak() -> None:
    """Let the peak that the system keeps of this process begin anew, where it can (Linux, proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Most memory this process has held since ``_forget_peak``, without what it shares with others (the object store).

    Where the system does not say, since it began and with what it shares.
    """
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text("ascii", "replace")
        held = {key: int(kilobytes) * 1024 for key, kilobytes in re.findall(r"(VmHWM|RssShmem):\s*(\d+)", status)}
        if "VmHWM" in held:
            return held["VmHWM"] - held.get("RssShmem", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes
