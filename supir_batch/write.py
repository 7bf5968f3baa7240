"""Restored tiles to committed outputs: parts, assembly, color back, gate, encode, metadata, re-read, commit.

Whoever brings the last tile of a cut image assembles it; there is no other coordination. Two writers may both see the
last part arrive: they then write the same bytes, and each reports the same outcome.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from supir_batch import color, commit, encode, metadata, provenance, released, resample, stitch, store
from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.commit import Committed
from supir_batch.errors import ImageError, StoreError
from supir_batch.types import Failure, FloatImage, ImageFacts, Job, Outcome, Settings, TileBox, TileTicket

FLAT_OUTPUT, FLAT_SOURCE = 0.5 / 255, 2.0 / 255
"""An output whose luma varies less than the first while its source's varies more than the second is a failed one."""


def write(ticket: TileTicket, pixels: FloatImage, alpha: NDArray[np.float32]) -> Outcome | None:
    """Take one restored tile ([h, w, 3] sRGB in [0, 1], alpha [h, w] or size 0) to its end.

    Returns the outcome of the image when this call finished it, failed it, or found it finished, and None while other
    tiles are still to come. No exception leaves: what is wrong becomes a failed outcome.
    """
    if ticket.failure is not None:
        return _failed(ticket, ticket.failure)
    try:
        return _write(ticket, pixels, alpha)
    except Exception as error:
        return _failed(ticket, failure_of("write", ticket.job.source, error))


def part_uri(job: Job, fingerprint: str, index: int) -> str:
    """Where tile ``index`` of a cut image waits for the others."""
    return store.join(job.scratch_uri, fingerprint, f"{index:06d}.npz")


def _failed(ticket: TileTicket, failure: Failure) -> Outcome:
    return Outcome(dataclasses.replace(ticket, failure=failure), "failed", finished_at=_now())


def _done(ticket: TileTicket, output: Committed) -> Outcome:
    return Outcome(ticket, "done", output.uri, output.sha256, output.size, output.finished_at)


def _write(ticket: TileTicket, pixels: FloatImage, alpha: NDArray[np.float32]) -> Outcome | None:
    watch = Stopwatch("write")
    job, facts, box = ticket.job, ticket.facts, ticket.box
    if facts is None:
        raise ValueError("the ticket carries no image facts")
    if ticket.recovered:
        there = commit.committed(job, ticket.fingerprint, facts.format)
        if there is None:
            raise ImageError("changed", "its output was complete when the run looked first and is not now; run again")
        return _done(ticket, there)
    if box is None:
        raise ValueError("the ticket carries no tile box")
    _check_tile(pixels, box)
    tile = np.concatenate([pixels, alpha[..., None]], axis=2) if alpha.size else pixels
    if box.count == 1:
        return _finish(ticket, facts, tile, watch)

    # a tile that comes late, because another run or a retry has already finished the image
    if (there := commit.committed(job, ticket.fingerprint, facts.format)) is not None:
        return _done(ticket, there)
    store.write_atomic(part_uri(job, ticket.fingerprint, box.index), _pack(box, tile))
    names = [part_uri(job, ticket.fingerprint, index) for index in range(box.count)]
    # each writer looks only after its own part is in place, so at least one of them sees all
    if not all(store.exists(name) for name in names):
        return None
    try:
        parts = [_unpack(store.read_bytes(name)) for name in names]
    except StoreError:
        there = commit.committed(job, ticket.fingerprint, facts.format)
        if there is None:
            raise
        return _done(ticket, there)  # another writer assembled the image and removed the parts meanwhile
    whole = stitch.stitch(parts, facts.work_width, facts.work_height, job.settings.overlap)
    outcome = _finish(ticket, facts, whole, watch)
    for name in names:
        store.delete(name)
    return outcome


def _check_tile(pixels: FloatImage, box: TileBox) -> None:
    if pixels.shape != (box.height, box.width, 3):
        raise ImageError(
            "bad-output", f"the engine returned {pixels.shape} for a tile of {(box.height, box.width, 3)}; run it again"
        )
    bad = int(np.count_nonzero(~np.isfinite(pixels)))
    if bad:
        raise ImageError(
            "bad-output",
            f"the engine returned {bad} values that are no numbers in tile {box.index} of {box.count}; "
            "run it again, with another seed or in float32",
        )


