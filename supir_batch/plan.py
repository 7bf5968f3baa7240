"""What a run would do, decided before any pixel is read: what is to do and why, what is done, what is refused.

Done means: the run log says so for the same source version and the same settings, and the output is still there.
File names never decide. Planning writes nothing.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from supir_batch import runlog, store
from supir_batch.captions import CAPTIONS_FOLDER
from supir_batch.errors import ManifestError, StoreError
from supir_batch.manifest import IMAGE_EXTENSIONS, describe, list_sources
from supir_batch.parts import PARTS_FOLDER
from supir_batch.settings import Manifest, resolve, settings_hash
from supir_batch.types import Failure, Job, ModelRef, Settings, Source

IIIF_FOLDER = "_iiif"
"""Where an output keeps what viewers want, below it."""

REPORT_FOLDER = "report"
"""Where an output keeps its report, below it."""

OWN_FOLDERS = (runlog.RUNS_FOLDER, PARTS_FOLDER, CAPTIONS_FOLDER, IIIF_FOLDER, REPORT_FOLDER)
"""The folders of an output in which no images of its sources lie."""

_EXTENSIONS = {
    "tiff": (".tif", ".tiff"),
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "jpeg2000": (".jp2", ".jpx", ".j2k"),
}
_MAX_PROBLEMS = 20


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
    """Every source of the manifest, sorted by what happens to it. ``ignored``: other files, by extension."""

    output_uri: str
    todo: tuple[Todo, ...]
    done: tuple[Done, ...]
    refused: tuple[RefusedJob, ...]
    ignored: Mapping[str, int]

    @property
    def reasons(self) -> dict[str, int]:
        """How many images are to do for each reason, most frequent first."""
        return dict(Counter(entry.reason for entry in self.todo).most_common())

    @property
    def changed(self) -> dict[str, int]:
        """The part of :attr:`reasons` that redoes earlier work because settings differ from the logged ones."""
        return {reason: count for reason, count in self.reasons.items() if reason.startswith("settings changed")}


def make_plan(manifest: Manifest, manifest_uri: str, model_sha256: str, captioner_identity: str = "") -> Plan:
    """Compare what the manifest names with what the run log below its output records.

    ``model_sha256``: hash of the weights that would be used, "" for engines without; ``captioner_identity``: likewise
    for caption mode ``llava``. Raises ManifestError when inputs
    are unusable, two sources would write the same output, or an output would overwrite an input.
    """
    listed = list_sources(manifest, manifest_uri)
    models = _Models(model_sha256, captioner_identity)
    jobs, refused = _jobs(manifest, listed.sources, models)
    refused += [
        RefusedJob(_job(manifest, source, _settings(manifest, source, models, "")), failure)
        for source, failure in listed.refused
    ]
    every_job = [*jobs, *(entry.job for entry in refused)]
    _refuse_collisions(manifest, manifest_uri, every_job)
    _refuse_overwriting(manifest, manifest_uri, every_job)
    _refuse_links(manifest, every_job)

    log = runlog.read_log(manifest.output.uri)
    index, attempts = runlog.done_index(log), runlog.last_attempts(log)
    output = manifest.output.uri
    present = {store.relative_to(found.uri, output) for found in store.list_tree(output)} if index else set()
    todo, done = [], []
    for job in jobs:
        key = runlog.DoneKey(job.source.id, job.source.uri, job.source.version, job.settings_sha256)
        logged = index.get(key)
        kept = store.relative_to(logged.output_uri, output) if logged else None
        named_alike = kept is not None and posixpath.splitext(kept)[0] == store.relative_to(job.output_stem, output)
        if logged and named_alike and kept in present:
            done.append(Done(job, logged.output_uri))
        else:
            todo.append(Todo(job, _reason(job, attempts.get(job.source.id), named_alike)))
    return Plan(output, tuple(todo), tuple(done), tuple(refused), listed.ignored)


# --- jobs ----------------------------------------------------------------------------------------------------------


class _Models(NamedTuple):
    """What the models of a run are."""

    sha256: str
    captioner_identity: str


def _jobs(manifest: Manifest, sources: Iterable[Source], models: _Models) -> tuple[list[Job], list[RefusedJob]]:
    jobs, refused, problems = [], [], []
    wants_sidecar = manifest.caption.mode == "sidecar" and manifest.engine.name == "supir"
    for source in sources:
        sidecar: str | Failure | None = None
        if wants_sidecar and source.prompt is None:
            sidecar = _read_sidecar(source)
        text = "" if isinstance(sidecar, Failure) else sidecar
        try:
            settings = resolve(manifest, source, models.sha256, text, models.captioner_identity)
            job = _job(manifest, source, settings)
        except ManifestError as error:
            problems.append(str(error))
            continue
        if isinstance(sidecar, Failure):
            refused.append(RefusedJob(job, sidecar))
        else:
            jobs.append(job)
    _raise_all(problems)
    return jobs, refused


def _settings(manifest: Manifest, source: Source, models: _Models, sidecar: str) -> Settings:
    """Settings for the log row of a source that is refused anyway: a prompt it lacks does not matter any more."""
    if source.prompt is None and manifest.caption.mode == "manifest":
        source = replace(source, prompt="")
    return resolve(manifest, source, models.sha256, sidecar, models.captioner_identity)


def _job(manifest: Manifest, source: Source, settings: Settings) -> Job:
    folder, _, file_name = source.relative.rpartition("/")
    name = manifest.output.naming.format(
        stem=_without_extension(file_name),
        id=_without_extension(source.id).replace("/", "_"),
        engine=settings.engine,
        upscale=f"{settings.upscale:g}",
    )
    try:
        stem = store.join(manifest.output.uri, *([folder] if folder else []), name)
    except StoreError as error:
        raise ManifestError(f"{describe(source)}: gives no output name: {error}") from error
    return Job(
        source=source,
        settings=settings,
        settings_sha256=settings_hash(settings),
        output_stem=stem,
        output_root=manifest.output.uri,
        model=ModelRef(manifest.engine.weights, manifest.engine.config, settings.precision or "float32")
        if settings.engine == "supir"
        else None,
        captioner=(manifest.caption.model or "") if settings.captioner else "",
        sidecars=manifest.output.sidecars,
        signing=manifest.signing.files,
    )


def _without_extension(name: str) -> str:
    stem, extension = posixpath.splitext(name)
    return stem if stem and extension.lower() in IMAGE_EXTENSIONS else name


def _read_sidecar(source: Source) -> str | Failure:
    """The text beside an image: ``photo.jpg.txt``, else ``photo.txt``."""
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


def _refuse_collisions(manifest: Manifest, manifest_uri: str, jobs: Sequence[Job]) -> None:
    """Two sources must not write one output, also where case or Unicode form do not count (Windows, macOS)."""
    first: dict[str, Job] = {}
    problems = []
    for job in jobs:
        relative = job.output_stem[len(manifest.output.uri.rstrip("/")) + 1 :]
        folder, _, below = relative.partition("/")
        if below and folder in OWN_FOLDERS:
            problems.append(f"{describe(job.source)} would be written below {folder}, which is reserved")
            continue
        earlier = first.setdefault(unicodedata.normalize("NFC", relative).casefold(), job)
        if earlier is not job:
            problems.append(
                f"{describe(earlier.source)} and {describe(job.source)} would both be written to {job.output_stem}.*; "
                f"rename one, or use {{id}} in output.naming"
            )
    _raise_all([f"{manifest_uri}: {problem}" for problem in problems])


def _refuse_overwriting(manifest: Manifest, manifest_uri: str, jobs: Sequence[Job]) -> None:
    inputs = {store.normalize(job.source.uri).casefold(): job.source for job in jobs}
    extensions = _EXTENSIONS.get(manifest.output.format, tuple(sorted(IMAGE_EXTENSIONS)))
    problems = []
    for job in jobs:
        stem = store.normalize(job.output_stem).casefold()
        for extension in extensions:
            if stem + extension in inputs:
                victim = inputs[stem + extension]
                problems.append(
                    f"the output of {describe(job.source)} would overwrite the input {describe(victim)}; "
                    f"choose another output.uri or output.naming"
                )
                break
    _raise_all([f"{manifest_uri}: {problem}" for problem in problems])


def _refuse_links(manifest: Manifest, jobs: Sequence[Job]) -> None:
    root = manifest.output.uri
    folders = {job.output_stem.rpartition("/")[0] for job in jobs} | {store.join(root, name) for name in OWN_FOLDERS}
    problems: dict[str, None] = {}  # each once, in order
    for folder in sorted(folders):
        try:
            store.refuse_links(store.join(folder, "any"), root)
        except StoreError as error:
            problems[str(error)] = None
    _raise_all(list(problems))


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise ManifestError("\n".join([*problems[:_MAX_PROBLEMS], *more]))


# --- reasons -------------------------------------------------------------------------------------------------------


def _reason(job: Job, last: Mapping[str, Any] | None, named_alike: bool) -> str:
    """Why work is needed, seen from the newest logged attempt at the same id."""
    if last is None or last["uri"] != job.source.uri:
        return "new"
    if last["status"] == "failed" and last["source_version"] is None:
        return f"failed before: {last['failure_kind']}"
    if last["source_version"] != job.source.version:
        return "source changed"
    if last["settings_sha256"] != job.settings_sha256:
        changes = _changes(job.settings, last)
        return f"settings changed: {'; '.join(changes)}" if changes else "settings changed"
    if last["status"] == "failed":
        return f"failed before: {last['failure_kind']}"
    return "output missing" if named_alike else "output name changed"


def _changes(settings: Settings, last: Mapping[str, Any]) -> list[str]:
    pairs = [(f.name, last[f"setting_{f.name}"], getattr(settings, f.name)) for f in fields(settings)]
    return [f"{key}: {_short(before)} -> {_short(now)}" for key, before, now in pairs if before != now]


def _short(value: object) -> str:
    if value is None:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return (text if len(text) <= 40 else f"{text[:37]}...") or "''"
