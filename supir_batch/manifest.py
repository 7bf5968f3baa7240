"""What the manifest's inputs name: every source with its identity, and what cannot be used, with the reason.

An input is a file, a folder (searched recursively), a glob, or a list (.csv, .jsonl, .parquet) with one image per row.
What concerns one image (missing, empty) becomes a refusal and the run goes on; what concerns the manifest (an unknown
column, a bad value, two rows with one id) is a ManifestError before any work.

A million images are no more than a table: rows are checked as columns, in pieces, and only those that look wrong or odd
one by one, in words. A list that gives ``sha256`` vouches for the content, so nobody looks whether the file is there
before it is decoded; any other source is looked up.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from supir_batch import store
from supir_batch.errors import ManifestError, StoreError, refuse
from supir_batch.manifest_file import plain_words
from supir_batch.settings import MAX_SEED, Manifest, Material
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

_LOOKUPS = 32  # concurrent look-ups; on an object store each is a round trip
_PIECE = 65_536  # rows read and checked at once
_MADE_AT_ONCE = 1024
_AT_ONCE = 512  # rows of a CSV as lists; more, and Python would search them for garbage, which doubles the time


TEXT = pa.large_string()  # a million paths may have more than 2 GB

SOURCES = pa.schema(
    [
        *((name, TEXT) for name in ("id", "uri", "origin", "relative", "version")),
        ("size", pa.int64()),
        *((name, TEXT) for name in ("sha256", "prompt", "negative_prompt")),
        ("upscale", pa.float64()),
        ("seed", pa.int64()),
        ("material", TEXT),
        ("page", pa.int64()),
        ("preset", TEXT),
        ("restoration_tau", pa.float64()),
        ("replaces", TEXT),
    ]
)
"""Sources as a table: the fields of :class:`~supir_batch.types.Source`, null where nothing is given or known.

Columns after ``size`` may be absent.
"""

Rows = NDArray[np.int64]  # numbers of rows of a table
T_co = TypeVar("T_co", covariant=True)


class Lazy(Sequence[T_co], Generic[T_co]):
    """Things made of rows of a table when they are asked for, a few at a time, as ``make`` makes them."""

    def __init__(self, rows: Rows, make: Callable[[Rows], Iterable[T_co]]) -> None:
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy[T_co]: ...

    def __getitem__(self, index: int | slice) -> T_co | Lazy[T_co]:
        if isinstance(index, slice):
            return Lazy(self._rows[index], self._make)
        return next(iter(self._make(self._rows[[index]])))

    def __iter__(self) -> Iterator[T_co]:
        for start in range(0, len(self._rows), _MADE_AT_ONCE):
            yield from self._make(self._rows[start : start + _MADE_AT_ONCE])


class Refused(NamedTuple):
    """A source that was named but cannot be restored, and why."""

    source: Source
    failure: Failure


@dataclass(frozen=True)
class SourceList:
    """Everything the inputs name. ``ignored`` counts files of folders that are no images, by extension.

    ``table`` (:data:`SOURCES`) has every source; ``chosen`` are the rows somebody asked for, ``failures`` says which of
    them cannot be used. ``places`` has one spelling for each file, to compare with others.
    """

    table: pa.Table
    places: pa.ChunkedArray
    chosen: NDArray[np.bool_]
    failures: Mapping[int, Failure]
    ignored: Mapping[str, int]

    @property
    def usable(self) -> Rows:
        """The rows that were asked for and can be used."""
        usable = self.chosen.copy()
        usable[list(self.failures)] = False
        return np.flatnonzero(usable)

    @property
    def sources(self) -> Lazy[Source]:
        """The sources that were asked for and can be used."""
        return Lazy(self.usable, self.make)

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Those that cannot."""
        rows = sorted(self.failures)
        return tuple(map(Refused, self.make(np.array(rows, np.int64)), (self.failures[row] for row in rows)))

    def make(self, rows: Rows) -> Iterator[Source]:
        """The sources of some rows."""
        return sources_of(self.table, rows)