def _finish(ticket: TileTicket, facts: ImageFacts, tile: FloatImage, watch: Stopwatch) -> Outcome:
    """From the whole image at working size ([h, w, 3 or 4]) to the committed output."""
    job, settings = ticket.job, ticket.job.settings
    whole = _at_output_size(tile, facts, settings)
    rgb = color.apply_tone(np.clip(whole[..., :3], 0.0, 1.0), color.Tone(facts.tone, facts.tone_curve))
    alpha = np.clip(whole[..., 3], 0.0, 1.0) if whole.shape[2] == 4 else np.zeros((0, 0), np.float32)
    spread = float(color.luma(rgb).std())
    if spread < FLAT_OUTPUT and facts.contrast > FLAT_SOURCE:
        raise ImageError("bad-output", f"the output is one flat tone (deviation {spread:.5f}); run it again")

    file_format = encode.output_format(facts.format, settings)
    bit_depth = encode.output_depth(facts.bit_depth, file_format, settings)
    notes = []
    if facts.has_alpha and file_format == "jpeg":
        notes.append("transparency was left out, as a JPEG has none")
    if bit_depth < facts.bit_depth:
        notes.append(f"{facts.bit_depth} bits per sample became {bit_depth}")
    record = provenance.build_record(ticket, file_format, bit_depth, tuple(notes))
    source_metadata = metadata.SourceMetadata.from_bytes(ticket.source_metadata)
    bands = facts.bands + int(alpha.size > 0)
    big = file_format == "tiff" and encode.needs_bigtiff(facts.output_width, facts.output_height, bands, bit_depth)
    packet, packet_notes = metadata.build_xmp(source_metadata, record) if big else (b"", ())
    spec = encode.FileSpec(file_format, bit_depth, facts.icc, record.dpi, bigtiff=big, xmp=packet)

    output = commit.output_uri(job, facts.format)
    with tempfile.TemporaryDirectory(prefix="supir-batch-") as folder:
        path = Path(folder) / f"output{encode.EXTENSIONS[file_format]}"
        encode.encode(color.from_srgb(rgb, facts.icc, facts.bands), alpha, path, spec)
        if big:
            written = (*packet_notes, "a BigTIFF can hold XMP but not the source's EXIF and IPTC")
        else:
            written = metadata.write_metadata(path, source_metadata, record)
        encode.check_file(path, facts.output_width, facts.output_height, spec, facts.bands, alpha.size > 0)
        result = Committed(output, commit.file_sha256(path), path.stat().st_size, _now())
        told = dataclasses.replace(facts, notes=(*record.notes, *written))
        finished = watch.record(dataclasses.replace(ticket, facts=told))
        commit.commit(output, path, _sidecar(finished, record, result))
    return _done(finished, result)


def _at_output_size(whole: FloatImage, facts: ImageFacts, settings: Settings) -> FloatImage:
    """Working size to output size, [h, w, 3 or 4]; the release knows no alpha, so that goes its usual way."""
    width, height = facts.output_width, facts.output_height
    if settings.geometry == "pad":
        return resample.resize(whole, width, height)
    rgb = released.to_output(whole[..., :3], width, height).astype(np.float32) / np.float32(255)
    return np.concatenate([rgb, resample.resize(whole[..., 3:], width, height)], axis=2)


def _sidecar(ticket: TileTicket, record: provenance.ProvenanceRecord, output: Committed) -> dict[str, object]:
    """The JSON beside the output: the record, the output's identity, and what varies from run to run."""
    return {
        **provenance.to_json(record),
        "notes": list(ticket.facts.notes) if ticket.facts is not None else [],
        "output": {"name": store.name(output.uri), "sha256": output.sha256, "bytes": output.size},
        "run": {
            "finished_at": output.finished_at,
            "source_uri": ticket.job.source.uri,
            "stages": [dataclasses.asdict(stage) for stage in ticket.records],
        },
    }


def _pack(box: TileBox, tile: FloatImage) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, box=np.array(dataclasses.astuple(box)), pixels=tile)
    return buffer.getvalue()


def _unpack(data: bytes) -> tuple[TileBox, FloatImage]:
    with np.load(io.BytesIO(data), allow_pickle=False) as part:
        return TileBox(*(int(number) for number in part["box"])), part["pixels"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
