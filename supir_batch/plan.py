"""What a run would do, decided before any pixel is read: what is to do and why, what is done, what is refused.

Done means: the run log says so for the same source and the same settings, and the output is still there. The same
source has the same id and URI, and the same SHA-256 where a list gives one, else the same version (size and time, or
ETag). File names never decide. Planning writes nothing.

It costs as little as the question allows. A source with a SHA-256 is not looked up; whether outputs are there is seen
from one listing of their folder; settings are resolved once for all rows that say the same; the log is read in pieces,
and only columns that matter, and joined with the list by id. What is to do is what the list has and this join leaves
over. A job is made when somebody asks for it.

An image in which workers died twice, or that did not end in time, is quarantined: only a retry tries the same again.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from supir_batch import review, runlog, store
from supir_batch.captions import CAPTIONS_FOLDER
from supir_batch.errors import ManifestError, StoreError, refuse
from supir_batch.identity import IDENTIFYING, settings_hash
from supir_batch.manifest import (
    IMAGE_EXTENSIONS,
    SOURCES,
    TEXT,
    Lazy,
    Rows,
    SourceList,
    cut,
    describe,
    joined,
    list_sources,
    mask,
    numbers_in,
    repeated,
    sources_of,
    split,
)
from supir_batch.parts import PARTS_FOLDER
from supir_batch.resolve import resolve
from supir_batch.settings import Manifest
from supir_batch.types import Failure, Job, ModelRef, Settings, Source

AUDIT_FOLDER = "_audit"
"""Where an output keeps the pictures of its audit, below it."""

IIIF_FOLDER = "_iiif"
"""Where an output keeps what viewers want, below it."""

REPORT_FOLDER = "report"
"""Where an output keeps its report, below it."""

OWN_FOLDERS = (runlog.RUNS_FOLDER, PARTS_FOLDER, CAPTIONS_FOLDER, AUDIT_FOLDER, IIIF_FOLDER, REPORT_FOLDER)
"""The folders of an output in which no images of its sources lie."""

_EXTENSIONS = {
    "tiff": (".tif", ".tiff"),
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "jpeg2000": (".jp2", ".jpx", ".j2k"),
}
QUARANTINED = ("hang", "poison")
"""Kinds of failure that a run does not try again."""

_OF_REVIEWS = ("prompt", "preset", "restoration_tau", "seed")
_OVERRIDES = (  # what rows decide
    *("prompt", "negative_prompt", "upscale", "seed", "material", "page", "sidecar", "preset", "restoration_tau"),
    "replaces",
)
_LOOKUPS = 32  # concurrent reads of captions
_PIECE = 65_536  # names handed to Arrow at once
_MAX_EXPLAINED = 1000  # different earlier settings whose changes are told


@dataclass(frozen=True)
class Selection:
    """Which of a manifest's images a run is about, and in which order.

    ``only`` and ``besides`` are patterns for ids (case counts, ``*`` spans folders); without ``only``, all are meant.
    ``retry`` are ids of images that failed; of these, quarantined ones are tried again, too. ``redo`` are ids of images
    that a reviewer sent back. ``shuffle_seed`` decides the order of work; None: that of the inputs.
    """

    only: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    retry: frozenset[str] | None = None
    shuffle_seed: int | None = None
    redo: frozenset[str] | None = None

    def chosen(self, ids: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which ids are meant. Raises ManifestError when patterns were given and leave none."""
        chosen = np.ones(len(ids), bool)
        for patterns, wanted in ((self.only, True), (self.besides, False)):
            if patterns:
                matches = re.compile("|".join(map(fnmatch.translate, patterns))).match
                chosen &= np.fromiter(((matches(id) is not None) is wanted for id in ids.to_pylist()), bool, len(ids))
        if not chosen.any():
            given = ", ".join(map(repr, (*self.only, *self.besides)))
            raise ManifestError(f"no id is left of {len(ids)} by {given}; plan --json shows the ids")
        if self.redo is not None and (foreign := self.redo - set(ids.to_pylist())):
            raise ManifestError(
                f"{len(foreign)} of {len(self.redo)} images to redo are not among those of the manifest, "
                f"such as {min(foreign)!r}; give the manifest that they were restored with"
            )
        for wanted_ids in (self.retry, self.redo):
            if wanted_ids is not None:
                chosen &= np.asarray(pc.is_in(ids, pa.array(sorted(wanted_ids), TEXT)))
        return chosen

    def ordered(self, rows: Rows, count: int) -> Rows:
        """``rows`` (of ``count``, ascending) in the order of work; that of any two of them is always the same."""
        if self.shuffle_seed is None:
            return rows
        shuffled = np.random.default_rng(self.shuffle_seed).permutation(count)
        return shuffled[mask(rows, count)[shuffled]]