def sources_of(table: pa.Table, rows: Rows) -> Iterator[Source]:
    """Some rows of a table of sources as what they stand for."""
    known = table.select([name for name in table.column_names if name in SOURCES.names])
    for row in known.take(pa.array(rows)).to_pylist():
        yield Source(**{**row, "version": row["version"] or "", "size": row["size"] or 0})


class ListRow(BaseModel):
    """One row of a list. Only ``uri`` is required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: Annotated[str, StringConstraints(min_length=1)] = Field(
        description="The image: a path, which counts from the list's folder, or a URI."
    )
    id: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Its name in log and messages, no other's; left out: as relative."
    )
    relative: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = Field(
        default=None, description="Its place below the output; left out: that below the list's folder."
    )
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{64}$", to_lower=True)] | None = Field(
        default=None, description="Hash of the file, which is compared; planning then does not look the file up."
    )
    prompt: str | None = Field(default=None, description="Its caption; none is made then.")
    negative_prompt: str | None = Field(
        default=None, description="What guidance leads away from; left out: as the manifest says."
    )
    upscale: Annotated[float, Field(ge=0.1, le=16)] | None = Field(
        default=None, description="Output side / input side; left out: as the manifest says."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Its seed; left out: a hash of the run seed and the file."
    )
    material: Material | None = Field(default=None, description="What it is; left out: as the manifest says.")
    page: Annotated[int, Field(ge=1, le=65_535)] | None = Field(
        default=None, description="Page of a TIFF with several; its number becomes part of the output's name."
    )


def list_sources(
    manifest: Manifest, manifest_uri: str, choose: Callable[[pa.Table], NDArray[np.bool_]] | None = None
) -> SourceList:
    """Every image that the manifest's inputs name, in the order of the inputs, names sorted within each.

    ``choose`` says which of the named ones are asked for; only these are looked up. Raises ManifestError when an input
    matches nothing, a list is malformed, or two sources share an id or a file.
    """
    ignored: Counter[str] = Counter()
    table = pa.concat_tables(
        (piece for reference in manifest.inputs for piece in _expand(reference, manifest, manifest_uri, ignored)),
        promote_options="default",
    )
    places = _places(table)
    _refuse_duplicates(table, places, manifest_uri)
    chosen = np.ones(len(table), bool) if choose is None else choose(table)
    table, failures = _look(table, chosen)
    return SourceList(table, places, chosen, failures, dict(sorted(ignored.items())))


# --- the four kinds of input ---------------------------------------------------------------------------------------


def _expand(reference: str, manifest: Manifest, manifest_uri: str, ignored: Counter[str]) -> Iterable[pa.Table]:
    if store.exists(reference):
        if _extension(reference) in LIST_EXTENSIONS:
            return _read_list(reference)
        return _tables([(reference, store.name(reference), None)], reference)
    if store.is_folder(reference):
        return _from_folder(reference, manifest, manifest_uri, ignored)
    if store.has_glob(reference):
        return _from_glob(reference, manifest, manifest_uri, ignored)
    extension = _extension(reference)
    if extension in LIST_EXTENSIONS:
        raise ManifestError(f"{manifest_uri}: inputs: the list {reference} does not exist")
    if extension not in IMAGE_EXTENSIONS:
        raise ManifestError(f"{manifest_uri}: inputs: {reference} does not exist; give a file, folder, glob or list")
    return _tables([(reference, store.name(reference), None)], reference)  # one image: a refusal, not an error


def _from_folder(folder: str, manifest: Manifest, manifest_uri: str, ignored: Counter[str]) -> list[pa.Table]:
    output = manifest.output.uri
    if store.normalize(output) == store.normalize(folder) or store.relative_to(folder, output) is not None:
        raise ManifestError(
            f"{manifest_uri}: output.uri {output} holds the input folder {folder}; "
            f"its files would be taken for outputs: choose a folder beside or inside the input"
        )
    inside = store.relative_to(output, folder)

    def images() -> Iterator[_Found]:
        for found in store.list_tree(folder):
            relative = store.relative_to(found.uri, folder)
            if relative is None or (inside is not None and f"{relative}/".startswith(f"{inside}/")):
                continue  # an earlier output of this manifest
            if _hidden(relative) or _extension(relative) not in IMAGE_EXTENSIONS:
                ignored[_extension(relative) or "(no extension)"] += 1
            else:
                yield found.uri, relative, found

    named = list(_tables(images(), folder))
    if not named:
        others = sum(ignored.values())
        raise ManifestError(
            f"{manifest_uri}: inputs: the folder {folder} holds no image ({others} other files); "
            f"known extensions: {' '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return named


def _from_glob(pattern: str, manifest: Manifest, manifest_uri: str, ignored: Counter[str]) -> list[pa.Table]:
    root = store.glob_root(pattern)
    others: Counter[str] = Counter()

    def images() -> Iterator[_Found]:
        for found in store.expand_glob(pattern):
            if store.relative_to(found.uri, manifest.output.uri) is not None:
                continue  # an earlier output of this manifest
            if _extension(found.uri) not in IMAGE_EXTENSIONS:
                others[_extension(found.uri) or "(no extension)"] += 1
            else:
                yield found.uri, store.relative_to(found.uri, root) or store.name(found.uri), found

    named = list(_tables(images(), pattern))
    ignored += others
    if not named:
        count = sum(others.values())
        raise ManifestError(f"{manifest_uri}: inputs: no image matches the pattern {pattern} ({count} other files)")
    return named


_Found = tuple[str, str, store.ObjectInfo | None]  # URI, path below the output, and what a listing said


def _tables(images: Iterable[_Found], origin: str) -> Iterator[pa.Table]:
    stream = iter(images)
    while piece := list(islice(stream, _PIECE)):
        uris, relatives, found = zip(*piece, strict=True)
        columns = {"id": relatives, "uri": uris, "origin": [origin] * len(piece), "relative": relatives}
        columns["version"] = [one and one.version for one in found]
        columns["size"] = [one and one.size for one in found]
        yield pa.table({name: pa.array(values, SOURCES.field(name).type) for name, values in columns.items()})


def _extension(uri: str) -> str:
    stem, dot, extension = store.name(uri).rpartition(".")
    return f".{extension.lower()}" if dot and stem else ""


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))  # .DS_Store, ._photo.jpg, .thumbnails/


# --- lists ---------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Some rows of a list. ``table`` has its columns as they are; None: they fit no table."""

    numbers: Rows  # of lines or rows, for messages
    table: pa.Table | None
    rows: Callable[[int], dict[str, Any]]  # one row: what is there of it


