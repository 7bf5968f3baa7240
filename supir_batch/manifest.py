"""What the manifest's inputs name: every source with its identity, and what cannot be used, with the reason.

An input is a file, a folder (searched recursively), a glob, or a list (.csv, .jsonl, .parquet) with one image per row.
What concerns one image (missing, empty) becomes a refusal and the run goes on; what concerns the manifest (an unknown
column, a bad value, two rows with one id) is a ManifestError before any work.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from supir_batch import store
from supir_batch.errors import ManifestError, StoreError
from supir_batch.settings import MAX_SEED, Manifest, Material, plain_words
from supir_batch.types import Failure, Source

IMAGE_EXTENSIONS = {
    ".tif",
    ".tiff",
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".webp",
    ".jp2",
    ".jpx",
    ".j2k",
    ".heic",
    ".heif",
    ".avif",
}
LIST_EXTENSIONS = {".csv", ".jsonl", ".parquet"}

_MAX_PROBLEMS = 20  # shown at once; a list made by a script tends to have the same mistake in every row
_LOOKUPS = 32  # concurrent look-ups; on an object store each is a round trip


class Refused(NamedTuple):
    """A source that was named but cannot be restored, and why."""

    source: Source
    failure: Failure


@dataclass(frozen=True)
class SourceList:
    """Everything the inputs name. ``ignored`` counts files of folders that are no images, by extension."""

    sources: tuple[Source, ...]
    refused: tuple[Refused, ...]
    ignored: dict[str, int]


class _Row(BaseModel):
    """One row of a list. Only ``uri`` is required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: Annotated[str, StringConstraints(min_length=1)]
    id: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    relative: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None  # place below the output
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{64}$", to_lower=True)] | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    upscale: Annotated[float, Field(ge=0.1, le=16)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    material: Material | None = None
    page: Annotated[int, Field(ge=1, le=65_535)] | None = None


class _Named(NamedTuple):
    """A source before anyone looked whether it is there; ``found`` is known already when a listing named it."""

    source: Source
    found: store.ObjectInfo | None


def list_sources(manifest: Manifest, manifest_uri: str) -> SourceList:
    """Every image that the manifest's inputs name, in the order of the inputs, names sorted within each.

    Raises ManifestError when an input matches nothing, a list is malformed, or two sources share an id or a file.
    """
    named: list[_Named] = []
    ignored: Counter[str] = Counter()
    for reference in manifest.inputs:
        named += _expand(reference, manifest, manifest_uri, ignored)
    _refuse_duplicates([one.source for one in named], manifest_uri)
    sources, refused = _look(named)
    return SourceList(tuple(sources), tuple(refused), dict(sorted(ignored.items())))


# --- the four kinds of input ---------------------------------------------------------------------------------------


def _expand(reference: str, manifest: Manifest, manifest_uri: str, ignored: Counter[str]) -> Iterable[_Named]:
    if store.exists(reference):
        if _extension(reference) in LIST_EXTENSIONS:
            return [_Named(source, None) for source in _read_list(reference)]
        return [_Named(_from_file(reference, store.name(reference), reference), None)]
    if store.is_folder(reference):
        return _from_folder(reference, manifest, manifest_uri, ignored)
    if store.has_glob(reference):
        return _from_glob(reference, manifest, manifest_uri, ignored)
    extension = _extension(reference)
    if extension in LIST_EXTENSIONS:
        raise ManifestError(f"{manifest_uri}: inputs: the list {reference} does not exist")
    if extension not in IMAGE_EXTENSIONS:
        raise ManifestError(f"{manifest_uri}: inputs: {reference} does not exist; give a file, folder, glob or list")
    return [_Named(_from_file(reference, store.name(reference), reference), None)]  # one image: a refusal, not an error


