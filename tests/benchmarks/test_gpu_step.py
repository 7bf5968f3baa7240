from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conftest import Run


def test_every_batch_has_its_time_and_rate(run: Run, tmp_path: Path) -> None:
    profile = tmp_path / "step.txt"
    measured, printed, code = run("gpu_step", "--batches", "1", "2", "--seconds", "0.05", "--profile", str(profile))
    assert code == 0
    assert [row["batch"] for row in measured["batches"]] == [1, 2]
    for row in measured["batches"]:
        assert row["TFLOP/s"] == pytest.approx(row["TFLOP"] / row["ms"] * 1e3, rel=0.02)
        assert row["share"] == pytest.approx(row["TFLOP/s"] / measured["matmul_tflops"], rel=0.02)
    assert "not judged here" in printed
    assert "held" not in printed
    assert measured["machine"]["command"].startswith("python benchmarks/gpu_step.py --width reduced")
    assert "aten::addmm" in profile.read_text()
    assert measured["machine"]["torch"] in profile.read_text()
