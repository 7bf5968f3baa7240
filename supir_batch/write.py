"""Restored tiles to committed outputs: parts, assembly, color back, gate, encode, metadata, re-read, commit.

Whoever brings the last tile of a cut image assembles it; there is no other coordination. Two writers may both see the
last part arrive. Their pixels are the same, their times and signatures are not, so the slower keeps what the faster has
committed; if they commit at the same moment, each reports what it then finds, and the newer report is true.
"""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from supir_batch import (
    audit,
    color,
    commit,
    encode,
    gate,
    metadata,
    parts,
    provenance,
    released,
    resample,
    signing,
    store,
)
from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.commit import Committed
from supir_batch.errors import ImageError, StoreError
from supir_batch.identity import item_seed, second_seed
from supir_batch.parts import Part
from supir_batch.signing import Signed
from supir_batch.stitch import Stitched
from supir_batch.types import Failure, FloatImage, ImageFacts, Outcome, Settings, TileBox, TileTicket


def write(ticket: TileTicket, pixels: FloatImage, carried: FloatImage, look: bool = False) -> Outcome | None:
    """Take one restored tile ([h, w, 3] sRGB in [0, 1], and what was carried past the engine) to its end.

    Returns the outcome of the image when this call finished it, failed it, or found it finished, and None while other
    tiles are still to come. With ``look``, an output that is committed already is not made again. No exception leaves:
    what is wrong becomes a failed outcome.
    """
    if ticket.failure is not None:
        return _failed(ticket, ticket.failure)
    try:
        return _write(ticket, pixels, carried, look)
    except Exception as error:
        return refused(ticket, error)


def refused(ticket: TileTicket, error: Exception) -> Outcome:
    """The outcome of an image that must not be written, because of ``error``."""
    return _failed(ticket, failure_of("write", ticket.job.source, error))


def _failed(ticket: TileTicket, failure: Failure) -> Outcome:
    return Outcome(dataclasses.replace(ticket, failure=failure), "failed", finished_at=_now())


def _done(ticket: TileTicket, output: Committed) -> Outcome:
    """The outcome of an image whose output is ``output``, whoever made it: seed and scores are those of its record."""
    ticket = dataclasses.replace(
        ticket,
        seed=output.seed,
        again=output.again,
        execution=output.execution,
        scores=output.scores,
        audit=output.audit,
    )
    return Outcome(
        ticket,
        "done",
        output.uri,
        output.sha256,
        output.size,
        output.finished_at,
        output.record_sha256,
        output.premis_sha256,
        output.c2pa_sha256,
    )


def _write(ticket: TileTicket, pixels: FloatImage, carried: FloatImage, look: bool) -> Outcome | None:
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
    fingerprint = ticket.fingerprint
    # a cut image may be finished while one of its tiles is late
    if (look or box.count > 1) and (there := commit.committed(job, fingerprint, facts.format)) is not None:
        return _done(ticket, there)
    if not ticket.kept:
        _check_tile(pixels, box)
        tile = np.concatenate([pixels, carried], axis=2) if carried.size else pixels
        part = Part.of(ticket)
        if box.count == 1:
            return _finish(ticket, facts, [part], [tile], watch)
        parts.keep(job, fingerprint, part, tile)
    # each writer looks only after its own part is in place, so at least one of them sees all
    if not parts.complete(job, fingerprint, box.count):
        return None
    try:
        found = parts.read(job, fingerprint, box.count)
        whole = Stitched(
            [part.box for part in found],
            lambda box: parts.pixels(job, fingerprint, box),
            facts.work_width,
            facts.work_height,
            job.settings.overlap,
        )
        outcome = _finish(ticket, facts, found, whole, watch)
    except StoreError:
        there = commit.committed(job, fingerprint, facts.format)
        if there is None:
            raise
        return _done(ticket, there)  # another writer assembled the image and removed the parts meanwhile
    except Exception:
        parts.remove(job, fingerprint, box.count)  # the same parts would fail the same way
        raise
    parts.remove(job, fingerprint, box.count)
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


