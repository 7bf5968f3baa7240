"""Faces and text are found where they are, and nothing where nothing is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from supir_batch import regions
from supir_batch.decode import decode
from supir_batch.types import FloatImage, Job

MakeJob = Callable[..., Job]


def page(size: int, lines: int) -> FloatImage:
    """Lines of text on paper, 300 x 400 pixels."""
    image = Image.new("RGB", (400, 300), (235, 230, 210))
    draw = ImageDraw.Draw(image)
    for i in range(lines):
        draw.text((30, 40 + 2 * size * i), "the quick brown fox jumps", (40, 30, 30), ImageFont.load_default(size))
    return (np.asarray(image) / 255).astype(np.float32)


def test_a_face_is_found_in_the_pixels_of_the_source() -> None:
    photograph = (skimage.data.astronaut() / 255).astype(np.float32)
    (face,) = [one for one in regions.find(photograph, 1024, 1024) if one.kind == "face"]
    assert 300 < face.x < 420  # twice as large as what was searched
    assert 80 < face.y < 220
    assert 120 < face.width < 300


@pytest.mark.parametrize("size", [16, 24])
def test_lines_of_text_are_found_together(size: int) -> None:
    found = regions.find(page(size, 3), 400, 300)
    assert {region.kind for region in found} == {"text"}
    assert len(found) < 3  # a word may be missed between two others
    for text in found:
        assert text.x >= 25  # the first letters of a line may be missed
        assert 35 <= text.y <= 40 + size
        assert text.height > 4 * size


@pytest.mark.parametrize("pixels", [np.full((300, 400, 3), 0.5, np.float32), np.zeros((1, 1, 3), np.float32)])
def test_nothing_is_found_in_nothing(pixels: FloatImage) -> None:
    assert regions.find(pixels, pixels.shape[1], pixels.shape[0]) == ()


def test_grain_is_neither(rng: np.random.Generator) -> None:
    grain = rng.normal(0.5, 0.02, (200, 300, 1)).astype(np.float32)
    assert regions.find(np.repeat(grain, 3, axis=2), 300, 200) == ()


def test_the_decoder_looks_where_something_is_generated(tmp_path: Path, make_job: MakeJob) -> None:
    path = tmp_path / "page.png"
    Image.fromarray((page(20, 3) * 255).astype(np.uint8)).save(path)
    for samples, kinds in ((0, None), (1, ["text"])):
        job = make_job(path)
        job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, audit_samples=samples))
        (tile,) = decode(job, 8)
        assert tile.ticket.facts is not None
        found = tile.ticket.facts.regions
        assert (None if found is None else [region.kind for region in found]) == kinds