class Todo(NamedTuple):
    """Work to be done. ``reason``: ``new``, ``source changed``, ``settings changed: steps: 10 -> 20``, ..."""

    job: Job
    reason: str


class Done(NamedTuple):
    """Work that an earlier run did, and its output."""

    job: Job
    output_uri: str


class RefusedJob(NamedTuple):
    """A source that cannot be worked on, and why; becomes a failed outcome of the run."""

    job: Job
    failure: Failure


@dataclass(frozen=True)
class Plan:
    """Every image that was asked for, sorted by what happens to it. ``ignored``: other files, by extension.

    ``reasons``: how many images are to do for each reason, most frequent first. The reason of a quarantined image is
    what ended its last attempt.
    """

    output_uri: str
    todo: Sequence[Todo]
    done: Sequence[Done]
    refused: Sequence[RefusedJob]
    ignored: Mapping[str, int]
    quarantined: Sequence[Todo] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, int]:
        """The part of :attr:`reasons` that redoes earlier work because settings differ from the logged ones."""
        return {reason: count for reason, count in self.reasons.items() if reason.startswith("settings changed")}


def make_plan(
    manifest: Manifest,
    manifest_uri: str,
    model_sha256: str,
    captioner_identity: str = "",
    selection: Selection = Selection(),
) -> Plan:
    """Compare what the manifest names with what the run log below its output records.

    ``model_sha256``: hash of the weights that would be used, "" for engines without; ``captioner_identity``: likewise
    for caption mode ``llava``. Raises ManifestError when inputs are unusable, nothing is selected, two sources would
    write the same output, or an output would overwrite an input.
    """
    listed = list_sources(manifest, manifest_uri, lambda table: selection.chosen(table.column("id")))
    listed = replace(listed, table=_reviewed(listed.table, review.redone(review.read(manifest.output.uri))))
    names = _output_names(manifest, listed)
    _refuse_collisions(manifest, manifest_uri, listed, names)
    _refuse_overwriting(manifest, manifest_uri, listed, names)
    _refuse_links(manifest, names)
    work = _work(manifest, listed, names, _Models(model_sha256, captioner_identity))

    log = _compare(work)
    pending = mask(work.rows, len(work.table)) & ~mask(log.done, len(work.table))
    stuck = [row for row in sorted(log.quarantined) if pending[row] and selection.retry is None]
    quarantined = np.array(stuck, np.int64)
    todo = np.flatnonzero(pending & ~mask(quarantined, len(work.table)))
    reasons, texts = _reasons(work, log, todo)
    todo = selection.ordered(todo, len(work.table))
    counts: Counter[str] = Counter()
    for text, count in zip(texts, np.bincount(reasons[todo], minlength=len(texts)).tolist(), strict=True):
        counts[text] += count
    return Plan(
        output_uri=manifest.output.uri,
        todo=Lazy(todo, lambda rows: map(Todo, work.jobs(rows), (texts[reasons[row]] for row in rows))),
        done=Lazy(
            log.done,
            lambda rows: (
                Done(job, job.output_stem + log.extension(row)) for row, job in zip(rows, work.jobs(rows), strict=True)
            ),
        ),
        refused=Lazy(
            np.array(sorted(work.failures), np.int64),
            lambda rows: map(RefusedJob, work.refused_jobs(rows), (work.failures[row] for row in rows)),
        ),
        ignored=listed.ignored,
        quarantined=Lazy(quarantined, lambda rows: map(Todo, work.jobs(rows), (log.quarantined[row] for row in rows))),
        reasons={text: count for text, count in counts.most_common() if count},
    )


