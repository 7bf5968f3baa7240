"""What the page of one image says: facts, provenance in plain words, settings, what went wrong.

Everything is text for people; the page puts it on the screen as text, so nothing is escaped here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from supir_batch import runlog, store
from supir_batch.report.renditions import Shown
from supir_batch.review import Decision

_PROMPT_SOURCES = {
    "manifest": "The prompt came with the list of images.",
    "review": "The prompt was written by a reviewer.",
    "sidecar": "The prompt was read from the text file beside the image.",
    "fixed": "The prompt is the same for all images of the manifest.",
    "none": "No caption was used.",
    "attributes": "The prompt says what could be measured in the image.",
}
_GRADES = {1: "grey", 3: "color"}


def of(row: Mapping[str, Any], shown: Shown) -> dict[str, Any]:
    """The page of a row of the run log, as JSON values; settings are apart (:func:`settings`)."""
    return {
        "facts": _facts(row),
        "provenance": _provenance(row) if row["status"] == "done" else [],
        "caption": row["caption"] or "",
        "prompt": row["prompt"] or "",
        "negative": row["setting_negative_prompt"] or "",
        "settings": row["settings_sha256"] or "",
        "before": shown.before and dataclasses.asdict(shown.before),
        "after": shown.after and dataclasses.asdict(shown.after),
        "overlays": [dataclasses.asdict(one) for one in shown.overlays],
        "problem": shown.problem,
        "failure": _failure(row) if row["status"] != "done" else None,
    }


def settings(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting of a row and its value; what was not used is left out."""
    named = ((key.removeprefix("setting_"), value) for key, value in row.items() if key.startswith("setting_"))
    return [(key.replace("_", " "), said(value)) for key, value in named if value not in (None, "")]


def decision(one: Decision) -> dict[str, Any]:
    """A decision as the page keeps it: what is not given is left out."""
    return {key: value for key, value in dataclasses.asdict(one).items() if value not in (None, "")}


def said(value: object) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = sum(row[f"seconds_{stage}"] or 0.0 for stage in runlog.STAGES)
    size = f"{row['source_width']} × {row['source_height']} px" if row["source_width"] else ""
    restored = f"{row['output_width']} × {row['output_height']} px" if row["status"] == "done" else ""
    kind = [row["source_format"] or "", f"{row['bit_depth']} bit" if row["bit_depth"] else ""]
    kind += [_GRADES.get(row["bands"], ""), "transparency" if row["has_alpha"] else ""]
    facts = {
        "Source": store.name(row["uri"]),
        "Page": said(row["setting_page"]) if (row["setting_page"] or 1) > 1 else "",
        "Source size": size,
        "Restored size": restored,
        "Format": ", ".join(filter(None, kind)),
        "Tone": row["tone"] or "",
        "Tiles": said(row["tiles"]) if (row["tiles"] or 1) > 1 else "",
        "Device": row["device"] or "",
        "Time": f"{seconds:.1f} s" if seconds else "",
        "Notes": row["notes"] or "",
        "Run": row["run_id"],
    }
    return [(key, value) for key, value in facts.items() if value]


def _provenance(row: Mapping[str, Any]) -> list[str]:
    """How this image came to be, as sentences."""
    generative = row["setting_engine"] != "lanczos"
    when = f" on {row['finished_at']:%-d %B %Y}" if row["finished_at"] else ""
    preset = f", preset {row['setting_preset']}" if generative else ""
    sentences = [f"Made from {store.name(row['uri'])} by {row['setting_engine_name']}{preset}{when}."]
    if generative:
        sentences.append(
            "It is a generative reconstruction, a sample from a model: detail in it may never have been in the "
            "original. It is no record copy and no evidence."
        )
    else:
        sentences.append("It was enlarged or reduced without a generative model.")
    if generative and (told := _PROMPT_SOURCES.get(row["prompt_source"])):
        sentences.append(told)
    if generative and row["prompt_source"] == "llava":
        sentences.append(f"The prompt was written by the captioner {row['setting_captioner']}.")
    if row["seed"] is not None and generative:
        given = "was given" if row["setting_seed"] is not None else "follows from the run's seed and the source"
        sentences.append(f"The seed {row['seed']} {given}: the same source and settings give the same image.")
    if row["restored_again"]:
        sentences.append("A first attempt went wrong, in the whole or in a part, and was made again with another seed.")
    if row["replaces"]:
        sentences.append(f"A reviewer sent an earlier result back ({row['replaces'][:12]}...); this one replaced it.")
    sentences += [f"Source SHA-256: {row['source_sha256']}", f"Output SHA-256: {row['output_sha256']}"]
    if row["setting_model_sha256"]:
        sentences.append(f"Model SHA-256: {row['setting_model_sha256']}")
    sentences.append(f"Fingerprint of the work: {row['fingerprint']}")
    return sentences


def _failure(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": row["failure_kind"] or "unknown",
        "stage": row["failure_stage"] or "unknown",
        "message": row["failure_message"] or "the log holds no reason",
        "retryable": bool(row["failure_retryable"]),
    }
