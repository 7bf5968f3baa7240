"""``<output>/report/index.html``: every image before and after, with what was done to it, and what failed and why.

The page and its pictures need no network and no server. Everything in it comes from the run log and the images; the log
holds text that strangers wrote (file names, captions, metadata), so the template escapes all of it.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

import jinja2

from supir_batch import __version__, pictures, resample, runlog, store
from supir_batch.errors import ImageError, StoreError
from supir_batch.plan import REPORT_FOLDER

PREVIEW_SIZE = 1000
"""Longer side of the pictures in the page, in pixels."""

MAX_IMAGES = 200
"""Most images that are shown with pictures; the page says how many more there are."""


@dataclass(frozen=True)
class _Card:
    """One restored image in the page; ``problem`` says why there are no pictures."""

    name: str
    id: str
    before: str
    after: str
    width: int
    height: int
    problem: str
    facts: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    caption: str


@dataclass(frozen=True)
class _FailureLine:
    name: str
    kind: str
    stage: str
    message: str
    retryable: bool


def build_report(output_uri: str) -> str:
    """Write the report of everything the run log below ``output_uri`` knows; returns the page's URI.

    Of each image the latest attempt counts. An image that can no longer be read is listed without pictures. Raises
    StoreError if the log cannot be read or the page not be written.
    """
    latest: dict[str, dict[str, Any]] = {row["id"]: row for row in runlog.read_log(output_uri).to_pylist()}
    rows = sorted(latest.values(), key=lambda row: str(row["output_uri"] or row["uri"]))
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] != "done"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("supir_batch", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        cards=[_card(output_uri, row) for row in done[:MAX_IMAGES]],
        failures=[_failure(row) for row in failed],
        done=len(done),
        unseen=max(0, len(done) - MAX_IMAGES),
        engines=sorted({str(row["setting_engine_name"]) for row in done}),
        generative=any(row["setting_engine"] != "lanczos" for row in done),
        version=__version__,
    )
    index = store.place(output_uri, REPORT_FOLDER, "index.html")
    store.write_atomic(index, page.encode())
    return index


def _card(output_uri: str, row: dict[str, Any]) -> _Card:
    name = store.relative_to(row["output_uri"], output_uri) or store.name(row["output_uri"])
    stem = str(row["fingerprint"])[:20]
    before, after = f"images/{stem}-before.jpg", f"images/{stem}-after.jpg"
    size, problem = (0, 0), ""
    try:
        restored = pictures.picture(row["output_uri"], PREVIEW_SIZE, sha256=row["output_sha256"])
        source = pictures.picture(row["uri"], PREVIEW_SIZE, row["setting_page"] or 1)
        original = resample.resize(source, restored.shape[1], restored.shape[0])
        size = (restored.shape[1], restored.shape[0])
        store.write_atomic(store.place(output_uri, REPORT_FOLDER, before), pictures.jpeg(original))
        store.write_atomic(store.place(output_uri, REPORT_FOLDER, after), pictures.jpeg(restored))
    except (ImageError, StoreError) as error:
        problem = str(error)
    return _Card(
        name=name,
        id=str(row["id"]),
        before=before,
        after=after,
        width=size[0],
        height=size[1],
        problem=problem,
        facts=_facts(row),
        settings=tuple(
            (key.removeprefix("setting_").replace("_", " "), _shown(value))
            for key, value in row.items()
            if key.startswith("setting_") and value not in (None, "")
        ),
        caption=str(row["prompt"] or row["caption"] or ""),
    )


def _facts(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    seconds = sum(row[f"seconds_{stage}"] or 0.0 for stage in runlog.STAGES)
    facts = {
        "engine": f"{row['setting_engine_name']}, {row['setting_preset']}" if row["setting_preset"] else "",
        "size": f"{row['source_width']} × {row['source_height']} → {row['output_width']} × {row['output_height']} px",
        "format": f"{row['source_format']}, {row['bit_depth']} bit, " + ("grey" if row["bands"] == 1 else "RGB"),
        "seed": _shown(row["seed"]),
        "prompt source": _shown(row["prompt_source"]),
        "time": f"{seconds:.1f} s" if seconds else "",
        "notes": row["notes"] or "",
        "source": store.name(row["uri"]),
        "SHA-256": str(row["source_sha256"]),
    }
    return tuple((key, value) for key, value in facts.items() if value)


def _failure(row: dict[str, Any]) -> _FailureLine:
    return _FailureLine(
        name=posixpath.basename(str(row["uri"])),
        kind=str(row["failure_kind"] or "unknown"),
        stage=str(row["failure_stage"] or "unknown"),
        message=str(row["failure_message"] or "the log holds no reason"),
        retryable=bool(row["failure_retryable"]),
    )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)