def _reviewed(table: pa.Table, wanted: Mapping[str, review.Decision]) -> pa.Table:
    """The list with what reviewers want for images that they sent back."""
    rows = numbers_in(pa.chunked_array([pa.array(wanted, TEXT)]), table.column("id").combine_chunks())
    decided = {int(row): one for row, one in zip(rows, wanted.values(), strict=True) if row >= 0}
    if not decided:
        return table
    for name in (*_OF_REVIEWS, "replaces"):
        given = {
            row: value
            for row, one in sorted(decided.items())
            if (value := one.fingerprint if name == "replaces" else getattr(one, name)) is not None
        }
        if not given:
            continue
        kind = SOURCES.field(name).type
        there = name in table.column_names
        column = table.column(name).combine_chunks() if there else pa.nulls(len(table), kind)
        chosen = pa.array(mask(np.array(list(given)), len(table)))
        column = pc.replace_with_mask(column, chosen, pa.array(given.values(), kind))
        if there:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


# --- where outputs go ----------------------------------------------------------------------------------------------


class _Names(NamedTuple):
    """Where outputs go, without their extensions: paths below the output folder, and the folder of each."""

    paths: pa.ChunkedArray
    folders: list[str]
    numbers: Rows  # of each path's folder


def _output_names(manifest: Manifest, listed: SourceList) -> _Names:
    """Raises ManifestError when a source gives no name."""
    table, output = listed.table, manifest.output
    folders, numbers, files = split(table.column("relative"))
    below = [_below(output.uri, folder) if folder else "" for folder in folders]
    values: dict[str, Callable[[], Any]] = {
        "stem": lambda: _stems(files),
        "id": lambda: pc.replace_substring(_stems(table.column("id")), "/", "_"),
        "engine": lambda: manifest.engine.name,
        "upscale": lambda: _scales(table, manifest.engine.upscale),
    }
    parsed = string.Formatter().parse(output.naming)
    names = joined(
        *(part for text, name, _, _ in parsed for part in (text, *([] if name is None else [values[name]()])))
    )
    bad = np.array([folder is None for folder in below], bool)[numbers]
    plain = pc.and_(
        pc.string_is_ascii(names), pc.match_substring_regex(names, r"^[^\x00\\]*[^\x00-\x20\\.][^\x00\\]*$")
    )
    odd = np.flatnonzero(~np.asarray(plain))
    named = names.take(pa.array(odd)).to_pylist()
    bad[odd] |= np.fromiter((_below(output.uri, name) is None for name in named), bool, len(odd))
    refuse(
        f"{describe(source)}: gives no output name; its path {source.relative!r} or id {source.id!r} must name a file"
        for source in listed.make(np.flatnonzero(bad))
    )
    heads = [f"{folder}/" if folder else "" for folder in below]
    return _Names(joined(pa.array(heads, TEXT).take(pa.array(numbers)), names), heads, numbers)


def _below(output_uri: str, path: str) -> str | None:
    """``path`` as it will be called below the output; None: nothing may be called so."""
    try:
        return store.join(output_uri, path)[len(output_uri.rstrip("/")) + 1 :]
    except StoreError:
        return None


def _scales(table: pa.Table, otherwise: float) -> Any:
    if "upscale" not in table.column_names:
        return f"{otherwise:g}"
    given = table.column("upscale").unique()
    texts = [f"{otherwise if one is None else one:g}" for one in given.to_pylist()]
    return pa.array(texts, TEXT).take(pa.array(numbers_in(table.column("upscale"), given)))


# the part of a name before an extension of images, as _without_extension
_STEM = rf"(?i)([^./][^/]*)(?:{'|'.join(map(re.escape, sorted(IMAGE_EXTENSIONS)))})$"


