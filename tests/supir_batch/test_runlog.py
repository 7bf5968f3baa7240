from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_batch import columns, runlog, store
from supir_batch.errors import StoreError, TransientStoreError
from supir_batch.identity import settings_hash
from supir_batch.resolve import resolve
from supir_batch.settings import Manifest
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


def test_every_column_has_a_meaning() -> None:
    assert list(columns.MEANINGS) == runlog.SCHEMA.names
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
    table = table.select([*runlog.OF_OUTPUTS, "output_sha256"])
    newest = runlog.newest_done(table)
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
        log.append(runlog.to_row(outcome(id="b.tif", finished="2026-01-02T00:00:03"), "r0"))
    newest = runlog.newest(runlog.read_log(str(tmp_path)), "id").to_pylist()
    assert [(row["id"], row["status"]) for row in newest] == [("a.tif", "failed"), ("b.tif", "done")]


def test_failures_are_those_of_the_newest_attempts(tmp_path: Path) -> None:
    with runlog.RunLog(str(tmp_path), "r") as log:
        for id, status, second in [("a", "failed", 1), ("a", "done", 2), ("b", "done", 1), ("b", "failed", 2)]:
            log.append(runlog.to_row(outcome(id=id, status=status, finished=f"2026-01-02T00:00:0{second}"), "r"))
    assert runlog.failures(str(tmp_path)).to_pylist() == [
        {"id": "b", "uri": "/in/b", "failure_kind": "disk", "failure_message": "a.tif: no space"}
    ]
    assert runlog.failures(str(tmp_path), ["disk", "x"]).num_rows == 1
    assert runlog.failures(str(tmp_path), ["poison"]).num_rows == 0
    assert runlog.failures(str(tmp_path / "nowhere")).num_rows == 0


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    with runlog.RunLog(str(tmp_path), "r", part_rows=2) as log:
        for index in range(5):
            log.append(runlog.to_row(outcome(id=f"{index}.tif"), "r"))
    assert runlog.read_log(str(tmp_path), ["id", "status"]).column_names == ["id", "status"]
    pieces = list(runlog.stream_log(str(tmp_path), ["id"], rows=2))
    assert [piece.num_rows for piece in pieces] == [2, 2, 1]
    assert [id for piece in pieces for id in piece.column("id").to_pylist()] == [f"{i}.tif" for i in range(5)]


def test_a_list_vouches_for_what_was_never_read() -> None:
    whole = outcome(status="failed").ticket.job
    vouched = dataclasses.replace(whole, source=dataclasses.replace(whole.source, sha256="a" * 64, version="", size=0))
    row = runlog.to_row(Outcome(TileTicket(vouched, failure=Failure("decode", "missing", "x")), "failed"), "run")
    assert (row["source_sha256"], row["source_version"], row["source_bytes"]) == ("a" * 64, None, None)


def test_run_ids_sort_and_differ() -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", runlog.new_run_id())
    assert runlog.new_run_id() != runlog.new_run_id()


# --- fewer, larger parts -------------------------------------------------------------------------------------------


def fill(output: str, runs: int = 3, parts: int = 4) -> list[dict[str, Any]]:
    """A log of several runs, one row in a part; returns the rows."""
    rows = []
    for run in range(runs):
        with runlog.RunLog(output, f"r{run}", part_rows=1) as log:
            for part in range(parts):
                rows.append(runlog.to_row(outcome(id=f"{run}-{part}.tif"), f"r{run}"))
                log.append(rows[-1])
    return rows


def parts_of(output: str) -> list[str]:
    return [found.uri.removeprefix(f"{output}/_runs/") for found in store.list_tree(f"{output}/_runs")]


def ids(output: str) -> list[str]:
    return sorted(runlog.read_log(output, ["id"]).column("id").to_pylist())


