"""A job's source to the tiles that the engine works on: read once, checked, turned upright, in sRGB, at working size.

Nothing escapes from here but tiles: whatever is wrong with an image becomes one tile whose ticket says so.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from supir_batch import (
    captions,
    color,
    commit,
    encode,
    identity,
    metadata,
    parts,
    probe,
    readers,
    regions,
    released,
    resample,
    store,
    tiles,
)
from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.errors import ImageError
from supir_batch.readers import Raster
from supir_batch.types import FloatImage, ImageFacts, Job, Region, TileBox, TileTicket

PREVIEW_SIZE = 512
"""Longest side, in pixels, of the preview that the captioner sees."""

_NO_PIXELS = np.zeros((0, 0, 3), np.float32)
_ALL = slice(None)


@dataclass(frozen=True)
class DecodedTile:
    """A tile on its way to the engine.

    ``pixels`` [h, w, 3] float32 sRGB in [0, 1]. ``carried`` [h, w, 0 to 4] float32 goes past the engine: alpha, where
    ``facts.has_alpha``, then the three bands of ``color.lost_in_srgb``, where ``facts.carries_color``. Both are empty
    when there is no work.
    """

    ticket: TileTicket
    pixels: FloatImage
    carried: FloatImage


@dataclass(frozen=True)
class Preview:
    """A whole image on its way to the captioner.

    ``pixels`` [h, w, 3] float32 sRGB in [0, 1], the longer side at most ``PREVIEW_SIZE``; empty when the ticket already
    has its caption, or has no work.
    """

    ticket: TileTicket
    pixels: FloatImage


def preview(job: Job, restoring: bool = True, look: bool = True) -> Preview:
    """What the captioner must see of the source of ``job``; nothing if its caption is kept from an earlier run.

    With ``restoring``, an image whose output is already committed needs no caption either. Without ``look``, its pixels
    are given whatever is kept or committed. No exception leaves: what is wrong becomes the ticket's failure.
    """
    blank = TileTicket(job, started_at=_now())
    try:
        return _preview(blank, restoring, look)
    except Exception as error:
        return Preview(dataclasses.replace(blank, failure=failure_of("decode", job.source, error)), _NO_PIXELS)


def decode(job: Job, alignment: int, seen: TileTicket | None = None, look: bool = True) -> Iterator[DecodedTile]:
    """Read the source of ``job`` and yield its tiles, whose origins are multiples of ``alignment`` pixels.

    ``seen`` is the ticket that came of its preview; the tiles carry on its caption. One tile without pixels is yielded
    if the output is already committed (``recovered``) or if anything is wrong (``failure``); no exception leaves,
    because it would stop all other images. Tiles that an earlier run has kept are left out;
    if it kept all, one comes without pixels (``kept``). Without ``look``, all tiles are given, whatever is there.
    """
    blank = seen or TileTicket(job, started_at=_now())
    if not blank.has_work:
        yield DecodedTile(blank, _NO_PIXELS, _NO_PIXELS)
        return
    try:
        yield from _decode(blank, alignment, look)
    except Exception as error:
        failed = dataclasses.replace(blank, failure=failure_of("decode", job.source, error))
        yield DecodedTile(failed, _NO_PIXELS, _NO_PIXELS)


def read_srgb(path: Path, page: int = 1) -> tuple[FloatImage, NDArray[np.float32]]:
    """Any readable image, upright, as ([h, w, 3] sRGB, [h, w] alpha or size 0), both float32 in [0, 1].

    For looking and comparing (report, demo). Raises ImageError.
    """
    raster = readers.read(path, probe.probe(path, page))
    colors, alpha = raster.floats(_ALL, _ALL)
    return color.to_srgb(colors, raster.icc), alpha[..., 0] if alpha.size else np.zeros((0, 0), np.float32)


def _preview(blank: TileTicket, restoring: bool, look: bool) -> Preview:
    watch = Stopwatch("decode")
    with _source(blank) as path:
        header = _header(blank.job, path)
        ticket = _identify(blank, path, header)
        if look and restoring and _is_committed(ticket):
            return Preview(dataclasses.replace(ticket, recovered=True), _NO_PIXELS)
        kept = captions.find(ticket) if look else None
        if kept is not None:
            return Preview(watch.record(dataclasses.replace(ticket, caption=kept)), _NO_PIXELS)
        raster = readers.read(path, header)
    pixels = np.ascontiguousarray(raster.reduced(PREVIEW_SIZE))
    return Preview(watch.record(ticket), pixels)


def _decode(blank: TileTicket, alignment: int, look: bool) -> Iterator[DecodedTile]:
    watch = Stopwatch("decode")
    chosen = blank.job.settings
    with _source(blank) as path:
        header = _header(blank.job, path)
        ticket = _identify(blank, path, header)
        facts = ticket.facts
        if facts is None:
            raise ValueError("the ticket carries no image facts")
        if look and _is_committed(ticket):
            yield DecodedTile(dataclasses.replace(ticket, recovered=True), _NO_PIXELS, _NO_PIXELS)
            return
        raster = readers.read(path, header)
        described = metadata.read_metadata(path)

    tone = color.Tone("neutral") if facts.bands == 1 else color.measure_tone(raster.reduced(color.TONE_SIZE))
    facts = dataclasses.replace(
        facts,
        icc=raster.icc,
        notes=(*facts.notes, *raster.notes, *described.notes),
        carries_color=tone.kind == "color" and color.exceeds_srgb(raster.icc, facts.bands),
        tone=tone.kind,
        tone_curve=tone.curve,
        regions=_regions(raster, facts) if chosen.audit_samples else None,
    )
    ticket = dataclasses.replace(ticket, facts=facts, source_metadata=described.to_bytes())
    squashed = _squashed(raster, facts) if chosen.geometry == "released" else None
    boxes = tiles.plan_tiles(facts.work_width, facts.work_height, chosen.max_pixels, chosen.overlap, alignment)
    if look and len(boxes) > 1:
        missing = [box for box in boxes if not parts.is_kept(blank.job, ticket.fingerprint, box.index)]
        if not missing:
            kept = dataclasses.replace(ticket, box=boxes[-1], kept=True)
            yield DecodedTile(watch.record(kept), _NO_PIXELS, _NO_PIXELS)
        boxes = tuple(missing)
    for box in boxes:
        pixels, carried = _working(raster, facts, box)
        if squashed is not None:
            pixels = np.ascontiguousarray(squashed[box.y : box.y + box.height, box.x : box.x + box.width])
        yield DecodedTile(watch.record(dataclasses.replace(ticket, box=box)), pixels, carried)
        watch = Stopwatch("decode")  # the first tile's time has that of reading; none has the time in between


def _regions(raster: Raster, facts: ImageFacts) -> tuple[Region, ...]:
    """What is to be watched where detail is generated."""
    return regions.find(raster.reduced(regions.SIZE), facts.width, facts.height)


def _squashed(raster: Raster, facts: ImageFacts) -> FloatImage:
    """The whole working image of geometry ``released``."""
    whole = color.to_srgb(raster.floats(_ALL, _ALL)[0], raster.icc)
    return released.to_work(whole, facts.work_width, facts.work_height)


def _working(raster: Raster, facts: ImageFacts, box: TileBox) -> tuple[FloatImage, FloatImage]:
    """Pixels and carried bands of the tile in ``box`` of the working image; only what it needs is made float."""
    across = resample.span(box.x, box.width, facts.work_width, facts.width)
    down = resample.span(box.y, box.height, facts.work_height, facts.height)
    colors, alpha = raster.floats(down.pixels, across.pixels)
    rgb = color.to_srgb(colors, raster.icc)
    lost = color.lost_in_srgb(colors, rgb, raster.icc) if facts.carries_color else colors[..., :0]
    place = (across.start, down.start, across.end, down.end)
    beside = np.concatenate([alpha, lost], axis=2)
    return (
        np.ascontiguousarray(resample.resize_part(rgb, place, box.width, box.height)),
        np.ascontiguousarray(resample.resize_part(beside, place, box.width, box.height, clip=False)),
    )


@contextmanager
def _source(blank: TileTicket) -> Iterator[Path]:
    """A local file with the source's bytes."""
    uri = blank.job.source.uri
    if not store.exists(uri):
        raise ImageError("missing", "the file does not exist; correct the input or remove it")
    with store.local_copy(uri) as path:
        yield path


