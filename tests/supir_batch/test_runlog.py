from __future__ import annotations

import dataclasses
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from supir_batch import runlog, store
from supir_batch.errors import StoreError
from supir_batch.settings import Manifest, resolve, settings_hash
from supir_batch.types import (
    Failure,
    ImageFacts,
    Job,
    Outcome,
    Settings,
    Source,
    StageRecord,
    TileBox,
    TileTicket,
)

DOC = Path(__file__).parents[2] / "docs" / "run-log.md"


def outcome(
    output: str = "/out",
    id: str = "a.tif",
    status: str = "done",
    steps: int = 10,
    finished: str = "2026-01-02T03:04:05",
) -> Outcome:
    source = Source(id=id, uri=f"/in/{id}", origin="/in", relative=id, version="9-1", size=9)
    manifest = Manifest.model_validate({"inputs": "/in", "output": {"uri": output}, "engine": {"steps": steps}})
    settings = resolve(manifest, source, "model")
    stem = store.join(output, id.removesuffix(".tif"))
    job = Job(source, settings, settings_hash(settings), stem, output)
    facts = ImageFacts(
        sha256="5" * 64, format="tiff", width=30, height=20, bands=3, bit_depth=16, has_alpha=False, orientation=6,
        icc=b"icc", dpi=None, output_width=60, output_height=40, work_width=60, work_height=40, notes=("x", "y"),
    )  # fmt: skip
    ticket = TileTicket(
        job=job,
        facts=facts,
        box=TileBox(0, 4, 0, 0, 30, 20),
        fingerprint="f" * 64,
        seed=2**62,
        caption="a boat",
        prompt="a boat, sharp",
        failure=Failure("write", "disk", "a.tif: no space", True) if status == "failed" else None,
        records=(StageRecord("restore", 2.0, 100, "cpu"), StageRecord("restore", 1.5, 300, "cpu")),
        started_at="2026-01-02T03:04:00+00:00",
    )
    if status == "failed":
        return Outcome(ticket, "failed", finished_at=finished)
    return Outcome(ticket, "done", f"{stem}.tif", "0" * 64, 123, finished)