def _from_folder(folder: str, manifest: Manifest, manifest_uri: str, ignored: Counter[str]) -> list[_Named]:
    output = manifest.output.uri
    if store.normalize(output) == store.normalize(folder) or store.relative_to(folder, output) is not None:
        raise ManifestError(
            f"{manifest_uri}: output.uri {output} holds the input folder {folder}; "
            f"its files would be taken for outputs: choose a folder beside or inside the input"
        )
    inside = store.relative_to(output, folder)
    named = []
    for found in store.list_tree(folder):
        relative = store.relative_to(found.uri, folder)
        if relative is None or (inside is not None and f"{relative}/".startswith(f"{inside}/")):
            continue  # an earlier output of this manifest
        if _hidden(relative) or _extension(relative) not in IMAGE_EXTENSIONS:
            ignored[_extension(relative) or "(no extension)"] += 1
            continue
        named.append(_Named(_from_file(found.uri, relative, folder), found))
    if not named:
        others = sum(ignored.values())
        raise ManifestError(
            f"{manifest_uri}: inputs: the folder {folder} holds no image ({others} other files); "
            f"known extensions: {' '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return named


def _from_glob(pattern: str, manifest: Manifest, manifest_uri: str, ignored: Counter[str]) -> list[_Named]:
    root = store.glob_root(pattern)
    named, others = [], 0
    for found in store.expand_glob(pattern):
        if store.relative_to(found.uri, manifest.output.uri) is not None:
            continue  # an earlier output of this manifest
        if _extension(found.uri) not in IMAGE_EXTENSIONS:
            ignored[_extension(found.uri) or "(no extension)"] += 1
            others += 1
            continue
        relative = store.relative_to(found.uri, root) or store.name(found.uri)
        named.append(_Named(_from_file(found.uri, relative, pattern), found))
    if not named:
        raise ManifestError(f"{manifest_uri}: inputs: no image matches the pattern {pattern} ({others} other files)")
    return named


def _from_file(uri: str, relative: str, origin: str) -> Source:
    return Source(id=relative, uri=uri, origin=origin, relative=relative, version="", size=0)


def _extension(uri: str) -> str:
    stem, dot, extension = store.name(uri).rpartition(".")
    return f".{extension.lower()}" if dot and stem else ""


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))  # .DS_Store, ._photo.jpg, .thumbnails/


# --- lists ---------------------------------------------------------------------------------------------------------


def _read_list(uri: str) -> list[Source]:
    extension = _extension(uri)
    if extension == ".csv":
        rows = _csv_rows(uri)
    elif extension == ".jsonl":
        rows = _jsonl_rows(uri)
    else:
        rows = _parquet_rows(uri)
    sources, problems = [], []
    for number, values in rows:
        origin = f"{store.name(uri)}:{number}"
        try:
            # CSV knows only text, so "2" may become 2.0; the typed formats must already have it right
            row = _Row.model_validate(values, strict=extension != ".csv")
            sources.append(_from_row(row, uri, origin))
        except ValidationError as error:
            problems += [f"{origin}: {line}" for line in _row_problems(error)]
        except StoreError as error:
            problems.append(f"{origin}: {error}")
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise ManifestError("\n".join(problems[:_MAX_PROBLEMS] + more))
    if not sources:
        raise ManifestError(f"{uri}: the list has no rows")
    return sources