def _read_list(uri: str) -> list[pa.Table]:
    label, extension = store.name(uri), _extension(uri)
    read = {".csv": _csv_pieces, ".jsonl": _jsonl_pieces, ".parquet": _parquet_pieces}[extension]
    tables, problems = [], list[str]()
    with store.local_copy(uri) as path:
        try:
            for piece in read(path, label):
                # CSV knows only text, so "2" may become 2.0; the typed formats must already have it right
                tables.append(_checked(piece, uri, extension != ".csv", problems))
        except UnicodeDecodeError:
            store.read_text(uri)  # raises, and says where
            raise
    refuse(problems)
    if not sum(map(len, tables)):
        raise ManifestError(f"{uri}: the list has no rows")
    return tables


def _csv_pieces(path: Path, label: str) -> Iterator[_Piece]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [column.strip() for column in next(reader, [])]
            _check_columns(header, f"{label}:1")
            end, more = reader.line_num, True
            while more:
                columns: list[list[str]] = [[] for _ in header]
                numbers = [np.empty(0, np.int64)]
                while len(columns[0]) < _PIECE and (more := bool(rows := list(islice(reader, _AT_ONCE)))):
                    found, end = _line_numbers(rows, end, reader.line_num), reader.line_num
                    if set(map(len, rows)) != {len(header)}:
                        found, rows = _whole_rows(rows, found, len(header), label)
                    numbers.append(found)
                    for column, cells in zip(columns, zip(*rows, strict=True), strict=bool(rows)):
                        column.extend(cells)
                if columns[0]:
                    texts = [pa.array(cells, TEXT) for cells in columns]
                    given = [pc.if_else(pc.equal(cells, ""), None, cells) for cells in texts]
                    yield _typed_piece(np.concatenate(numbers), pa.table(given, names=header))
        except csv.Error as error:
            raise ManifestError(f"{label}:{reader.line_num}: is not CSV: {error}") from error


