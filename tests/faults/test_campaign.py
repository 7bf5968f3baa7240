"""A short campaign of kills; the long one is ``python -m tests.faults.campaign --kills 200``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import campaign


@pytest.mark.slow
def test_whatever_is_killed_every_image_is_committed_once_and_logged(tmp_path: Path) -> None:
    figures = campaign(tmp_path, kills=2, seed=20260131)
    assert figures.wrong == []
    assert sum(figures.kills.values()) == 2
