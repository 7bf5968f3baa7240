"""Outputs to report on, and the browser that looks at the report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from supir_batch import audit, runlog
from supir_batch.report.build import build_report
from supir_batch.types import AuditScores, GateScores, Outcome
from tests.runs import photograph

Restore = Callable[..., Outcome]

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028'\"`${1}"

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's Chromium, without a window.

    Closed behind each file: while it is open an event loop runs, and a test elsewhere could not run its own.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed, so nobody has looked at the report; install Debian's chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console says; a test that means to cause some clears it."""
    return []


@pytest.fixture
def page(chromium: Browser, complaints: list[str]) -> Iterator[Page]:
    """A window of 1280 x 900; what the page complains about fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", accept_downloads=True)
    page = context.new_page()
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def log(tmp_path: Path) -> Callable[[Sequence[Outcome]], Path]:
    """Write a run log of outcomes; returns the output folder."""

    def write(outcomes: Sequence[Outcome]) -> Path:
        with runlog.RunLog(str(tmp_path / "out"), "20260101T000000Z-000001") as opened:
            for outcome in outcomes:
                opened.append(runlog.to_row(outcome, "20260101T000000Z-000001"))
        return tmp_path / "out"

    return write


@pytest.fixture
def output(tmp_path: Path, restore: Restore, log: Callable[[Sequence[Outcome]], Path]) -> Path:
    """Four restored images and a failure: one with a hostile name and prompt, one of a giant that is shown in tiles."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        photograph(tmp_path / name, 120 + 40 * number, 90, seed=number)
    photograph(tmp_path / "wide.jpg", 20_000, 40, seed=9)
    hostile = tmp_path / "<script>alert(3)<&.png"
    photograph(hostile, 60, 80, seed=5)
    (tmp_path / "bad.jpg").write_text("<img src=x>")
    outcomes = [restore(tmp_path / name, upscale=2.0) for name in ("a.png", "b.png")]
    outcomes.append(restore(tmp_path / "c.png", change=lambda pixels: (pixels * 0.99).astype(np.float32)))
    outcomes.append(restore(tmp_path / "wide.jpg"))
    odd = restore(hostile)
    outcomes.append(dataclasses.replace(odd, ticket=dataclasses.replace(odd.ticket, prompt=HOSTILE, caption=HOSTILE)))
    scored = [_scored(outcome, number) for number, outcome in enumerate(outcomes)]
    return log([*scored, restore(tmp_path / "bad.jpg")])


def _scored(outcome: Outcome, number: int) -> Outcome:
    """As if gate and audit had measured it."""
    scores = GateScores(area=1, finite=True, color_drift=0.3 + number / 7, similarity=0.99 - number / 50, dead=0.0)
    fidelity = AuditScores(
        psnr=30, ssim=0.9, delta_e=1, delta_e_90=2, sharpness=2, invention=0.1, invented=0.02, spread=None, regions=None
    )
    ticket = dataclasses.replace(outcome.ticket, scores=scores, audit=fidelity, again=number == 2)
    return dataclasses.replace(outcome, ticket=ticket)


@pytest.fixture
def index(output: Path) -> Path:
    """The built report of ``output``, with stripes to lay over ``a.png``."""
    lay_over(output)
    build_report(str(output))
    return output / "report" / "index.html"


def lay_over(output: Path) -> None:
    """As if the audit had drawn stripes as the map of ``a.png``."""
    path = Path(audit.picture_uri(str(output), "a.png", "invention"))
    path.parent.mkdir()
    stripes = np.zeros((90, 120, 4), np.uint8)
    stripes[:, ::8] = (255, 0, 255, 255)
    Image.fromarray(stripes).save(path)


def handed_over(script: Path) -> Any:
    """What a data file hands to the page."""
    text = script.read_text(encoding="ascii").strip()
    assert "<" not in text
    assert text.startswith("supirReport(")
    _, _, data = text.removeprefix("supirReport(").removesuffix(");").partition(",")
    return json.loads(data)


def size_of(picture: Path) -> tuple[int, int]:
    image = pyvips.Image.new_from_file(str(picture))
    return image.width, image.height
