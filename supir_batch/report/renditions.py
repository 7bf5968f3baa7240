"""The pictures of one image in the report: before, after, a thumbnail, and overlays such as an invention map.

They lie in a folder named by the fingerprint, so the same work is never shown twice in different ways, and what is
there need not be made again. The thumbnail is written last: where it is, the others are.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from supir_batch import pictures, store
from supir_batch.errors import ImageError, StoreError

THUMBNAIL_SIZE = 400
"""Longer side of a thumbnail, in pixels."""

_WHOLE_PIXELS, _WHOLE_SIDE = 2**24, 2**14  # up to these a browser takes a picture in one piece
_TILE = 1024
_THUMBNAIL = "thumbnail.jpg"


@dataclass(frozen=True)
class Picture:
    """One picture: a file, or with ``tile`` the folder of a Deep Zoom pyramid of tiles that overlap by one pixel.

    ``file`` counts from the folder of all pictures; ``width`` and ``height`` are in pixels.
    """

    file: str
    width: int
    height: int
    tile: int = 0


@dataclass(frozen=True)
class Overlay:
    """A picture to be laid over the restored one."""

    name: str
    file: str


@dataclass(frozen=True)
class Shown:
    """What can be seen of an image; ``problem`` says why nothing can."""

    thumbnail: str = ""
    before: Picture | None = None
    after: Picture | None = None
    overlays: tuple[Overlay, ...] = ()
    problem: str = ""


def folder_of(row: Mapping[str, Any]) -> str:
    """Where the pictures of a row of the run log lie, below the folder of all pictures."""
    fingerprint = str(row["fingerprint"])
    return f"{fingerprint[:2]}/{fingerprint[2:26]}"


def render(
    row: Mapping[str, Any], overlays: Callable[[], Mapping[str, str]], target: str, made: frozenset[str]
) -> Shown:
    """The pictures of a row that is done, of which those that are not ``made`` are made below the folder ``target``.

    ``overlays`` says the URI of each picture to be laid over it, by name. An image that cannot be shown is told, and no
    error.
    """
    folder = folder_of(row)
    before = _place(f"{folder}/before", row["source_width"], row["source_height"])
    after = _place(f"{folder}/after", row["output_width"], row["output_height"])
    thumbnail = f"{folder}/{_THUMBNAIL}"
    laid: list[Overlay] = []
    try:
        for name, uri in sorted(overlays().items()):
            word = "".join(letter if letter.isalnum() else "-" for letter in name)
            one = Overlay(name, f"{folder}/overlay-{word}{posixpath.splitext(uri)[1]}")
            if one.file not in made:
                store.write_atomic(store.place(target, one.file), store.read_bytes(uri))
            laid.append(one)
        if thumbnail not in made:
            restored = pictures.whole_picture(row["output_uri"], row["output_sha256"])
            _write(pictures.whole_picture(row["uri"], row["source_sha256"], row["setting_page"] or 1), before, target)
            _write(restored, after, target)
            small = restored.thumbnail_image(THUMBNAIL_SIZE, height=THUMBNAIL_SIZE, size="down")
            store.write_atomic(store.place(target, thumbnail), small.jpegsave_buffer(Q=82, keep="none"))
    except (ImageError, StoreError) as error:
        return Shown(problem=str(error))
    return Shown(thumbnail, before, after, tuple(laid))


def _place(path: str, width: int, height: int) -> Picture:
    if width * height <= _WHOLE_PIXELS and max(width, height) <= _WHOLE_SIDE:
        return Picture(f"{path}.jpg", width, height)
    return Picture(f"{path}_files", width, height, _TILE)


def _write(image: pyvips.Image, place: Picture, target: str) -> None:
    if not place.tile:
        store.write_atomic(store.place(target, place.file), image.jpegsave_buffer(Q=90, subsample_mode="off"))
        return
    with tempfile.TemporaryDirectory(prefix="supir-batch-") as folder:
        image.dzsave(f"{folder}/picture", tile_size=place.tile, overlap=1, suffix=".jpg[Q=88,subsample_mode=off]")
        tiles = Path(folder, "picture_files")
        for tile in sorted(tiles.rglob("*.jpg")):
            store.write_atomic(store.place(target, place.file, tile.relative_to(tiles).as_posix()), tile)
