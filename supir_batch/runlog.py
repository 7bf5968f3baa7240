"""The run log: one row for each attempt at an image, as Parquet parts under ``<output>/_runs/<run id>/``.

Parts are written whole and never rewritten, so a killed run leaves a readable log; :func:`compact` merges small ones
of finished runs, under ``<output>/_runs/merged/``. docs/run-log.md describes each column; the ``setting_`` columns are
generated from :class:`~supir_batch.types.Settings` and cannot drift from it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import secrets
import tempfile
import time
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from supir_batch import __version__, store
from supir_batch.errors import StoreError, TransientStoreError
from supir_batch.types import Outcome, Region, Settings

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
_AUDIT_SCORES = ("psnr", "ssim", "delta_e", "delta_e_90", "sharpness", "invention", "invented", "spread")
_REGION = pa.struct(
    [
        ("kind", pa.string()),
        *((side, pa.int64()) for side in ("x", "y", "width", "height")),
        ("invention", pa.float64()),
    ]
)

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
        ("replaces", pa.string()),
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
        *((f"audit_{key}", pa.float64()) for key in _AUDIT_SCORES),
        ("audit_faces", pa.int64()),
        ("audit_face_invention", pa.float64()),
        ("audit_texts", pa.int64()),
        ("audit_text_invention", pa.float64()),
        ("audit_regions", pa.list_(_REGION)),
        *((f"setting_{key}", kind) for key, kind in _SETTING_TYPES.items()),
        *((f"seconds_{stage}", pa.float64()) for stage in STAGES),
        ("peak_memory_bytes", pa.int64()),
        ("device", pa.string()),
        ("execution", pa.string()),
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
        "source_sha256": source.sha256,
        "source_bytes": source.size if source.version or facts is not None else None,
        "fingerprint": ticket.fingerprint or None,
        "settings_sha256": job.settings_sha256,
        "replaces": source.replaces,
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
        "execution": ticket.execution or None,
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
    if ticket.audit is not None:
        row |= {f"audit_{key}": getattr(ticket.audit, key) for key in _AUDIT_SCORES}
        if ticket.audit.regions is not None:
            row |= _regions(ticket.audit.regions)
    if failure is not None:
        row |= {f"failure_{field.name}": getattr(failure, field.name) for field in dataclasses.fields(failure)}
    row |= {f"setting_{key}": value for key, value in dataclasses.asdict(job.settings).items()}
    for stage in STAGES:
        seconds = [record.seconds for record in ticket.records if record.stage == stage]
        row[f"seconds_{stage}"] = sum(seconds) if seconds else None
    return row | _versions()


def _regions(regions: Sequence[Region]) -> dict[str, Any]:
    row: dict[str, Any] = {"audit_regions": [dataclasses.asdict(region) for region in regions]}
    for kind in ("face", "text"):
        found = [region.invention for region in regions if region.kind == kind]
        row[f"audit_{kind}s"] = len(found)
        row[f"audit_{kind}_invention"] = max((one for one in found if one is not None), default=None)
    return row


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


def stream_log(output_uri: str, columns: Sequence[str] | None = None, rows: int = 2**18) -> Iterator[pa.Table]:
    """The rows of all runs below ``output_uri``, in tables of about ``rows``, oldest run first.

    Only ``columns`` are read; all of :data:`SCHEMA` when None. Raises StoreError when a part cannot be read, or was
    written by a newer schema than this one, TransientStoreError when parts were merged meanwhile.
    """
    parts, _ = _parts(output_uri)
    yield from _tables(output_uri, parts, SCHEMA, columns, rows)


def read_log(output_uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of all runs below ``output_uri``, oldest first; an empty table when there was none.

    Has ``columns``, all of :data:`SCHEMA` when None, which is much more than most need. Raises as ``stream_log``.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    read = list(dict.fromkeys([*wanted, "finished_at", "run_id"]))
    empty = pa.schema([SCHEMA.field(name) for name in read], metadata=SCHEMA.metadata).empty_table()
    table = pa.concat_tables([empty, *stream_log(output_uri, read)])
    return table.sort_by([("finished_at", "ascending"), ("run_id", "ascending")]).select(wanted)


def newest(table: pa.Table, key: str) -> pa.Table:
    """The last row of each value of the column ``key``, in their order; rows without a value are left out."""
    return table.take(pa.array(_last(table.column(key))))


def newest_done(table: pa.Table) -> dict[str, dict[str, Any]]:
    """The newest row that says ``done`` of each image, by the path of its output below the output folder, sorted.

    What must be there: an output of which the image has a newer one elsewhere, or that another image has written over,
    is not among them. Rows have the table's columns: more than :data:`OF_OUTPUTS` and what is needed fill the memory.
    """
    done = _with_output(table)
    both = np.intersect1d(_last(done.column("output_path")), _last(done.column("id")))
    rows = done.take(pa.array(both)).sort_by("output_path")
    return {row["output_path"]: row for batch in rows.to_batches(max_chunksize=10_000) for row in batch.to_pylist()}


OF_OUTPUTS = ("id", "status", "output_path")
"""The columns by which ``newest_done`` and ``output_paths`` choose."""


def output_paths(table: pa.Table) -> set[str]:
    """The path of every output that was ever made, below the output folder; some may be gone."""
    return set(_with_output(table).column("output_path").unique().to_pylist())


def failures(output_uri: str, causes: Collection[str] = ()) -> pa.Table:
    """The newest attempt of each image where that failed, with one of ``causes`` (``failure_kind``) if any are given.

    Columns ``id``, ``uri``, ``failure_kind``, ``failure_message``; oldest first. Raises as ``stream_log``.
    """
    columns = ["id", "uri", "failure_kind", "failure_message"]
    last = newest(read_log(output_uri, [*columns, "status"]), "id")
    failed = last.filter(pc.equal(last.column("status"), "failed")).select(columns)
    return failed.filter(pc.is_in(failed.column("failure_kind"), pa.array(sorted(causes)))) if causes else failed


# --- fewer, larger parts -------------------------------------------------------------------------------------------


MERGED_FOLDER = "merged"
"""Where merged parts lie, beside the folders of the runs."""

_LARGE = 16 * 2**20  # bytes; a part of this size is not merged again
_AT_ONCE = 64 * 2**20  # bytes of parts that become one


def compact(output_uri: str, more_than: int = 64) -> int:
    """Merge small parts into large ones when there are more than ``more_than`` small ones; returns how many went.

    A merged part names those it replaces in its metadata (``replaces``), and who reads the log skips them from the
    moment it is there, whole. They are deleted after that. So whenever this is killed no row is lost or seen twice, and
    the next call goes on.

    Call it only while no run writes there. Raises StoreError when a part cannot be read, written or deleted.
    """
    runs = store.join(output_uri, RUNS_FOLDER)
    parts, replaced = _parts(output_uri)
    for stale in replaced:  # first: what a merged part replaces must be gone before that is merged itself
        store.delete(stale.uri)
    small = [part for part in parts if part.size < _LARGE]
    if len(small) <= more_than:
        return 0
    merged_away = 0
    for group in _groups(small, _AT_ONCE):
        if len(group) == 1:
            continue
        names = [store.relative_to(part.uri, runs) for part in group]
        with tempfile.TemporaryDirectory(prefix="supir-batch-") as folder:
            merged = Path(folder) / "part.parquet"
            _merge(output_uri, group, merged, {"replaces": json.dumps(names)})
            store.write_atomic(store.join(runs, MERGED_FOLDER, f"part-{new_run_id()}.parquet"), merged)
        for part in group:
            store.delete(part.uri)
        merged_away += len(group)
    return merged_away


def _merge(output_uri: str, parts: Sequence[store.ObjectInfo], target: Path, metadata: Mapping[str, str]) -> None:
    with _dataset(parts, SCHEMA) as dataset:
        written = [fragment.physical_schema for fragment in dataset.get_fragments()]
    # a later version may have written columns that this one does not know: they stay
    schema = pa.unify_schemas([SCHEMA, *written]).with_metadata({**SCHEMA.metadata, **metadata})
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for rows in _tables(output_uri, parts, schema, None, 2**16):
            writer.write_table(rows)


# --- inside --------------------------------------------------------------------------------------------------------


def _last(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Where each value stands for the last time, ascending; nulls do not count."""
    numbers = pc.index_in(column, column.drop_null().unique()).to_numpy(zero_copy_only=False)
    backwards = np.nan_to_num(numbers, nan=-1)[::-1]
    values, first = np.unique(backwards, return_index=True)
    found: NDArray[np.int64] = np.sort(len(column) - 1 - first[values >= 0])
    return found


