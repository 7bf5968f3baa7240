"""Decode, the SUPIR engine with the shipped weights, write: in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from supir_batch.decode import decode
from supir_batch.engine import SupirEngine, alignment, sampling_of
from supir_batch.types import FloatImage, Job, ModelRef, Outcome
from supir_batch.write import write
from supir_model.config import TINY
from supir_model.vae_tiling import WHOLE, VAETiling

MakeJob = Callable[..., Job]
TINY_MODEL = ModelRef("tiny", TINY)
SUPIR = {"engine": "supir", "weights": "tiny", "steps": 2, "color_fix": "wavelet", "prompt": "a wall"}


@pytest.fixture(scope="module")
def engine() -> SupirEngine:
    return SupirEngine(TINY_MODEL, "cpu")


def restore(engine: SupirEngine, job: Job) -> tuple[FloatImage, FloatImage, Outcome]:
    """What the engine was given, what it gave, and how it ended."""
    (tile,) = decode(job, alignment(TINY_MODEL))
    assert tile.ticket.failure is None
    ticket = dataclasses.replace(tile.ticket, prompt="a wall")
    (restored,) = engine.restore([ticket], [tile.pixels])
    outcome = write(ticket, restored, tile.carried)
    assert outcome is not None
    assert outcome.status == "done", outcome.ticket.failure
    return tile.pixels, restored, outcome


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((150, 100), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_geometry_released_end_to_end(engine: SupirEngine, path: Path, make_job: MakeJob) -> None:
    given, restored, outcome = restore(engine, make_job(path, geometry="released", upscale=1.1, **SUPIR))
    # 165 x 110 is the output, 192 x 128 what the model sees
    assert given.shape == restored.shape == (128, 192, 3)
    tensor = torch.from_numpy(restored).permute(2, 0, 1)[None]
    wanted = F.interpolate(tensor, size=(110, 165), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    with Image.open(outcome.output_uri) as image:
        written = np.asarray(image).astype(int)
    assert written.shape == (110, 165, 3)
    assert np.abs(written - (wanted * 255).clip(0, 255).to(torch.uint8).numpy()).max() <= 1


def test_tiling_the_vae_exactly_moves_no_level_by_more_than_one(
    engine: SupirEngine, path: Path, make_job: MakeJob
) -> None:
    _, whole, _ = restore(engine, make_job(path, folder="whole", **SUPIR))
    _, tiled, _ = restore(engine, make_job(path, folder="tiled", vae_tiling="exact", vae_tile=64, **SUPIR))
    assert whole.shape == (100, 150, 3)
    np.testing.assert_allclose(tiled, whole, atol=1e-3)


def test_geometry_and_vae_tiling_reach_the_model(path: Path, make_job: MakeJob) -> None:
    plain = sampling_of(make_job(path, **SUPIR).settings)
    assert (plain.vae_tiling, plain.clip) == (WHOLE, True)
    other = make_job(path, vae_tiling="released", vae_tile=256, geometry="released", **SUPIR).settings
    assert (sampling_of(other).vae_tiling, sampling_of(other).clip) == (VAETiling("released", 256), False)
