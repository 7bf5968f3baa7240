"""`supir-batch caption` with the Ray stream replaced by known captions; the whole of it is in test_captioner.py."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from supir_batch import caption_list, runlog
from supir_batch.cli import app
from supir_batch.manifest import list_sources
from supir_batch.manifest_file import load_manifest
from supir_batch.types import Failure, Job, Outcome, TileTicket

OnRow = Callable[[dict[str, Any]], None]
SAID = 'two words, "quoted", größer'


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.tif", "box/b.png", "box/c.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"pixels")
    (tmp_path / "m.yaml").write_text("inputs: in\noutput: {uri: out}\n")
    monkeypatch.setattr("supir_batch.model_folder.model_sha256", lambda weights: "hash")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_captions(monkeypatch: pytest.MonkeyPatch, work: Callable[[Sequence[Job], OnRow], None]) -> None:
    module = types.ModuleType("supir_batch.pipeline")
    module.caption = lambda jobs, runtime, listener, run_id, stop: work(jobs, listener.on_row)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supir_batch.pipeline", module)
    monkeypatch.setattr("supir_batch.pipeline", module, raising=False)


def answer(job: Job) -> dict[str, Any]:
    return runlog.to_row(Outcome(TileTicket(job=job, caption=f"{SAID} {job.source.id}"), "done"), "run")


def fail(job: Job) -> dict[str, Any]:
    failure = Failure("decode", "truncated", f"{job.source.uri}: is cut")
    return runlog.to_row(Outcome(TileTicket(job=job, failure=failure), "failed"), "run")


def each(work: Callable[[Job], dict[str, Any]]) -> Callable[[Sequence[Job], OnRow], None]:
    """Answer every job, last first."""

    def all_of(jobs: Sequence[Job], on_row: OnRow) -> None:
        for job in reversed(jobs):
            on_row(work(job))

    return all_of


def caption(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["caption", *arguments])


@pytest.mark.parametrize("name", ["captions.csv", "captions.parquet"])
def test_a_list_is_an_input_as_it_stands(archive: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_captions(monkeypatch, each(answer))
    before = list_sources(load_manifest("m.yaml"), "m.yaml").sources
    result = caption("m.yaml", "--output", name)
    assert result.exit_code == 0, result.stderr
    assert f"list      {archive / name}" in result.stdout

    fed_back = load_manifest("m.yaml", {"inputs": name})
    after = list_sources(fed_back, "m.yaml").sources
    assert [(s.id, s.uri, s.relative) for s in after] == [(s.id, s.uri, s.relative) for s in before]
    assert [source.prompt for source in after] == [f"{SAID} {source.id}" for source in before]
    plan = json.loads(CliRunner().invoke(app, ["plan", "m.yaml", "--set", f"inputs={name}", "--json"]).stdout)
    assert [todo["output_stem"] for todo in plan["todo"]] == [
        str(archive / "out" / stem) for stem in ("a", "box/b", "box/c")
    ]


def test_what_a_list_said_is_passed_on_and_prompts_are_kept(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def work(jobs: Sequence[Job], on_row: OnRow) -> None:
        asked.extend(job.source.id for job in jobs)
        for job in jobs:
            on_row(answer(job))

    with_captions(monkeypatch, work)
    (archive / "list.csv").write_text(
        "uri,id,prompt,material,upscale,seed,negative_prompt\n"
        "in/box/c.jpg,third,,map,2,7,blur\n"
        "in/a.tif,first,by hand,,,,\n"
    )
    before = list_sources(load_manifest("m.yaml", {"inputs": "list.csv"}), "m.yaml").sources
    assert caption("m.yaml", "--set", "inputs=list.csv", "--output", "new.csv").exit_code == 0
    after = list_sources(load_manifest("m.yaml", {"inputs": "new.csv"}), "m.yaml").sources
    assert asked == ["third"]
    assert [source.prompt for source in after] == [f"{SAID} third", "by hand"]
    for old, new in zip(before, after, strict=True):
        for field in ("id", "uri", "relative", "material", "upscale", "seed", "negative_prompt"):
            assert getattr(new, field) == getattr(old, field), field


def test_failures_keep_their_rows_and_exit_3(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive / "in" / "empty.png").touch()
    with_captions(monkeypatch, each(lambda job: (fail if job.source.id == "a.tif" else answer)(job)))
    result = caption("m.yaml", "--json", "--output", "c.parquet")
    assert result.exit_code == 3
    data = json.loads(result.stdout)
    assert (data["captioned"], data["failed"], data["left"]) == (2, {"empty": 1, "truncated": 1}, 0)
    assert {failure["id"] for failure in data["failures"]} == {"a.tif", "empty.png"}
    assert sum(line.startswith("failed: ") for line in result.stderr.splitlines()) == 2
    rows = {row["id"]: row["prompt"] for row in pq.read_table("c.parquet").to_pylist()}
    assert rows == {"a.tif": None, "empty.png": None} | {id: f"{SAID} {id}" for id in ("box/b.png", "box/c.jpg")}


@pytest.mark.parametrize(
    ("stop", "code"),
    [(lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)], 143), (lambda: Path("gone").read_bytes(), 4)],
)
def test_what_stops_the_stream_leaves_no_list(
    archive: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], object], code: int
) -> None:
    def work(jobs: Sequence[Job], on_row: OnRow) -> None:
        on_row(answer(jobs[0]))
        stop()
        pytest.fail("not stopped")

    with_captions(monkeypatch, work)
    result = caption("m.yaml", "--output", "c.csv")
    assert result.exit_code == code
    assert "left      2" in result.stdout
    assert "next      supir-batch caption m.yaml --output c.csv" in result.stdout
    assert not (archive / "c.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "list.txt"], "must end in .csv or .parquet"),
        (["--output", "there.csv"], "exists already and may hold someone's edits"),
        (["--set", "engine.name=lanczos"], "engine 'lanczos' reads no captions"),
    ],
)
def test_refused_before_any_work(archive: Path, arguments: list[str], message: str) -> None:
    (archive / "there.csv").write_text("uri,prompt\n")
    result = caption("m.yaml", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert (archive / "there.csv").read_text() == "uri,prompt\n"


def test_a_list_of_given_prompts_needs_no_captioner(archive: Path) -> None:
    result = caption("m.yaml", "--set", "caption.mode=fixed", "--set", "caption.text=a street", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["given"] == 3
    with (archive / "captions.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prompt"] for row in rows] == ["a street"] * 3
    assert list(rows[0]) == caption_list.COLUMNS.names