def _finish(
    ticket: TileTicket, facts: ImageFacts, found: Sequence[Part], working: Iterable[FloatImage], watch: Stopwatch
) -> Outcome:
    """From the image at working size, in strips of sRGB and what was carried, to the committed output."""
    job, settings = ticket.job, ticket.job.settings
    ticket, maps = _of_image(ticket, facts, found)
    if wrong := _complaints(ticket):
        return _failed(ticket, failure_of("write", job.source, _refusal(wrong)))

    file_format = encode.output_format(facts.format, settings)
    bit_depth = encode.output_depth(facts.bit_depth, file_format, settings)
    notes = []
    if facts.bands == 1 and file_format == "webp":
        facts = dataclasses.replace(facts, bands=3, icc=None)
        notes.append("a WebP has no grey; it is sRGB with three equal channels")
    if facts.has_alpha and file_format == "jpeg":
        notes.append("transparency was left out, as a JPEG has none")
    if bit_depth < facts.bit_depth:
        notes.append(f"{facts.bit_depth} bits per sample became {bit_depth}")
    record = provenance.build_record(ticket, file_format, bit_depth, tuple(notes))
    source_metadata = metadata.SourceMetadata.from_bytes(ticket.source_metadata)
    bands = facts.bands + int(facts.has_alpha)
    big = file_format == "tiff" and encode.needs_bigtiff(facts.output_width, facts.output_height, bands, bit_depth)
    packet, packet_notes = metadata.build_xmp(source_metadata, record, bigtiff=True) if big else (b"", ())
    spec = encode.FileSpec(
        file_format,
        bit_depth,
        facts.icc,
        record.dpi,
        bigtiff=big,
        xmp=packet,
        compression=settings.compression,
        tiled=settings.tiled,
        pyramid=settings.pyramid,
        quality=settings.quality,
    )

    output = commit.output_uri(job, facts.format)
    store.refuse_links(output, job.output_root)
    with tempfile.TemporaryDirectory(prefix="supir-batch-") as folder:
        path = Path(folder) / f"output{encode.EXTENSIONS[file_format]}"
        encode.encode_strips(_in_source_space(working, facts, settings), facts.output_height, path, spec)
        if isinstance(working, Stitched) and ticket.scores is not None:
            ticket = dataclasses.replace(ticket, scores=dataclasses.replace(ticket.scores, seam=working.seam))
            if wrong := _complaints(ticket):
                return _failed(ticket, failure_of("write", job.source, _refusal(wrong)))
        written = packet_notes if big else metadata.write_metadata(path, source_metadata, record)
        if spec.format == "tiff" and spec.pyramid:
            encode.add_pyramid(path, spec)
        signed = _sign(path, ticket, facts, record, store.name(output)) if job.signing is not None else None
        encode.check_file(path, facts.output_width, facts.output_height, spec, facts.bands, facts.has_alpha)
        result = Committed(
            output,
            commit.file_sha256(path),
            path.stat().st_size,
            _now(),
            seed=ticket.seed,
            again=ticket.again,
            execution=ticket.execution,
            scores=ticket.scores,
            audit=ticket.audit,
        )
        told = dataclasses.replace(facts, notes=(*record.notes, *written))
        finished = watch.record(dataclasses.replace(ticket, facts=told))
        # Another writer may have been faster: of the last part, or one whose driver was killed a moment ago. It is left
        # alone, as times and signatures of two would differ.
        if (there := commit.committed(job, ticket.fingerprint, facts.format)) is not None:
            return _done(ticket, there)
        audit.write(job.output_root, _below(output, job.output_root), maps)
        told_beside = _sidecar(finished, record, result) | {"signature": signed.signer if signed else None}
        result = commit.commit(result, path, told_beside, job.sidecars, signed.credentials if signed else b"")
    return _done(finished, result if len(found) == 1 else _last(finished, facts, result))


def _last(ticket: TileTicket, facts: ImageFacts, ours: Committed) -> Committed:
    """What is there now that ``ours`` was committed: another writer of the same image may have written over it.

    The time is the one before looking, so that of two reports the one that saw the last writes is the newer. If the
    other is between its writes, nothing counts yet: it will report in its turn.
    """
    looked_at = datetime.datetime.now(datetime.UTC).isoformat()
    there = commit.committed(ticket.job, ticket.fingerprint, facts.format)
    return dataclasses.replace(there or ours, finished_at=looked_at)


def _sign(path: Path, ticket: TileTicket, facts: ImageFacts, record: provenance.ProvenanceRecord, name: str) -> Signed:
    """Sign the finished file with the key of the job; the credentials hold the hash of the source itself."""
    job = ticket.job
    if job.signing is None:
        raise ValueError("the job names no key")
    with store.local_copy(job.source.uri) as original:
        if commit.file_sha256(original) != facts.sha256:
            raise ImageError("changed", "its source was changed while it was restored; run again")
        return signing.sign(path, record, name, original, job.signing)


