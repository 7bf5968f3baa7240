"""Lists and plans made of columns say what a loop over rows would say."""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from supir_batch import runlog, store
from supir_batch.errors import ManifestError, StoreError
from supir_batch.identity import settings_hash
from supir_batch.manifest import ListRow, _from_row, _row_problems, list_sources
from supir_batch.plan import QUARANTINED, Plan, Selection, make_plan
from supir_batch.resolve import resolve
from supir_batch.settings import Manifest
from supir_batch.types import Failure, Job, Outcome, Source, TileTicket

SHA = "ab" * 32
OTHER = "cd" * 32

# --- lists ---------------------------------------------------------------------------------------------------------

URIS = [
    *("a.tif", "b.PNG", "box/a.tif", "./d.tif", "x//y.jpg", "box/../c.tif", "../up.tif", "/abs/z.tif", "/z.tif"),
    *(".hidden", "noext", "..tif", "sp ace.tif", "é.tif", "日本/画.tif", "a.tif/", "..", "q?.tif", "#1.tif"),
    *("s3://b/k.tif", "s3://b/x/../k.tif", "s3://b", "S3://b/K.tif", "file:///abs/f.tif", "x\n.tif", "a\\b.tif", ""),
]  # fmt: skip
VALUES: dict[str, list[object]] = {
    "id": ["x", "x y", " x", "x ", "日本", "z\u200bz", "n\n", "a/b.tif", "i" * 1024, "i" * 1025, "é" * 1024, "\x7f"],
    "relative": ["r/a.tif", "/r.tif", "../r.tif", "r/./a.tif", "s3://r", "日本.tif", "~r.tif", "r/", "."],
    "sha256": [SHA, SHA.upper(), "xyz", SHA + "0", SHA[1:] + "é"],
    "prompt": ["a boat", "two\nlines", 'with "quotes", and commas', "日本"],
    "upscale": [2, 2.5, 0.05, 17, 0.1, 16, math.nan, True, "2", " 2", "1e1", "07", "x"],
    "seed": [0, 7, -1, 2**63 - 1, 2**63, 2**70, 1.0, "7", "+7", "007"],
    "material": ["map", "photo", "Map"],
    "page": [1, 12, 1000, 0, 65_536, "3"],
}
ROWS = st.lists(
    st.fixed_dictionaries(
        {"uri": st.sampled_from(URIS)},
        optional={name: st.sampled_from(values) for name, values in VALUES.items()},
    ),
    min_size=1,
    max_size=6,
)


def write_list(folder: Path, rows: Sequence[dict[str, Any]], kind: str) -> Path:
    path = folder / f"list.{kind}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.table({key: pa.array([row.get(key) for row in rows]) for key in columns}), path)
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), newline="")
    return path


def one_by_one(path: Path, numbered: Sequence[tuple[int, dict[str, Any]]], strict: bool) -> list[Source] | str:
    """The sources of rows of a list, or what is wrong with them."""
    sources, problems = [], []
    for number, row in numbered:
        origin = f"{path.name}:{number}"
        try:
            sources.append(_from_row(ListRow.model_validate(row, strict=strict), str(path.parent), origin))
        except ValidationError as error:
            problems += [f"{origin}: {line}" for line in _row_problems(error)]
        except StoreError as error:
            problems.append(f"{origin}: {error}")
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n".join([*problems[:20], *more]) if problems else sources


def without_duplicates(sources: Sequence[Source]) -> bool:
    files = {(store.normalize(source.uri), source.page) for source in sources}
    return len(files) == len(sources) == len({source.id for source in sources})