def _line_numbers(rows: Sequence[Sequence[str]], before: int, last: int) -> Rows:
    """The line each row begins on, of lines ``before + 1`` to ``last``."""
    numbers = np.arange(before + 1, before + 1 + len(rows))
    if last - before > len(rows):  # there are line breaks in quotes
        breaks = [sum(len(_LINE_BREAK.findall(cell)) for cell in row) for row in rows]
        numbers[1:] += np.cumsum(breaks)[:-1]
    return numbers


_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def _whole_rows(rows: Sequence[list[str]], numbers: Rows, width: int, label: str) -> tuple[Rows, list[list[str]]]:
    """Without empty lines. Raises ManifestError if a row has more or fewer fields than the header."""
    for number, row in zip(numbers, rows, strict=True):
        if len(row) not in (0, width):
            raise ManifestError(
                f"{label}:{number}: has {len(row)} fields, the header has {width}; "
                f"put text that contains a comma in double quotes"
            )
    return numbers[[len(row) > 0 for row in rows]], [row for row in rows if row]


def _jsonl_pieces(path: Path, label: str) -> Iterator[_Piece]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        rows = _jsonl_rows(file, label)
        while piece := list(islice(rows, _PIECE)):
            numbers, values = zip(*piece, strict=True)
            table: pa.Table | None = None
            columns = dict.fromkeys(key for row in values for key in row)
            with suppress(pa.ArrowException, OverflowError):  # a column of several types: its rows are looked at singly
                table = pa.table({name: pa.array([row.get(name) for row in values]) for name in columns})
            yield _Piece(np.array(numbers, np.int64), table, values.__getitem__)


def _jsonl_rows(lines: Iterable[str], label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_no_key_twice)
        except ValueError as error:
            raise ManifestError(f"{label}:{number}: is not a line of JSON: {error}") from error
        if not isinstance(values, dict):
            shown = line.rstrip("\n")[:60]
            raise ManifestError(f'{label}:{number}: must be an object such as {{"uri": "a.tif"}}, saw {shown}')
        _check_columns(values, f"{label}:{number}")
        yield number, {key: value for key, value in values.items() if value is not None}


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"key '{twice[0]}' is given twice")
    return dict(pairs)


def _parquet_pieces(path: Path, label: str) -> Iterator[_Piece]:
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _check_columns(file.schema_arrow.names, label)
            count = 0
            for batch in file.iter_batches(_PIECE, use_threads=False):
                yield _typed_piece(np.arange(count + 1, count + len(batch) + 1), pa.Table.from_batches([batch]))
                count += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{label}: is not a Parquet file: {error}") from error


def _typed_piece(numbers: Rows, table: pa.Table) -> _Piece:
    def row(index: int) -> dict[str, Any]:
        (values,) = table.slice(index, 1).to_pylist()
        return {key: value for key, value in values.items() if value is not None}

    return _Piece(numbers, table, row)


