"""Which columns of the run log are scores and flags of an image, and what they are called in front of people.

Every column of floats that is no setting and no time is a score, and every column of booleans that is about the image
is a flag, so a column that a later version logs is shown without being named here; here it gets its name in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from supir_batch import runlog

_NO_SCORES = ("setting_", "seconds_")
_NO_FLAGS = ("recovered", "failure_retryable", "has_alpha", "gate_finite")


@dataclass(frozen=True)
class Score:
    """A column of numbers, or with ``better`` None also one of which nobody can say which end is the good one."""

    column: str
    label: str
    meaning: str = ""
    better: Literal["low", "high"] | None = None


_NAMED = {
    score.column: score
    for score in (
        Score("gate_color_drift", "Color drift", "mean ΔE 2000 between restored image and source", "low"),
        Score("gate_similarity", "Similarity", "SSIM of luma against the source; 1 is the same structure", "high"),
        Score("gate_dead", "Dead area", "share of the area that is constant and was not", "low"),
        Score("gate_seam", "Seam", "most that two tiles differ where they overlap", "low"),
        Score("audit_psnr", "Consistency, PSNR", "dB, of luma: the result, reduced, against the source", "high"),
        Score("audit_ssim", "Consistency, SSIM", "of luma: the result, reduced, against the source", "high"),
        Score("audit_delta_e", "Color difference", "mean ΔE 2000 of the cells against the source", "low"),
        Score("audit_delta_e_90", "Color difference, worst tenth", "ΔE 2000 that a tenth of the cells exceeds", "low"),
        Score("audit_sharpness", "Sharpness gain", "fine detail, restored over source; 1 is no gain"),
        Score("audit_invention", "Invention", "share of visible detail that the source does not explain", "low"),
        Score("audit_invented", "Invented area", "share of the area where most detail is not the source's", "low"),
        Score("audit_spread", "Uncertainty", "how much restorations with other seeds differ", "low"),
        Score("audit_face_invention", "Invention in faces", "the worst region that looks like a face", "low"),
        Score("audit_text_invention", "Invention in text", "the worst region that looks like text", "low"),
    )
}
_FLAGS = {"restored_again": "Restored twice"}
_COUNTS = {"audit_faces": "Face", "audit_texts": "Text"}

SCORES = tuple(
    _NAMED.get(field.name, Score(field.name, field.name.replace("_", " ").capitalize()))
    for field in runlog.SCHEMA
    if pa.types.is_floating(field.type) and not field.name.startswith(_NO_SCORES)
)

FLAGS = {
    field.name: _FLAGS.get(field.name, field.name.replace("_", " ").capitalize())
    for field in runlog.SCHEMA
    if pa.types.is_boolean(field.type) and not field.name.startswith(_NO_SCORES) and field.name not in _NO_FLAGS
} | _COUNTS
"""Column and label of each flag; a count above zero flags an image as well."""
