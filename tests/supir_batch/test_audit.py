"""The audit says what its definitions say: on known cases, however an image is cut, and through the stages."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from supir_batch import audit, resample, runlog, tiles
from supir_batch.decode import decode
from supir_batch.engine import LanczosEngine, to_tensor
from supir_batch.isolation import Guards
from supir_batch.stages import RestoreStage, write_stage
from supir_batch.types import AuditScores, FloatImage, ImageFacts, Job, Region, TileTicket
from supir_model.config import TINY
from supir_model.model import Request, Sampling, SupirModel

MakeJob = Callable[..., Job]


def photograph() -> FloatImage:
    """256 x 320 pixels."""
    return (skimage.data.astronaut()[0:256, 100:420] / 255).astype(np.float32)


def facts(width: int, height: int, upscale: float = 1.0, work: tuple[int, int] | None = None) -> ImageFacts:
    output = tiles.output_size(width, height, upscale)
    return ImageFacts("x", "png", width, height, 3, 8, False, 1, None, None, *output, *(work or output))


def blur(sigma: float) -> Callable[[FloatImage], FloatImage]:
    return lambda pixels: gaussian_filter(pixels, (sigma, sigma, 0))


def audited(
    source: FloatImage,
    change: Callable[[FloatImage], FloatImage],
    upscale: float = 1.0,
    max_pixels: int = 2**30,
    overlap: int = 128,
    known: ImageFacts | None = None,
) -> tuple[AuditScores, np.ndarray]:
    """Scores and the invention map, in [0, 1], of what ``change`` makes of an enlarged source."""
    known = known or facts(source.shape[1], source.shape[0], upscale)
    before = resample.resize(source, known.work_width, known.work_height)
    after = change(before).astype(np.float32)
    found = []
    for box in tiles.plan_tiles(known.work_width, known.work_height, max_pixels, overlap, 8):
        here = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        found.append(audit.measure(before[here], after[here], known, box, overlap))
    scores, maps = audit.combine(found[::-1], known)
    return scores, maps["invention"] / 255


# --- known cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscale", [1.0, 1.5, 2.0, 4.0])
def test_nothing_is_invented_by_enlarging(upscale: float) -> None:
    scores, invention = audited(photograph(), np.copy, upscale)
    assert invention.max() < 0.05
    assert (scores.psnr, scores.delta_e, scores.delta_e_90, scores.invented) == (100.0, 0.0, 0.0, 0.0)
    assert scores.ssim == pytest.approx(1)
    assert scores.sharpness == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "sharpness"),
    [
        (blur(1), (0.2, 0.6)),
        (blur(4), (0.0, 0.2)),
        (lambda p: resample.resize(resample.resize(p, 160, 128), 320, 256), (0.3, 0.8)),
        (lambda p: p + 1.5 * (p - blur(1.5)(p)), (1.3, 3.0)),
        (lambda p: 0.5 + 1.2 * (p - 0.5), (1.0, 1.3)),
    ],
    ids=["blur", "strong blur", "reduced and enlarged", "sharpened", "contrast"],
)
def test_a_filter_changes_sharpness_and_invents_little(
    change: Callable[[FloatImage], FloatImage], sharpness: tuple[float, float]
) -> None:
    scores, invention = audited(0.2 + 0.6 * photograph(), change)
    assert scores.invention < 0.04
    assert np.percentile(invention, 95) < 0.2
    assert scores.sharpness is not None
    assert sharpness[0] < scores.sharpness < sharpness[1]


def test_detail_above_the_band_limit_of_the_source_is_not_explained() -> None:
    sharp = photograph()
    scores, _ = audited(resample.resize(sharp, 80, 64), lambda _: sharp, upscale=4)
    identity, _ = audited(resample.resize(sharp, 80, 64), np.copy, upscale=4)
    assert scores.invention > 0.08 > 20 * identity.invention
    assert scores.psnr > 35  # reduced, it is the source


@pytest.mark.parametrize("upscale", [1.0, 2.0])
def test_what_is_painted_lights_up_there_and_only_there(upscale: float, rng: np.random.Generator) -> None:
    source = photograph()
    place = slice(64, 128), slice(160, 240)  # of the source

    def paint(before: FloatImage) -> FloatImage:
        painted = before.copy()
        patch = painted[tuple(slice(round(s.start * upscale), round(s.stop * upscale)) for s in place)]
        patch += gaussian_filter(rng.normal(0, 0.3, patch.shape[:2]), 0.8)[..., None]
        return painted

    _, invention = audited(source, paint, upscale)
    inside = np.zeros_like(invention, bool)
    inside[8:16, 20:30] = True
    near = np.zeros_like(inside)
    near[6:18, 18:32] = True
    assert np.median(invention[inside]) > 0.5
    assert invention[~near].max() < 0.05


def test_structure_that_was_moved_is_invented() -> None:
    scores, _ = audited(photograph(), lambda p: shift(p, (0, 6, 0), order=1, mode="nearest"))
    assert scores.invention > 0.3


def test_faint_changes_do_not_count(rng: np.random.Generator) -> None:
    flat = np.full((128, 128, 3), 0.5, np.float32)
    scores, _ = audited(flat, lambda p: p + rng.normal(0, 0.3 / 255, (128, 128, 1)))
    assert scores.invention < 0.05
    assert scores.sharpness is None  # the source has no detail to compare with


def test_colors_and_structure_of_the_reduced_output_count() -> None:
    reddish = np.array([1.1, 1.0, 0.9], np.float32)
    scores, _ = audited(0.8 * photograph(), lambda p: p * reddish, 2)
    assert 1 < scores.delta_e < scores.delta_e_90 < 15
    darker, _ = audited(0.8 * photograph(), lambda p: p - 0.05, 2)
    assert darker.psnr == pytest.approx(20 * np.log10(1 / 0.05), abs=1.0)  # of dark pixels less is left to lose
    upside_down, _ = audited(photograph(), lambda p: p[::-1])
    assert upside_down.ssim < 0.5 < darker.ssim


def test_the_tone_that_the_writer_puts_back_counts() -> None:
    grey = np.repeat(photograph()[..., 1:2], 3, axis=2)
    neutral = dataclasses.replace(facts(320, 256), tone="neutral")
    bluish = grey * np.array([0.9, 0.95, 1.2], np.float32)
    with_tone, _ = audited(grey, lambda _: bluish, known=neutral)
    without, _ = audited(grey, lambda _: bluish)
    assert with_tone.delta_e < without.delta_e / 2


# --- tiles ---------------------------------------------------------------------------------------------------------


@given(
    width=st.integers(40, 400),
    height=st.integers(40, 400),
    upscale=st.sampled_from([0.5, 1.0, 1.37, 2.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_how_an_image_is_cut(width: int, height: int, upscale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = np.clip(gaussian_filter(rng.normal(0.5, 0.8, (height, width, 3)), (2, 2, 0)), 0, 1).astype(np.float32)
    known = facts(width, height, upscale)
    invented = gaussian_filter(rng.normal(0, 0.1, (known.work_height, known.work_width, 1)), (1, 1, 0))
    whole, whole_map = audited(source, lambda p: p + invented, upscale)
    cut, cut_map = audited(source, lambda p: p + invented, upscale, max_pixels=280 * 280, overlap=128)
    for name in ("psnr", "ssim", "delta_e", "delta_e_90", "sharpness", "invention", "invented"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=2e-3, abs=2e-3), name
    assert np.abs(cut_map - whole_map).max() < 0.02


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    upscale=st.sampled_from([0.25, 1.0, 1.9, 3.0]),
    overlap=st.sampled_from([0, 16, 64]),
)
@settings(max_examples=30, deadline=None)
def test_each_cell_is_answered_for_once(width: int, height: int, upscale: float, overlap: int) -> None:
    known = facts(width, height, upscale)
    flat = np.full((known.work_height, known.work_width, 3), 0.5, np.float32)
    found = []
    for box in tiles.plan_tiles(known.work_width, known.work_height, 200 * 200, overlap, 16):
        tile = flat[: box.height, : box.width]
        found.append(audit.measure(tile, tile, known, box, overlap))
    shape = audit.combine(found, known)[1]["invention"].shape
    count = np.zeros(shape, int)
    for one in found:
        count[one.row : one.row + one.rows, one.column : one.column + one.columns] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (7, 9), (2000, 1)])
def test_small_images_have_scores(size: tuple[int, int], rng: np.random.Generator) -> None:
    source = rng.random((*size, 3)).astype(np.float32)
    scores, _ = audited(source, np.copy, 2)
    assert scores.psnr == 100
    assert scores.invention < 0.05


def test_an_output_that_is_smaller_than_what_was_worked_at_is_seen_as_it_is(rng: np.random.Generator) -> None:
    known = facts(160, 128, 1.0, work=(320, 256))
    fine = rng.normal(0, 0.2, (256, 320, 1))
    seen, _ = audited(resample.resize(photograph(), 160, 128), lambda p: p + fine, known=known)
    full, _ = audited(resample.resize(photograph(), 160, 128), lambda p: p + fine, 2)
    assert seen.invention < full.invention


def test_pixels_of_another_size_are_refused() -> None:
    known, (box,) = facts(320, 256), tiles.plan_tiles(320, 256, 2**30, 0, 8)
    with pytest.raises(ValueError, match="cannot be measured"):
        audit.measure(photograph(), photograph()[1:], known, box, 0)


def test_regions_have_the_invention_of_their_cells(rng: np.random.Generator) -> None:
    regions = (Region("face", 160, 64, 80, 64), Region("text", 0, 200, 60, 20), Region("face", 310, 250, 30, 30))
    known = dataclasses.replace(facts(320, 256), regions=regions)

    def paint(before: FloatImage) -> FloatImage:
        painted = before.copy()
        painted[64:128, 160:240] += rng.normal(0, 0.3, (64, 80, 1))
        return painted

    scores, _ = audited(photograph(), paint, known=known)
    assert scores.regions is not None
    inventions = [region.invention for region in scores.regions]
    assert inventions[0] is not None
    assert inventions[0] > 0.5
    assert inventions[1:] == pytest.approx([0, 0], abs=0.05)


def test_spread_is_the_deviation_of_luma(rng: np.random.Generator) -> None:
    source, known = 0.25 + photograph() / 2, facts(320, 256)
    (box,) = tiles.plan_tiles(320, 256, 2**30, 0, 8)
    noisy = [(source + rng.normal(0, 0.04, (256, 320, 1))).astype(np.float32) for _ in range(8)]
    scores, maps = audit.combine([audit.measure(source, noisy[0], known, box, 0, noisy[1:])], known)
    assert scores.spread == pytest.approx(0.04, rel=0.05)
    assert maps["uncertainty"].shape == maps["invention"].shape == (32, 40)
    alone, maps = audit.combine([audit.measure(source, noisy[0], known, box, 0)], known)
    assert (alone.spread, list(maps)) == (None, ["invention"])


# --- what a model generates ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_model_samples_is_invented_where_it_has_drawn() -> None:
    source = resample.resize(photograph()[64:256, 96:288], 96, 96)
    known = facts(96, 96, 2.0)
    before = resample.resize(source, 192, 192)
    model = SupirModel.load("tiny", device="cpu")
    sampling = Sampling.of(TINY.presets["quality"], TINY.window, TINY.stride)
    request = Request(to_tensor(before), "a photograph of a woman", TINY.negative_prompt, seed=0)
    restored = ((model.restore([request], sampling)[0] + 1) / 2).permute(1, 2, 0).numpy()
    after = np.where(np.arange(192)[:, None] < 96, restored, before)  # the right half is only enlarged
    _, invention = audited(source, lambda _: after, known=known)
    assert invention[:, :5].mean() > 0.1
    assert invention[:, 8:].max() < 0.02


# --- in the stages -------------------------------------------------------------------------------------------------


class _Inventive(LanczosEngine):
    """An engine that paints noise of its seed into the left half of an image."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        restored = []
        for ticket, tile in zip(tickets, tiles, strict=True):
            self.seeds.append(ticket.seed)
            noise = np.random.default_rng(ticket.seed).normal(0, 0.1, tile.shape)
            assert ticket.box is not None
            assert ticket.facts is not None
            noise[:, max(0, ticket.facts.work_width // 2 - ticket.box.x) :] = 0
            restored.append((tile + noise).astype(np.float32))
        return restored


def _run(
    job: Job, guards: Guards, engine: LanczosEngine, regions: tuple[Region, ...] | None = None
) -> dict[str, object]:
    """The run-log row of the image, whose regions are given."""
    stage = RestoreStage(guards, None, "cpu", lambda model, device: engine)
    rows: list[dict[str, object]] = []
    for tile in decode(job, 16):
        ticket = tile.ticket
        if regions is not None and ticket.facts is not None:
            ticket = dataclasses.replace(ticket, facts=dataclasses.replace(ticket.facts, regions=regions))
        batch = {"ticket": [pickle.dumps(ticket)], "pixels": tile.pixels[None], "carried": tile.carried[None]}
        rows += write_stage(stage(batch), guards).to_pylist()
    (row,) = rows
    return row


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray((photograph() * 255).astype(np.uint8)).save(path)
    return path


LOOSE = {"gate_color_drift": 50.0, "gate_similarity": -1.0, "gate_seam": 1.0}


def test_scores_are_in_log_and_record_and_the_map_beside_them(source: Path, make_job: MakeJob, guards: Guards) -> None:
    job = make_job(source, upscale=2.0, **LOOSE)
    row = _run(job, guards, _Inventive())
    assert row["status"] == "done"
    record = json.loads(Path(f"{row['output_uri']}.json").read_text())
    for name in ("psnr", "ssim", "delta_e", "delta_e_90", "sharpness", "invention", "invented", "spread"):
        assert record["audit"][name] == row[f"audit_{name}"], name
    found = audit.maps(job.output_root, row)
    assert found == {"invention": f"{job.output_root}/_audit/photo.png.invention.png"}
    with Image.open(found["invention"]) as picture:
        assert (picture.mode, picture.size) == ("L", (40, 32))
        assert "8 x 8" in picture.text["Description"]
        values = np.asarray(picture)
    assert values[:, :18].mean() > 100
    assert values[:, 22:].mean() < 10
    again = _run(job, guards, _Inventive())
    assert again["recovered"]
    for name in runlog.SCHEMA.names:
        assert not name.startswith("audit_") or again[name] == row[name], name


def test_a_cut_image_has_one_audit(source: Path, make_job: MakeJob, guards: Guards) -> None:
    whole = _run(make_job(source, folder="whole", **LOOSE), guards, LanczosEngine())
    job = make_job(source, max_pixels=192 * 192, overlap=64, **LOOSE)
    row = _run(job, guards, LanczosEngine())
    assert (row["tiles"], row["gate_seam"]) != (1, None)
    assert row["audit_psnr"] == whole["audit_psnr"] == 100
    assert row["audit_sharpness"] == pytest.approx(whole["audit_sharpness"])
    with Image.open(audit.maps(job.output_root, row)["invention"]) as picture:
        assert picture.size == (40, 32)


def test_without_an_audit_there_is_none(source: Path, make_job: MakeJob, guards: Guards) -> None:
    job = make_job(source, audit_enabled=False)
    row = _run(job, guards, LanczosEngine())
    assert row["status"] == "done"
    assert all(row[name] is None for name in runlog.SCHEMA.names if name.startswith("audit_"))
    assert audit.maps(job.output_root, row) == {}
    assert not (Path(job.output_root) / "_audit").exists()
    assert json.loads(Path(f"{row['output_uri']}.json").read_text())["audit"] is None


def test_samples_map_where_seeds_differ_and_change_no_output(source: Path, make_job: MakeJob, guards: Guards) -> None:
    face = (Region("face", 20, 20, 60, 60),)
    plain = _run(make_job(source, folder="plain", **LOOSE), guards, _Inventive(), face)
    engine = _Inventive()
    job = make_job(source, audit_samples=4, **LOOSE)
    row = _run(job, guards, engine, face)
    assert row["output_sha256"] == plain["output_sha256"]
    assert row["seed"] == plain["seed"] == engine.seeds[0]
    assert len(set(engine.seeds)) == 4
    assert (plain["audit_spread"], row["audit_invention"]) == (None, plain["audit_invention"])
    found = audit.maps(job.output_root, row)
    assert sorted(found) == ["invention", "uncertainty"]
    with Image.open(found["uncertainty"]) as picture:
        values = np.asarray(picture) / 255 / 4
    assert 0.02 < values[:, :18].mean() < 0.08
    assert values[:, 22:].max() == 0
    assert row["audit_spread"] == pytest.approx(values.mean(), abs=1e-3)


@pytest.mark.parametrize(("regions", "samples"), [(None, 0), ((), 4)])
def test_images_without_flags_are_restored_once(
    source: Path, make_job: MakeJob, guards: Guards, regions: tuple[Region, ...] | None, samples: int
) -> None:
    engine = _Inventive()
    row = _run(make_job(source, audit_samples=samples, **LOOSE), guards, engine, regions)
    assert len(engine.seeds) == 1
    assert row["audit_spread"] is None
    assert row["audit_faces"] == (None if regions is None else 0)


def test_a_picture_of_an_earlier_output_goes(source: Path, make_job: MakeJob, guards: Guards) -> None:
    face = (Region("face", 20, 20, 60, 60),)
    job = make_job(source, audit_samples=2, **LOOSE)
    _run(job, guards, _Inventive(), face)
    uncertainty = Path(audit.picture_uri(job.output_root, "photo.png", "uncertainty"))
    assert uncertainty.exists()
    _run(make_job(source, upscale=2.0, **LOOSE), guards, _Inventive(), face)
    assert not uncertainty.exists()
    _run(make_job(source, audit_enabled=False), guards, LanczosEngine())
    assert not list((Path(job.output_root) / "_audit").iterdir())


def test_pictures_are_the_same_to_the_last_byte() -> None:
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert audit.picture("invention", values) == audit.picture("invention", values)
    with Image.open(io.BytesIO(audit.picture("uncertainty", values))) as picture:
        assert (np.asarray(picture) == values).all()
