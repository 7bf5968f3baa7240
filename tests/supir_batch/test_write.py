from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from supir_batch import commit, encode, parts, store
from supir_batch.decode import DecodedTile, decode, read_srgb
from supir_batch.errors import ImageError, StoreError
from supir_batch.metadata import read_claims
from supir_batch.probe import probe
from supir_batch.types import Failure, FloatImage, Job, Outcome
from supir_batch.write import write

MakeJob = Callable[..., Job]
Restore = Callable[..., Outcome]


def _photo(path: Path, rng: np.random.Generator, height: int = 120, width: int = 160) -> Path:
    y, x = np.mgrid[0:height, 0:width]
    base = 100 + 60 * np.sin(x / 9)[..., None] * np.array([1.0, 0.6, 0.2]) + 40 * np.cos(y / 7)[..., None]
    levels = np.clip(base + rng.normal(0, 5, (height, width, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(levels).save(path, dpi=(300, 300))
    return path


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _write(tile: DecodedTile) -> Outcome | None:
    return write(tile.ticket, tile.pixels, tile.carried)


def test_a_16_bit_grey_tiff_comes_back_as_exactly_that(
    tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.tif"
    icc = bytes(imagecodecs.cms_profile("gray", gamma=2.2))
    levels = rng.permutation(65536).astype(np.uint16).reshape(256, 256)
    tifffile.imwrite(path, levels, iccprofile=icc, resolution=(600, 600), resolutionunit="INCH", metadata=None)
    outcome = restore(path)
    assert outcome.status == "done", outcome.ticket.failure
    with tifffile.TiffFile(outcome.output_uri) as tif:
        page = tif.pages.first
        np.testing.assert_array_equal(page.asarray(), levels)
        assert page.iccprofile == icc
        assert page.tags.valueof("XResolution") == (600, 1)
    assert outcome.output_sha256 == commit.file_sha256(Path(outcome.output_uri))
    assert outcome.output_bytes == Path(outcome.output_uri).stat().st_size


def test_geometry_physical_size_and_mirrored_name(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    outcome = restore(_photo(tmp_path / "photo.jpg", rng, 101, 75), upscale=2.5)
    assert Path(outcome.output_uri).name == "photo.jpg"
    with Image.open(outcome.output_uri) as image:
        assert image.size == (round(75 * 2.5), round(101 * 2.5))
        dpi = image.info["dpi"]
        assert image.size[0] / float(dpi[0]) == pytest.approx(75 / 300, rel=0.01)


def test_an_enlarged_working_size_is_brought_back(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    outcome = restore(_photo(tmp_path / "a.png", rng, 40, 60), min_size=200)
    with Image.open(outcome.output_uri) as image:
        assert image.size == (60, 40)


def test_orientation_is_applied_and_the_tag_reset(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(path, exif=exif, dpi=(200, 100))
    outcome = restore(path)
    with Image.open(outcome.output_uri) as image:
        assert image.size == (30, 50)
        assert image.getexif()[0x0112] == 1
        assert image.info["dpi"] == pytest.approx((100, 200))


def test_alpha_is_kept(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    path = tmp_path / "a.png"
    levels = rng.integers(0, 256, (90, 120, 4), np.uint8)
    Image.fromarray(levels).save(path)
    for options in ({}, {"max_pixels": 80 * 80}):
        with Image.open(restore(path, folder=f"out{len(options)}", **options).output_uri) as image:
            np.testing.assert_array_equal(np.asarray(image), levels)


def test_a_neutral_and_a_toned_print_stay_so(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    grey = rng.random((60, 60, 1))

    def tint(pixels: FloatImage) -> FloatImage:
        return np.clip(pixels + np.array([0.1, 0.0, -0.1], np.float32), 0, 1)

    neutral = tmp_path / "neutral.png"
    Image.fromarray(np.repeat((grey * 255).astype(np.uint8), 3, axis=2)).save(neutral)
    with Image.open(restore(neutral, change=tint).output_uri) as image:
        pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()

    sepia = tmp_path / "sepia.png"
    toned = (np.concatenate([grey**0.75, grey, grey**1.4], axis=2) * 255).astype(np.uint8)
    Image.fromarray(toned).save(sepia)
    with Image.open(restore(sepia, change=lambda p: np.repeat(p[..., 1:2], 3, axis=2)).output_uri) as image:
        restored = np.asarray(image).astype(float)
    warmth = (restored[..., 0] - restored[..., 2]).mean()
    assert warmth == pytest.approx((toned[..., 0].astype(float) - toned[..., 2]).mean(), rel=0.15)


# --------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_the_same_work_gives_the_same_bytes(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, name: str
) -> None:
    path = _photo(tmp_path / name, rng)
    first, second = (restore(path, folder=folder, upscale=1.5) for folder in ("one", "two"))
    assert first.status == second.status == "done"
    assert Path(first.output_uri).read_bytes() == Path(second.output_uri).read_bytes()


# --------------------------------------------------------------------------------------------------- cut images


def test_assembled_tiles_equal_the_whole_and_leave_no_parts(
    tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    path = _photo(tmp_path / "a.png", rng, 150, 210)
    whole = restore(path, folder="whole")
    cut = restore(path, folder="cut", max_pixels=80 * 80)
    assert cut.ticket.box is not None
    assert cut.ticket.box.count > 4
    with Image.open(whole.output_uri) as one, Image.open(cut.output_uri) as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert _files(tmp_path / "cut") == ["a.png", "a.png.json"]


def test_only_the_last_tile_reports(tmp_path: Path, make_job: MakeJob, rng: np.random.Generator) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=90 * 90), 16))
    outcomes = [_write(tile) for tile in tiles[::-1]]
    assert outcomes[:-1] == [None] * (len(tiles) - 1)
    assert outcomes[-1] is not None
    assert outcomes[-1].status == "done"


def test_two_writers_that_both_see_the_last_part(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    for tile in tiles[2:]:
        assert _write(tile) is None
    both = threading.Barrier(2)
    put = store.write_atomic

    def put_then_wait(uri: str, data: bytes | Path) -> None:
        put(uri, data)
        if uri.endswith(".npy"):
            both.wait(timeout=30)

    monkeypatch.setattr("supir_batch.store.write_atomic", put_then_wait)
    outcomes: list[Outcome | None] = []
    writers = [threading.Thread(target=lambda t=tile: outcomes.append(_write(t))) for tile in tiles[:2]]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [o.status if o else None for o in outcomes] == ["done", "done"], outcomes
    assert len({o.output_sha256 for o in outcomes if o}) == 1
    assert _files(tmp_path / "out") == ["a.png", "a.png.json"]


def test_two_writers_that_commit_at_the_same_moment_report_what_stays(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    put, inner = store.write_atomic, list[Outcome | None]()

    def commit_between(uri: str, data: bytes | Path) -> None:
        if uri.endswith("a.png.json") and not inner:  # the first has looked, and is about to write its record
            inner.append(None)
            inner[0] = _write(
                dataclasses.replace(tiles[0], ticket=dataclasses.replace(tiles[0].ticket, started_at="x"))
            )
        put(uri, data)

    monkeypatch.setattr("supir_batch.store.write_atomic", commit_between)
    outer = [_write(tile) for tile in tiles][-1]
    faster = inner[0]
    assert outer is not None
    assert faster is not None
    assert (outer.status, faster.status) == ("done", "done")
    assert outer.record_sha256 != faster.record_sha256
    assert commit.file_sha256(Path(commit.record_uri(outer.output_uri))) == outer.record_sha256
    assert outer.finished_at > faster.finished_at


def test_a_writer_whose_record_was_written_over_reports_the_one_that_is_there(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    put = store.write_atomic

    def another_record_follows(uri: str, data: bytes | Path) -> None:
        put(uri, data)
        if uri.endswith("a.png"):
            record = Path(f"{uri}.json")
            record.write_text(record.read_text().replace('"started_at": "', '"started_at": "1'))

    monkeypatch.setattr("supir_batch.store.write_atomic", another_record_follows)
    outcome = [_write(tile) for tile in tiles][-1]
    assert outcome is not None
    assert commit.file_sha256(Path(commit.record_uri(outcome.output_uri))) == outcome.record_sha256


def test_parts_that_vanish_because_another_writer_finished(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    for tile in tiles[1:]:
        assert _write(tile) is None
    look = store.read_bytes

    def finish_first(uri: str) -> bytes:
        monkeypatch.setattr("supir_batch.store.read_bytes", look)
        other = _write(tiles[0])
        assert other is not None
        assert other.status == "done"
        return look(uri)  # the part is gone now

    monkeypatch.setattr("supir_batch.store.read_bytes", finish_first)
    late = _write(tiles[0])
    assert late is not None
    assert late.status == "done", late.ticket.failure
    assert _files(tmp_path / "out") == ["a.png", "a.png.json"]


@pytest.mark.parametrize("max_pixels", [100 * 100, 1000 * 1000])
def test_a_slower_writer_leaves_the_output_of_the_faster(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, max_pixels: int
) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=max_pixels), 16))
    check, faster = encode.check_file, list[Outcome | None]()

    def finish_first(*args: object) -> None:
        if not faster:
            faster.append(None)
            faster[0] = _write(tiles[0])
        check(*args)

    monkeypatch.setattr("supir_batch.encode.check_file", finish_first)
    slower = [_write(tile) for tile in tiles][-1]
    assert slower is not None
    assert faster[0] is not None
    assert (slower.status, slower.record_sha256) == ("done", faster[0].record_sha256)
    assert commit.file_sha256(Path(commit.record_uri(slower.output_uri))) == slower.record_sha256


def test_a_tile_that_comes_after_the_image_was_finished_leaves_nothing_behind(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator
) -> None:
    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    outcomes = [_write(tile) for tile in (*tiles, tiles[0])]
    assert outcomes[-1] is not None
    assert outcomes[-1].status == "done"
    assert _files(tmp_path / "out") == ["a.png", "a.png.json"]


@pytest.mark.parametrize("error", [ImageError("encode-failed", "x"), ValueError("x")])
def test_parts_that_cannot_be_assembled_are_removed(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    monkeypatch.setattr("supir_batch.encode.encode_strips", fail)
    assert _failure([_write(tile) for tile in tiles][-1]).stage == "write"
    assert _files(tmp_path / "out") == []


def test_parts_stay_if_the_store_fails(
    tmp_path: Path, make_job: MakeJob, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise StoreError("no space")

    tiles = list(decode(make_job(_photo(tmp_path / "a.png", rng), max_pixels=100 * 100), 16))
    monkeypatch.setattr("supir_batch.commit.commit", fail)
    assert _failure([_write(tile) for tile in tiles][-1]).kind == "store"
    assert len(_files(tmp_path / "out")) == 2 * len(tiles)


# ------------------------------------------------------------------------------------------------------- commits


def test_nothing_is_deleted_that_is_not_there(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(uri: str) -> None:
        raise StoreError(f"{uri}: access denied")

    path = _photo(tmp_path / "a.png", rng)
    with monkeypatch.context() as patch:
        patch.setattr("supir_batch.store.delete", denied)
        assert restore(path, sidecars=("json",)).status == "done"
    assert restore(path, upscale=2.0, sidecars=("json", "premis")).status == "done"
    assert restore(path, sidecars=("json",)).status == "done"
    assert _files(tmp_path / "out") == ["a.png", "a.png.json"]


def test_a_kill_between_record_and_image_is_seen(
    tmp_path: Path, make_job: MakeJob, restore: Restore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _photo(tmp_path / "a.png", rng)
    put = store.write_atomic

    class Killed(BaseException):
        pass

    def die_before_image(uri: str, data: bytes | Path) -> None:
        if not uri.endswith(".json"):
            raise Killed
        put(uri, data)

    for restart in ("with no older output", "with the output of other settings in place"):
        monkeypatch.setattr("supir_batch.store.write_atomic", die_before_image)
        with pytest.raises(Killed):
            restore(path, upscale=2.0)
        monkeypatch.setattr("supir_batch.store.write_atomic", put)
        (tile,) = decode(make_job(path, upscale=2.0), 16)
        assert not tile.ticket.recovered, restart
        restore(path, upscale=1.0)
        (other,) = decode(make_job(path, upscale=1.0), 16)
        assert other.ticket.recovered


def test_an_output_that_was_changed_or_cut_does_not_count(
    tmp_path: Path, make_job: MakeJob, restore: Restore, rng: np.random.Generator
) -> None:
    path = _photo(tmp_path / "a.png", rng)
    outcome = restore(path)
    output = Path(outcome.output_uri)
    job = make_job(path)
    good = output.read_bytes()
    assert commit.committed(job, outcome.ticket.fingerprint, "png") is not None
    for bad in (good[:-1], good[:-1] + b"\0"):
        output.write_bytes(bad)
        assert commit.committed(job, outcome.ticket.fingerprint, "png") is None
    output.write_bytes(good)
    assert commit.committed(job, "another fingerprint", "png") is None
    Path(commit.record_uri(str(output))).write_text("{not json")
    assert commit.committed(job, outcome.ticket.fingerprint, "png") is None


def test_a_recovered_ticket_reports_the_committed_output(
    tmp_path: Path, make_job: MakeJob, restore: Restore, rng: np.random.Generator
) -> None:
    path = _photo(tmp_path / "a.png", rng)
    first, again = restore(path), restore(path)
    assert again.ticket.recovered
    assert (again.status, again.output_uri, again.output_sha256) == ("done", first.output_uri, first.output_sha256)
    assert again.finished_at == first.finished_at


def test_the_record_beside_the_image(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    outcome = restore(_photo(tmp_path / "a.png", rng), upscale=2.0)
    record = json.loads(Path(outcome.output_uri + ".json").read_text())
    assert record["fingerprint"] == outcome.ticket.fingerprint
    assert record["output"]["sha256"] == outcome.output_sha256
    assert record["settings"]["upscale"] == 2.0
    assert [stage["stage"] for stage in record["run"]["stages"]] == ["decode", "write"]


# ------------------------------------------------------------------------------------------------------ failures


def _failure(outcome: Outcome | None) -> Failure:
    assert outcome is not None
    assert outcome.status == "failed"
    assert outcome.ticket.failure is not None
    assert outcome.finished_at
    return outcome.ticket.failure


def test_a_failure_passes_through(tmp_path: Path, make_job: MakeJob) -> None:
    (tile,) = decode(make_job(tmp_path / "nowhere.png"), 16)
    assert _failure(_write(tile)) == tile.ticket.failure


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, value: float
) -> None:
    def spoil(pixels: FloatImage) -> FloatImage:
        spoiled = pixels.copy()
        spoiled[3, 4, 1] = value
        return spoiled

    failure = _failure(restore(_photo(tmp_path / "a.png", rng), change=spoil))
    assert (failure.stage, failure.kind) == ("write", "bad-output")
    assert not (tmp_path / "out").exists()


def test_an_engine_that_returns_another_size_is_refused(
    tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    assert _failure(restore(_photo(tmp_path / "a.png", rng), change=lambda p: p[1:])).kind == "bad-output"


def test_an_unwritable_output_is_a_failed_outcome(tmp_path: Path, make_job: MakeJob, rng: np.random.Generator) -> None:
    (tile,) = decode(make_job(_photo(tmp_path / "a.png", rng)), 16)
    (tmp_path / "out").write_text("a file where the folder should be")
    assert _failure(_write(tile)).kind == "store"


def test_an_unexpected_error_is_a_failed_outcome(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supir_batch.encode.encode_strips", None)
    failure = _failure(restore(_photo(tmp_path / "a.png", rng)))
    assert failure.kind == "internal"
    assert "TypeError" in failure.message


def test_parts_are_keyed_by_fingerprint(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_job(tmp_path / "a.png")
    assert parts.uri(job, "f1", 0) != parts.uri(job, "f2", 0)
    assert parts.uri(dataclasses.replace(job, output_root="memory://x"), "f", 1) == "memory://x/_parts/f/000001.npy"


@pytest.mark.parametrize("tiled", [False, True])
def test_colors_outside_of_srgb_come_back(
    wide_profile: bytes, tiled: bool, tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    levels = rng.integers(0, 65536, (96, 128, 4), np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, levels, iccprofile=wide_profile, photometric="rgb", extrasamples=["unassalpha"], metadata=None
    )
    outcome = restore(path, **({"max_pixels": 80 * 80} if tiled else {}))
    assert outcome.status == "done", outcome.ticket.failure
    error = np.abs(tifffile.imread(outcome.output_uri).astype(int) - levels.astype(int))
    assert error.max() <= 1
    assert error.mean() < 0.01


def test_colors_outside_of_srgb_are_enlarged_with_the_picture(
    wide_profile: bytes, tmp_path: Path, restore: Restore
) -> None:
    path = tmp_path / "a.tif"
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    green = np.tile(ramp[:, None, None], (1, 64, 3))  # greys of all levels, or it would be taken for a toned print
    green[:, 32:] = 0, 65535, 0  # no green of sRGB is as green
    tifffile.imwrite(path, green, iccprofile=wide_profile, photometric="rgb", metadata=None)
    enlarged = tifffile.imread(restore(path, upscale=2).output_uri)
    assert enlarged.shape == (128, 128, 3)
    assert enlarged[:, 72:, 1].min() > 65400
    assert enlarged[:, 72:, [0, 2]].max() < 140


@pytest.mark.parametrize("target", ["tiff", "png", "jpeg", "webp", "jpeg2000"])
@pytest.mark.parametrize("bands", [1, 3])
def test_every_format_holds_pixels_resolution_and_what_it_is(
    target: str, bands: int, tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    levels = rng.integers(0, 256, (40, 60, bands), np.uint8)
    source = tmp_path / "a.tif"
    tifffile.imwrite(source, levels.squeeze(), resolution=(300, 300), resolutionunit="INCH", metadata=None)
    outcome = restore(source, format=target)
    assert outcome.status == "done", outcome.ticket.failure
    output = Path(outcome.output_uri)
    header = probe(output)
    kept = 3 if target == "webp" else bands
    assert (header.format, header.width, header.height, header.bands) == (target, 60, 40, kept)
    assert header.dpi == ((300.0, 300.0) if target != "webp" else None)
    seen = np.rint(read_srgb(output)[0] * 255)
    assert np.abs(seen - np.broadcast_to(levels, (40, 60, 3))).max() <= (60 if target == "jpeg" else 0)
    claims = read_claims(output)
    assert claims["supirBatch:Fingerprint"] == outcome.ticket.fingerprint
    assert claims["supirBatch:GenerativeReconstruction"] == "False"
    again = restore(source, format=target, folder="again")
    assert Path(again.output_uri).read_bytes() == output.read_bytes()


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none"])
@pytest.mark.parametrize("shape", ["strips", "tiled", "pyramid"])
def test_kinds_of_tiff(
    compression: str, shape: str, tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    levels = rng.integers(0, 65536, (600, 700, 3), np.uint16)
    source = tmp_path / "a.tif"
    tifffile.imwrite(source, levels, photometric="rgb", metadata=None)
    outcome = restore(source, compression=compression, tiled=shape != "strips", pyramid=shape == "pyramid")
    assert outcome.status == "done", outcome.ticket.failure
    with tifffile.TiffFile(outcome.output_uri) as tif:
        page = tif.pages.first
        np.testing.assert_array_equal(page.asarray(), levels)
        names = {"deflate": "ADOBE_DEFLATE", "lzw": "LZW", "none": "NONE"}
        assert {other.compression.name for other in tif.pages} == {names[compression]}
        assert page.is_tiled == (shape != "strips")
        sizes = [other.shape[:2] for other in tif.pages]
    assert sizes == ([(600, 700), (300, 350), (150, 175)] if shape == "pyramid" else [(600, 700)])
    assert read_claims(Path(outcome.output_uri))["supirBatch:Fingerprint"] == outcome.ticket.fingerprint


def test_a_lossy_webp_is_smaller(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> None:
    source = _photo(tmp_path / "a.png", rng, 200, 300)
    sizes = [restore(source, format="webp", quality=q, folder=f"q{q}").output_bytes for q in (None, 90, 30)]
    assert sizes == sorted(sizes, reverse=True)
