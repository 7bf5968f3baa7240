from __future__ import annotations

import dataclasses
import hashlib
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from supir_batch import color, readers
from supir_batch.decode import DecodedTile, decode, preview
from supir_batch.types import Job, Outcome

MakeJob = Callable[..., Job]


def _only(job: Job) -> DecodedTile:
    tiles = list(decode(job, 16))
    assert len(tiles) == 1
    return tiles[0]


def _failed(job: Job) -> str:
    tile = _only(job)
    assert tile.ticket.failure is not None
    assert tile.ticket.failure.stage == "decode"
    assert tile.ticket.failure.message.startswith(f"list.csv:2: {job.source.uri}: ")
    assert tile.pixels.size == tile.carried.size == 0
    return tile.ticket.failure.kind


def _noise(rng: np.random.Generator, height: int, width: int, bands: int, depth: int = 8) -> np.ndarray:
    levels = rng.integers(0, 2**depth, (height, width, bands))
    return levels.astype(np.uint8 if depth == 8 else np.uint16)


def test_pixels_are_srgb_floats_and_facts_are_complete(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.png"
    levels = _noise(rng, 30, 40, 3)
    Image.fromarray(levels).save(path)
    tile = _only(make_job(path))
    np.testing.assert_array_equal(np.rint(tile.pixels * 255), levels)
    assert tile.pixels.dtype == np.float32
    facts = tile.ticket.facts
    assert facts is not None
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts.width, facts.height, facts.bands, facts.bit_depth) == (40, 30, 3, 8)
    assert tile.ticket.fingerprint
    assert [record.stage for record in tile.ticket.records] == ["decode"]
    assert tile.carried.size == 0


def test_geometry_is_rounded_size_times_upscale(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (33, 7)).save(path)
    tile = _only(make_job(path, upscale=1.5, min_size=64))
    facts = tile.ticket.facts
    assert facts is not None
    assert (facts.output_width, facts.output_height) == (round(33 * 1.5), round(7 * 1.5))
    assert min(facts.work_width, facts.work_height) == 64
    assert tile.pixels.shape == (facts.work_height, facts.work_width, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, orientation: int
) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(_noise(rng, 12, 20, 3)).save(path, exif=exif)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(np.rint(_only(make_job(path)).pixels * 255), upright)


def test_alpha_travels_beside(tmp_path: Path, make_job: MakeJob, rng: np.random.Generator) -> None:
    path = tmp_path / "a.png"
    levels = _noise(rng, 20, 24, 4)
    Image.fromarray(levels).save(path)
    tile = _only(make_job(path))
    np.testing.assert_array_equal(np.rint(tile.carried[..., 0] * 255), levels[..., 3])
    np.testing.assert_array_equal(np.rint(tile.pixels * 255), levels[..., :3])


