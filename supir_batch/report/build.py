"""``<output>/report/``: a folder of static files in which people look at an output, doubt and decide.

It needs no server and no network: ``index.html`` and ``assets/`` are the built front end (its sources are in
``frontend/``), ``data/`` holds what the run log says, as scripts (a page opened from a disk may load scripts, but no
other files), and ``pictures/`` what a browser can show. ``data/report.js`` has one column per score and whatever else
the gallery filters and sorts by; the rest lies in pieces that the page of an image loads.

Everything is made while the log streams by; of an image some numbers and names stay in memory. Pictures are kept by
fingerprint, so a second report makes only those that are new. ``data/report.js`` is written last and names the folder
of its pieces: a report that is built anew is the old one until it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from supir_batch import __version__, audit, review, runlog, store
from supir_batch.manifest_file import manifest_name
from supir_batch.plan import REPORT_FOLDER
from supir_batch.progress import progress
from supir_batch.report import details
from supir_batch.report.renditions import Shown, folder_of, render
from supir_batch.report.scores import FLAGS, SCORES

PIECE = 200
"""Images whose pages are in one file."""

_FACETS = {  # columns to filter by, and what they are called
    "setting_engine_name": "Engine",
    "setting_preset": "Preset",
    "setting_material": "Material",
    "tone": "Tone",
    "source_format": "Format",
    "prompt_source": "Prompt from",
    "failure_kind": "Cause of failure",
}
_ATTEMPTS = (
    *("id", "run_id", "status", "recovered", "started_at", "finished_at", "output_width", "output_height"),
    *("failure_kind", "failure_stage", "failure_message", "failure_retryable"),
)
_MOST_VALUES = 4  # of a setting that differs between images
_DIGITS = 5  # of a score


def build_report(output_uri: str) -> str:
    """Write the report of everything the run log below ``output_uri`` knows; returns the page's URI.

    Of each image the latest attempt counts. An image that can no longer be read is listed without pictures. Raises
    StoreError if the log cannot be read or the report not be written.
    """
    folder = store.join(output_uri, REPORT_FOLDER)
    for name in ("pictures", "data", "assets"):
        store.refuse_links(store.join(folder, name, "any"), output_uri)
    log = runlog.read_log(output_uri, _ATTEMPTS)
    newest = runlog.newest(log, "id")
    stamp = runlog.new_run_id()
    decisions = review.read(output_uri)
    columns = _Columns()

    files = frozenset(name for names in store.list_names(store.join(folder, "pictures"), ("",)) for name in names)
    workers = max(2, min(8, os.cpu_count() or 2))
    with ThreadPoolExecutor(workers) as pool, progress(len(newest)) as display:

        def show(row: dict[str, Any]) -> Shown:
            if row["status"] != "done":
                return Shown()
            return render(row, lambda: audit.maps(output_uri, row), store.join(folder, "pictures"), files)

        for number, rows in enumerate(_pieces(_rows(output_uri, newest))):
            shown = []
            for row, one in zip(rows, pool.map(show, rows), strict=True):
                shown.append(one)
                columns.add(row, one, decisions.get((row["id"], row["fingerprint"])))
                if row["status"] == "done":
                    display.update(row)
            _script(store.place(folder, "data", stamp, f"{number}.js"), "piece", _piece(number, rows, shown))

    head = {
        "name": _name(output_uri, log),
        "output": hashlib.sha256(store.normalize(output_uri).encode()).hexdigest()[:16],
        "version": __version__,
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "pieces": {"folder": stamp, "size": PIECE},
        "runs": _runs(log),
        "failures": _failures(newest),
    }
    for name, data in _assets():
        store.write_atomic(store.join(folder, name), data)
    _script(store.join(folder, "data", "report.js"), "report", head | columns.data())
    _remove_stale(folder, stamp, columns.folders, files)
    return store.join(folder, "index.html")


# --- the log -------------------------------------------------------------------------------------------------------


def _rows(output_uri: str, newest: pa.Table) -> Iterator[dict[str, Any]]:
    """The whole rows of the newest attempts, in the order of the log, a few at a time in memory."""
    wanted = _attempt(newest).combine_chunks()
    seen: set[str] = set()
    for table in runlog.stream_log(output_uri, rows=2**12):
        chosen = table.filter(pc.is_in(_attempt(table), wanted))
        for batch in chosen.to_batches(max_chunksize=PIECE):
            for row in batch.to_pylist():
                if row["id"] not in seen:  # two writers committed it at the same moment
                    seen.add(row["id"])
                    if row["output_path"]:  # the folder may have moved since
                        row["output_uri"] = store.join(output_uri, row["output_path"])
                    yield row


def _attempt(table: pa.Table) -> pa.ChunkedArray:
    """A text for each row that tells attempts apart."""
    at = pc.coalesce(table.column("finished_at").cast(pa.int64()).cast(pa.string()), "")
    return pc.binary_join_element_wise(table.column("run_id"), table.column("id"), at, "\n")


def _pieces(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while piece := list(islice(rows, PIECE)):
        yield piece


def _runs(log: pa.Table) -> list[dict[str, Any]]:
    """What each run did, and how fast, oldest first."""
    done = pc.and_(pc.equal(log.column("status"), "done"), pc.invert(pc.fill_null(log.column("recovered"), False)))
    pixels = pc.multiply(pc.fill_null(log.column("output_width"), 0), pc.fill_null(log.column("output_height"), 0))
    table = log.append_column("done", pc.cast(done, pa.int64()))
    table = table.append_column("pixels", pc.if_else(done, pixels, 0))
    sums = table.group_by("run_id").aggregate(
        [("done", "sum"), ("pixels", "sum"), ("id", "count"), ("started_at", "min"), ("finished_at", "max")]
    )
    failed = Counter(log.filter(pc.equal(log.column("status"), "failed")).column("run_id").to_pylist())
    return [
        {
            "run": one["run_id"],
            "started_at": one["started_at_min"] and one["started_at_min"].isoformat(),
            "seconds": _seconds(one["started_at_min"], one["finished_at_max"]),
            "done": one["done_sum"],
            "failed": failed[one["run_id"]],
            "megapixels": round(one["pixels_sum"] / 1e6, 2),
        }
        for one in sums.sort_by("run_id").to_pylist()
    ]


def _name(output_uri: str, log: pa.Table) -> str:
    """What the manifest of the last run is called, else the output folder."""
    last = pc.max(log.column("run_id")).as_py()
    named = last and manifest_name(store.join(runlog.run_folder(output_uri, last), "manifest.yaml"))
    return named or store.name(output_uri)


def _seconds(start: datetime | None, end: datetime | None) -> float:
    return (end - start).total_seconds() if start and end else 0.0


def _failures(newest: pa.Table) -> list[dict[str, Any]]:
    """Why images have no output, the most frequent cause first, with one message of each."""
    failed = newest.filter(pc.equal(newest.column("status"), "failed")).select(
        ["failure_kind", "failure_stage", "failure_message", "failure_retryable"]
    )
    counts = Counter(failed.column("failure_kind").to_pylist())
    examples = {row["failure_kind"]: row for row in runlog.newest(failed, "failure_kind").to_pylist()}
    return [
        {
            "kind": kind or "unknown",
            "count": count,
            "stage": examples.get(kind, {}).get("failure_stage") or "unknown",
            "message": examples.get(kind, {}).get("failure_message") or "the log holds no reason",
            "retryable": bool(examples.get(kind, {}).get("failure_retryable")),
        }
        for kind, count in counts.most_common()
    ]


# --- what the gallery knows of each image --------------------------------------------------------------------------


class _Columns:
    """One list for each thing that the gallery filters or sorts by, in the order of the pieces."""

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self._texts: dict[str, list[str]] = {"id": [], "name_of": [], "fingerprint": [], "thumbnail": []}
        self._sizes: dict[str, list[int]] = {"width": [], "height": []}
        self._scores: dict[str, list[float | None]] = {score.column: [] for score in SCORES}
        self._flags: dict[str, list[int]] = {column: [] for column in FLAGS}
        self._facets: dict[str, tuple[dict[str, int], list[int]]] = {column: ({}, []) for column in _FACETS}
        self._settings: dict[str, Counter[str]] = {}
        self._decisions: list[dict[str, Any]] = []
        self._done: list[int] = []
        self._generative = False

    def add(self, row: Mapping[str, Any], shown: Shown, decision: review.Decision | None) -> None:
        """Remember what matters of a row."""
        done = row["status"] == "done"
        number = len(self._done)
        self._done.append(int(done))
        texts = {
            "id": row["id"],
            "name_of": row["output_path"] or posixpath.basename(row["uri"]),
            "fingerprint": row["fingerprint"] or "",
            "thumbnail": shown.thumbnail,
        }
        for key, text in texts.items():
            self._texts[key].append(text)
        for key, sizes in self._sizes.items():
            sizes.append(row[f"output_{key}"] or 0)
        for column, scores in self._scores.items():
            scores.append(_rounded(row[column]))
        for column, flags in self._flags.items():
            if row[column]:
                flags.append(number)
        for column, (values, codes) in self._facets.items():
            value = row[column]
            codes.append(-1 if value in (None, "") else values.setdefault(str(value), len(values)))
        if done:
            self.folders.add(folder_of(row))
            self._generative = self._generative or row["setting_engine"] != "lanczos"
            for key, text in details.settings(row):
                self._settings.setdefault(key, Counter())[text] += 1
        if decision is not None:
            self._decisions.append(details.decision(decision))

    def data(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "generative": self._generative,
            "done": self._done,
            **self._texts,
            **self._sizes,
            "scores": [
                {
                    "column": score.column,
                    "label": score.label,
                    "meaning": score.meaning,
                    "better": score.better,
                    "values": self._scores[score.column],
                }
                for score in SCORES
                if any(value is not None for value in self._scores[score.column])
            ],
            "flags": [
                {"column": column, "label": label, "rows": self._flags[column]}
                for column, label in FLAGS.items()
                if self._flags[column]
            ],
            "facets": [
                {"column": column, "label": _FACETS[column], "values": list(values), "codes": codes}
                for column, (values, codes) in self._facets.items()
                if values
            ],
            "settings": [
                {"label": label, "values": counts.most_common(_MOST_VALUES), "different": len(counts)}
                for label, counts in self._settings.items()
            ],
            "decisions": self._decisions,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def _piece(number: int, rows: Sequence[Mapping[str, Any]], shown: Sequence[Shown]) -> dict[str, Any]:
    return {
        "number": number,
        "rows": [details.of(row, one) for row, one in zip(rows, shown, strict=True)],
        "settings": {row["settings_sha256"]: details.settings(row) for row in rows if row["settings_sha256"]},
    }


# --- files ---------------------------------------------------------------------------------------------------------


def _script(uri: str, what: str, data: Mapping[str, Any]) -> None:
    """A script that hands ``data`` to the page. Nothing in it can end a script element or a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)
    store.write_atomic(uri, f"supirReport({json.dumps(what)},{text.replace('<', chr(92) + 'u003c')});\n".encode())


def _assets() -> Iterator[tuple[str, bytes]]:
    """The built front end: name below the report's folder, and content."""
    for file in sorted(importlib.resources.files("supir_batch.report").joinpath("assets").iterdir(), key=str):
        if not file.name.endswith(".sha256"):  # what it was built from
            yield ("" if file.name == "index.html" else "assets/") + file.name, file.read_bytes()


def _remove_stale(folder: str, stamp: str, folders: set[str], files: frozenset[str]) -> None:
    """Delete what earlier reports had and this one has not."""
    for name in files:
        if "/".join(name.split("/")[:2]) not in folders:
            store.delete(store.join(folder, "pictures", name))
    for names in store.list_names(store.join(folder, "data"), (".js",)):
        for name in names:
            if "/" in name and not name.startswith(f"{stamp}/"):
                store.delete(store.join(folder, "data", name))
