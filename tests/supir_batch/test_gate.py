"""The output gate: sound outputs pass, ruined ones do not, and a second attempt is made and told."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import skimage.util
from PIL import Image

from supir_batch import gate, runlog
from supir_batch.color import Tone, measure_tone
from supir_batch.decode import decode
from supir_batch.engine import Engine
from supir_batch.identity import item_seed, second_seed
from supir_batch.isolation import Guards
from supir_batch.stages import RestoreStage, write_stage
from supir_batch.types import FloatImage, GateLimits, Job, TileTicket

MakeJob = Callable[..., Job]
COLOR = Tone("color")
LIMITS = GateLimits(color_drift=5.0, similarity=0.6, dead=0.05, seam=0.05)


@pytest.fixture
def photograph() -> FloatImage:
    return (skimage.data.astronaut()[0:256, 100:420] / 255).astype(np.float32)


def wrong(before: FloatImage, after: FloatImage, tone: Tone = COLOR) -> str:
    return "; ".join(gate.complaints(gate.measure(before, after.astype(np.float32), tone), LIMITS))


def test_the_same_picture_scores_perfectly(photograph: FloatImage) -> None:
    scores = gate.measure(photograph, photograph, COLOR)
    assert scores.area == 256 * 320
    assert (scores.finite, scores.color_drift, scores.dead) == (True, 0.0, 0.0)
    assert scores.similarity == pytest.approx(1)


def test_removing_noise_is_no_fault(photograph: FloatImage, rng: np.random.Generator) -> None:
    noisy = np.clip(photograph + rng.normal(0, 0.1, photograph.shape), 0, 1).astype(np.float32)
    assert not wrong(noisy, photograph)


@pytest.mark.parametrize(
    ("ruin", "complaint"),
    [
        (np.zeros_like, "dead area"),
        (lambda p: np.full_like(p, p.mean()), "dead area"),
        (lambda p: np.clip(p + 0.15, 0, 1), "color drift"),
        (lambda p: p * np.array([1.0, 0.8, 0.6]), "color drift"),
        (lambda p: p[::-1, ::-1], "similarity"),
        (lambda p: np.random.default_rng(0).random(p.shape), "similarity"),
        (lambda p: np.clip((p - 0.5) * 8 + 0.5, 0, 1), "color drift"),
        (lambda p: np.where(np.arange(p.shape[1])[:, None] < 64, 1.0, p), "dead area"),
        (lambda p: np.where(p > 2, p, np.nan), "no numbers"),
    ],
    ids=["black", "grey", "brighter", "reddish", "upside down", "noise", "posterized", "white strip", "nan"],
)
def test_ruined_outputs_are_named(
    photograph: FloatImage, ruin: Callable[[FloatImage], FloatImage], complaint: str
) -> None:
    assert complaint in wrong(photograph, ruin(photograph))


def test_the_tone_that_the_writer_puts_back_counts(photograph: FloatImage) -> None:
    grey = np.repeat(photograph[..., 1:2], 3, axis=2)
    bluish = np.clip(grey * np.array([0.7, 0.8, 1.2], np.float32), 0, 1)
    assert "color drift" in wrong(grey, bluish)
    assert gate.measure(grey, bluish, measure_tone(grey)).color_drift < gate.measure(grey, bluish, COLOR).color_drift


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (15, 15), (16, 5)])
def test_small_images_have_scores(size: tuple[int, int], rng: np.random.Generator) -> None:
    pixels = rng.random((*size, 3)).astype(np.float32)
    assert not wrong(pixels, pixels)
    assert wrong(pixels, 1 - np.round(pixels))


def test_another_size_is_refused(photograph: FloatImage) -> None:
    with pytest.raises(ValueError, match="restored to"):
        gate.measure(photograph, photograph[1:], COLOR)


def test_tiles_count_by_area(photograph: FloatImage, guards: Guards) -> None:
    first = dataclasses.replace(gate.measure(photograph, photograph, COLOR), area=300, color_drift=1.0)
    second = dataclasses.replace(first, area=100, color_drift=5.0, finite=False)
    together = gate.combine([first, second])
    assert (together.area, together.color_drift, together.finite) == (400, 2.0, False)


_SCORES = ("color_drift", "similarity", "dead", "seam")


# --- in the stages -------------------------------------------------------------------------------------------------


class _Faulty(Engine):
    """An engine whose first attempts at some tiles, or all attempts, come out black."""

    device = "cpu"

    def __init__(self, bad: set[int], hopeless: bool) -> None:
        self.bad, self.hopeless = bad, hopeless
        self.seeds: list[int] = []

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        boxes = [ticket.box.index for ticket in tickets if ticket.box is not None]
        return [np.zeros_like(tile) if box in self.bad else tile for box, tile in zip(boxes, tiles, strict=True)]

    def restore_again(self, ticket: TileTicket, tile: FloatImage) -> FloatImage | None:
        self.seeds.append(ticket.seed)
        return np.zeros_like(tile) if self.hopeless else tile


def restored(job: Job, engine: Engine, guards: Guards) -> dict[str, Any]:
    """The run-log row of the image after restoring and writing its tiles one by one."""
    stage = RestoreStage(guards, None, "cpu")
    stage._loaded = engine
    rows: list[dict[str, Any]] = []
    for tile in decode(job, 16):
        assert tile.ticket.failure is None, tile.ticket.failure
        batch = {"ticket": [pickle.dumps(tile.ticket)], "pixels": [tile.pixels], "carried": [tile.carried]}
        rows += write_stage(stage(batch), guards).to_pylist()
    (row,) = rows
    assert row.keys() == set(runlog.SCHEMA.names)
    return row


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Image.fromarray(skimage.data.astronaut()[0:200, 100:380]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_sound_image_is_logged_with_its_scores(source: Path, make_job: MakeJob, guards: Guards) -> None:
    row = restored(make_job(source), _Faulty(set(), hopeless=False), guards)
    assert (row["status"], row["restored_again"], row["gate_finite"], row["gate_seam"]) == ("done", False, True, None)
    assert row["gate_color_drift"] < 0.01
    assert row["gate_similarity"] == pytest.approx(1)
    told = json.loads(Path(f"{row['output_uri']}.json").read_text())["gate"]
    assert told["similarity"] == row["gate_similarity"]
    assert told["restored_again"] is False


def test_a_second_attempt_has_another_seed_and_says_so(source: Path, make_job: MakeJob, guards: Guards) -> None:
    job, engine = make_job(source), _Faulty({0}, hopeless=False)
    row = restored(job, engine, guards)
    first = item_seed(job.settings, row["source_sha256"])
    assert engine.seeds == [second_seed(first)]
    assert (row["status"], row["restored_again"], row["seed"]) == ("done", True, second_seed(first))
    assert f"restored again with seed {second_seed(first)} instead of {first}" in row["notes"]
    assert json.loads(Path(f"{row['output_uri']}.json").read_text())["seed"] == second_seed(first)


def test_an_image_that_fails_twice_has_no_output_but_scores(source: Path, make_job: MakeJob, guards: Guards) -> None:
    row = restored(make_job(source), _Faulty({0}, hopeless=True), guards)
    assert (row["status"], row["failure_kind"], row["restored_again"]) == ("failed", "gate", True)
    assert "dead area" in row["failure_message"]
    assert "above gate.dead" in row["failure_message"]
    assert row["gate_dead"] > 0.9
    assert not list(source.parent.glob("out/*.png*"))


def test_a_second_attempt_that_breaks_fails_its_own_tile_only(source: Path, make_job: MakeJob, guards: Guards) -> None:
    class _Breaking(_Faulty):
        def restore_again(self, ticket: TileTicket, tile: FloatImage) -> FloatImage | None:
            raise MemoryError

    job = make_job(source, max_pixels=160 * 160)
    stage = RestoreStage(guards, None, "cpu")
    stage._loaded = _Breaking({1}, hopeless=False)
    tiles = list(decode(job, 16))
    result = stage({"ticket": [pickle.dumps(tile.ticket) for tile in tiles], "pixels": [tile.pixels for tile in tiles]})
    failures = [pickle.loads(ticket).failure for ticket in result["ticket"]]
    assert [failure and failure.kind for failure in failures] == [None, "out-of-memory", None]


def test_of_a_cut_image_only_the_bad_tile_is_tried_again(source: Path, make_job: MakeJob, guards: Guards) -> None:
    job, engine = make_job(source, max_pixels=160 * 160), _Faulty({1}, hopeless=False)
    row = restored(job, engine, guards)
    first = item_seed(job.settings, row["source_sha256"])
    assert (row["status"], row["tiles"], row["seed"], engine.seeds) == ("done", 3, first, [second_seed(first)])
    assert "tiles 2 of 3" in row["notes"]
    assert 0 <= row["gate_seam"] < 1e-6


@pytest.mark.parametrize("cut", [{}, {"max_pixels": 160 * 160}])
def test_an_output_found_again_is_logged_with_the_seed_and_scores_of_its_record(
    source: Path, make_job: MakeJob, cut: dict[str, int], guards: Guards
) -> None:
    job = make_job(source, **cut)
    first = restored(job, _Faulty({0, 1, 2}, hopeless=False), guards)
    again = restored(job, _Faulty(set(), hopeless=False), guards)
    assert (again["recovered"], first["recovered"]) == (True, False)
    assert again["seed"] == second_seed(item_seed(job.settings, first["source_sha256"]))
    for column in ("seed", "restored_again", "gate_finite", *(f"gate_{key}" for key in _SCORES)):
        assert again[column] == first[column], column


def test_a_late_tile_is_logged_with_the_seed_of_the_image(source: Path, make_job: MakeJob, guards: Guards) -> None:
    job, stage = make_job(source, max_pixels=160 * 160), RestoreStage(guards, None, "cpu")
    stage._loaded = _Faulty({1}, hopeless=False)
    late = list(decode(job, 16))[1]
    row = restored(job, _Faulty({1}, hopeless=False), guards)
    batch = {"ticket": [pickle.dumps(late.ticket)], "pixels": [late.pixels], "carried": [late.carried]}
    (again,) = write_stage(stage(batch), guards).to_pylist()
    assert (again["seed"], again["restored_again"]) == (row["seed"], True)
    assert again["seed"] == item_seed(job.settings, row["source_sha256"])
    assert again["gate_similarity"] == row["gate_similarity"]


def test_tiles_that_do_not_fit_together_are_refused(source: Path, make_job: MakeJob, guards: Guards) -> None:
    class _Uneven(_Faulty):
        def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
            sign = [1 if ticket.box is not None and ticket.box.index % 2 else -1 for ticket in tickets]
            return [np.clip(tile + 0.04 * s, 0, 1) for s, tile in zip(sign, tiles, strict=True)]

    job = make_job(source, max_pixels=160 * 160, gate_seam=0.01)
    row = restored(job, _Uneven(set(), hopeless=False), guards)
    assert (row["status"], row["failure_kind"]) == ("failed", "gate")
    assert "seam score 0.0" in row["failure_message"]
    assert not list((source.parent / "out").rglob("*.np?")), "parts of a refused image are removed"
