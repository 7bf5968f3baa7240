"""What people decided about outputs: accept, reject, or redo with other settings, with a note.

Decisions lie below ``<output>/_runs/reviews/`` as JSON lines, in files that are written whole and never changed by
somebody else. A decision is about one output (id and fingerprint); of several about the same one the latest counts.
What a reviewer wants redone with other settings holds from then on: every plan lays it over what the manifest says.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple

import pyarrow.compute as pc
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from supir_batch import runlog, store
from supir_batch.errors import ManifestError, StoreError, refuse
from supir_batch.manifest_file import plain_words
from supir_batch.settings import Preset
from supir_batch.types import Verdict

REVIEWS_FOLDER = "reviews"

_ROLL_AT = 500  # decisions in one file of a session, which is put anew with each


@dataclass(frozen=True)
class Decision:
    """What somebody decided about the output of ``id`` with this ``fingerprint``.

    ``undecided`` takes an earlier decision back, or is a note alone. The settings are for ``redo``; None: as before
    any redo, what the manifest says.
    """

    id: str
    fingerprint: str
    decision: Verdict
    prompt: str | None = None
    preset: Preset | None = None
    restoration_tau: float | None = None
    seed: int | None = None
    note: str = ""
    decided_at: str = ""  # UTC, ISO 8601


COLUMNS = tuple(Decision.__dataclass_fields__)

Decisions = Mapping[tuple[str, str], Decision]
"""The one that counts, by id and fingerprint."""


class _Row(BaseModel):
    """A decision as a file or a browser gives it; what is empty is not given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    fingerprint: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    decision: Verdict
    prompt: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    preset: Preset | None = None
    restoration_tau: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None  # what a browser can hold
    note: Annotated[str, StringConstraints(max_length=10_000)] = ""
    decided_at: AwareDatetime | None = None


class Placed(NamedTuple):
    """A decision and where it was read (``decisions.csv:12``)."""

    place: str
    decision: Decision


# --- reading -------------------------------------------------------------------------------------------------------


def read_file(uri: str) -> list[Placed]:
    """The decisions of a CSV or JSON file, as the report exports it.

    Raises ManifestError, with the line of each, for what is no decision; StoreError if the file cannot be read.
    """
    name, text = store.name(uri), store.read_text(uri)
    if name.lower().endswith(".csv"):
        rows = _csv_rows(name, text)
    elif name.lower().endswith(".json"):
        rows = _json_rows(name, text)
    else:
        raise ManifestError(f"{uri}: must be a .csv or .json file, as the report exports it")
    found, problems = [], list[str]()
    for place, row in rows:
        try:
            found.append(Placed(place, parse(row)))
        except ManifestError as error:
            problems += [f"{place}: {line}" for line in str(error).splitlines()]
    refuse(problems)
    return found


def parse(row: Mapping[str, Any]) -> Decision:
    """A decision from what a file or a browser says. Raises ManifestError, one line for each bad value."""
    try:
        given = _Row.model_validate({key: value for key, value in row.items() if value not in (None, "")})
    except ValidationError as error:
        lines = [_problem(one) for one in error.errors(include_url=False)]
        raise ManifestError("\n".join(lines)) from error
    now = datetime.now(UTC)
    at = given.decided_at or now
    if at > now + timedelta(days=1):
        raise ManifestError(f"decided_at is {at.isoformat()}, which is yet to come; set the clock, or leave it out")
    wanted = (given.prompt, given.preset, given.restoration_tau, given.seed)
    if given.decision == "redo" and wanted == (None,) * 4:
        raise ManifestError(
            "redo without another setting would give the same image; give a prompt, preset, restoration_tau or seed"
        )
    if given.decision != "redo" and wanted != (None,) * 4:
        raise ManifestError(f"decision '{given.decision}' takes no prompt, preset, restoration_tau or seed")
    return Decision(**{**given.model_dump(), "decided_at": at.astimezone(UTC).isoformat(timespec="milliseconds")})


def read(output_uri: str) -> Decisions:
    """What was decided about outputs below ``output_uri``. Raises StoreError if it cannot be read."""
    latest: dict[tuple[str, str], Decision] = {}
    for found in store.list_tree(store.join(output_uri, runlog.RUNS_FOLDER, REVIEWS_FOLDER)):
        if not found.uri.endswith(".jsonl") or store.is_partial(found.uri):
            continue
        for number, line in enumerate(store.read_text(found.uri).split("\n"), 1):
            if not line:
                continue
            try:
                one = parse(json.loads(line))
            except (ValueError, AttributeError, ManifestError) as error:
                raise StoreError(f"{found.uri}:{number}: is no decision ({error}); move the file away") from error
            earlier = latest.get((one.id, one.fingerprint))
            if earlier is None or one.decided_at >= earlier.decided_at:
                latest[one.id, one.fingerprint] = one
    return latest