def _of_image(ticket: TileTicket, facts: ImageFacts, found: Sequence[Part]) -> tuple[TileTicket, dict[str, audit.Map]]:
    """The ticket of the last tile, with what concerns the whole image, and the maps of its audit."""
    seed = item_seed(ticket.job.settings, facts.sha256)
    again = [str(part.box.index + 1) for part in found if part.again]
    if again:
        seeds = f"restored again with seed {second_seed(seed)} instead of {seed}"
        note = f"{seeds}, in float32, after the output gate: tiles {', '.join(again)} of {len(found)}"
        facts = dataclasses.replace(facts, notes=(*facts.notes, note))
    scores = [part.scores for part in found if part.scores is not None]
    audits = [part.audit for part in found if part.audit is not None]
    # tiles that were kept by a run without an audit have none
    audited, maps = audit.combine(audits, facts) if len(audits) == len(found) else (None, {})
    of_image = dataclasses.replace(
        ticket,
        facts=facts,
        seed=second_seed(seed) if len(again) == len(found) else seed,
        again=bool(again),
        execution=" | ".join(dict.fromkeys(part.execution for part in found if part.execution)),
        scores=gate.combine(scores) if scores else None,
        audit=audited,
    )
    return of_image, maps


def _complaints(ticket: TileTicket) -> list[str]:
    return [] if ticket.scores is None else gate.complaints(ticket.scores, ticket.job.settings.gate)


def _refusal(wrong: Sequence[str]) -> ImageError:
    advice = "look at the source; try another preset, prompt or seed, or allow more in the manifest's gate section"
    return ImageError("gate", f"the restored image did not pass the output gate: {', '.join(wrong)}; {advice}")


def _in_source_space(working: Iterable[FloatImage], facts: ImageFacts, settings: Settings) -> Iterator[FloatImage]:
    """Strips at working size to strips of the output: [rows, width, bands, and one for alpha], to be clipped."""
    tone = color.Tone(facts.tone, facts.tone_curve)
    for strip in _at_output_size(working, facts, settings):
        rgb = color.apply_tone(np.clip(strip[..., :3], 0.0, 1.0), tone)
        colors = color.from_srgb(rgb, facts.icc, facts.bands)
        if facts.carries_color:
            colors = colors + strip[..., -3:]
        yield np.concatenate([colors, strip[..., 3:4]], axis=2) if facts.has_alpha else colors


def _at_output_size(working: Iterable[FloatImage], facts: ImageFacts, settings: Settings) -> Iterator[FloatImage]:
    """Strips, which have to be made one where sizes differ: for small images, and for geometry ``released``."""
    width, height = facts.output_width, facts.output_height
    if settings.geometry == "pad" and (width, height) == (facts.work_width, facts.work_height):
        yield from working
        return
    whole = np.concatenate(list(working))
    if settings.geometry == "pad":
        yield resample.resize(whole, width, height, clip=False)
        return
    rgb = released.to_output(whole[..., :3], width, height).astype(np.float32) / np.float32(255)
    # the release knows nothing that is carried, so that goes its usual way
    yield np.concatenate([rgb, resample.resize(whole[..., 3:], width, height, clip=False)], axis=2)


def _sidecar(ticket: TileTicket, record: provenance.ProvenanceRecord, output: Committed) -> dict[str, object]:
    """The JSON beside the output: the record, the output's identity, and what varies from run to run."""
    source = ticket.job.source
    return {
        **provenance.to_json(record),
        "notes": list(ticket.facts.notes) if ticket.facts is not None else [],
        "gate": None if ticket.scores is None else dataclasses.asdict(ticket.scores) | {"restored_again": ticket.again},
        "audit": None if ticket.audit is None else dataclasses.asdict(ticket.audit),
        "output": {"name": store.name(output.uri), "sha256": output.sha256, "bytes": output.size},
        "run": {
            "started_at": ticket.started_at,
            "finished_at": output.finished_at,
            "source_uri": source.uri,
            "source_bytes": source.size,
            "source_sha256_given": source.sha256 is not None,
            "replaces": source.replaces,
            "execution": ticket.execution,
            "stages": [dataclasses.asdict(stage) for stage in ticket.records],
        },
    }


def _below(uri: str, folder: str) -> str:
    path = store.relative_to(uri, folder)
    if path is None:
        raise ValueError(f"{uri} does not lie below {folder}")
    return path


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
