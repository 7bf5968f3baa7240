"""The run log: one row for each attempt at an image, as Parquet parts under ``<output>/_runs/<run id>/``.

Parts are written whole and never rewritten, so a killed run leaves a readable log. docs/run-log.md describes each
column; the ``setting_`` columns are generated from :class:`~supir_batch.types.Settings` and cannot drift from it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import secrets
import time
import types
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from supir_batch import __version__, store
from supir_batch.errors import StoreError
from supir_batch.types import Outcome, Settings

SCHEMA_VERSION = 1
RUNS_FOLDER = "_runs"

STAGES = ("decode", "caption", "restore", "write")
PACKAGES = ("torch", "ray", "diffusers", "transformers", "pyvips")

_TIME = pa.timestamp("us", tz="UTC")


def _arrow_type(hint: Any) -> pa.DataType:
    """The column type of a Settings field: str, int, float, bool, a Literal of one of these, or any of them or None."""
    if get_origin(hint) is Literal:
        hint = type(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        kinds = {_arrow_type(one) for one in get_args(hint) if one is not type(None)}
        if len(kinds) != 1:
            raise TypeError(f"a setting of type {hint} has no single column type")
        return kinds.pop()
    return {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}[hint]


_SETTING_TYPES = {key: _arrow_type(hint) for key, hint in get_type_hints(Settings).items()}

_SCORES = ("color_drift", "similarity", "dead", "seam")

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("origin", pa.string()),
        ("source_version", pa.string()),
        ("source_sha256", pa.string()),
        ("source_bytes", pa.int64()),
        ("fingerprint", pa.string()),
        ("settings_sha256", pa.string()),
        ("status", pa.string()),
        ("recovered", pa.bool_()),
        ("failure_stage", pa.string()),
        ("failure_kind", pa.string()),
        ("failure_message", pa.string()),
        ("failure_retryable", pa.bool_()),
        ("output_uri", pa.string()),
        ("output_path", pa.string()),
        ("output_sha256", pa.string()),
        ("output_bytes", pa.int64()),
        ("record_sha256", pa.string()),
        ("premis_sha256", pa.string()),
        ("c2pa_sha256", pa.string()),
        ("source_width", pa.int64()),
        ("source_height", pa.int64()),
        ("output_width", pa.int64()),
        ("output_height", pa.int64()),
        ("work_width", pa.int64()),
        ("work_height", pa.int64()),
        ("source_format", pa.string()),
        ("bands", pa.int64()),
        ("bit_depth", pa.int64()),
        ("has_alpha", pa.bool_()),
        ("orientation", pa.int64()),
        ("tone", pa.string()),
        ("notes", pa.string()),
        ("tiles", pa.int64()),
        ("caption", pa.string()),
        ("prompt", pa.string()),
        ("prompt_source", pa.string()),
        ("seed", pa.int64()),
        ("restored_again", pa.bool_()),
        ("gate_finite", pa.bool_()),
        *((f"gate_{key}", pa.float64()) for key in _SCORES),
        *((f"setting_{key}", kind) for key, kind in _SETTING_TYPES.items()),
        *((f"seconds_{stage}", pa.float64()) for stage in STAGES),
        ("peak_memory_bytes", pa.int64()),
        ("device", pa.string()),
        ("version_supir_batch", pa.string()),
        *((f"version_{package}", pa.string()) for package in PACKAGES),
        ("started_at", _TIME),
        ("finished_at", _TIME),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


def new_run_id() -> str:
    """A name for a run that sorts by time: ``20260131T235959Z-1a2b3c``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def run_folder(output_uri: str, run_id: str) -> str:
    """Where a run keeps its log parts and the manifest it ran."""
    return store.join(output_uri, RUNS_FOLDER, run_id)


