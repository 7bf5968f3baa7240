"""The list of hashes in an output: read by sha256sum, true to the log, whole or absent."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from supir_batch import checksums, driver, pipeline, runlog
from supir_batch.errors import ManifestError
from supir_batch.events import Talk
from supir_batch.plan import Plan, RefusedJob, Todo
from supir_batch.runlog import RunLog
from supir_batch.settings import Manifest
from supir_batch.types import Failure, Job, Outcome
from supir_batch.verify import verify

Restore = Callable[..., Outcome]
NAMES = ["b.jpg", "a.png", "odd \\ name\n.png", "é.tif"]


@pytest.fixture
def output(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> Path:
    """Four restored images with their log."""
    with RunLog(str(tmp_path / "out"), "run") as log:
        for name in NAMES:
            Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / name)
            outcome = restore(tmp_path / name, sidecars=("json", "premis"))
            assert outcome.status == "done", outcome.ticket.failure
            log.append(runlog.to_row(outcome, "run"))
    return tmp_path / "out"


def sha256sum(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sha256sum", "--check", "--strict", "--quiet", checksums.FILE_NAME]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_coreutils_reads_it_and_finds_a_changed_file(output: Path) -> None:
    checksums.renew(str(output))
    lines = (output / checksums.FILE_NAME).read_text().splitlines()
    assert len(lines) == 3 * len(NAMES)
    assert lines[0] == f"{hashlib.sha256((output / 'a.png').read_bytes()).hexdigest()}  a.png"
    assert [line.split("  ")[1] for line in lines[:6]] == [
        *("a.png", "a.png.json", "a.png.premis.xml"),
        *("b.jpg", "b.jpg.json", "b.jpg.premis.xml"),
    ]
    assert sha256sum(output).returncode == 0, sha256sum(output).stderr
    (output / "b.jpg.premis.xml").write_text("<premis/>")
    assert "b.jpg.premis.xml: FAILED" in sha256sum(output).stdout


@given(st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1))
def test_a_line_stays_one_line(name: str) -> None:
    line = checksums.line("ab" * 32, name)
    assert line.count("\n") == 1
    assert "\r" not in line
    escaped = line[1:] if line.startswith("\\") else line
    back = escaped.removesuffix("\n").partition("  ")[2]
    if line.startswith("\\"):
        back = back.replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r").replace("\0", "\\")
    assert back == name


def test_it_vouches_only_for_what_the_log_says(output: Path) -> None:
    (output / "a.png").write_bytes(b"another")
    checksums.renew(str(output))
    assert "a.png: FAILED" in sha256sum(output).stdout


def test_it_is_written_once_and_again_only_if_it_differs(output: Path) -> None:
    checksums.renew(str(output))
    path = output / checksums.FILE_NAME
    stamp, good = path.stat().st_mtime_ns, path.read_bytes()
    checksums.renew(str(output))
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(b"".join(good.splitlines(keepends=True)[:-1]))
    assert [problem.kind for checked in verify(str(output)) for problem in checked.problems] == ["changed"]
    checksums.renew(str(output))
    assert path.read_bytes() == good
    assert [problem for checked in verify(str(output)) for problem in checked.problems] == []


def test_where_nothing_was_done_there_is_none(tmp_path: Path) -> None:
    checksums.renew(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "foreign", [b"", b"no list\n", b"\xff\xfe", f"{'ab' * 32}  a.png\n{'ab' * 32}  mine.txt\n".encode()]
)
@pytest.mark.parametrize("logged", [True, False])
def test_a_list_that_no_run_wrote_is_left_alone(
    tmp_path: Path, output: Path, make_job: Callable[..., Job], foreign: bytes, logged: bool
) -> None:
    if not logged:
        shutil.rmtree(output / "_runs")
    (output / checksums.FILE_NAME).write_bytes(foreign)
    manifest = Manifest.model_validate({"inputs": [str(tmp_path)], "output": {"uri": str(output)}})
    (tmp_path / "m.yaml").write_text("inputs: x")
    before = sorted(output.rglob("*"))
    refused = RefusedJob(make_job(tmp_path / "a.png"), Failure("plan", "x", "x"))
    for plan in (Plan(str(output), (), (), (), {}), Plan(str(output), (), (), (refused,), {})):
        with pytest.raises(ManifestError, match=r"checksum\.sha256: is not a list that a run wrote.*move it away"):
            driver.execute(manifest, str(tmp_path / "m.yaml"), plan, driver.Limits(), Talk())
    assert (output / checksums.FILE_NAME).read_bytes() == foreign
    assert sorted(output.rglob("*")) == before


def test_a_list_of_outputs_that_were_superseded_since_is_ours(output: Path, tmp_path: Path, restore: Restore) -> None:
    checksums.renew(str(output))
    with RunLog(str(output), "second") as log:
        log.append(runlog.to_row(restore(tmp_path / "a.png", format="webp"), "second"))
    checksums.refuse_foreign(str(output))
    checksums.renew(str(output))
    listed = (output / checksums.FILE_NAME).read_text()
    assert "  a.webp\n" in listed
    assert "  a.png\n" not in listed
    assert sha256sum(output).returncode == 0


OnRow = Callable[[dict[str, Any]], None]


def test_of_two_rows_of_one_image_the_later_is_true_and_one_counts(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    outcome = restore(tmp_path / "a.png")
    row = runlog.to_row(outcome, "run")
    early = row | {"record_sha256": "0" * 64, "finished_at": row["finished_at"] - datetime.timedelta(seconds=1)}
    written = pa.Table.from_pylist([row, early, row], schema=runlog.SCHEMA)

    def stream(jobs: list[Any], runtime: Any, listener: Any, run_id: str, stop: driver.Stop, load: Any) -> None:
        pipeline._collect([written], SimpleNamespace(retire=print), {}, listener.on_row)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "run", stream)
    (tmp_path / "m.yaml").write_text("inputs: x")
    manifest = Manifest.model_validate({"inputs": [str(tmp_path)], "output": {"uri": str(tmp_path / "out")}})
    plan = Plan(str(tmp_path / "out"), (Todo(outcome.ticket.job, "new"),), (), (), {})
    summary = driver.execute(manifest, str(tmp_path / "m.yaml"), plan, driver.Limits(), Talk())
    assert (summary.done, summary.left, summary.exit_code) == (1, 0, 0)
    assert runlog.read_log(str(tmp_path / "out")).num_rows == 3
    assert [problem for checked in verify(str(tmp_path / "out")) for problem in checked.problems] == []


def test_a_run_with_nothing_to_do_brings_back_what_a_killed_one_lacks(tmp_path: Path, output: Path) -> None:
    manifest = Manifest.model_validate({"inputs": [str(tmp_path)], "output": {"uri": str(output)}})
    plan = Plan(str(output), (), (), (), {})
    assert driver.execute(manifest, "m.yaml", plan, driver.Limits(), Talk()).exit_code == 0
    assert sha256sum(output).returncode == 0
