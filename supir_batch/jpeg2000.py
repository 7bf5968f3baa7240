"""JPEG 2000: what the boxes of a JP2 file and the header of its codestream say, and the samples.

libvips in its binary package cannot read it, and OpenJPEG, given a JP2 with an ICC profile, returns changed samples. So
the boxes are read here, and the codec gets the bare codestream, whose samples it returns exactly.

Sources: ISO/IEC 15444-1 (= ITU-T T.800), annex A (codestream) and annex I (JP2 boxes); Adobe XMP part 3 (XMP box).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np

from supir_batch.errors import ImageError
from supir_batch.levels import Levels, spread, unassociate

CODESTREAM = b"\xff\x4f\xff\x51"  # SOC, SIZ
_END = b"\xff\xd9"  # EOC
_TILE_PART = b"\xff\x90"  # SOT
JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"

_XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_BOX_LIMIT = 64 * 2**20  # bytes of a box that is read into memory
_BOXES = 10_000  # of a file
_METRE = 0.0254  # of an inch
_SRGB, _GREY = 16, 17  # enumerated color spaces (table I.10)
_COLOR, _ALPHA, _PREMULTIPLIED = 0, 1, 2  # Typ of a channel (table I.16)
_WHOLE_IMAGE = 0  # Asoc of a channel that belongs to no single color (table I.17)


@dataclass(frozen=True)
class Jpeg2000:
    """What a file declares. ``bits`` of every sample; ``dpi`` (x, y) as captured, None where nothing is said.

    ``premultiplied``: colors are multiplied by alpha, as stored.

    ``start`` and ``length`` say where the codestream lies, in bytes. ``xmp`` is the packet, b"" if there is none.
    """

    width: int
    height: int
    components: int
    bits: int
    has_alpha: bool
    premultiplied: bool
    icc: bytes | None
    dpi: tuple[float, float] | None
    xmp: bytes
    start: int
    length: int


def read_header(path: Path) -> Jpeg2000:
    """Read boxes and codestream header; decodes nothing. Raises ImageError ``truncated`` or ``unsupported``."""
    size = path.stat().st_size
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    xmp, channels, found = b"", None, None
    with path.open("rb") as stream:
        if stream.read(4) == CODESTREAM:
            found = (0, size)
        else:
            for kind, start, length in _boxes(stream, 0, size):
                if kind == b"jp2h":
                    icc, channels, dpi = _header_box(stream, start, length)
                elif kind == b"uuid" and _read(stream, start, 16) == _XMP_BOX:
                    xmp = _read(stream, start + 16, length - 16)
                elif kind == b"jp2c" and found is None:
                    found = (start, length)
        if found is None:
            raise ImageError("truncated", "the JPEG 2000 file holds no codestream; get a whole copy")
        width, height, bits = _size_marker(_read(stream, found[0], min(found[1], 64 * 1024)))
    components = len(bits)
    if len(set(bits)) > 1 or components > 4:
        raise ImageError("unsupported", f"a JPEG 2000 of {components} components with {bits} bits is not read")
    alpha = _alpha(channels, components)
    return Jpeg2000(
        width, height, components, bits[0], alpha is not None, alpha == _PREMULTIPLIED, icc, dpi, xmp, *found
    )


def read_samples(path: Path, header: Jpeg2000) -> Levels:
    """Decode [h, w, components]: uint8 up to 8 bits, uint16 above, spread over the whole range of that type.

    Colors that are multiplied by alpha are divided by it. Raises ImageError ``damaged``.
    """
    with path.open("rb") as stream:
        data = _read(stream, header.start, header.length, limit=None)
    if not data.endswith(_END):  # the codec would answer a cut codestream with whatever it has of it
        raise ImageError("truncated", "its codestream has no end; get a whole copy of the file")
    _check_tiles(data)
    try:
        levels = imagecodecs.jpeg2k_decode(data)
    except (imagecodecs.Jpeg2kError, ValueError) as error:
        raise ImageError("damaged", f"its codestream cannot be decoded ({error}); get a whole copy") from error
    if levels.ndim == 2:
        levels = levels[..., None]
    if levels.shape != (header.height, header.width, header.components) or levels.dtype not in (np.uint8, np.uint16):
        raise ImageError("damaged", f"its codestream holds {levels.shape} {levels.dtype}, not what its header says")
    levels = spread(levels, header.bits)
    return unassociate(levels) if header.premultiplied else levels


def encode(levels: Levels, icc: bytes | None, dpi: tuple[float, float] | None, psnr: int | None) -> bytes:
    """A JP2 file of [h, w, 1 to 4] uint8 or uint16; a second or fourth component is alpha. psnr in dB, None: lossless.

    Raises ImageError ``encode-failed``.
    """
    levels = np.ascontiguousarray(levels.reshape(*levels.shape[:2], -1))
    height, width, components = levels.shape
    options: dict[str, Any] = {"level": 0, "reversible": True} if psnr is None else {"level": psnr, "reversible": False}
    try:
        plane = levels if components > 1 else levels[..., 0]
        data = bytes(imagecodecs.jpeg2k_encode(plane, codecformat="j2k", mct=components >= 3, **options))
    except (imagecodecs.Jpeg2kError, ValueError) as error:
        raise ImageError("encode-failed", f"the JPEG 2000 cannot be written: {error}") from error
    space = _GREY if components <= 2 else _SRGB
    color = b"\x02\x00\x00" + icc if icc is not None else b"\x01\x00\x00" + struct.pack(">I", space)
    header = _box(b"ihdr", struct.pack(">2IH4B", height, width, components, levels.itemsize * 8 - 1, 7, 0, 0))
    header += _box(b"colr", color)
    if components in (2, 4):
        kinds = [(index, int(index == components - 1), (index + 1) % components) for index in range(components)]
        header += _box(b"cdef", struct.pack(">H", components) + b"".join(struct.pack(">3H", *kind) for kind in kinds))
    if dpi is not None:
        down, across = (_per_metre(value) for value in (dpi[1], dpi[0]))
        fields = struct.pack(">4H2b", down[0], 1, across[0], 1, down[1], across[1])
        header += _box(b"res ", _box(b"resc", fields))
    kind = _box(b"ftyp", b"jp2 " + bytes(4) + b"jp2 ")
    return JP2 + kind + _box(b"jp2h", header) + _box(b"jp2c", data)


def with_metadata(image: bytes, tagged: bytes, packet: bytes) -> bytes:
    """The JP2 ``image`` with EXIF and IPTC of the JP2 ``tagged`` and this XMP packet, in front of its codestream."""
    boxes = list(_contents(image))
    tags = [body for kind, body in _contents(tagged) if kind == b"uuid" and body[:16] != _XMP_BOX]
    return b"".join(
        [_box(kind, body) for kind, body in boxes if kind != b"jp2c"]
        + [_box(b"uuid", body) for body in (*tags, _XMP_BOX + packet)]
        + [_box(kind, body) for kind, body in boxes if kind == b"jp2c"]
    )


def _contents(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    for kind, start, length in _boxes(io.BytesIO(data), 0, len(data)):
        yield kind, data[start : start + length]


def _box(kind: bytes, body: bytes) -> bytes:
    if len(body) + 8 >= 2**32:
        return struct.pack(">I4sQ", 1, kind, 16 + len(body)) + body
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _per_metre(dpi: float) -> tuple[int, int]:
    """Pixels per metre as a number below 2^16 and a power of ten."""
    value, power = dpi / _METRE, 0
    while value * 10 < 2**16 and power > -9:
        value, power = value * 10, power - 1
    while round(value) >= 2**16:
        value, power = value / 10, power + 1
    return round(value), power


def _boxes(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, first byte of the contents, and their length, of the boxes in [start, end)."""
    at = start
    for _ in range(_BOXES):
        if at + 8 > end:
            return
        length, kind = struct.unpack(">I4s", _read(stream, at, 8))
        head = 8
        if length == 1:
            (length,), head = struct.unpack(">Q", _read(stream, at + 8, 8)), 16
        if length == 0:  # to the end of the file
            length = end - at
        if length < head or at + length > end:
            raise ImageError("truncated", f"its box {kind!r} declares {length} bytes; get a whole copy of the file")
        yield kind, at + head, length - head
        at += length
    raise ImageError("damaged", f"it has more than {_BOXES} boxes; get a sound copy of the file")


