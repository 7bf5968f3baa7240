"""Jobs and a pipeline of two stages (decode, write) for tests of what happens to one image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from supir_batch.decode import decode
from supir_batch.settings import settings_hash
from supir_batch.types import FloatImage, Job, Outcome, Settings, Source
from supir_batch.write import write

NOTICE = "AI-assisted reconstruction; details may not be in the original"

PLAIN = Settings(
    engine="lanczos",
    engine_name="Lanczos",
    model_sha256="",
    weights="",
    precision="",
    preset="fidelity",
    sampler="",
    steps=0,
    cfg_start=1.0,
    cfg_end=1.0,
    control_scale=1.0,
    restoration_tau=None,
    churn=0.0,
    eta=0.0,
    noise=1.0,
    color_fix="none",
    upscale=1.0,
    min_size=0,
    window=128,
    stride=96,
    max_pixels=2**24,
    overlap=32,
    geometry="pad",
    vae_tiling="off",
    vae_tile=0,
    caption_mode="none",
    prompt="",
    prompt_source="none",
    positive_prompt="",
    negative_prompt="",
    captioner="",
    captioner_identity="",
    caption_question="",
    caption_template="",
    caption_max_new_tokens=0,
    caption_temperature=0.0,
    caption_top_p=0.0,
    caption_precision="",
    caption_quantization="",
    material="photograph",
    run_seed=0,
    seed=None,
    format="source",
    bit_depth=None,
    notice=NOTICE,
    operator=None,
    organization=None,
    accepted_license=None,
)

MakeJob = Callable[..., Job]
Restore = Callable[..., Outcome]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """A job for a file; keywords replace settings, ``sha256`` is the source's."""

    def make(path: Path, *, sha256: str | None = None, folder: str = "out", **settings: object) -> Job:
        chosen = dataclasses.replace(PLAIN, **settings)
        size = path.stat().st_size if path.exists() else 0
        source = Source(path.name, str(path), "list.csv:2", path.name, "v1", size, sha256=sha256)
        output = tmp_path / folder
        return Job(source, chosen, settings_hash(chosen), str(output / path.stem), str(output / "_parts"))

    return make


@pytest.fixture
def restore(make_job: MakeJob) -> Restore:
    """Decode, ``change`` the pixels of each tile, write; returns the image's outcome."""

    def run(
        path: Path, *, change: Callable[[FloatImage], FloatImage] = np.copy, prompt: str = "", **options: object
    ) -> Outcome:
        last: Outcome | None = None
        for tile in decode(make_job(path, **options), 16):
            ticket = dataclasses.replace(tile.ticket, prompt=prompt)
            last = write(ticket, change(tile.pixels) if ticket.has_work else tile.pixels, tile.alpha) or last
        assert last is not None, "no tile brought the image to its end"
        return last

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