def _csv_rows(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    label = store.name(uri)
    reader = csv.reader(io.StringIO(store.read_text(uri), newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        _check_columns(header, f"{label}:1")
        end = reader.line_num
        for cells in reader:
            number, end = end + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise ManifestError(
                    f"{label}:{number}: has {len(cells)} fields, the header has {len(header)}; "
                    f"put text that contains a comma in double quotes"
                )
            yield number, {column: cell for column, cell in zip(header, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise ManifestError(f"{label}:{reader.line_num}: is not CSV: {error}") from error


def _jsonl_rows(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    label = store.name(uri)
    for number, line in enumerate(store.read_text(uri).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_no_key_twice)
        except ValueError as error:
            raise ManifestError(f"{label}:{number}: is not a line of JSON: {error}") from error
        if not isinstance(values, dict):
            raise ManifestError(f'{label}:{number}: must be an object such as {{"uri": "a.tif"}}, saw {line[:60]}')
        _check_columns(values, f"{label}:{number}")
        yield number, {key: value for key, value in values.items() if value is not None}


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"key '{twice[0]}' is given twice")
    return dict(pairs)


def _parquet_rows(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    label = store.name(uri)
    try:
        table = pq.read_table(pa.BufferReader(store.read_bytes(uri)))
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{label}: is not a Parquet file: {error}") from error
    _check_columns(table.column_names, label)
    for number, values in enumerate(table.to_pylist(), start=1):
        yield number, {key: value for key, value in values.items() if value is not None}


def _check_columns(columns: Iterable[str], place: str) -> None:
    columns, known = list(columns), list(_Row.model_fields)
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise ManifestError(f"{place}: column '{twice[0]}' appears twice")
    unknown = [column for column in columns if column not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0].lower(), known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known columns: {', '.join(known)}"
        if len(columns) == 1 and re.search(r"[;\t|]", columns[0]):
            hint = "; separate the columns by commas"
        raise ManifestError(f"{place}: unknown column {unknown[0]!r}{hint}")
    if "uri" not in columns:
        raise ManifestError(f"{place}: has no column 'uri', which names the image")


def _row_problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        column = ".".join(str(part) for part in problem["loc"][:1])
        if problem["type"] == "missing":
            yield f"{column} is empty; every row must name an image"
            continue
        if column == "sha256":
            yield f"sha256 must be 64 hexadecimal digits, saw {problem['input']!r}"
            continue
        yield f"{column} {plain_words(problem['msg'])}, " + (f"saw {problem['input']!r}")


def _from_row(row: _Row, list_uri: str, origin: str) -> Source:
    folder = store.parent(list_uri)
    uri = store.resolve(folder, store.refuse_credentials(row.uri))
    relative = row.relative or store.relative_to(uri, folder)
    if row.relative is not None and (row.relative.startswith("/") or "://" in row.relative or "\0" in row.relative):
        raise StoreError(f"relative {row.relative!r} must lead down from output.uri; write it like 'box1/photo.tif'")
    if relative is None:
        # A pure function of the URI: whatever else is in the list, the output keeps its place.
        relative = (str(store.local_path(uri)) if store.is_local(uri) else uri.partition("://")[2]).strip("/")
    if not relative or ".." in relative.split("/"):  # the output mirrors it and must stay below output.uri
        named = f"uri {row.uri!r}" if row.relative is None else f"relative {row.relative!r}"
        raise StoreError(f"{named} does not name a file; write it without '..'")
    if row.page is not None and row.relative is None:
        stem, extension = posixpath.splitext(relative)
        relative = f"{stem}-p{row.page:03d}{extension}"  # each page has an output of its own
    if row.id is not None and (not row.id.isprintable() or row.id.strip() != row.id):
        raise StoreError(f"id {row.id!r} has control characters or blanks at its ends; remove them")
    return Source(
        id=row.id or relative,
        uri=uri,
        origin=origin,
        relative=relative,
        version="",
        size=0,
        sha256=row.sha256,
        prompt=row.prompt,
        negative_prompt=row.negative_prompt,
        upscale=row.upscale,
        seed=row.seed,
        material=row.material,
        page=row.page,
    )


# --- what is there -------------------------------------------------------------------------------------------------


def _refuse_duplicates(sources: Sequence[Source], manifest_uri: str) -> None:
    by_id: dict[str, Source] = {}
    by_file: dict[tuple[str, int | None], Source] = {}
    problems = []
    for source in sources:
        first = by_file.setdefault((store.normalize(source.uri), source.page), source)
        if first is not source:
            page = "" if source.page is None else f"page {source.page} of "
            problems.append(f"{_both(first, source)} name {page}the same file {source.uri}; remove one of them")
            continue
        first = by_id.setdefault(source.id, source)
        if first is not source:
            problems.append(f"{_both(first, source)} share the id '{source.id}'; give each a different one in a list")
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise ManifestError("\n".join(f"{manifest_uri}: {line}" for line in problems[:_MAX_PROBLEMS] + more))


def _both(first: Source, second: Source) -> str:
    return f"{describe(first)} and {describe(second)}"


def describe(source: Source) -> str:
    """How a message points at a source: its row, or the input that led to it and its name."""
    if re.search(r":\d+$", source.origin):
        return f"{source.origin} ({source.uri})"
    return source.uri if source.uri == source.origin else f"{source.uri} (from {source.origin})"


def _look(named: Sequence[_Named]) -> tuple[list[Source], list[Refused]]:
    sources, refused = [], []
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        for one, found in zip(named, pool.map(_find, named), strict=True):
            if isinstance(found, Failure):
                refused.append(Refused(one.source, found))
                continue
            source = replace(one.source, size=found.size, version=found.version)
            if found.size == 0:
                message = f"{describe(source)}: is 0 bytes; upload it again or remove it from the inputs"
                refused.append(Refused(source, Failure("plan", "empty", message)))
            else:
                sources.append(source)
    return sources, refused


def _find(named: _Named) -> store.ObjectInfo | Failure:
    source = named.source
    try:
        found = named.found or store.find(source.uri)
    except StoreError as error:
        message = f"{describe(source)}: {error}"
        return Failure("plan", "unreachable" if error.retryable else "unreadable", message, error.retryable)
    if found is None or found.size < 0:
        message = f"{describe(source)}: does not exist; correct its name or remove it from the inputs"
        return Failure("plan", "missing", message)
    return found
