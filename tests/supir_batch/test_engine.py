from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from supir_batch.engine import (
    LanczosEngine,
    SupirEngine,
    alignment,
    full_prompt,
    load_engine,
    sampling_of,
)
from supir_batch.model_folder import model_sha256
from supir_batch.types import FloatImage, Job, ModelRef, TileBox, TileTicket
from supir_model.config import TINY
from supir_model.sampler import DPMPP2MSettings

MakeJob = Callable[..., Job]

SUPIR = {
    "engine": "supir",
    "weights": "tiny",
    "sampler": "edm",
    "steps": 2,
    "window": 16,
    "stride": 8,
    "color_fix": "wavelet",
    "prompt": None,
}


@pytest.fixture(scope="module")
def engine() -> SupirEngine:
    return SupirEngine(ModelRef("tiny", TINY), "cpu")


def tile(seed: int, height: int = 24, width: int = 32) -> FloatImage:
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def ticket(make_job: MakeJob, tmp_path: Path, seed: int = 0, **settings: object) -> TileTicket:
    job = make_job(tmp_path / "a.png", **(SUPIR | settings))
    return TileTicket(job, box=TileBox(0, 1, 0, 0, 32, 24), seed=seed, prompt="a photograph")


def test_the_model_of_a_job_chooses_the_engine(make_job: MakeJob, tmp_path: Path) -> None:
    plain = make_job(tmp_path / "a.png").model
    assert isinstance(load_engine(plain, "cpu"), LanczosEngine)
    assert alignment(plain) == 1
    assert alignment(ModelRef("tiny", TINY)) == TINY.alignment


def test_lanczos_returns_what_the_decoder_resampled(make_job: MakeJob, tmp_path: Path) -> None:
    pixels = tile(1)
    (returned,) = LanczosEngine().restore([ticket(make_job, tmp_path)], [pixels])
    assert np.array_equal(returned, pixels)


def test_supir_keeps_shape_range_and_order(engine: SupirEngine, make_job: MakeJob, tmp_path: Path) -> None:
    tickets = [ticket(make_job, tmp_path, seed=i, steps=2 + i % 2) for i in range(3)]  # two settings in one call
    tiles = [tile(i) for i in range(3)]
    together = engine.restore(tickets, tiles)
    for one, pixels, restored in zip(tickets, tiles, together, strict=True):
        assert restored.shape == pixels.shape
        assert restored.dtype == np.float32
        assert 0 <= restored.min() <= restored.max() <= 1
        assert np.array_equal(engine.restore([one], [pixels])[0], restored)


def test_every_sampling_setting_reaches_the_model(make_job: MakeJob, tmp_path: Path) -> None:
    base = make_job(tmp_path / "a.png", **SUPIR).settings
    changes: dict[str, object] = {
        "steps": 3,
        "cfg_start": 9.0,
        "cfg_end": 9.0,
        "control_scale": 0.5,
        "restoration_tau": 2.0,
        "restoration_to_end": True,
        "churn": 5.0,
        "noise": 0.9,
        "color_fix": "adain",
        "window": 24,
        "stride": 16,
    }
    for name, value in changes.items():
        changed = dataclasses.replace(base, **{name: value})
        assert sampling_of(changed) != sampling_of(base), name
    few_steps = dataclasses.replace(base, sampler="dpmpp_2m_sde", eta=1.0)
    assert isinstance(sampling_of(few_steps).sampler, DPMPP2MSettings)
    for name, value in {**changes, "eta": 0.5}.items():
        if name != "churn":
            assert sampling_of(dataclasses.replace(few_steps, **{name: value})) != sampling_of(few_steps), name


def test_the_few_step_sampler_restores(engine: SupirEngine, make_job: MakeJob, tmp_path: Path) -> None:
    edm, dpm = (
        engine.restore([ticket(make_job, tmp_path, sampler=sampler, eta=1.0)], [tile(0)])[0]
        for sampler in ("edm", "dpmpp_2m_sde")
    )
    assert np.isfinite(dpm).all()
    assert not np.array_equal(edm, dpm)


def test_half_precision_is_the_models_not_the_tiles(make_job: MakeJob, tmp_path: Path) -> None:
    half = SupirEngine(ModelRef("tiny", TINY, "bfloat16"), "cpu")
    full = SupirEngine(ModelRef("tiny", TINY, "float32"), "cpu")
    one = [ticket(make_job, tmp_path)]
    (rounded,), (exact,) = half.restore(one, [tile(0)]), full.restore(one, [tile(0)])
    assert rounded.dtype == np.float32
    assert not np.array_equal(rounded, exact)
    assert np.abs(rounded - exact).mean() < 0.02


def test_prompt_is_caption_and_suffix_without_a_separator(make_job: MakeJob, tmp_path: Path) -> None:
    settings = make_job(tmp_path / "a.png", positive_prompt=", sharp").settings
    assert full_prompt(settings, "a boat") == "a boat, sharp"


def test_the_model_hash_is_the_files(tmp_path: Path) -> None:
    digest = model_sha256("tiny")
    assert len(digest) == 64
    assert digest == model_sha256("tiny")