def _header_box(
    stream: BinaryIO, start: int, length: int
) -> tuple[bytes | None, bytes | None, tuple[float, float] | None]:
    """ICC profile, contents of the ``cdef`` box, and resolution of a ``jp2h`` box; None: not said."""
    icc: bytes | None = None
    channels: bytes | None = None
    dpi: tuple[float, float] | None = None
    seen_color = False
    for kind, at, size in _boxes(stream, start, start + length):
        body = _read(stream, at, size)
        if kind == b"pclr":
            raise ImageError("unsupported", "a JPEG 2000 with a palette is not read; convert it to RGB")
        if kind == b"colr" and not seen_color and size > 3:  # the first one counts (I.5.3.3)
            seen_color = True
            if body[0] == 2:
                icc = body[3:]
            elif body[0] == 1 and size >= 7 and (space := int.from_bytes(body[3:7], "big")) not in (_SRGB, _GREY):
                raise ImageError("unsupported", f"JPEG 2000 color space {space} is not read; convert it to grey or RGB")
        if kind == b"cdef":
            channels = body
        if kind == b"res ":
            dpi = _resolution(stream, at, size)
    return icc, channels, dpi


def _alpha(channels: bytes | None, components: int) -> int | None:
    """What kind of alpha the last component is, None if it is a color: by a ``cdef`` box (I.5.3.6), or by their number.

    Raises ImageError ``unsupported`` where the others are not grey or red, green, blue in this order.
    """
    if channels is None:
        return _ALPHA if components in (2, 4) else None
    count = min(components + 1, max(0, len(channels) - 2) // 6)  # one more than there may be is enough to see
    said = sorted(struct.iter_unpack(">3H", channels[2 : 2 + 6 * count]))
    colors = 1 if components <= 2 else 3
    meant = [(index, _COLOR, index + 1) for index in range(colors)]
    if said == meant and components == colors:
        return None
    for kind in (_ALPHA, _PREMULTIPLIED):
        if said == [*meant, (colors, kind, _WHOLE_IMAGE)] and components == colors + 1:
            return kind
    raise ImageError(
        "unsupported",
        f"a JPEG 2000 of {components} components with the channels (number, type, association) {said} is not read; "
        "convert it to grey or RGB, with alpha last if it has one",
    )


def _resolution(stream: BinaryIO, start: int, length: int) -> tuple[float, float] | None:
    """(x, y) in pixels per inch of a ``res`` box, as captured if it says so, else as to be displayed."""
    said: dict[bytes, tuple[float, float]] = {}
    for kind, at, size in _boxes(stream, start, start + length):
        if kind in (b"resc", b"resd") and size == 10:
            down, by_down, across, by_across, power_down, power_across = struct.unpack(">4H2b", _read(stream, at, size))
            if by_down and by_across and down and across:
                y, x = down / by_down * 10.0**power_down, across / by_across * 10.0**power_across
                said[kind] = (round(x * _METRE, 2), round(y * _METRE, 2))
    return said.get(b"resc", said.get(b"resd"))


def _size_marker(data: bytes) -> tuple[int, int, list[int]]:
    """Width, height and bits of each component from the SIZ marker (A.5.1)."""
    if data[:4] != CODESTREAM or len(data) < 42:
        raise ImageError("truncated", "its JPEG 2000 codestream has no header; get a whole copy of the file")
    right, bottom, left, top = struct.unpack_from(">4I", data, 8)
    (components,) = struct.unpack_from(">H", data, 40)
    fields = data[42 : 42 + 3 * components]
    if not components or len(fields) < 3 * components or right <= left or bottom <= top:
        raise ImageError("truncated", "its JPEG 2000 codestream has a broken header; get a whole copy of the file")
    if any(fields[i] & 0x80 for i in range(0, len(fields), 3)):
        raise ImageError("unsupported", "a JPEG 2000 with signed samples is not read; convert it to unsigned ones")
    if any(step != 1 for i in range(0, len(fields), 3) for step in fields[i + 1 : i + 3]):
        raise ImageError("unsupported", "a JPEG 2000 with subsampled components is not read; convert it to RGB")
    bits = [(fields[i] & 0x7F) + 1 for i in range(0, len(fields), 3)]
    if max(bits) > 16:
        raise ImageError("unsupported", f"a JPEG 2000 with {max(bits)} bits per sample is not read; convert it to 16")
    return right - left, bottom - top, bits


def _check_tiles(data: bytes) -> None:
    """Refuse a codestream that lacks a tile, or the end of one: the codec would make it grey (A.4.2, B.3)."""
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", data, 8)
    if not width or not height or left >= right or top >= bottom:
        raise ImageError("damaged", "its JPEG 2000 codestream has a broken header; get a sound copy of the file")
    count = -(-(right - left) // width) * -(-(bottom - top) // height)
    at = len(CODESTREAM) - 2
    while data[at : at + 2] != _TILE_PART and at + 4 <= len(data):  # segments of the main header
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    end = len(data) - len(_END)
    seen: set[int] = set()
    while data[at : at + 2] == _TILE_PART and at + 12 <= end:
        tile, length = struct.unpack_from(">HI", data, at + 4)
        seen.add(tile)
        at = at + length if length else end  # 0: to the end of the codestream
        if length and (length < 14 or at > end):
            raise ImageError("truncated", f"its tile {tile} is not whole; get a whole copy of the file")
    if len(seen) != count:
        raise ImageError("truncated", f"it holds {len(seen)} of {count} tiles; get a whole copy of the file")


def _read(stream: BinaryIO, start: int, length: int, limit: int | None = _BOX_LIMIT) -> bytes:
    if limit is not None and length > limit:
        raise ImageError("too-large", f"a box of its header declares {length} bytes; get a sound copy of the file")
    stream.seek(start)
    data = stream.read(length)
    if len(data) != length:
        raise ImageError("truncated", "it ends in the middle of a box; get a whole copy of the file")
    return data