def redone(decisions: Decisions) -> dict[str, Decision]:
    """The latest redo of each image, by id: its settings hold, whatever was decided about what came out."""
    wanted = sorted((one for one in decisions.values() if one.decision == "redo"), key=lambda one: one.decided_at)
    return {one.id: one for one in wanted}


# --- writing -------------------------------------------------------------------------------------------------------


def import_file(output_uri: str, uri: str) -> tuple[int, list[Decision]]:
    """Add the decisions of a file to those of an output, all or none; what is there already is not added again.

    Returns how many are new, and all of the file. Raises ManifestError, with the line of each, for images that the run
    log does not know and outputs that it never made.
    """
    placed = read_file(uri)
    refuse_unknown(output_uri, placed)
    there = read(output_uri)
    new = [one for _, one in placed if there.get((one.id, one.fingerprint)) != one]
    if new:
        append(output_uri, new)
    return len(new), [one for _, one in placed]


def refuse_unknown(output_uri: str, placed: Iterable[Placed]) -> None:
    """Raise ManifestError for decisions about images that the log does not know, or outputs that it never made."""
    log = runlog.read_log(output_uri, ("id", "fingerprint", "status"))
    ids = set(log.column("id").unique().to_pylist())
    done = log.filter(pc.equal(log.column("status"), "done"))
    made = set(zip(done.column("id").to_pylist(), done.column("fingerprint").to_pylist(), strict=True))
    problems = []
    for place, one in placed:
        if one.id not in ids:
            problems.append(f"{place}: id {one.id!r} is not in the run log of {output_uri}")
        elif (one.id, one.fingerprint) not in made:
            problems.append(
                f"{place}: no output of {one.id!r} has the fingerprint {one.fingerprint[:12]}...; "
                f"was the decision made about another output folder?"
            )
    refuse(problems)


def append(output_uri: str, decisions: Sequence[Decision]) -> None:
    """Put decisions below the output, as one file."""
    _put(output_uri, runlog.new_run_id(), decisions)


class Session:
    """Decisions that come one by one: each is safe when :meth:`add` returns."""

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri
        self._name = runlog.new_run_id()
        self._decisions: list[Decision] = []

    def add(self, decision: Decision) -> None:
        """Keep a decision. Raises StoreError if that cannot be done."""
        if len(self._decisions) >= _ROLL_AT:
            self._name, self._decisions = runlog.new_run_id(), []
        _put(self._output_uri, self._name, [*self._decisions, decision])
        self._decisions.append(decision)


def to_csv(decisions: Iterable[Decision]) -> str:
    """A file that ``import_file`` reads."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(asdict(one) for one in decisions)
    return text.getvalue()


def _put(output_uri: str, name: str, decisions: Sequence[Decision]) -> None:
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in decisions)
    place = store.place(output_uri, runlog.RUNS_FOLDER, REVIEWS_FOLDER, f"{name}.jsonl")
    store.write_atomic(place, lines.encode())


# --- files of people -----------------------------------------------------------------------------------------------


def _csv_rows(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        unknown = [column for column in reader.fieldnames or () if column not in COLUMNS]
        if unknown or not reader.fieldnames:
            seen = f"unknown column {unknown[0]!r}" if unknown else "is empty"
            raise ManifestError(f"{name}:1: {seen}; columns: {', '.join(COLUMNS)}")
        for row in reader:
            place = f"{name}:{reader.line_num}"
            if None in row:
                raise ManifestError(f"{place}: has more fields than line 1 names; put quotes around text with commas")
            yield place, row
    except csv.Error as error:
        raise ManifestError(f"{name}:{reader.line_num}: is no CSV: {error}") from error


def _json_rows(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{name}: is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ManifestError(f"{name}: must be a list of decisions, as the report exports it")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ManifestError(f"{name}: entry {number}: must be an object, saw {row!r:.80}")
        yield f"{name}: entry {number}", row


_WORDS = {
    "fingerprint": "must be 64 hexadecimal digits",
    "decided_at": "must be a time with its zone, such as 2026-01-31T23:59:59Z",
}


def _problem(error: Any) -> str:
    column = ".".join(str(part) for part in error["loc"][:1])
    if error["type"] == "missing":
        return f"{column} is missing"
    if error["type"] == "extra_forbidden":
        return f"unknown key {column!r}; keys: {', '.join(COLUMNS)}"
    words = _WORDS.get(column) or plain_words(error["msg"])
    return f"{column} {words}, saw {error['input']!r:.80}"