def _checked(piece: _Piece, list_uri: str, strict: bool, problems: list[str]) -> pa.Table:
    """The sources of a piece of a list; what is wrong with it is added to ``problems``."""
    label, folder = store.name(list_uri), store.parent(list_uri)
    plain, table = np.zeros(len(piece.numbers), bool), SOURCES.empty_table()
    if piece.table is not None:
        plain, table = _plain_sources(piece.table, piece.numbers, label, folder, strict)
    odd = []
    for index in np.flatnonzero(~plain):
        origin = f"{label}:{piece.numbers[index]}"
        try:
            odd.append(_from_row(ListRow.model_validate(piece.rows(int(index)), strict=strict), folder, origin))
        except ValidationError as error:
            problems += [f"{origin}: {line}" for line in _row_problems(error)]
        except StoreError as error:
            problems.append(f"{origin}: {error}")
    if not odd or problems:
        return table
    unseen = {"version": None, "size": None}
    found = pa.Table.from_pylist([dataclasses.asdict(source) | unseen for source in odd], schema=SOURCES)
    order = np.argsort(np.concatenate([np.flatnonzero(plain), np.flatnonzero(~plain)]))
    return pa.concat_tables([table, found], promote_options="default").take(pa.array(order))


def _check_columns(columns: Iterable[str], place: str) -> None:
    columns, known = list(columns), list(ListRow.model_fields)
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


def _from_row(row: ListRow, folder: str, origin: str) -> Source:
    uri = store.resolve(folder, store.refuse_credentials(row.uri))
    relative = row.relative or _mirrored(uri, folder)
    if row.relative is not None and (row.relative.startswith("/") or "://" in row.relative or "\0" in row.relative):
        raise StoreError(f"relative {row.relative!r} must lead down from output.uri; write it like 'box1/photo.tif'")
    if not relative or ".." in relative.split("/"):  # the output mirrors it and must stay below output.uri
        named = f"uri {row.uri!r}" if row.relative is None else f"relative {row.relative!r}"
        raise StoreError(f"{named} does not name a file; write it without '..'")
    if row.page is not None and row.relative is None:
        relative = _of_page(relative, row.page)
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


def _mirrored(uri: str, folder: str) -> str:
    """Where the output of ``uri`` goes if its list, in ``folder``, does not say."""
    relative = store.relative_to(uri, folder)
    if relative is not None:
        return relative
    # A pure function of the URI: whatever else is in the list, the output keeps its place.
    return (str(store.local_path(uri)) if store.is_local(uri) else uri.partition("://")[2]).strip("/")


def _of_page(relative: str, page: int) -> str:
    stem, extension = posixpath.splitext(relative)
    return f"{stem}-p{page:03d}{extension}"  # each page has an output of its own


# --- rows as columns -----------------------------------------------------------------------------------------------


def _plain_sources(
    listed: pa.Table, numbers: Rows, label: str, folder: str, strict: bool
) -> tuple[NDArray[np.bool_], pa.Table]:
    """Which rows of a list are right beyond doubt, and the sources that :func:`_from_row` would make of them.

    Columns are tested with what :class:`ListRow` and ``_from_row`` demand, or with more: all others go there.
    """
    plain = np.ones(len(listed), bool)
    columns: dict[str, pa.ChunkedArray] = {}
    for name in listed.column_names:
        columns[name], good = _plain_column(listed.column(name), SOURCES.field(name).type, strict)
        if name in _PLAIN:
            good = pc.and_(good, pc.fill_null(_PLAIN[name](columns[name]), True))
        plain &= good.to_numpy(zero_copy_only=False)
    paths = split(pc.fill_null(columns["uri"], ""))
    plain &= pc.is_valid(columns["uri"]).to_numpy() & ~pc.is_in(paths.names, pa.array(["", ".", ".."], TEXT)).to_numpy()
    places = [_place(one, folder) for one in paths.folders]
    plain &= np.array([place is not None for place in places], bool)[paths.numbers]

    numbers_of, names = pa.array(paths.numbers[plain]), paths.names
    if not plain.all():
        chosen = pa.array(plain)
        columns, names = {name: column.filter(chosen) for name, column in columns.items()}, names.filter(chosen)
    columns["uri"] = joined(_texts(place and place[0] for place in places).take(numbers_of), names)
    relative = joined(_texts(place and place[1] for place in places).take(numbers_of), names)
    if "page" in columns:
        pages = zip(relative.to_pylist(), columns["page"].to_pylist(), strict=True)
        relative = _texts(path if page is None else _of_page(path, page) for path, page in pages)
    columns["relative"] = pc.coalesce(columns["relative"], relative) if "relative" in columns else relative
    columns["id"] = pc.coalesce(columns["id"], columns["relative"]) if "id" in columns else columns["relative"]
    columns["origin"] = joined(f"{label}:", pa.array(numbers[plain]).cast(TEXT))
    if "sha256" in columns:
        columns["sha256"] = pc.ascii_lower(columns["sha256"])
    given = [name for name, column in columns.items() if column.null_count < len(column) or name in ("id", "uri")]
    unseen = {name: pa.nulls(int(plain.sum()), SOURCES.field(name).type) for name in ("version", "size")}
    return plain, pa.table({name: columns[name] for name in given} | unseen)