def _header(job: Job, path: Path) -> probe.Header:
    """The header of the page to be restored. Raises ImageError, also for what the manifest wants refused."""
    header = probe.probe(path, job.settings.page)
    if job.settings.few_levels == "refuse" and (header.palette or header.stored_bits < 8):
        kind = "a palette image" if header.palette else f"an image of {header.stored_bits} bits per sample"
        raise ImageError("few-levels", f"it is {kind}; convert it, or set reading.few_levels to expand")
    return header


def _identify(blank: TileTicket, path: Path, header: probe.Header) -> TileTicket:
    """The ticket with the source's hash, what its header tells, its fingerprint and its seed.

    Raises ImageError if the bytes are not those that the manifest, or an earlier look at them, named.
    """
    job, sha256 = blank.job, commit.file_sha256(path)
    named = job.source.sha256
    if named is not None and named.lower() != sha256:
        raise ImageError(
            "hash-mismatch",
            f"its SHA-256 is {sha256}, the manifest says {named.lower()}; the file has changed or is "
            "damaged: restore it from a good copy, or correct the manifest",
        )
    if blank.facts is not None and blank.facts.sha256 != sha256:
        raise ImageError("changed", "the file was changed between captioning and restoring; run again")
    # nobody may have looked at the file before
    seen = dataclasses.replace(job, source=dataclasses.replace(job.source, size=path.stat().st_size))
    return dataclasses.replace(
        blank,
        job=seen,
        facts=_facts(job, header, sha256),
        fingerprint=identity.fingerprint(sha256, job.settings_sha256),
        seed=identity.item_seed(job.settings, sha256),
    )


