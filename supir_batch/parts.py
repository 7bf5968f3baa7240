"""The tiles of a cut image, kept beside the output until the last one has come."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy

from supir_batch import store
from supir_batch.types import FloatImage, GateScores, Job, TileAudit, TileBox, TileTicket

PARTS_FOLDER = "_parts"  # below the output


@dataclass(frozen=True)
class Part:
    """What is known of a restored tile besides its pixels."""

    box: TileBox
    scores: GateScores | None
    again: bool
    execution: str
    audit: TileAudit | None = None

    @classmethod
    def of(cls, ticket: TileTicket) -> Self:
        """The part that a ticket stands for. Raises ValueError if it has no box."""
        if ticket.box is None:
            raise ValueError("the ticket carries no tile box")
        return cls(ticket.box, ticket.scores, ticket.again, ticket.execution, ticket.tile_audit)


def uri(job: Job, fingerprint: str, index: int) -> str:
    """Where the pixels of tile ``index`` of a cut image wait; what is known of it is in a JSON file beside them."""
    return store.join(job.output_root, PARTS_FOLDER, fingerprint, f"{index:06d}.npy")


def keep(job: Job, fingerprint: str, part: Part, pixels: FloatImage) -> None:
    """Store a tile [h, w, C]; once its pixels are there, all of it is."""
    place = uri(job, fingerprint, part.box.index)
    store.write_atomic(_about(place), json.dumps(dataclasses.asdict(part), default=_text).encode())
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    store.write_atomic(place, buffer.getvalue())


def is_kept(job: Job, fingerprint: str, index: int) -> bool:
    """Whether tile ``index`` is there."""
    return store.exists(uri(job, fingerprint, index))


def complete(job: Job, fingerprint: str, count: int) -> bool:
    """Whether all tiles are there."""
    return all(is_kept(job, fingerprint, index) for index in range(count))


def read(job: Job, fingerprint: str, count: int) -> list[Part]:
    """What is known of all tiles. Raises StoreError if one is gone."""
    found = []
    for index in range(count):
        fields = json.loads(store.read_text(_about(uri(job, fingerprint, index))))
        scores = None if fields["scores"] is None else GateScores(**fields["scores"])
        audit = None if fields.get("audit") is None else _audit(fields["audit"])
        execution = fields.get("execution", "")  # not in what an earlier version has kept
        found.append(Part(TileBox(**fields["box"]), scores, fields["again"], execution, audit))
    return found


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _audit(fields: dict[str, Any]) -> TileAudit:
    maps = ("delta_e", "invention", "spread")
    return TileAudit(**fields | {name: base64.b64decode(fields[name]) for name in maps})


class Kept:
    """The pixels [h, w, C] of a tile in a local file, of which rows are read as they are asked for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        read_header = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}[npy.read_magic(stream)[0]]
        self.shape, _, self._type = read_header(stream)
        self._start, self._row_bytes = stream.tell(), self.shape[1] * self.shape[2] * self._type.itemsize

    def __getitem__(self, rows: slice) -> FloatImage:
        top, end, _ = rows.indices(self.shape[0])
        self._stream.seek(self._start + top * self._row_bytes)
        found = np.frombuffer(self._stream.read((end - top) * self._row_bytes), self._type)
        return found.reshape(end - top, *self.shape[1:])


@contextmanager
def pixels(job: Job, fingerprint: str, box: TileBox) -> Iterator[Kept]:
    """The pixels of a tile, to be read while the context lasts. Raises StoreError if they are gone."""
    place = uri(job, fingerprint, box.index)
    with store.local_copy(place) as path, store.open_read(str(path)) as stream:
        yield Kept(stream)


def remove(job: Job, fingerprint: str, count: int) -> None:
    """Delete the tiles of an image that has come to its end."""
    for index in range(count):
        place = uri(job, fingerprint, index)
        store.delete(place)
        store.delete(_about(place))


def _about(place: str) -> str:
    return f"{place.removesuffix('.npy')}.json"