def _plain_column(column: pa.ChunkedArray, wanted: pa.DataType, strict: bool) -> tuple[pa.ChunkedArray, Any]:
    """The column as ``wanted``, and which of its values are beyond doubt of that type, or null."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    missing = pa.chunked_array([pa.nulls(len(column), wanted)])
    right = text if pa.types.is_large_string(wanted) else pa.types.is_integer(kind)
    if pa.types.is_floating(wanted):
        right = right or pa.types.is_floating(kind)
    if text and not strict and not pa.types.is_large_string(wanted):
        number = r"^[1-9][0-9]{0,15}$" if pa.types.is_integer(wanted) else r"^[0-9]{1,9}(\.[0-9]{1,6})?$"
        good = pc.fill_null(pc.match_substring_regex(column, number), True)
        return pc.if_else(good, column, None).cast(wanted), good
    if right:
        try:
            return column.cast(wanted), pc.is_valid(pc.fill_null(column.is_null(), True))
        except pa.ArrowInvalid:
            pass  # a number that is too large
    return missing, column.is_null()


def _good_id(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    good = pc.match_substring_regex(ids, r"^[!-~]([ -~]{0,1000}[!-~])?$")
    return _in_python(ids, good, lambda text: text.isprintable() and text.strip() == text and len(text) <= 1024)


def _in_python(column: pa.ChunkedArray, good: pa.ChunkedArray, test: Callable[[str], bool]) -> pa.ChunkedArray:
    """``good``, and where it is not and the value has letters beyond ASCII, what ``test`` says."""
    asked = pc.and_(pc.invert(good), pc.invert(pc.string_is_ascii(column)))
    answers = [test(text) for text in column.filter(asked).to_pylist()]
    return pc.replace_with_mask(good.combine_chunks(), asked.combine_chunks(), pa.array(answers, pa.bool_()))


# What is beyond doubt, by column; null stays null.
_PLAIN: dict[str, Callable[[pa.ChunkedArray], pa.ChunkedArray]] = {
    "uri": lambda column: pc.invert(pc.match_substring_regex(column, r"[\x00-\x1f\x7f\\?&]|://.*@|^~")),
    "id": _good_id,
    "relative": lambda column: pc.and_(
        pc.match_substring_regex(column, r"(?s)^[^/~].{0,999}$"),
        pc.invert(pc.match_substring_regex(column, r"[\x00-\x1f\x7f\\]|://|(^|/)\.{0,2}(/|$)")),
    ),
    "sha256": lambda column: pc.match_substring_regex(column, r"^[0-9a-fA-F]{64}$"),
    "upscale": lambda column: pc.and_(pc.greater_equal(column, 0.1), pc.less_equal(column, 16.0)),
    "seed": lambda column: pc.greater_equal(column, 0),
    "material": lambda column: pc.is_in(column, pa.array(get_args(Material), TEXT), skip_nulls=True),
    "page": lambda column: pc.and_(pc.greater_equal(column, 1), pc.less_equal(column, 65_535)),
}


def _place(named: str, folder: str) -> tuple[str, str] | None:
    """What stands before a name in the URI and in the mirrored path of rows that name a file in ``named``."""
    try:
        uri = store.resolve(folder, f"{named}_")  # any name
        relative = _mirrored(uri, folder)
    except (StoreError, ValueError):
        return None
    return None if ".." in relative.split("/") else (uri[:-1], relative[:-1])


class Split(NamedTuple):
    """Paths taken apart: what is before the name (empty, or ending in a slash), once each, and the names."""

    folders: list[str]
    numbers: Rows  # of each path's folder
    names: pa.ChunkedArray


def split(paths: pa.ChunkedArray) -> Split:
    """Take paths or URIs apart."""
    known: dict[str, int] = {}
    numbers, names = [np.empty(0, np.int64)], []
    for start in range(0, len(paths), _PIECE):  # each needs several copies
        folders, found = cut(joined("/", paths.slice(start, _PIECE)), "/")  # so that each has a slash
        distinct = folders.unique()
        known_as = [known.setdefault(f"{folder}/"[1:], len(known)) for folder in distinct.to_pylist()]
        numbers.append(np.array(known_as, np.int64)[numbers_in(folders, distinct)])
        names += found.chunks
    return Split(list(known), np.concatenate(numbers), pa.chunked_array(names, TEXT))


def cut(paths: pa.ChunkedArray, mark: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """What is before and after the last ``mark`` of each of ``paths``, which all have one."""
    flat = [chunk.flatten() for chunk in pc.split_pattern(paths, mark, max_splits=1, reverse=True).chunks]
    before, after = ([one.take(pa.array(np.arange(at, len(one), 2))) for one in flat] for at in (0, 1))
    return pa.chunked_array(before, TEXT), pa.chunked_array(after, TEXT)


def numbers_in(column: pa.ChunkedArray, values: pa.Array) -> Rows:
    """Where in ``values`` each value of a column is, -1 if it is not there; a null is found if ``values`` has one."""
    return np.asarray(pc.fill_null(pc.index_in(column, value_set=values), -1), np.int64)


def mask(rows: Rows, count: int) -> NDArray[np.bool_]:
    """Which of ``count`` rows are among ``rows``."""
    found = np.zeros(count, bool)
    found[rows] = True
    return found


def joined(*parts: str | pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts put together, row by row."""
    texts = [pa.scalar(part, TEXT) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*texts, pa.scalar("", TEXT))