def test_a_row_has_exactly_the_columns_and_survives_parquet(tmp_path: Path) -> None:
    row = runlog.to_row(outcome(), "run")
    assert list(row) == runlog.SCHEMA.names
    with runlog.RunLog(str(tmp_path), "run") as log:
        log.append(row)
    table = runlog.read_log(str(tmp_path))
    assert table.schema.equals(runlog.SCHEMA)
    assert table.to_pylist() == [row]
    assert row["seconds_restore"] == 3.5
    assert row["seconds_decode"] is None
    assert row["peak_memory_bytes"] == 300
    assert row["tiles"] == 4
    assert row["notes"] == "x; y"
    assert row["finished_at"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert row["version_pyvips"]


def test_every_setting_is_a_column_of_its_type() -> None:
    row = runlog.to_row(outcome(), "run")
    for field in dataclasses.fields(Settings):
        assert row[f"setting_{field.name}"] == getattr(outcome().ticket.job.settings, field.name)
    kinds = {
        name: str(runlog.SCHEMA.field(f"setting_{name}").type) for name in ("engine", "steps", "upscale", "bit_depth")
    }
    assert kinds == {"engine": "string", "steps": "int64", "upscale": "double", "bit_depth": "int64"}
    assert str(runlog.SCHEMA.field("setting_restoration_tau").type) == "double"


def test_a_failure_before_the_file_was_opened() -> None:
    whole = outcome(status="failed")
    bare = TileTicket(job=whole.ticket.job, failure=whole.ticket.failure)
    row = runlog.to_row(Outcome(bare, "failed"), "run")
    assert (row["failure_stage"], row["failure_kind"], row["failure_retryable"]) == ("write", "disk", True)
    assert row["source_sha256"] is row["fingerprint"] is row["seed"] is row["output_uri"] is row["finished_at"] is None


def test_the_document_lists_every_column_with_its_type() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", DOC.read_text(), re.MULTILINE))
    types = {"timestamp[us, tz=UTC]": "timestamp (UTC)"}
    assert rows == {field.name: types.get(str(field.type), str(field.type)) for field in runlog.SCHEMA}
    assert f"`schema_version` is `{runlog.SCHEMA_VERSION}`" in DOC.read_text()


def test_the_documented_call_reads_all_runs(tmp_path: Path) -> None:
    for run in ("r1", "r2"):
        with runlog.RunLog(str(tmp_path), run) as log:
            log.append(runlog.to_row(outcome(), run))
        store.write_atomic(str(tmp_path / "_runs" / run / "manifest.yaml"), b"inputs: x\n")
    table = pyarrow.dataset.dataset(tmp_path / "_runs", format="parquet", exclude_invalid_files=True).to_table()
    assert table.num_rows == 2


def test_parts_are_written_by_rows_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    log = runlog.RunLog(str(tmp_path), "run", part_rows=3, part_seconds=10)

    def parts() -> int:
        return len(list(tmp_path.glob("_runs/run/part-*.parquet")))

    row = runlog.to_row(outcome(), "run")
    log.append(row)
    log.append(row)
    assert parts() == 0
    log.append(row)
    assert parts() == 1
    now[0] = 11
    log.append(row)
    assert parts() == 2
    log.close()
    assert parts() == 2
    assert runlog.read_log(str(tmp_path)).num_rows == 4


def test_a_failed_flush_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = runlog.RunLog(str(tmp_path), "run")
    log.append(runlog.to_row(outcome(), "run"))
    write = store.write_atomic

    def fail(uri: str, data: bytes | Path) -> None:
        write(uri, data)
        raise KeyboardInterrupt  # after the rename, before the log knows

    monkeypatch.setattr(store, "write_atomic", fail)
    with pytest.raises(KeyboardInterrupt):
        log.flush()
    monkeypatch.undo()
    log.close()
    assert runlog.read_log(str(tmp_path)).num_rows == 1


def test_a_row_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing or unknown: \['extra'\]"):
        runlog.RunLog(str(tmp_path), "run").append(runlog.to_row(outcome(), "run") | {"extra": 1})


def test_no_log_is_an_empty_table(tmp_path: Path) -> None:
    assert runlog.read_log(str(tmp_path / "nowhere")).num_rows == 0


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    store.write_atomic(str(tmp_path / "_runs" / "r" / "part-00000.parquet"), b"PAR1 broken")
    with pytest.raises(StoreError, match="part-00000"):
        runlog.read_log(str(tmp_path))


def test_a_newer_schema_is_refused_and_an_older_one_filled(tmp_path: Path) -> None:
    folder = tmp_path / "_runs" / "r"
    folder.mkdir(parents=True)
    old = pa.Table.from_pylist([runlog.to_row(outcome(), "r")], schema=runlog.SCHEMA).drop_columns(["device"])
    pq.write_table(old, folder / "part-00000.parquet")
    assert runlog.read_log(str(tmp_path)).to_pylist()[0]["device"] is None
    pq.write_table(old.replace_schema_metadata({"schema_version": "99"}), folder / "part-00001.parquet")
    with pytest.raises(StoreError, match="has run-log schema 99"):
        runlog.read_log(str(tmp_path))


def test_a_remote_log() -> None:
    output = f"memory://{uuid.uuid4().hex}"
    with runlog.RunLog(output, "run") as log:
        log.append(runlog.to_row(outcome(output), "run"))
    assert runlog.read_log(output).column("id").to_pylist() == ["a.tif"]


def table_of(*outcomes: Outcome) -> pa.Table:
    rows = [runlog.to_row(one, "run") for one in outcomes]
    return pa.Table.from_pylist(rows, schema=runlog.SCHEMA)


def test_done_index() -> None:
    first = outcome()
    index = runlog.done_index(table_of(first, outcome(id="b.tif", status="failed")))
    source, job = first.ticket.job.source, first.ticket.job
    key = runlog.DoneKey("a.tif", source.uri, "9-1", job.settings_sha256)
    assert index == {key: runlog.Done("/out/a.tif", "0" * 64, "f" * 64)}


def test_an_output_written_over_is_not_done() -> None:
    ten, twenty = outcome(steps=10), outcome(steps=20)
    index = runlog.done_index(table_of(ten, twenty))
    assert [key.settings_sha256 for key in index] == [twenty.ticket.job.settings_sha256]


def _at(second: int, id: str = "a.tif", path: str | None = "a.tif") -> dict[str, Any]:
    row = runlog.to_row(outcome(id=id, finished=f"2026-01-02T00:00:0{second}"), "run")
    return row | {"output_path": path, "output_sha256": str(second)}


def test_only_the_newest_output_of_an_image_must_be_there() -> None:
    rows = [
        _at(1),
        _at(2, path="a.png"),
        _at(3, path=None),
        _at(1, "b", "b.tif"),
        _at(2, "c", "b.tif"),
        _at(1, "d", "d"),
    ]
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["finished_at"])), schema=runlog.SCHEMA)
    newest = runlog.newest_done(table, ["output_sha256", "output_path"])
    assert {path: (row["id"], row["output_sha256"]) for path, row in newest.items()} == {
        "a.png": ("a.tif", "2"),
        "b.tif": ("c", "2"),
        "d": ("d", "1"),
    }
    assert set(newest["d"]) == {"status", "id", "output_path", "output_sha256"}
    assert runlog.output_paths(table) == {"a.tif", "a.png", "b.tif", "d"}


def test_the_newest_attempt_counts(tmp_path: Path) -> None:
    with runlog.RunLog(str(tmp_path), "r1") as log:
        log.append(runlog.to_row(outcome(status="failed", finished="2026-01-02T00:00:02"), "r1"))
    with runlog.RunLog(str(tmp_path), "r0") as log:
        log.append(runlog.to_row(outcome(finished="2026-01-02T00:00:01"), "r0"))
    assert runlog.last_attempts(runlog.read_log(str(tmp_path)))["a.tif"]["status"] == "failed"


def test_run_ids_sort_and_differ() -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", runlog.new_run_id())
    assert runlog.new_run_id() != runlog.new_run_id()
