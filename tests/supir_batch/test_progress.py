from __future__ import annotations

import time
from typing import Any

import pytest

from supir_batch import progress
from supir_batch.progress import BarProgress, LineProgress, Tally, duration


def row(status: str = "done", recovered: bool = False) -> dict[str, Any]:
    return {
        "status": status,
        "recovered": recovered,
        "output_width": 2000,
        "output_height": 1000,
        "failure_message": "list.csv:2: is cut off" if status == "failed" else None,
    }


def test_tally(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tally = Tally(6)
    for one in (row(), row(), row(recovered=True), row("failed")):
        tally.add(one)
    now[0] = 110.0
    assert tally.line() == "4/6 images, 0.40 megapixels/s, 1 failed, about 5 s left"


def test_a_failure_without_a_size_counts() -> None:
    tally = Tally(1)
    tally.add(row("failed") | {"output_width": None, "output_height": None})
    assert tally.line() == "1/1 images, 0.00 megapixels/s, 1 failed"


def test_lines_appear_while_nothing_finishes_and_failures_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with LineProgress(2, seconds=0.02) as display:
        display.update(row("failed"))
        assert capsys.readouterr().err.startswith("failed: list.csv:2: is cut off\n")
        deadline = time.monotonic() + 5
        while "1/2 images" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    captured = capsys.readouterr()
    assert captured.out == ""


def test_the_bar_writes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with BarProgress(2) as display:
        display.update(row())
        display.update(row("failed"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "failed: list.csv:2: is cut off" in captured.err
    assert "2/2" in captured.err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