def test_cmyk_becomes_rgb_and_says_so(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(path, quality=95)
    tile = _only(make_job(path))
    assert tile.ticket.facts is not None
    assert tile.ticket.facts.bands == 3
    assert "CMYK" in tile.ticket.facts.notes[0]
    red, green, blue = tile.pixels.mean(axis=(0, 1))
    assert red > 0.7
    assert max(green, blue) < 0.4


@pytest.mark.parametrize("name", ["palette.png", "bits.png", "bits.tif"])
def test_images_of_few_levels_are_expanded_or_refused(tmp_path: Path, make_job: MakeJob, name: str) -> None:
    path = tmp_path / name
    grey = Image.linear_gradient("L").resize((20, 20))
    (grey.quantize(16) if name.startswith("palette") else grey.convert("1")).save(path)
    tile = _only(make_job(path))
    assert tile.ticket.facts is not None
    assert "expanded" in tile.ticket.facts.notes[0]
    assert _failed(make_job(path, few_levels="refuse")) == "few-levels"
    grey.save(path)
    assert _only(make_job(path, few_levels="refuse")).ticket.failure is None


def test_the_page_that_was_asked_for_is_restored(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(np.full((20, 20), 50, np.uint8), subfiletype=1, metadata=None)
        tif.write(np.full((30, 40), 200, np.uint8), metadata=None)
    tile = _only(make_job(path, page=2))
    assert tile.pixels.shape == (30, 40, 3)
    assert np.rint(tile.pixels * 255).max() == 200
    assert tile.ticket.facts is not None
    assert tile.ticket.facts.notes[0] == "page 2 of 2 was used"
    facts = _only(make_job(path)).ticket.facts
    assert facts is not None
    assert "smaller version" in facts.notes[1]
    assert _failed(make_job(path, page=3)) == "no-such-page"


def test_an_icc_profile_is_honored(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.png"
    icc = bytes(imagecodecs.cms_profile("adobergb"))
    levels = np.full((8, 8, 3), (60, 180, 60), np.uint8)
    Image.fromarray(levels).save(path, icc_profile=icc)
    tile = _only(make_job(path))
    expected = color.to_srgb((levels / 255).astype(np.float32), icc)
    np.testing.assert_allclose(tile.pixels, expected, atol=1e-6)
    assert np.abs(tile.pixels - levels / 255).max() > 0.1
    assert tile.ticket.facts is not None
    assert tile.ticket.facts.icc == icc


def test_a_profile_that_does_not_fit_is_noted(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.tif"
    icc = bytes(imagecodecs.cms_profile("gray", gamma=2.2))
    tifffile.imwrite(path, np.zeros((4, 4, 3), np.uint8), photometric="rgb", iccprofile=icc, metadata=None)
    facts = _only(make_job(path)).ticket.facts
    assert facts is not None
    assert facts.icc is None
    assert "GRAY" in facts.notes[0]


def test_the_preview_shows_the_whole_image_at_most_512_wide(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (1000, 300), 128).save(path)
    assert preview(make_job(path)).pixels.shape == (154, 512, 3)


def test_tiles_carry_on_the_caption_of_the_preview(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (1000, 300), 128).save(path)
    job = make_job(path, max_pixels=400 * 400)
    seen = dataclasses.replace(preview(job).ticket, caption="a wall")
    tiles = list(decode(job, 16, seen))
    assert len(tiles) > 1
    assert {tile.ticket.caption for tile in tiles} == {"a wall"}
    assert {tile.ticket.fingerprint for tile in tiles} == {seen.fingerprint}
    assert {tile.ticket.started_at for tile in tiles} == {seen.started_at}
    assert [record.stage for record in tiles[0].ticket.records] == ["decode", "decode"]


def test_a_file_that_changes_between_captioning_and_restoring_fails(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (10, 10), 128).save(path)
    job = make_job(path)
    seen = preview(job).ticket
    Image.new("L", (10, 10), 200).save(path)
    (tile,) = decode(job, 16, seen)
    assert tile.ticket.failure is not None
    assert tile.ticket.failure.kind == "changed"


def test_a_preview_fails_as_the_image_would_and_its_tiles_pass_that_on(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    job = make_job(path)
    seen = preview(job)
    assert seen.pixels.size == 0
    assert seen.ticket.failure is not None
    (tile,) = decode(job, 16, seen.ticket)
    assert tile.ticket == seen.ticket
    assert tile.pixels.size == 0


def test_a_large_image_is_cut_at_multiples_of_the_alignment(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.png"
    levels = _noise(rng, 300, 200, 4)
    Image.fromarray(levels).save(path)
    tiles = list(decode(make_job(path, max_pixels=150 * 150), 16))
    for tile in tiles:
        box = tile.ticket.box
        assert box is not None
        assert box.count == len(tiles) > 1
        assert box.x % 16 == box.y % 16 == 0
        part = levels[box.y : box.y + box.height, box.x : box.x + box.width]
        np.testing.assert_array_equal(np.rint(tile.pixels * 255), part[..., :3])
        np.testing.assert_array_equal(np.rint(tile.carried[..., 0] * 255), part[..., 3])


# ---------------------------------------------------------------------------------------- traps of the image libraries


def test_a_zstd_tiff_is_read_and_not_all_zeros(tmp_path: Path, make_job: MakeJob, rng: np.random.Generator) -> None:
    path = tmp_path / "a.tif"
    levels = _noise(rng, 32, 48, 1, 16)[..., 0]
    tifffile.imwrite(path, levels, compression="zstd", metadata=None)
    tile = _only(make_job(path))
    np.testing.assert_array_equal(np.rint(tile.pixels[..., 0].astype(np.float64) * 65535), levels)
    assert tile.ticket.facts is not None
    assert "read by tifffile" in tile.ticket.facts.notes[0]


def test_a_healthy_tiff_with_unsorted_tags_is_read(tmp_path: Path, make_job: MakeJob, rng: np.random.Generator) -> None:
    path = tmp_path / "a.tif"
    levels = _noise(rng, 32, 48, 3)
    tifffile.imwrite(path, levels, photometric="rgb", metadata=None, byteorder="<", software="x")
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    first, last = start + 2, start + 2 + 12 * (count - 1)
    data[first : first + 12], data[last : last + 12] = data[last : last + 12], data[first : first + 12]
    path.write_bytes(data)
    tile = _only(make_job(path))
    assert tile.ticket.failure is None
    np.testing.assert_array_equal(np.rint(tile.pixels * 255), levels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("strips.tif", {"compression": "deflate"}),
        ("tiled.tif", {"compression": "deflate", "tile": (64, 64)}),
        ("plain.tif", {"tile": (64, 64)}),
        ("a.jpg", {}),
        ("a.png", {}),
        ("a.webp", {}),
        ("a.avif", {}),
    ],
)
def test_a_truncated_image_fails(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, name: str, options: dict[str, object]
) -> None:
    path = tmp_path / name
    levels = _noise(rng, 256, 256, 3)
    if name.endswith(".tif"):
        tifffile.imwrite(path, levels, photometric="rgb", metadata=None, **options)
    else:
        Image.fromarray(levels).save(path)
    assert _only(make_job(path)).ticket.failure is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert _failed(make_job(path)) == "truncated"


def test_a_flipped_byte_in_an_lzw_tiff_is_seen_by_its_hash_alone(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, _noise(rng, 64, 64, 1)[..., 0], compression="lzw", metadata=None)
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    assert _only(make_job(path, sha256=good.upper())).ticket.failure is None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert _failed(make_job(path, sha256=good)) == "hash-mismatch"


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg", "a.webp", "a.avif"])
def test_a_rewritten_file_gives_its_new_pixels(tmp_path: Path, make_job: MakeJob, name: str) -> None:
    path = tmp_path / name
    for level in (10, 200):
        Image.new("RGB", (16, 16), (level,) * 3).save(path)
        assert _only(make_job(path)).pixels.max() * 255 == pytest.approx(level, abs=3)


# ------------------------------------------------------------------------------------------------ nothing escapes


def test_a_missing_file(tmp_path: Path, make_job: MakeJob) -> None:
    assert _failed(make_job(tmp_path / "nowhere.tif")) == "missing"


def test_an_empty_file(tmp_path: Path, make_job: MakeJob) -> None:
    (tmp_path / "a.tif").touch()
    assert _failed(make_job(tmp_path / "a.tif")) == "empty"


@pytest.mark.parametrize(("error", "kind"), [(MemoryError(), "out-of-memory"), (RuntimeError("odd"), "internal")])
def test_no_exception_leaves(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("supir_batch.color.measure_tone", fail)
    assert _failed(make_job(path)) == kind


def test_what_is_committed_is_not_decoded_again(
    tmp_path: Path, make_job: MakeJob, restore: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40), "teal").save(path)
    first = restore(path)
    monkeypatch.setattr("supir_batch.color.measure_tone", None)  # decoding would call it
    tile = _only(make_job(path))
    assert tile.ticket.recovered
    assert tile.ticket.fingerprint == first.ticket.fingerprint
    assert tile.pixels.size == 0


def test_the_source_is_left_as_it_was(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8), metadata=None)
    path.chmod(0o400)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert _only(make_job(path)).ticket.failure is None
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(("target", "most"), [("jpeg", 65535), ("webp", 16383)])
def test_an_output_too_large_for_its_format_is_refused_before_any_work(
    tmp_path: Path, make_job: MakeJob, target: str, most: int
) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (most + 1, 4)).save(path)
    (tile,) = decode(make_job(path, format=target), 16)
    assert tile.ticket.failure is not None
    assert tile.ticket.failure.kind == "unsupported"
    assert (
        f"a {target} cannot be {most + 1} x 4 pixels; set output.format to tiff or png" in tile.ticket.failure.message
    )
    Image.new("L", (most, 4)).save(path)
    (tile,) = decode(make_job(path, format=target), 16)
    assert tile.ticket.failure is None


def test_each_tile_has_its_own_time_and_the_first_that_of_reading(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    decoding = sys.modules[decode.__module__]
    read, work = readers.read, decoding._working

    def reading(*args: Any) -> readers.Raster:
        now[0] += 5
        return read(*args)

    def working(*args: Any) -> Any:
        now[0] += 2
        return work(*args)

    monkeypatch.setattr(readers, "read", reading)
    monkeypatch.setattr(decoding, "_working", working)
    path = tmp_path / "a.png"
    Image.new("RGB", (160, 120), "teal").save(path)
    seconds = []
    for tile in decode(make_job(path, max_pixels=100 * 100), 16):
        (record,) = tile.ticket.records
        seconds.append(record.seconds)
        now[0] += 100  # while nobody asks for the next tile
    assert len(seconds) > 2
    assert seconds == [7.0] + [2.0] * (len(seconds) - 1)
