"""Jobs and a pipeline of two stages (decode, write) for tests of what happens to one image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from supir_batch.decode import decode
from supir_batch.identity import settings_hash
from supir_batch.isolation import Begun, Book, Guards, Item, Worker, remove_notes
from supir_batch.types import FloatImage, Job, Outcome, Settings, Sidecar, SigningKey, Source
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
    guidance_from=0.0,
    guidance_to=None,
    control_scale=1.0,
    restoration_tau=None,
    restoration_to_end=False,
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
    page=1,
    few_levels="expand",
    format="source",
    bit_depth=None,
    compression="deflate",
    tiled=False,
    pyramid=False,
    quality=None,
    gate_color_drift=5.0,
    gate_similarity=0.6,
    gate_dead=0.05,
    gate_seam=0.05,
    audit_enabled=True,
    audit_samples=0,
    notice=NOTICE,
    operator=None,
    organization=None,
    accepted_license=None,
    signed=False,
)

MakeJob = Callable[..., Job]
Restore = Callable[..., Outcome]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """A job for a file; keywords replace settings, ``sha256`` is the source's."""

    def make(
        path: Path,
        *,
        sha256: str | None = None,
        folder: str = "out",
        sidecars: tuple[Sidecar, ...] = ("json",),
        signing: SigningKey | None = None,
        **settings: object,
    ) -> Job:
        chosen = dataclasses.replace(PLAIN, **settings)
        size = path.stat().st_size if path.exists() else 0
        source = Source(path.name, str(path), "list.csv:2", path.name, "v1", size, sha256=sha256)
        output = tmp_path / folder
        stem = str(output / path.stem)
        return Job(source, chosen, settings_hash(chosen), stem, str(output), sidecars=sidecars, signing=signing)

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
            last = write(ticket, change(tile.pixels) if ticket.has_work else tile.pixels, tile.carried) or last
        assert last is not None, "no tile brought the image to its end"
        return last

    return run


class OneProcess:
    """A ledger for stages that are called in the test's own process."""

    def __init__(self) -> None:
        self.book = Book(is_lost=lambda node: False)

    def begin(self, stage: str, items: Sequence[Item]) -> Begun:
        return self.book.begin(stage, items, Worker("here", os.getpid()))

    def end(self, stage: str, items: Sequence[Item]) -> None:
        self.book.end(stage, items)


@pytest.fixture
def guards() -> Iterator[Guards]:
    """What the stages of a run are guarded with."""
    run_id = f"test-{os.getpid()}"
    yield Guards(OneProcess(), run_id, 600.0)
    remove_notes(run_id)


@pytest.fixture(params=["Adobe RGB", "Display P3", "ProPhoto"])
def wide_profile(request: pytest.FixtureRequest) -> bytes:
    """The ICC profile of a space with colors outside of sRGB, made of its white point, primaries and gamma."""
    white, primaries, gamma = {
        "Adobe RGB": ((0.3127, 0.3290), (0.64, 0.33, 1, 0.21, 0.71, 1, 0.15, 0.06, 1), 563 / 256),
        "Display P3": ((0.3127, 0.3290), (0.68, 0.32, 1, 0.265, 0.69, 1, 0.15, 0.06, 1), 2.2),
        "ProPhoto": ((0.3457, 0.3585), (0.7347, 0.2653, 1, 0.1596, 0.8404, 1, 0.0366, 0.0001, 1), 1.8),
    }[request.param]
    return bytes(imagecodecs.cms_profile("rgb", whitepoint=[*white, 1.0], primaries=list(primaries), gamma=gamma))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