def _stems(names: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(names, _STEM, r"\1")


# --- jobs ----------------------------------------------------------------------------------------------------------


class _Models(NamedTuple):
    """What the models of a run are."""

    sha256: str
    captioner_identity: str


@dataclass(frozen=True)
class _Work:
    """The list with all that was decided about its rows; makes jobs of them."""

    manifest: Manifest
    models: _Models
    table: pa.Table  # sources; column ``sidecar``: the text beside an image, if that is asked for
    paths: pa.ChunkedArray  # of outputs, without extension
    rows: Rows  # that can be worked on
    failures: Mapping[int, Failure]  # of those that were asked for and cannot
    groups: Rows  # which rows have the same settings; -1: not resolved
    hashes: list[str]  # of the settings of each group

    def settings(self, source: Source, sidecar: str | None) -> Settings:
        return resolve(self.manifest, source, self.models.sha256, sidecar, self.models.captioner_identity)

    def jobs(self, rows: Rows) -> Iterator[Job]:
        """The jobs of rows that can be worked on."""
        resolved: dict[int, Settings] = {}
        for row, source, sidecar, path in self._described(rows):
            group = int(self.groups[row])
            if group not in resolved:
                resolved[group] = self.settings(source, sidecar)
            yield self._job(source, resolved[group], self.hashes[group], path)

    def refused_jobs(self, rows: Rows) -> Iterator[Job]:
        """The jobs of rows that cannot, for the log: a prompt they lack does not matter any more."""
        for _, source, sidecar, path in self._described(rows):
            if source.prompt is None and self.manifest.caption.mode == "manifest":
                settings = self.settings(replace(source, prompt=""), sidecar)
            else:
                settings = self.settings(source, sidecar or "")
            yield self._job(source, settings, settings_hash(settings), path)

    def _described(self, rows: Rows) -> Iterator[tuple[int, Source, str | None, str]]:
        at = pa.array(rows)
        sidecars: list[str | None] = [None] * len(rows)
        if "sidecar" in self.table.column_names:
            sidecars = self.table.column("sidecar").take(at).to_pylist()
        return zip(rows.tolist(), sources_of(self.table, rows), sidecars, self.paths.take(at).to_pylist(), strict=True)

    def _job(self, source: Source, settings: Settings, digest: str, path: str) -> Job:
        manifest = self.manifest
        model = ModelRef(manifest.engine.weights, manifest.engine.config, settings.precision or "float32")
        return Job(
            source=source,
            settings=settings,
            settings_sha256=digest,
            output_stem=store.join(manifest.output.uri, path),
            output_root=manifest.output.uri,
            model=model if settings.engine == "supir" else None,
            captioner=(manifest.caption.model or "") if settings.captioner else "",
            sidecars=manifest.output.sidecars,
            signing=manifest.signing.files,
        )


def _work(manifest: Manifest, listed: SourceList, names: _Names, models: _Models) -> _Work:
    """Resolve the settings of all rows that can be worked on. Raises ManifestError when a prompt is missing."""
    table, failures, rows = listed.table, dict(listed.failures), listed.usable
    if manifest.caption.mode == "sidecar" and manifest.engine.name == "supir":
        table, unread = _with_sidecars(table, rows)
        failures |= unread
        rows = np.setdiff1d(rows, list(unread))
    groups = np.full(len(table), -1)
    groups[rows], first = _same_overrides(table, rows)
    work = _Work(manifest, models, table, names.paths, rows, failures, groups, [])
    missing = []
    for group, source, sidecar, _ in work._described(first):
        try:
            work.hashes.append(settings_hash(work.settings(source, sidecar)))
        except ManifestError:
            missing.append(groups[group])
    problems = []
    for _, source, sidecar, _ in work._described(rows[np.isin(groups[rows], missing)]) if missing else ():
        try:
            work.settings(source, sidecar)
        except ManifestError as error:
            problems.append(str(error))
    refuse(problems)
    return work


def _same_overrides(table: pa.Table, rows: Rows) -> tuple[Rows, Rows]:
    """A number for each of ``rows``, equal where a list overrides the same with the same; a row for each number."""
    numbers = np.zeros(len(rows), np.int64)
    for name in _OVERRIDES:
        if name in table.column_names:
            column = table.column(name).take(pa.array(rows))
            values = column.unique()
            numbers = numbers * len(values) + numbers_in(column, values)
            numbers = np.unique(numbers, return_inverse=True)[1]  # small again
    return numbers, rows[np.unique(numbers, return_index=True)[1]]


def _with_sidecars(table: pa.Table, rows: Rows) -> tuple[pa.Table, dict[int, Failure]]:
    """The table with the text beside each image that has no prompt, and what is wrong with others of ``rows``."""
    failures: dict[int, Failure] = {}
    texts: list[str | None] = [None] * len(table)
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        for start in range(0, len(rows), _PIECE):
            piece = rows[start : start + _PIECE]
            for row, read in zip(piece.tolist(), pool.map(_read_sidecar, sources_of(table, piece)), strict=True):
                if isinstance(read, Failure):
                    failures[row] = read
                else:
                    texts[row] = read
    return table.append_column("sidecar", pa.array(texts, TEXT)), failures


def _without_extension(name: str) -> str:
    stem, extension = posixpath.splitext(name)
    return stem if stem and extension.lower() in IMAGE_EXTENSIONS else name


def _read_sidecar(source: Source) -> str | Failure | None:
    """The text beside an image: ``photo.jpg.txt``, else ``photo.txt``; None if it has a prompt already."""
    if source.prompt is not None:
        return None
    names = list(dict.fromkeys([f"{source.uri}.txt", f"{_without_extension(source.uri)}.txt"]))
    try:
        for uri in names:
            if store.exists(uri):
                return store.read_text(uri)
    except StoreError as error:
        return Failure("plan", "unreadable-caption", f"{describe(source)}: {error}", error.retryable)
    expected = " or ".join(store.name(uri) for uri in names)
    message = f"{describe(source)}: has no caption file; caption.mode 'sidecar' expects {expected}"
    return Failure("plan", "no-caption", message)


# --- what would destroy something ----------------------------------------------------------------------------------


def _refuse_collisions(manifest: Manifest, manifest_uri: str, listed: SourceList, names: _Names) -> None:
    """Two sources must not write one output, also where case or Unicode form do not count (Windows, macOS)."""
    reserved = [folder.partition("/")[0].casefold() in OWN_FOLDERS for folder in names.folders]
    own = np.array(reserved, bool)[names.numbers]
    folded = _folded(names.paths)
    suspects = np.union1d(np.flatnonzero(own), repeated(folded))
    first: dict[str, Source] = {}
    problems = []
    paths = (column.take(pa.array(suspects)).to_pylist() for column in (names.paths, folded))
    for source, path, spelled in zip(listed.make(suspects), *paths, strict=True):
        folder, _, below = path.partition("/")
        if below and folder.casefold() in OWN_FOLDERS:
            problems.append(f"{describe(source)} would be written below {folder}, which is reserved")
            continue
        earlier = first.setdefault(spelled, source)
        if earlier is not source:
            stem = store.join(manifest.output.uri, path)
            problems.append(
                f"{describe(earlier)} and {describe(source)} would both be written to {stem}.*; "
                f"rename one, or use {{id}} in output.naming"
            )
    refuse(f"{manifest_uri}: {problem}" for problem in problems)


def _folded(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths that are equal where neither case nor Unicode form count."""
    foreign = pc.invert(pc.string_is_ascii(paths)).combine_chunks()
    spelled = [unicodedata.normalize("NFC", path).casefold() for path in paths.filter(foreign).to_pylist()]
    lower = pc.ascii_lower(paths)
    return pc.replace_with_mask(lower.combine_chunks(), foreign, pa.array(spelled, TEXT)) if spelled else lower


def _refuse_overwriting(manifest: Manifest, manifest_uri: str, listed: SourceList, names: _Names) -> None:
    read = split(listed.places)
    written = [store.join(manifest.output.uri, *([one] if one else [])) for one in names.folders]
    # an output can only overwrite what is read from a folder that it goes to
    targets = [f"{store.normalize(one).rstrip('/')}/".casefold() for one in written]
    origins = [folder.casefold() for folder in read.folders]
    shared = set(targets) & set(origins)
    if not shared:
        return
    threatened = np.flatnonzero(np.array([one in shared for one in origins], bool)[read.numbers])
    places = listed.places.take(pa.array(threatened)).to_pylist()
    inputs = {place.casefold(): row for place, row in zip(places, threatened.tolist(), strict=True)}
    extensions = _EXTENSIONS.get(manifest.output.format, tuple(sorted(IMAGE_EXTENSIONS)))
    rows = np.flatnonzero(np.array([one in shared for one in targets], bool)[names.numbers])
    stems = names.paths.take(pa.array(rows)).to_pylist()
    problems = []
    for row, path in zip(rows.tolist(), stems, strict=True):
        stem = targets[names.numbers[row]] + store.name(path).casefold()
        victim = next((inputs[stem + one] for one in extensions if stem + one in inputs), None)
        if victim is not None:
            source, threatened_one = listed.make(np.array([row, victim]))
            problems.append(
                f"the output of {describe(source)} would overwrite the input {describe(threatened_one)}; "
                f"choose another output.uri or output.naming"
            )
    refuse(f"{manifest_uri}: {problem}" for problem in problems)


def _refuse_links(manifest: Manifest, names: _Names) -> None:
    root = manifest.output.uri
    problems: dict[str, None] = {}  # each once, in order
    for folder in sorted({*names.folders, *(f"{name}/" for name in OWN_FOLDERS)}):
        try:
            store.refuse_links(store.join(root, f"{folder}any"), root)
        except StoreError as error:
            problems[str(error)] = None
    refuse(problems)


# --- what the log says ---------------------------------------------------------------------------------------------


class _Numbers:
    """Numbers for texts (or None), the same for all pieces of a log."""

    def __init__(self, texts: Sequence[str | None] = ()) -> None:
        self.texts = list(texts)
        self._number = {text: number for number, text in enumerate(self.texts)}

    def of(self, column: pa.ChunkedArray) -> Rows:
        """The number of each value."""
        distinct = column.unique()
        for text in distinct.to_pylist():
            if self._number.setdefault(text, len(self.texts)) == len(self.texts):
                self.texts.append(text)
        numbers = np.array([self._number[text] for text in distinct.to_pylist()], np.int64)
        return numbers[numbers_in(column, distinct)]


_ATTEMPT = np.dtype(
    [("row", "i4"), ("age", "i8"), ("settings", "i4"), ("kind", "i4"), ("message", "i4")]
    + [(name, "?") for name in ("failed", "same_uri", "identified", "same_source", "same_path")]
)
_OUTPUT = np.dtype([("row", "i4"), ("age", "i8"), ("extension", "i4"), ("counts", "?")])
_LOGGED = (
    *("id", "uri", "source_version", "source_sha256", "output_path"),
    *("settings_sha256", "status", "failure_kind", "failure_message", "finished_at"),
)


@dataclass(frozen=True)
class _Log:
    """What the log says about the rows of the list."""

    last: NDArray[np.void]  # _ATTEMPT: the newest of each row that has one
    settings: list[str | None]  # hashes, by their number in an attempt; first those of the groups
    words: list[str | None]  # kinds of failures, extensions
    done: Rows
    extensions: Rows  # of the outputs of done rows, in ``words``
    quarantined: Mapping[int, str]  # why, by row

    def extension(self, row: int) -> str:
        """Of the output of a row that is done."""
        return f".{self.words[self.extensions[row]]}"


def _compare(work: _Work) -> _Log:
    """Join the run log with the list."""
    output = work.manifest.output.uri
    settings, words, messages = _Numbers(work.hashes), _Numbers(), _Numbers([None])
    attempts, outputs = [np.empty(0, _ATTEMPT)], [np.empty(0, _OUTPUT)]
    pa.default_memory_pool().release_unused()  # of a million rows some hundred megabytes are kept for reuse
    for piece in runlog.stream_log(output, _LOGGED, 2**17):
        attempted, made = _compare_piece(work, piece, settings, words, messages)
        attempts.append(attempted)
        outputs.append(made)
    attempt, made = np.concatenate(attempts), np.concatenate(outputs)
    del attempts, outputs

    same = attempt[attempt["same_source"] & (attempt["settings"] == work.groups[attempt["row"]])]
    same = same[_newest(same["row"], same["age"])]
    stuck = same[same["failed"] & (same["message"] > 0)]
    last = attempt[_newest(attempt["row"], attempt["age"])]
    del attempt, same

    kept = _newest(made["row"].astype(np.int64) * len(words.texts) + made["extension"], made["age"])
    newest = made[np.sort(kept)]  # in the order of the log, which tells of two of the same age which is newer
    newest = newest[newest["counts"]]  # an output that later work has written over does not
    newest = newest[mask(work.rows, len(work.table))[newest["row"]]]
    newest = newest[_newest(newest["row"], newest["age"])]
    pa.default_memory_pool().release_unused()
    extensions = joined(".", pa.array(words.texts, TEXT).take(pa.array(newest["extension"])))
    newest = newest[_present(output, joined(work.paths.take(pa.array(newest["row"])), extensions), extensions)]
    extension = np.zeros(len(work.table), np.int64)
    extension[newest["row"]] = newest["extension"]
    return _Log(
        last=last,
        settings=settings.texts,
        words=words.texts,
        done=newest["row"],
        extensions=extension,
        quarantined={int(one["row"]): str(messages.texts[one["message"]]) for one in stuck},
    )


def _compare_piece(
    work: _Work, piece: pa.Table, settings: _Numbers, words: _Numbers, messages: _Numbers
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Attempts at images of the list, and outputs that lie where those of the list go, whoever made them."""
    texts = {name: piece.column(name).cast(TEXT) for name in _LOGGED[:5]}
    row = _rows_of(texts["id"], work.table.column("id"))
    known = row >= 0
    first, last = (int(row[known].min()), int(row[known].max())) if known.any() else (0, 0)
    at = pa.array(np.where(known, row - first, 0))

    def listed(column: pa.ChunkedArray) -> pa.ChunkedArray:
        return column.slice(first, last - first + 1).take(at)  # Arrow copies what it takes from

    def same(logged: pa.ChunkedArray, column: pa.ChunkedArray) -> NDArray[np.bool_]:
        return known & _true(pc.equal(logged, listed(column)))

    digests = pa.chunked_array([pa.nulls(len(work.table), TEXT)])
    if "sha256" in work.table.column_names:
        digests = work.table.column("sha256")
    vouched = listed(digests).is_valid().to_numpy()
    stems, extensions = cut(joined(pc.coalesce(texts["output_path"], "."), ""), ".")
    failed = _true(pc.equal(piece.column("status"), "failed"))
    stopped = pc.is_in(piece.column("failure_kind"), pa.array(QUARANTINED))
    reason = pc.binary_join_element_wise(piece.column("failure_kind"), piece.column("failure_message"), ": ")

    found = np.zeros(len(piece), _ATTEMPT)
    found["row"] = row
    found["age"] = pc.fill_null(piece.column("finished_at").cast(pa.int64()), 2**63 - 1)
    found["settings"] = settings.of(piece.column("settings_sha256"))
    found["kind"] = words.of(piece.column("failure_kind"))
    found["message"] = messages.of(pc.if_else(stopped, reason, None))
    found["failed"] = failed
    found["same_uri"] = same(texts["uri"], work.table.column("uri"))
    hashed, seen = texts["source_sha256"].is_valid().to_numpy(), texts["source_version"].is_valid().to_numpy()
    found["identified"] = np.where(vouched, hashed, seen)
    hash_is_same = same(texts["source_sha256"], digests)
    version_is_same = same(texts["source_version"], work.table.column("version"))
    found["same_source"] = found["same_uri"] & np.where(vouched, hash_is_same, version_is_same)
    found["same_path"] = same(stems, work.paths)
    place = np.where(found["same_path"], row, -1)
    elsewhere = ~failed & ~found["same_path"]
    if elsewhere.any():
        place[elsewhere] = _rows_of(stems.filter(pa.array(elsewhere)), work.paths)

    made = np.zeros(len(piece), _OUTPUT)
    made["row"], made["age"] = place, found["age"]
    made["extension"] = words.of(extensions)
    made["counts"] = found["same_path"] & found["same_source"] & (found["settings"] == work.groups[row])
    return found[known], made[(place >= 0) & ~failed]


def _rows_of(column: pa.ChunkedArray, listed: pa.ChunkedArray) -> Rows:
    """The row of the list, in which no value is twice, that has each value; -1 if none has.

    As ``numbers_in``, but what is hashed is the smaller side, anew for each piece of a log.
    """
    distinct = column.unique()
    found = numbers_in(listed, distinct)
    rows = np.full(len(distinct), -1)
    rows[found[found >= 0]] = np.flatnonzero(found >= 0)
    return rows[numbers_in(column, distinct)]


def _true(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.fill_null(values, False))


def _newest(keys: Rows, ages: Rows) -> Rows:
    """Where the newest of each key is."""
    order = np.lexsort((ages, keys))
    ordered = keys[order]
    newest: Rows = order[np.append(ordered[1:] != ordered[:-1], True)[: len(order)]]
    return newest


def _present(output_uri: str, paths: pa.ChunkedArray, extensions: pa.Array) -> NDArray[np.bool_]:
    """Which of these paths there are below the output, by one listing of it."""
    if not len(paths):
        return np.zeros(0, bool)
    endings = tuple(extensions.unique().to_pylist())
    names = [pa.array(piece, TEXT) for piece in store.list_names(output_uri, endings)]
    return np.asarray(pc.is_in(paths, pa.chunked_array(names, TEXT)))


# --- reasons -------------------------------------------------------------------------------------------------------


def _reasons(work: _Work, log: _Log, todo: Rows) -> tuple[Rows, list[str]]:
    """Why work is needed, seen from the newest logged attempt at the same id: a number for each row, and the texts."""
    at = np.full(len(work.table), -1)
    at[log.last["row"]] = np.arange(len(log.last))
    todo = todo[at[todo] >= 0]
    last = log.last[at[todo]]
    before = [f"failed before: {word}" for word in log.words]
    texts = ["new", "source changed", "output missing", "output name changed", *before]
    failed = last["kind"] + len(texts) - len(before)
    changed = last["settings"] != work.groups[todo]

    pairs = last["settings"].astype(np.int64) * len(work.hashes) + work.groups[todo]
    of_change = last["same_source"] & changed
    told, number = np.unique(pairs[of_change], return_inverse=True)
    change = np.zeros(len(todo), np.int64)
    change[of_change] = len(texts) + number
    texts += _changes(work, log, todo[of_change], told, number)

    cases = [
        (~last["same_uri"], 0),
        (last["failed"] & ~last["identified"], failed),
        (~last["same_source"], 1),
        (changed, change),
        (last["failed"], failed),
        (last["same_path"], 2),
    ]
    reasons = np.zeros(len(work.table), np.int64)
    reasons[todo] = np.select([case for case, _ in cases], [value for _, value in cases], 3)
    return reasons, texts


def _changes(work: _Work, log: _Log, rows: Rows, pairs: Rows, number: Rows) -> list[str]:
    """What has changed, for each pair of settings as they were and the group of settings as they are."""
    if not len(pairs):
        return []
    before, _ = np.divmod(pairs, len(work.hashes))
    wanted = {log.settings[one] for one in np.unique(before)[:_MAX_EXPLAINED].tolist()}
    logged = _logged_settings(work.manifest.output.uri, wanted)
    texts = []
    one_of_each = rows[np.unique(number, return_index=True)[1]]
    for job, old in zip(work.jobs(one_of_each), before.tolist(), strict=True):
        last = logged.get(log.settings[old])
        changes = "; ".join(_changed(job.settings, last)) if last else ""
        texts.append(f"settings changed: {changes}" if changes else "settings changed")
    return texts


def _logged_settings(output_uri: str, wanted: set[str | None]) -> dict[str | None, dict[str, Any]]:
    """One row of the log for each of these hashes of settings."""
    found: dict[str | None, dict[str, Any]] = {}
    columns = ["settings_sha256", *(f"setting_{name}" for name in IDENTIFYING)]
    for piece in runlog.stream_log(output_uri, columns, rows=1):  # a little at a time: mostly the first has them
        missing = pa.array([one for one in wanted if one not in found], pa.string())
        rows = piece.filter(pc.is_in(piece.column("settings_sha256"), missing))
        found |= {row["settings_sha256"]: row for row in runlog.newest(rows, "settings_sha256").to_pylist()}
        if len(found) == len(wanted):
            break
    return found


def _changed(settings: Settings, last: Mapping[str, Any]) -> list[str]:
    pairs = [(name, last[f"setting_{name}"], getattr(settings, name)) for name in IDENTIFYING]
    return [f"{key}: {_short(before)} -> {_short(now)}" for key, before, now in pairs if before != now]


def _short(value: object) -> str:
    if value is None:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return (text if len(text) <= 40 else f"{text[:37]}...") or "''"