def repeated(column: pa.ChunkedArray) -> Rows:
    """The rows whose value another row has, too; nulls are no values."""
    if len(column.unique()) == len(column):
        return np.empty(0, np.int64)
    counts = column.drop_null().value_counts()
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    return np.flatnonzero(pc.is_in(column, pc.struct_field(twice, "values")))


def _texts(values: Iterable[str | None]) -> pa.Array:
    return pa.array(list(values), TEXT)


# --- what is there -------------------------------------------------------------------------------------------------


def _places(table: pa.Table) -> pa.ChunkedArray:
    """One spelling of the place of each source, so that no file is named twice.

    Links are followed: of folders always, of files unless a list vouches for them. Two files that it vouches for and
    that are the same have the same SHA-256, and these are followed.
    """
    uris = table.column("uri")
    paths = split(uris)
    spelled = [store.normalize(folder).rstrip("/") + "/" if folder else "" for folder in paths.folders]
    places = uris
    if spelled != paths.folders:
        places = joined(_texts(spelled).take(pa.array(paths.numbers)), paths.names)
    followed = np.array([store.is_local(folder) for folder in paths.folders], bool)[paths.numbers]
    if "sha256" in table.column_names:
        digests = table.column("sha256")
        followed &= mask(repeated(digests), len(table)) | digests.is_null().to_numpy()
    followed |= np.asarray(pc.equal(paths.names, ""))
    if followed.any():
        found = _texts(store.normalize(uri) for uri in uris.filter(pa.array(followed)).to_pylist())
        places = pc.replace_with_mask(places.combine_chunks(), pa.array(followed), found)
    return places if isinstance(places, pa.ChunkedArray) else pa.chunked_array([places])


