from __future__ import annotations

import pytest

from tests.benchmarks.conftest import Run


@pytest.mark.parametrize("weights", [pytest.param("tiny", marks=pytest.mark.slow), "random"])
def test_what_changes_errs_and_what_is_left_out_is_not_computed(run: Run, weights: str) -> None:
    measured, printed, code = run("approximations", "--weights", weights, "--images", "1", "--steps", "4")
    assert code == 0
    rows = {row["changed"]: row for row in measured["rows"]}
    for precision in ("bfloat16", "float8"):
        assert 0 < rows[precision]["error"] < 0.05
        assert rows[precision]["work"] == 1
    assert rows["guidance from 0 to 5"]["error"] > 0
    assert rows["guidance from 0 to 5"]["work"] < 1
    assert "not judged here" in printed