def to_row(outcome: Outcome, run_id: str) -> dict[str, Any]:
    """The run-log row of an outcome: exactly the columns of :data:`SCHEMA`, None where nothing is known."""
    ticket, job = outcome.ticket, outcome.ticket.job
    facts, failure, source = ticket.facts, ticket.failure, job.source
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {
        "run_id": run_id,
        "id": source.id,
        "uri": source.uri,
        "origin": source.origin,
        "source_version": source.version or None,
        "source_bytes": source.size if source.version else None,
        "fingerprint": ticket.fingerprint or None,
        "settings_sha256": job.settings_sha256,
        "status": outcome.status,
        "recovered": ticket.recovered,
        "output_uri": outcome.output_uri or None,
        "output_path": store.relative_to(outcome.output_uri, job.output_root) if outcome.output_uri else None,
        "output_sha256": outcome.output_sha256 or None,
        "output_bytes": outcome.output_bytes if outcome.output_uri else None,
        "record_sha256": outcome.record_sha256 or None,
        "premis_sha256": outcome.premis_sha256 or None,
        "c2pa_sha256": outcome.c2pa_sha256 or None,
        "tiles": ticket.box.count if ticket.box else None,
        "caption": ticket.caption or None,
        "prompt": ticket.prompt or None,
        "prompt_source": job.settings.prompt_source,
        "seed": ticket.seed if ticket.fingerprint else None,
        "peak_memory_bytes": max((record.peak_memory_bytes for record in ticket.records), default=None),
        "device": next((record.device for record in ticket.records if record.stage == "restore"), None),
        "started_at": _moment(ticket.started_at),
        "finished_at": _moment(outcome.finished_at),
    }
    if facts is not None:
        row |= {
            "source_sha256": facts.sha256,
            "source_width": facts.width,
            "source_height": facts.height,
            "output_width": facts.output_width,
            "output_height": facts.output_height,
            "work_width": facts.work_width,
            "work_height": facts.work_height,
            "source_format": facts.format,
            "bands": facts.bands,
            "bit_depth": facts.bit_depth,
            "has_alpha": facts.has_alpha,
            "orientation": facts.orientation,
            "tone": facts.tone,
            "notes": "; ".join(facts.notes) or None,
        }
    if ticket.scores is not None:
        row |= {"restored_again": ticket.again, "gate_finite": ticket.scores.finite}
        row |= {f"gate_{key}": getattr(ticket.scores, key) for key in _SCORES}
    if failure is not None:
        row |= {f"failure_{field.name}": getattr(failure, field.name) for field in dataclasses.fields(failure)}
    row |= {f"setting_{key}": value for key, value in dataclasses.asdict(job.settings).items()}
    for stage in STAGES:
        seconds = [record.seconds for record in ticket.records if record.stage == stage]
        row[f"seconds_{stage}"] = sum(seconds) if seconds else None
    return row | _versions()


