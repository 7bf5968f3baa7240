from __future__ import annotations

import dataclasses
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from supir_batch import runlog
from supir_batch.report.build import build_report
from supir_batch.types import Outcome

Restore = Callable[..., Outcome]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def output(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> Path:
    """An output folder with a log of one image (with a hostile prompt and name) and one failure."""
    path = tmp_path / "<script>alert(1)<&.png"
    Image.fromarray(rng.integers(0, 256, (30, 40, 4), np.uint8)).save(path)
    (tmp_path / "bad.jpg").write_text("<img src=x>")
    good, bad = restore(path, upscale=2.0), restore(tmp_path / "bad.jpg")
    good = dataclasses.replace(good, ticket=dataclasses.replace(good.ticket, prompt="<b>bold</b> & more"))
    with runlog.RunLog(str(tmp_path / "out"), "run1") as log:
        for outcome in (good, bad):
            log.append(runlog.to_row(outcome, "run1"))
    return tmp_path / "out"


def test_a_self_contained_page_with_pictures_settings_and_failures(output: Path) -> None:
    index = Path(build_report(str(output)))
    assert index == output / "report" / "index.html"
    page = _Page(index.read_text())
    assert len(page.links) == 2
    for link in page.links:
        assert "//" not in link
        with Image.open(index.parent / link) as picture:
            assert picture.size == (80, 60)
    assert page.tags.count("input") == 1
    assert "not-an-image" in page.text
    assert "max pixels" in page.text


def test_text_of_strangers_is_escaped(output: Path) -> None:
    page = _Page(Path(build_report(str(output))).read_text())
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert "<b>bold</b> & more" in page.text
    assert "<script>alert(1)<&.png" in page.text


def test_an_image_that_is_gone_is_listed_without_pictures(output: Path) -> None:
    next(output.glob("*.png")).unlink()
    page = _Page(Path(build_report(str(output))).read_text())
    assert "img" not in page.tags
    assert "No pictures" in page.text


def test_an_output_without_a_run(tmp_path: Path) -> None:
    page = _Page(Path(build_report(str(tmp_path / "empty"))).read_text())
    assert "0 images restored" in page.text