def _with_output(table: pa.Table) -> pa.Table:
    """The rows of outputs that were made; one that was only captioned has none."""
    return table.filter(pc.and_(pc.equal(table.column("status"), "done"), pc.is_valid(table.column("output_path"))))


def _parts(output_uri: str) -> tuple[list[store.ObjectInfo], list[store.ObjectInfo]]:
    """The parts that count, oldest run first, and those that a merged part replaces."""
    runs = store.join(output_uri, RUNS_FOLDER)
    found = [part for part in store.list_tree(runs) if part.uri.endswith(".parquet") and not store.is_partial(part.uri)]
    merged = store.join(runs, MERGED_FOLDER) + "/"
    replaced: set[str] = set()
    for part in found:
        if part.uri.startswith(merged):
            replaced |= {store.join(runs, name) for name in _replaces(part)}
    return [part for part in found if part.uri not in replaced], [part for part in found if part.uri in replaced]


def _replaces(merged: store.ObjectInfo) -> list[str]:
    with _reading(merged.uri), _dataset([merged], SCHEMA) as dataset:
        (fragment,) = dataset.get_fragments()
        names: list[str] = json.loads(fragment.physical_schema.metadata[b"replaces"])
        return names


def _groups(parts: Sequence[store.ObjectInfo], size: int) -> Iterator[list[store.ObjectInfo]]:
    """Neighbors that together have ``size`` bytes or a little more."""
    group: list[store.ObjectInfo] = []
    for part in parts:
        group.append(part)
        if sum(one.size for one in group) >= size:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _dataset(parts: Sequence[store.ObjectInfo], schema: pa.Schema) -> Iterator[Any]:
    """``parts`` as one Arrow dataset, of local copies, because only the store knows how to try again.

    Raises StoreError when one has a newer schema than this version knows.
    """
    with ExitStack() as stack:
        places = [
            str(
                store.local_path(part.uri)
                if store.is_local(part.uri)
                else stack.enter_context(store.local_copy(part.uri))
            )
            for part in parts
        ]
        dataset = pds.dataset(places, schema=schema, format="parquet")
        for part, fragment in zip(parts, dataset.get_fragments(), strict=True):
            written = (fragment.physical_schema.metadata or {}).get(b"schema_version", b"0")
            if int(written) > SCHEMA_VERSION:
                raise StoreError(
                    f"{part.uri}: has run-log schema {int(written)}, this version reads up to {SCHEMA_VERSION}; "
                    f"update supir-batch"
                )
        yield dataset


def _tables(
    output_uri: str, parts: Sequence[store.ObjectInfo], schema: pa.Schema, columns: Sequence[str] | None, rows: int
) -> Iterator[pa.Table]:
    """The rows in the order of the parts, ``rows`` or a little more at a time; a column that a part lacks is null."""
    names, waiting, count = None if columns is None else list(columns), list[Any](), 0
    with _reading(output_uri):
        for group in _groups(parts, _LARGE):  # Arrow reads ahead, up to a gigabyte of one dataset
            with _dataset(group, schema) as dataset:
                for batch in dataset.to_batches(columns=names, batch_size=2**16, batch_readahead=1, use_threads=False):
                    waiting.append(batch)
                    count += len(batch)
                    if count >= rows:
                        yield pa.Table.from_batches(waiting)
                        waiting, count = [], 0
        if count:
            yield pa.Table.from_batches(waiting)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise TransientStoreError(f"{uri}: parts of the run log were merged while it was read; try again") from error
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{uri}: cannot read the run log: {error}; move the damaged part away") from error


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
