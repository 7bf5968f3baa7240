"""A job's source to the tiles that the engine works on: read once, checked, turned upright, in sRGB, at working size.

Nothing escapes from here but tiles: whatever is wrong with an image becomes one tile whose ticket says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyvips
import tifffile
from numpy.typing import NDArray

from supir_batch import captions, color, commit, jpeg2000, metadata, probe, released, resample, settings, store, tiles
from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.errors import ImageError
from supir_batch.types import FloatImage, ImageFacts, Job, TileBox, TileTicket

PREVIEW_SIZE = 512
"""Longest side, in pixels, of the preview that the captioner sees."""

_NO_PIXELS = np.zeros((0, 0, 3), np.float32)
_ALL = slice(None)
_STRIP_BLOCKS = 64  # rows of blocks that are averaged at once

# how the readers word that a file ends too early
_CUT_SHORT = re.compile(
    r"premature|truncat|unexpected end|read error|seek|EOF|got \d+ bytes|unable to parse|not enough|missing SOS"
    r"|corrupted strip|incorrect data",
    re.IGNORECASE,
)


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


@dataclass(frozen=True)
class _Raster:
    """Pixels as read, upright: ``levels`` [h, w, bands, and one for alpha] uint8 or uint16.

    A giant is held as stored; floats, four times as large with all that is made of them, are for parts of it.
    """

    levels: NDArray[np.unsignedinteger[Any]]
    bands: int
    icc: bytes | None
    notes: tuple[str, ...]

    def floats(self, rows: slice, columns: slice) -> tuple[FloatImage, FloatImage]:
        """Color [h, w, bands] and alpha [h, w, 0 or 1] of a part, float32 in [0, 1]."""
        part = self.levels[rows, columns]
        values = part.astype(np.float32) / np.float32(np.iinfo(part.dtype).max)
        return np.ascontiguousarray(values[..., : self.bands]), np.ascontiguousarray(values[..., self.bands :])

    def reduced(self, longer_side: int) -> FloatImage:
        """The image in sRGB, [h, w, 3], its longer side at most ``longer_side``."""
        side = max(self.levels.shape[:2])
        block = max(1, side // (2 * longer_side))  # means of blocks first: the rest fits into memory as floats
        height, width = (length // block * block for length in self.levels.shape[:2])
        strips = []
        for top in range(0, height, _STRIP_BLOCKS * block):
            part, _ = self.floats(slice(top, min(height, top + _STRIP_BLOCKS * block)), slice(0, width))
            strips.append(
                part.reshape(-1, block, width // block, block, self.bands).mean(axis=(1, 3), dtype=np.float32)
            )
        return resample.reduce_to(color.to_srgb(np.concatenate(strips), self.icc), longer_side)


def preview(job: Job, restoring: bool = True) -> Preview:
    """What the captioner must see of the source of ``job``; nothing if its caption is kept from an earlier run.

    With ``restoring``, an image whose output is already committed needs no caption either. No exception leaves: what is
    wrong becomes the ticket's failure.
    """
    blank = TileTicket(job, started_at=_now())
    try:
        return _preview(blank, restoring)
    except Exception as error:
        return Preview(dataclasses.replace(blank, failure=failure_of("decode", job.source, error)), _NO_PIXELS)


def decode(job: Job, alignment: int, seen: TileTicket | None = None) -> Iterator[DecodedTile]:
    """Read the source of ``job`` and yield its tiles, whose origins are multiples of ``alignment`` pixels.

    ``seen`` is the ticket that came of its preview; the tiles carry on its caption. One tile without pixels is yielded
    if the output is already committed (``recovered``) or if anything is wrong (``failure``); no exception leaves,
    because it would stop all other images.
    """
    blank = seen or TileTicket(job, started_at=_now())
    if not blank.has_work:
        yield DecodedTile(blank, _NO_PIXELS, _NO_PIXELS)
        return
    try:
        yield from _decode(blank, alignment)
    except Exception as error:
        failed = dataclasses.replace(blank, failure=failure_of("decode", job.source, error))
        yield DecodedTile(failed, _NO_PIXELS, _NO_PIXELS)


def read_srgb(path: Path) -> tuple[FloatImage, NDArray[np.float32]]:
    """Any readable image, upright, as ([h, w, 3] sRGB, [h, w] alpha or size 0), both float32 in [0, 1].

    For looking and comparing (report, demo). Raises ImageError.
    """
    raster = _read(path, probe.probe(path))
    colors, alpha = raster.floats(_ALL, _ALL)
    return color.to_srgb(colors, raster.icc), alpha[..., 0] if alpha.size else np.zeros((0, 0), np.float32)


def _preview(blank: TileTicket, restoring: bool) -> Preview:
    watch = Stopwatch("decode")
    with _source(blank) as path:
        header = probe.probe(path)
        ticket = _identify(blank, path, header)
        if restoring and _is_committed(ticket):
            return Preview(dataclasses.replace(ticket, recovered=True), _NO_PIXELS)
        kept = captions.find(ticket)
        if kept is not None:
            return Preview(watch.record(dataclasses.replace(ticket, caption=kept)), _NO_PIXELS)
        raster = _read(path, header)
    pixels = np.ascontiguousarray(raster.reduced(PREVIEW_SIZE))
    return Preview(watch.record(ticket), pixels)


def _decode(blank: TileTicket, alignment: int) -> Iterator[DecodedTile]:
    watch = Stopwatch("decode")
    chosen = blank.job.settings
    with _source(blank) as path:
        header = probe.probe(path)
        ticket = _identify(blank, path, header)
        facts = ticket.facts
        if facts is None:
            raise ValueError("the ticket carries no image facts")
        if _is_committed(ticket):
            yield DecodedTile(dataclasses.replace(ticket, recovered=True), _NO_PIXELS, _NO_PIXELS)
            return
        raster = _read(path, header)
        described = metadata.read_metadata(path)

    tone = color.Tone("neutral") if facts.bands == 1 else color.measure_tone(raster.reduced(color.TONE_SIZE))
    facts = dataclasses.replace(
        facts,
        icc=raster.icc,
        notes=(*facts.notes, *raster.notes, *described.notes),
        carries_color=tone.kind == "color" and color.exceeds_srgb(raster.icc, facts.bands),
        tone=tone.kind,
        tone_curve=tone.curve,
    )
    ticket = dataclasses.replace(ticket, facts=facts, source_metadata=described.to_bytes())
    squashed = _squashed(raster, facts) if chosen.geometry == "released" else None
    for box in tiles.plan_tiles(facts.work_width, facts.work_height, chosen.max_pixels, chosen.overlap, alignment):
        pixels, carried = _working(raster, facts, box)
        if squashed is not None:
            pixels = np.ascontiguousarray(squashed[box.y : box.y + box.height, box.x : box.x + box.width])
        yield DecodedTile(watch.record(dataclasses.replace(ticket, box=box)), pixels, carried)


def _squashed(raster: _Raster, facts: ImageFacts) -> FloatImage:
    """The whole working image of geometry ``released``."""
    whole = color.to_srgb(raster.floats(_ALL, _ALL)[0], raster.icc)
    return released.to_work(whole, facts.work_width, facts.work_height)


def _working(raster: _Raster, facts: ImageFacts, box: TileBox) -> tuple[FloatImage, FloatImage]:
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
    return dataclasses.replace(
        blank,
        facts=_facts(job, header, sha256),
        fingerprint=settings.fingerprint(sha256, job.settings_sha256),
        seed=settings.item_seed(job.settings, sha256),
    )


def _is_committed(ticket: TileTicket) -> bool:
    return ticket.facts is not None and (
        commit.committed(ticket.job, ticket.fingerprint, ticket.facts.format) is not None
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _facts(job: Job, header: probe.Header, sha256: str) -> ImageFacts:
    """What the header tells; color facts are added once the pixels are read."""
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
    if header.pages > 1:
        notes.append(f"page 1 of {header.pages} was used")
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


def _read(path: Path, header: probe.Header) -> _Raster:
    """Decode all pixels, strictly; TIFFs that libvips refuses get a second, equally strict reader."""
    if header.reader == "jpeg2000":
        return _read_jpeg2000(path, header)
    refused = "libvips does not know this kind of TIFF"
    if header.reader == "vips":
        try:
            return _read_vips(path, header)
        except pyvips.Error as error:
            refused = probe.vips_message(error, path)
            if header.format != "tiff":
                raise _damaged(refused) from error
    try:
        raster = _read_tifffile(path, header)
    except (ImageError, MemoryError):
        raise
    # tifffile raises its own errors, but damaged data also surfaces as codec errors, IndexError, struct.error ...
    except Exception as error:
        raise _damaged(f"libvips: {refused}; tifffile: {type(error).__name__}: {error}") from error
    return dataclasses.replace(raster, notes=(*raster.notes, f"read by tifffile because libvips refused it: {refused}"))


def _read_jpeg2000(path: Path, header: probe.Header) -> _Raster:
    found = jpeg2000.read_header(path)
    depth = 8 if found.bits <= 8 else 16
    notes = () if found.bits == depth else (f"{found.bits}-bit samples were expanded to {depth} bits",)
    return _raster(jpeg2000.read_samples(path, found), header, found.icc, notes)


def _damaged(seen: str) -> ImageError:
    kind = "truncated" if _CUT_SHORT.search(seen) else "damaged"
    return ImageError(kind, f"its pixels cannot be decoded ({seen}); get a whole copy of the file")


def _read_vips(path: Path, header: probe.Header) -> _Raster:
    image = probe.open_vips(path, header.format)
    fields = set(image.get_fields())
    notes = []
    if "palette" in fields:
        notes.append("palette colors were expanded to RGB")
    if "bits-per-sample" in fields and image.get("bits-per-sample") < 8:
        notes.append(f"{image.get('bits-per-sample')}-bit samples were expanded to 8 bits")
    icc = bytes(image.get("icc-profile-data")) if "icc-profile-data" in fields else None
    alpha_band: Any = None
    if header.has_alpha:
        alpha_band = image[image.bands - 1]
        image = image.extract_band(0, n=image.bands - 1)
    if header.mode == "cmyk":
        # without a profile of its own a CMYK image is taken for libvips' generic press; there is no better guess
        image = image.icc_transform("srgb", embedded=icc is not None, input_profile="cmyk", depth=header.bit_depth)
        icc = None
    elif header.mode == "lab":
        image = image.colourspace("rgb16" if header.bit_depth == 16 else "srgb")
        icc = None
    if alpha_band is not None:
        image = image.bandjoin(alpha_band)
    levels = image.numpy()
    if levels.ndim == 2:
        levels = levels[..., None]
    return _raster(levels, header, icc, tuple(notes))


def _read_tifffile(path: Path, header: probe.Header) -> _Raster:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        if header.mode == "cmyk":
            raise ImageError("unsupported", "this CMYK TIFF can be read by tifffile only; convert it to RGB")
        levels = page.asarray()
        if page.axes == "SYX":
            levels = np.moveaxis(levels, 0, 2)
        elif page.axes == "YX":
            levels = levels[..., None]
        elif page.axes != "YXS":
            raise ImageError("unsupported", f"a TIFF with axes {page.axes} is not read; convert it to grey or RGB")
        if getattr(page.photometric, "name", "") == "MINISWHITE":
            levels = np.iinfo(levels.dtype).max - levels
        found = page.tags.valueof(34675)
    return _raster(levels, header, bytes(found) if found else None, ())


def _raster(levels: NDArray[Any], header: probe.Header, icc: bytes | None, notes: tuple[str, ...]) -> _Raster:
    """Integer samples [h, w, bands] as stored, checked, upright."""
    shape = (header.height, header.width)
    if levels.shape[:2] != shape or levels.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            "damaged", f"its pixels are {levels.shape} {levels.dtype}, its header said {shape}; get a whole copy"
        )
    bands = 1 if header.mode == "grey" else 3
    if icc is not None and (problem := color.check_profile(icc, bands)) is not None:
        notes = (*notes, f"{problem}; it was ignored and the image taken for sRGB")
        icc = None
    return _Raster(upright(levels, header.orientation), bands, icc, notes)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn [h, w, ...] pixels as EXIF ``orientation`` (1 to 8) says they must be shown; a view."""
    turns: dict[int, tuple[bool, Literal[0, 1, 2, 3]]] = {  # (mirror left-right first, then quarter turns clockwise)
        1: (False, 0),
        2: (True, 0),
        3: (False, 2),
        4: (True, 2),
        5: (True, 3),
        6: (False, 1),
        7: (True, 1),
        8: (False, 3),
    }
    mirror, quarters = turns[orientation]
    return np.rot90(pixels[:, ::-1] if mirror else pixels, k=-quarters)