def _refuse_duplicates(table: pa.Table, places: pa.ChunkedArray, manifest_uri: str) -> None:
    files = places
    if "page" in table.column_names:
        files = joined(places, "#", pc.fill_null(table.column("page").cast(TEXT), ""))
    suspects = np.union1d(repeated(files), repeated(table.column("id")))
    by_id: dict[str, Source] = {}
    by_file: dict[tuple[str, int | None], Source] = {}
    problems = []
    found = zip(sources_of(table, suspects), places.take(pa.array(suspects)).to_pylist(), strict=True)
    for source, place in found:
        first = by_file.setdefault((place, source.page), source)
        if first is not source:
            page = "" if source.page is None else f"page {source.page} of "
            problems.append(f"{_both(first, source)} name {page}the same file {source.uri}; remove one of them")
            continue
        first = by_id.setdefault(source.id, source)
        if first is not source:
            problems.append(f"{_both(first, source)} share the id '{source.id}'; give each a different one in a list")
    refuse(f"{manifest_uri}: {problem}" for problem in problems)


def _both(first: Source, second: Source) -> str:
    return f"{describe(first)} and {describe(second)}"


def describe(source: Source) -> str:
    """How a message points at a source: its row, or the input that led to it and its name."""
    if re.search(r":\d+$", source.origin):
        return f"{source.origin} ({source.uri})"
    return source.uri if source.uri == source.origin else f"{source.uri} (from {source.origin})"


def _look(table: pa.Table, chosen: NDArray[np.bool_]) -> tuple[pa.Table, dict[int, Failure]]:
    """The table with size and version of what had to be looked up, and what is wrong with rows that were asked for."""
    unseen = chosen & table.column("version").is_null().to_numpy()
    if "sha256" in table.column_names:
        unseen &= table.column("sha256").is_null().to_numpy()
    failures: dict[int, Failure] = {}
    rows = np.flatnonzero(unseen)
    if len(rows):
        versions, sizes = list[str | None](), list[int | None]()
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            for start in range(0, len(rows), _PIECE):
                piece = rows[start : start + _PIECE]
                for row, found in zip(piece.tolist(), pool.map(_find, sources_of(table, piece)), strict=True):
                    if isinstance(found, Failure):
                        failures[row] = found
                    versions.append(None if isinstance(found, Failure) else found.version)
                    sizes.append(None if isinstance(found, Failure) else found.size)
        for name, values in (("version", versions), ("size", sizes)):
            column = table.column(name).combine_chunks()
            filled = pc.replace_with_mask(column, pa.array(unseen), pa.array(values, column.type))
            table = table.set_column(table.column_names.index(name), name, filled)
    bad = chosen & np.asarray(pc.fill_null(pc.less_equal(table.column("size"), 0), False))
    for row, source in zip(np.flatnonzero(bad).tolist(), sources_of(table, np.flatnonzero(bad)), strict=True):
        if source.size < 0:
            failures[row] = _missing(source)
        else:
            message = f"{describe(source)}: is 0 bytes; upload it again or remove it from the inputs"
            failures[row] = Failure("plan", "empty", message)
    return table, failures


def _find(source: Source) -> store.ObjectInfo | Failure:
    try:
        found = store.find(source.uri)
    except StoreError as error:
        message = f"{describe(source)}: {error}"
        return Failure("plan", "unreachable" if error.retryable else "unreadable", message, error.retryable)
    return _missing(source) if found is None else found


def _missing(source: Source) -> Failure:
    message = f"{describe(source)}: does not exist; correct its name or remove it from the inputs"
    return Failure("plan", "missing", message)
