"""What an output says about itself: from which source, by what, with which settings, and that it is a reconstruction.

Pure: a record depends on the work alone, not on when, where or by which worker it was done, so that the same input and
settings give the same file to the last byte. Times and machines stand in the JSON beside the output and in the run log.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass
from typing import Literal

from supir_batch import __version__
from supir_batch.types import OutputFormat, Settings, TileTicket

RECORD_VERSION = 1

SOURCE_TYPE_BASE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATIVE_SOURCE_TYPE = SOURCE_TYPE_BASE + "compositeWithTrainedAlgorithmicMedia"
ENHANCED_SOURCE_TYPE = SOURCE_TYPE_BASE + "algorithmicallyEnhanced"

MEDIA_TYPES = {
    "tiff": "image/tiff",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "jpeg2000": "image/jp2",
    "webp": "image/webp",
    "avif": "image/avif",
    "heic": "image/heic",
}
"""Registered media type of each image format, by the name that the readers and writers give it."""

_HISTORY_LIMIT = 1000  # bytes of JSON in one xmpMM:History entry

# identifiers are name-based UUIDs (RFC 9562, version 5) in a space of our own, so that they do not vary between runs
_IDENTIFIERS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:x-supir-batch:identifiers")


@dataclass(frozen=True)
class ProvenanceRecord:
    """Everything that is written into the file or its sidecar about how the output came to be.

    ``settings`` is the full resolved Settings as a dictionary. ``scale`` is output size over source size (x, y).
    """

    fingerprint: str
    tool: str
    tool_version: str
    generative: bool
    digital_source_type: str
    engine: str
    engine_name: str
    model_sha256: str
    source_id: str
    source_name: str  # path below the input root; not the full URI, which may name a machine
    source_sha256: str
    source_format: str
    source_size: tuple[int, int]
    output_format: OutputFormat
    output_size: tuple[int, int]
    output_bit_depth: int
    scale: tuple[float, float]
    dpi: tuple[float, float] | None  # of the output
    seed: int
    prompt: str
    negative_prompt: str
    caption: str
    caption_source: str
    notice: str
    settings: dict[str, object]
    settings_sha256: str
    document_id: str
    instance_id: str
    fallback_original_id: str  # used if the source names none
    notes: tuple[str, ...]

    @property
    def system_version(self) -> str:
        """Tool version and weights, as IPTC AISystemVersionUsed wants them."""
        weights = f"weights sha256:{self.model_sha256}" if self.model_sha256 else "no weights"
        return f"{self.tool} {self.tool_version}; {weights}"

    @property
    def prompt_information(self) -> str:
        """Prompts and where they came from, for IPTC AIPromptInformation."""
        return f"positive: {self.prompt}; negative: {self.negative_prompt}; caption source: {self.caption_source}"

    @property
    def software(self) -> str:
        """Tool, version and engine, for EXIF Software and XMP CreatorTool."""
        return f"{self.tool} {self.tool_version} ({self.engine_name})"

    @property
    def prompt_writer(self) -> str | None:
        """The operator, where a person wrote the prompt."""
        operator = self.settings.get("operator")
        by_person = self.caption_source in ("manifest", "sidecar", "fixed")
        return operator if isinstance(operator, str) and by_person and self.generative else None

    @property
    def tile_spec(self) -> str:
        """Tiling in one line."""
        keys = ("max_pixels", "overlap", "window", "stride")
        return "; ".join(f"{key} {self.settings[key]}" for key in keys)

    @property
    def history_parameters(self) -> str:
        """The settings that shape the picture as JSON of at most 1 kB; the full set is in the sidecar."""
        keys = (
            (
                *("precision", "preset", "sampler", "steps", "cfg_start", "cfg_end", "guidance_from"),
                *("guidance_to", "control_scale", "restoration_tau", "restoration_to_end", "churn", "eta", "noise"),
            )
            if self.generative
            else ()
        )
        chosen: dict[str, object] = {key: self.settings[key] for key in (*keys, "color_fix", "upscale", "min_size")}
        chosen |= {"engine": self.engine, "seed": self.seed, "settings_sha256": self.settings_sha256}
        text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
        if len(text.encode()) <= _HISTORY_LIMIT:
            return text
        return json.dumps({"settings_sha256": self.settings_sha256}, separators=(",", ":"))


def is_generative(settings: Settings) -> bool:
    """Whether the engine invents detail; only the ``lanczos`` baseline is known not to."""
    return settings.engine != "lanczos"


def build_record(
    ticket: TileTicket, file_format: OutputFormat, bit_depth: Literal[8, 16], notes: tuple[str, ...] = ()
) -> ProvenanceRecord:
    """Record of the output of ``ticket``, which must carry ``facts``; ``notes`` add to the decoder's.

    Raises ValueError for a ticket without facts.
    """
    facts, job, settings = ticket.facts, ticket.job, ticket.job.settings
    if facts is None:
        raise ValueError(f"{job.source.origin}: a ticket without image facts has no provenance")
    scale = (facts.output_width / facts.width, facts.output_height / facts.height)
    identity = f"{ticket.fingerprint}:{file_format}"
    return ProvenanceRecord(
        fingerprint=ticket.fingerprint,
        tool="supir-batch",
        tool_version=__version__,
        generative=is_generative(settings),
        digital_source_type=GENERATIVE_SOURCE_TYPE if is_generative(settings) else ENHANCED_SOURCE_TYPE,
        engine=settings.engine,
        engine_name=settings.engine_name,
        model_sha256=settings.model_sha256,
        source_id=job.source.id,
        source_name=job.source.relative,
        source_sha256=facts.sha256,
        source_format=facts.format,
        source_size=(facts.width, facts.height),
        output_format=file_format,
        output_size=(facts.output_width, facts.output_height),
        output_bit_depth=bit_depth,
        scale=scale,
        # the same physical size: twice the pixels on the same paper are twice the pixels per inch
        dpi=None if facts.dpi is None else (round(facts.dpi[0] * scale[0], 4), round(facts.dpi[1] * scale[1], 4)),
        seed=ticket.seed,
        prompt=ticket.prompt,
        negative_prompt=settings.negative_prompt,
        caption=ticket.caption,
        caption_source=settings.prompt_source,
        notice=settings.notice if is_generative(settings) else "",  # it speaks of invented detail
        settings=dataclasses.asdict(settings),
        settings_sha256=job.settings_sha256,
        document_id=f"xmp.did:{uuid.uuid5(_IDENTIFIERS, 'document:' + identity)}",
        instance_id=f"xmp.iid:{uuid.uuid5(_IDENTIFIERS, 'instance:' + identity)}",
        fallback_original_id=f"xmp.did:{uuid.uuid5(_IDENTIFIERS, 'source:' + facts.sha256)}",
        notes=(*facts.notes, *notes),
    )


def to_json(record: ProvenanceRecord) -> dict[str, object]:
    """The record as JSON values, with ``record_version`` first among what readers should look at."""
    return {"record_version": RECORD_VERSION, **dataclasses.asdict(record)}
