"""Errors of the pipeline.

SupirBatchError
├── ManifestError      the manifest or what it lists is unusable; stops before any work (exit 2)
├── StoreError         a URI cannot be listed, read or written
│   └── TransientStoreError   ... and trying again can help
├── LeaseError         another run is writing to the same output (exit 5)
├── ClusterError       a Ray cluster cannot be reached, dies under a run, or does not take a job
├── EngineError        the engine or the captioner cannot be loaded, so no image can be restored; ends the run
└── ImageError         one image cannot be read, restored or written; becomes a failed outcome
"""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 20  # problems at once; a list made by a script tends to have the same mistake in every row


class SupirBatchError(Exception):
    """Base of every error raised on purpose; the message says what, which item, what was seen, what to do."""

    retryable = False
    kind: str  # a short stable word for the log


class ManifestError(SupirBatchError):
    """The manifest, or what it lists, is unusable; nothing has been done."""

    kind = "manifest"


def refuse(problems: Iterable[str]) -> None:
    """Raise ManifestError that names the problems, one per line and the first 20 of them; none is fine."""
    found = list(problems)
    if found:
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ManifestError("\n".join([*found[:_SHOWN], *more]))


class StoreError(SupirBatchError):
    """A URI cannot be listed, read or written."""

    kind = "store"


class TransientStoreError(StoreError):
    """A URI could not be reached this time; trying again can help."""

    retryable = True


class LeaseError(SupirBatchError):
    """Another run is writing to the same output; this one has not begun."""

    kind = "lease"


class ClusterError(SupirBatchError):
    """A Ray cluster cannot be reached, dies under a run, or does not take a job; trying again can help."""

    kind = "cluster"
    retryable = True


class EngineError(SupirBatchError):
    """The engine or the captioner cannot be loaded, so no image can be restored; the run ends and can be repeated."""

    kind = "engine"


class ImageError(SupirBatchError):
    """One image cannot be read, restored or written; it becomes a failed outcome and the run goes on.

    ``kind`` is one of ``truncated``, ``empty``, ``not-an-image``, ...
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