class RunLog:
    """Collects rows and writes them as Parquet parts; use it as a context manager, which writes the rest at the end.

    A part is written when ``part_rows`` rows wait, or with the first row that comes ``part_seconds`` after the last
    part. A run that dies between parts loses rows, not outputs: the next run finds those committed and logs them.
    """

    def __init__(self, output_uri: str, run_id: str, part_rows: int = 256, part_seconds: float = 30.0) -> None:
        self.folder = run_folder(output_uri, run_id)
        self._part_rows = part_rows
        self._part_seconds = part_seconds
        self._rows: list[dict[str, Any]] = []
        self._parts = 0
        self._written_at = time.monotonic()

    def append(self, row: dict[str, Any]) -> None:
        """Add one row of :func:`to_row`; raises ValueError when its columns are not those of the schema."""
        if row.keys() != set(SCHEMA.names):
            odd = sorted(row.keys() ^ set(SCHEMA.names))
            raise ValueError(f"a run-log row must have exactly the schema's columns; missing or unknown: {odd}")
        self._rows.append(row)
        if len(self._rows) >= self._part_rows or time.monotonic() - self._written_at >= self._part_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as the next part; nothing when none wait."""
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
            # The part's number moves on only after it is safe: an interrupted flush repeats the same part.
            store.write_atomic(store.join(self.folder, f"part-{self._parts:05d}.parquet"), _parquet(table))
            self._parts += 1
            self._rows = []
        self._written_at = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        self.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_log(output_uri: str) -> pa.Table:
    """All rows of all runs below ``output_uri``, oldest first; an empty table when there was none.

    Raises StoreError when a part cannot be read, or was written by a newer schema than this one.
    """
    parts = [found.uri for found in store.list_tree(store.join(output_uri, RUNS_FOLDER)) if _is_part(found.uri)]
    if not parts:
        return SCHEMA.empty_table()
    places = [str(store.local_path(part)) for part in parts]
    remote = None
    if not store.is_local(output_uri):
        remote = store.filesystem(output_uri)[0]
        places = [store.filesystem(part)[1] for part in parts]
    try:
        dataset = pds.dataset(places, schema=SCHEMA, filesystem=remote, format="parquet")
        _refuse_newer(dataset)
        table = dataset.to_table()
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{output_uri}: cannot read the run log: {error}; move the damaged part away") from error
    return table.sort_by([("finished_at", "ascending"), ("run_id", "ascending")])


class DoneKey(NamedTuple):
    """What must be equal for logged work to count for a source."""

    id: str
    uri: str
    source_version: str
    settings_sha256: str


class Done(NamedTuple):
    """The output that logged work left."""

    output_uri: str
    output_sha256: str
    fingerprint: str


def done_index(table: pa.Table) -> dict[DoneKey, Done]:
    """Which work is done, by the log alone. An output that later work has written over does not count."""
    columns = ["status", *DoneKey._fields, *Done._fields]
    latest: dict[str, tuple[DoneKey, Done]] = {}
    for row in _iterate(table, columns):
        if row["status"] == "done":
            key = DoneKey(*(row[field] for field in DoneKey._fields))
            latest[row["output_uri"]] = key, Done(*(row[field] for field in Done._fields))
    return dict(latest.values())


def newest_done(table: pa.Table, columns: Collection[str]) -> dict[str, dict[str, Any]]:
    """The newest row that says ``done`` of each image, by the path of its output below the output folder, sorted.

    What must be there: an output of which the image has a newer one elsewhere, or that another image has written over,
    is not among them. Rows have ``columns`` and ``output_path``: all of them would fill the memory.
    """
    needed = list(dict.fromkeys(["status", "id", "output_path", *columns]))
    by_path: dict[str, dict[str, Any]] = {}
    path_of: dict[str, str] = {}
    for row in _iterate(table, needed):
        if row["status"] == "done" and row["output_path"] is not None:  # one that was only captioned has none
            by_path[row["output_path"]] = row
            path_of[row["id"]] = row["output_path"]
    return {path: row for path, row in sorted(by_path.items()) if path_of[row["id"]] == path}


def output_paths(table: pa.Table) -> set[str]:
    """The path of every output that was ever made, below the output folder; some may be gone."""
    rows = _iterate(table, ["status", "output_path"])
    return {row["output_path"] for row in rows if row["status"] == "done" and row["output_path"] is not None}


def last_attempts(table: pa.Table) -> dict[str, dict[str, Any]]:
    """The newest row of each id (all columns that :mod:`supir_batch.plan` gives reasons from)."""
    columns = ["id", "uri", "source_version", "settings_sha256", "status", "output_uri"]
    columns += ["failure_kind", "failure_message", *(f"setting_{key}" for key in _SETTING_TYPES)]
    return {row["id"]: row for row in _iterate(table, columns)}


# --- inside --------------------------------------------------------------------------------------------------------


def _iterate(table: pa.Table, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.select(columns).to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()


def _is_part(uri: str) -> bool:
    return uri.endswith(".parquet") and not store.is_partial(uri)


def _refuse_newer(dataset: Any) -> None:
    for fragment in dataset.get_fragments():
        written = (fragment.physical_schema.metadata or {}).get(b"schema_version", b"0")
        if int(written) > SCHEMA_VERSION:
            raise StoreError(
                f"{fragment.path}: has run-log schema {int(written)}, this version reads up to {SCHEMA_VERSION}; "
                f"update supir-batch"
            )


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


@functools.cache
def _versions() -> dict[str, str | None]:
    return {"version_supir_batch": __version__} | {f"version_{package}": _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