def in_columns(path: Path) -> list[Source] | str:
    manifest = Manifest.model_validate({"inputs": str(path), "output": {"uri": "/nowhere/out"}})
    try:
        listed = list_sources(manifest, "m.yaml", lambda table: np.zeros(len(table), bool))
    except ManifestError as error:
        return str(error)
    return list(listed.make(np.arange(len(listed.table))))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@hypothesis_settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_rows_of_a_list_mean_the_same_in_columns(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    try:
        path = write_list(tmp_path, rows, kind)
    except (pa.ArrowException, OverflowError):
        return  # no column of a Parquet file holds such different values
    if kind == "csv":
        (_, header), *lines = _lines(path.read_bytes().decode())
        numbered = [(n, {k: v for k, v in zip(header, row, strict=True) if v}) for n, row in lines]
    elif kind == "parquet":
        stored = pq.read_table(path).to_pylist()
        numbered = [(n, {k: v for k, v in row.items() if v is not None}) for n, row in enumerate(stored, 1)]
    else:
        numbered = list(enumerate(rows, 1))
    expected = one_by_one(path, numbered, kind != "csv")
    found = in_columns(path)
    if isinstance(expected, str) or without_duplicates(expected):
        assert found == expected
    else:
        assert isinstance(found, str)
        assert "name the same file" in found or "share the id" in found or "of the same file" in found


def _lines(text: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV with the line each begins on."""
    reader, found, end = csv.reader(io.StringIO(text, newline="")), [], 0
    for row in reader:
        found.append((end + 1, row))
        end = reader.line_num
    return [(line, row) for line, row in found if row]


# --- plans ---------------------------------------------------------------------------------------------------------


def naive_plan(
    manifest: Manifest, jobs: Sequence[Job], log: Sequence[dict[str, Any]], there: set[str]
) -> dict[str, Any]:
    """What becomes of each job by the rules of supir_batch.plan, one job at a time."""
    last: dict[str, dict[str, Any]] = {}
    made: dict[str, dict[str, Any]] = {}
    for row in log:
        last[row["id"]] = row
        if row["status"] == "done":
            made[row["output_path"]] = row

    def same_source(job: Job, row: dict[str, Any]) -> bool:
        source = job.source
        if (row["id"], row["uri"]) != (source.id, source.uri):
            return False
        if source.sha256 is not None:
            return bool(row["source_sha256"] == source.sha256)
        return bool(row["source_version"] == source.version)

    found = {}
    for job in jobs:
        id, stem = job.source.id, store.relative_to(job.output_stem, manifest.output.uri)
        mine = [row for row in log if same_source(job, row) and row["settings_sha256"] == job.settings_sha256]
        counts = [row for row in mine if row["output_path"] and made[row["output_path"]] is row]
        counts = [row for row in counts if posixpath.splitext(row["output_path"])[0] == stem]
        if counts and counts[-1]["output_path"] in there:
            found[id] = "done", counts[-1]["output_path"]
        elif mine and mine[-1]["failure_kind"] in QUARANTINED:
            found[id] = "quarantined", f"{mine[-1]['failure_kind']}: {mine[-1]['failure_message']}"
        else:
            found[id] = "todo", reason(job, last.get(id), same_source, stem)
    return found


def reason(job: Job, last: dict[str, Any] | None, same_source: Any, stem: str | None) -> str:
    if last is None or last["uri"] != job.source.uri:
        return "new"
    identity = last["source_version"] if job.source.sha256 is None else last["source_sha256"]
    if last["status"] == "failed" and identity is None:
        return f"failed before: {last['failure_kind']}"
    if not same_source(job, last):
        return "source changed"
    if last["settings_sha256"] != job.settings_sha256:
        return "settings changed: steps: "
    if last["status"] == "failed":
        return f"failed before: {last['failure_kind']}"
    alike = posixpath.splitext(last["output_path"])[0] == stem
    return "output missing" if alike else "output name changed"


ATTEMPTS = st.lists(
    st.fixed_dictionaries(
        {
            "image": st.integers(0, 4),
            "steps": st.sampled_from([10, 20]),
            "place": st.sampled_from(["own", "own", "own", "other", "moved"]),
            "extension": st.sampled_from([".tif", ".png"]),
            "kind": st.sampled_from([None, None, None, "truncated", "poison", "hang"]),
            "change": st.sampled_from([None, None, None, "uri", "identity", "unseen", "id"]),
            "second": st.integers(0, 20),
            "there": st.booleans(),
        }
    ),
    max_size=12,
)
_SOUND = {"image": 0, "steps": 10, "place": "own", "kind": None, "change": None, "second": 0, "there": True}
AT_ONE_TIME = [_SOUND | {"kind": "truncated", "extension": ".tif"}] + [
    _SOUND | {"extension": extension} for extension in (".png", ".tif", ".png")
]


@hypothesis_settings(deadline=None, max_examples=150)
@given(attempts=ATTEMPTS, vouched=st.sets(st.integers(0, 4)), part_rows=st.integers(1, 5), retry=st.booleans())
@example(attempts=AT_ONE_TIME, vouched=set(), part_rows=1, retry=False)
def test_a_plan_in_columns_is_the_plan_of_a_loop(
    tmp_path_factory: pytest.TempPathFactory,
    attempts: list[dict[str, Any]],
    vouched: set[int],
    part_rows: int,
    retry: bool,
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    rows = []
    for index in range(5):
        (folder / f"{index}.tif").write_bytes(b"pixels")
        rows.append({"uri": f"{index}.tif"} | ({"sha256": SHA} if index in vouched else {}))
        rows[-1] |= {"prompt": "a boat", "upscale": 2} if index % 2 else {}
    path = write_list(folder, rows, "jsonl")
    output = folder / "out"

    def manifest(steps: int) -> Manifest:
        values = {"inputs": str(path), "output": {"uri": str(output)}, "engine": {"steps": steps}}
        return Manifest.model_validate(values)

    jobs = {steps: _jobs(manifest(steps)) for steps in (10, 20)}
    log = []
    with runlog.RunLog(str(output), "run", part_rows=part_rows) as run:
        for attempt in attempts:
            row = _attempt(jobs[attempt["steps"]], attempt)
            log.append(row)
            run.append(row)
            if attempt["there"] and row["output_path"]:
                store.write_atomic(str(output / row["output_path"]), b"restored")
    log.sort(key=lambda row: row["finished_at"])
    there = {found.uri.removeprefix(f"{output}/") for found in store.list_tree(str(output))}

    selection = Selection(retry=frozenset(str(i) + ".tif" for i in range(5)) if retry else None)
    plan = make_plan(manifest(10), "m.yaml", "model", selection=selection)
    expected = naive_plan(manifest(10), jobs[10], log, there)
    if retry:
        for job in jobs[10]:
            if expected[job.source.id][0] == "quarantined":
                stem = store.relative_to(job.output_stem, str(output))
                newest = next((row for row in reversed(log) if row["id"] == job.source.id), None)
                expected[job.source.id] = "todo", reason(job, newest, _same, stem)
    assert _said(plan) == expected
    assert sorted(job.source.id for job, _ in [*plan.todo, *plan.done, *plan.quarantined]) == sorted(expected)
    planned = {entry.job.source.id: entry.job for entry in (*plan.todo, *plan.done, *plan.quarantined)}
    assert planned == {job.source.id: job for job in jobs[10]}
    assert sum(plan.reasons.values()) == len(plan.todo)


def _same(job: Job, row: dict[str, Any]) -> bool:
    source = job.source
    identity = row["source_version"] == source.version if source.sha256 is None else row["source_sha256"] == SHA
    return bool(identity and row["uri"] == source.uri)


def _said(plan: Plan) -> dict[str, Any]:
    changed = "settings changed: steps: "
    said: dict[str, Any] = {}
    for job, why in plan.todo:
        said[job.source.id] = "todo", changed if why.startswith(changed) else why
    for job, why in plan.quarantined:
        said[job.source.id] = "quarantined", why
    for job, uri in plan.done:
        said[job.source.id] = "done", store.relative_to(uri, plan.output_uri)
    return said


def _jobs(manifest: Manifest) -> list[Job]:
    """The jobs of a first plan, each as its source and manifest say."""
    jobs = [todo.job for todo in make_plan(manifest, "m.yaml", "model").todo]
    for job in jobs:
        assert job.settings == resolve(manifest, job.source, "model")
        assert job.settings_sha256 == settings_hash(job.settings)
        assert job.output_stem == store.join(manifest.output.uri, posixpath.splitext(job.source.relative)[0])
    return jobs


def _attempt(jobs: Sequence[Job], attempt: dict[str, Any]) -> dict[str, Any]:
    job, other = jobs[attempt["image"]], jobs[(attempt["image"] + 1) % 5]
    places = {"own": job.output_stem, "other": other.output_stem, "moved": f"{job.output_stem}-x"}
    kind, finished = attempt["kind"], f"2026-01-01T00:00:{attempt['second']:02d}"
    failure = None if kind is None else Failure("restore", kind, "it broke")
    place = "" if failure else places[attempt["place"]] + attempt["extension"]
    ended = Outcome(TileTicket(job, failure=failure), "failed" if failure else "done", place, finished_at=finished)
    changes: dict[str | None, dict[str, Any]] = {
        "uri": {"uri": "/elsewhere.tif"},
        "identity": {"source_version": "9-9", "source_sha256": OTHER},
        "unseen": {"source_version": None, "source_sha256": None},
        "id": {"id": "somebody.tif"},
    }
    return runlog.to_row(ended, "run") | changes.get(attempt["change"], {})