def test_many_small_parts_become_one(tmp_path: Path) -> None:
    output = str(tmp_path)
    rows = fill(output)
    assert runlog.compact(output, more_than=12) == 0
    assert len(parts_of(output)) == 12
    assert runlog.compact(output, more_than=11) == 12
    (merged,) = parts_of(output)
    assert merged.startswith("merged/part-")
    assert sorted(runlog.read_log(output).to_pylist(), key=lambda row: row["id"]) == rows
    assert runlog.compact(output, more_than=0) == 0  # nothing to merge it with
    assert parts_of(output) == [merged]
    with runlog.RunLog(output, "later") as log:
        log.append(runlog.to_row(outcome(), "later"))
    assert runlog.compact(output, more_than=1) == 2
    assert len(parts_of(output)) == 1
    assert len(ids(output)) == 13
    documented = pyarrow.dataset.dataset(tmp_path / "_runs", format="parquet", exclude_invalid_files=True)
    assert documented.count_rows() == 13


def test_parts_of_a_later_version_keep_their_columns(tmp_path: Path) -> None:
    fill(str(tmp_path), runs=1, parts=1)
    (part,) = (tmp_path / "_runs").glob("*/*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.append_column("mood", pa.array(["fine"])), part.with_name("part-00001.parquet"))
    pq.write_table(table.drop_columns(["device"]), part.with_name("part-00002.parquet"))
    assert runlog.compact(str(tmp_path), more_than=0) == 3
    (merged,) = (tmp_path / "_runs" / "merged").iterdir()
    assert pq.read_table(merged).column("mood").to_pylist() == [None, "fine", None]
    assert pq.read_schema(merged).metadata[b"schema_version"] == b"1"
    assert len(ids(str(tmp_path))) == 3


class Killed(BaseException):
    pass


@hypothesis_settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_row_is_lost_or_seen_twice_wherever_merging_stops(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Merging stops before or after any of its writes and deletes, several times; each time all rows are there."""
    output = str(tmp_path_factory.mktemp("out"))
    fill(output, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)))
    expected = ids(output)
    write, delete = store.write_atomic, store.delete
    for at_once in data.draw(st.lists(st.sampled_from([1, 60_000, 10**9]), min_size=1, max_size=3)):
        left = [data.draw(st.integers(0, 12))]

        def dies(change: Any, *given: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0 and data.draw(st.booleans()):
                raise Killed
            change(*given)
            if left[0] == 0:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runlog, "_AT_ONCE", at_once)
            patch.setattr(store, "write_atomic", lambda *given: dies(write, *given))
            patch.setattr(store, "delete", lambda *given: dies(delete, *given))
            with contextlib.suppress(Killed):
                runlog.compact(output, more_than=0)
        assert ids(output) == expected
        if data.draw(st.booleans()):
            with runlog.RunLog(output, f"later-{uuid.uuid4().hex}") as log:
                log.append(runlog.to_row(outcome(id="later.tif"), "later"))
            expected = sorted([*expected, "later.tif"])
    runlog.compact(output, more_than=0)
    assert ids(output) == expected
    assert len(parts_of(output)) == 1


def test_merging_survives_kills(tmp_path: Path) -> None:
    """A process that merges is killed at random moments until one comes to its end."""
    output = str(tmp_path)
    fill(output, runs=2, parts=40)
    expected = ids(output)
    code = (
        f"from supir_batch import runlog; runlog._AT_ONCE = 300_000; print(flush=True); runlog.compact({output!r}, 0)"
    )
    generator, killed = np.random.default_rng(1), 0
    for _ in range(30):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(generator.uniform(0, 0.4))
            except subprocess.TimeoutExpired:
                process.kill()
            done = process.wait() == 0
        assert ids(output) == expected
        killed += not done
        if done:
            break
    store.remove_partials(output)
    runlog.compact(output, 0)
    assert killed > 0
    assert ids(output) == expected
    assert len(parts_of(output)) == 1


def test_a_remote_log_is_merged() -> None:
    output = f"memory://{uuid.uuid4().hex}"
    fill(output)
    assert runlog.compact(output, more_than=0) == 12
    assert len(ids(output)) == 12
    assert len(parts_of(output)) == 1


def test_a_log_that_changes_while_it_is_read_is_worth_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path))
    listed = runlog._parts(str(tmp_path))
    monkeypatch.setattr(runlog, "_parts", lambda output: listed)  # as it was before they were merged
    for part in (tmp_path / "_runs").glob("*/*.parquet"):
        part.unlink()
    with pytest.raises(TransientStoreError, match="merged while it was read"):
        runlog.read_log(str(tmp_path))