def _is_committed(ticket: TileTicket) -> bool:
    return ticket.facts is not None and (
        commit.committed(ticket.job, ticket.fingerprint, ticket.facts.format) is not None
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _facts(job: Job, header: probe.Header, sha256: str) -> ImageFacts:
    """What the header tells; color facts are added once the pixels are read.

    Raises ImageError if the output's format cannot hold its size: before the engine works for hours.
    """
    turned = header.orientation >= 5
    width, height = (header.height, header.width) if turned else (header.width, header.height)
    dpi = header.dpi if header.dpi is None or not turned else (header.dpi[1], header.dpi[0])
    upscale, min_size = job.settings.upscale, job.settings.min_size
    notes = []
    if job.settings.geometry == "released":
        (work_width, work_height), (output_width, output_height) = released.usable_sizes(
            width, height, upscale, min_size
        )
        if header.bit_depth == 16:
            notes.append("geometry 'released' works on 8 bits per sample; the source has 16")
    else:
        output_width, output_height = tiles.output_size(width, height, upscale)
        work_width, work_height = tiles.work_size(output_width, output_height, min_size)
    encode.refuse_size(output_width, output_height, encode.output_format(header.format, job.settings))
    if header.pages > 1:
        notes.append(f"page {header.page} of {header.pages} was used")
    if header.reduced:
        notes.append(f"page {header.page} calls itself a smaller version of another page")
    if header.mode == "cmyk":
        notes.append("CMYK was converted to sRGB, as CMYK cannot be restored to exact inks; the output is RGB")
    if header.mode == "lab":
        notes.append("CIELAB was converted to sRGB; the output is RGB")
    return ImageFacts(
        sha256=sha256,
        format=header.format,
        width=width,
        height=height,
        bands=1 if header.mode == "grey" else 3,
        bit_depth=header.bit_depth,
        has_alpha=header.has_alpha,
        orientation=header.orientation,
        icc=None,
        dpi=dpi,
        output_width=output_width,
        output_height=output_height,
        work_width=work_width,
        work_height=work_height,
        notes=tuple(notes),
    )
