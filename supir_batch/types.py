"""The values that flow through the pipeline. All frozen; pixels travel beside them as numpy arrays.

Words are those of docs/architecture.md: source, fingerprint, tile, window, engine, outcome, commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from supir_model.config import ModelConfig, Precision, SamplerName, VAETilingMode

FloatImage = NDArray[np.float32]  # [H, W, C], values in [0, 1]

OutputFormat = Literal["tiff", "png", "jpeg", "webp", "jpeg2000"]
Compression = Literal["deflate", "lzw", "none"]
FewLevels = Literal["expand", "refuse"]  # what becomes of 1 to 7-bit and palette images
Status = Literal["done", "failed"]
Sidecar = Literal["json", "premis"]
Verdict = Literal["accept", "reject", "redo", "undecided"]  # of a person who looked at an output


@dataclass(frozen=True)
class Source:
    """One image to restore, as the manifest names it.

    ``origin`` says where it was named (``list.csv:12`` or the input pattern), for messages.
    ``relative`` is its path below the input root, with extension; the output mirrors it.
    ``version`` changes whenever the bytes behind ``uri`` may have changed (size and mtime, or an ETag); empty, with
    ``size`` 0, while nobody has looked, because the manifest gives ``sha256``.
    ``replaces`` is the fingerprint of the output that a reviewer sent back, to be made anew with what is given here.
    """

    id: str
    uri: str
    origin: str
    relative: str
    version: str
    size: int  # bytes
    sha256: str | None = None  # as given by the manifest, to be checked
    prompt: str | None = None
    negative_prompt: str | None = None
    upscale: float | None = None
    seed: int | None = None
    material: str | None = None
    page: int | None = None  # of a TIFF with several; None: the manifest's
    preset: str | None = None
    restoration_tau: float | None = None
    replaces: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything besides the source's bytes that decides the output: resolved, with no default left open.

    Hashed canonically (``identity.settings_hash``) into the fingerprint, and written to log, sidecar and metadata.
    """

    engine: str  # "supir" | "lanczos"
    engine_name: str  # display name, e.g. "SUPIR v0Q"
    model_sha256: str  # "" for engines without weights
    weights: str
    precision: Literal["", Precision]  # inside the networks; "" for engines without
    preset: str
    sampler: Literal["", SamplerName]
    steps: int
    cfg_start: float
    cfg_end: float
    guidance_from: float  # noise levels (sigma) between which the guidance scale counts, and is else 1
    guidance_to: float | None  # None: to the largest
    control_scale: float
    restoration_tau: float | None
    restoration_to_end: bool
    churn: float  # 0 unless sampler is edm
    eta: float  # 0 unless sampler is dpmpp_2m_sde
    noise: float
    color_fix: Literal["wavelet", "adain", "none"]
    upscale: float
    min_size: int
    window: int  # latent positions
    stride: int
    max_pixels: int  # a larger working image is cut into tiles
    overlap: int  # pixels shared by neighboring tiles
    geometry: Literal["pad", "released"]
    vae_tiling: VAETilingMode
    vae_tile: int  # pixels; 0: not tiled
    caption_mode: str
    prompt: str | None  # None: to be captioned
    prompt_source: str  # "manifest" | "review" | "sidecar" | "fixed" | "none" | "attributes" | "llava"
    positive_prompt: str  # appended to the caption
    negative_prompt: str
    captioner: str  # name of the model; this and the next eight are "" or 0 unless it captions this image
    captioner_identity: str  # hash of its files or commit of the hub
    caption_question: str
    caption_template: str  # "": the model's own
    caption_max_new_tokens: int
    caption_temperature: float
    caption_top_p: float
    caption_precision: Literal["", "float32", "bfloat16", "float16"]
    caption_quantization: Literal["", "none", "8bit", "4bit"]
    material: str
    run_seed: int
    seed: int | None  # None: from the source's hash
    page: int  # of a source with several, from 1
    few_levels: FewLevels
    format: OutputFormat | Literal["source"]
    bit_depth: Literal[8, 16] | None  # None: as the source
    compression: Compression  # of a TIFF; so are the next two
    tiled: bool
    pyramid: bool
    quality: int | None  # None: as good as the format can
    gate_color_drift: float
    gate_similarity: float
    gate_dead: float
    gate_seam: float
    audit_enabled: bool
    audit_samples: int  # restorations of a flagged image, with as many seeds; 0 if nothing is generated
    notice: str
    operator: str | None
    organization: str | None
    accepted_license: str | None
    signed: bool  # with whose key is no setting: a certificate that is renewed makes no new work

    @property
    def gate(self) -> GateLimits:
        """What the output may score."""
        return GateLimits(self.gate_color_drift, self.gate_similarity, self.gate_dead, self.gate_seam)


@dataclass(frozen=True)
class GateLimits:
    """What an output may score at most, ``similarity`` at least; meanings in :class:`GateScores`."""

    color_drift: float
    similarity: float
    dead: float
    seam: float


@dataclass(frozen=True)
class GateScores:
    """How a tile, or an image of several, compares with what it was restored from; measured by ``gate``.

    ``area`` in pixels. ``color_drift``: mean Delta E 2000. ``similarity``: SSIM of luma. ``dead``: share of the area
    that is constant and was not. ``seam``: most that two tiles differ where they overlap, mean of [0, 1]; None for an
    image of one tile.
    """

    area: int
    finite: bool
    color_drift: float
    similarity: float
    dead: float
    seam: float | None = None


@dataclass(frozen=True)
class Region:
    """A rectangle of the source, in its pixels after orientation, that looks like something to watch.

    ``invention`` is the mean of the invention map in it, once that is known.
    """

    kind: Literal["face", "text"]
    x: int
    y: int
    width: int
    height: int
    invention: float | None = None


@dataclass(frozen=True)
class TileAudit:
    """What the audit of one tile adds to that of its image: sums over the cells it answers for, and their maps.

    ``row``, ``column``: the first of its cells. ``pixels`` of the source. ``similarity`` is a sum over pixels, like
    ``squared_error``; ``sharp_before`` and ``sharp_after`` are sums of squares. Maps hold one byte for each cell, row
    by row, with the scales of ``audit``; ``spread`` is empty for a single restoration.
    """

    row: int
    column: int
    rows: int
    columns: int
    pixels: int
    squared_error: float
    similarity: float
    sharp_before: float
    sharp_after: float
    delta_e: bytes = field(repr=False)
    invention: bytes = field(repr=False)
    spread: bytes = field(repr=False)


@dataclass(frozen=True)
class AuditScores:
    """How true an output is to its source; ``audit`` has the definitions.

    ``psnr``: dB, of luma, output reduced. ``ssim``: likewise. ``delta_e``, ``delta_e_90``: mean and 90th percentile of
    Delta E 2000. ``sharpness``: fine detail, output over source; None where the source has none. ``invention``: mean of
    the map; ``invented``: share of the area above one half. ``spread``: mean deviation between seeds, None for one
    seed. ``regions``: None if nobody looked for any.
    """

    psnr: float
    ssim: float
    delta_e: float
    delta_e_90: float
    sharpness: float | None
    invention: float
    invented: float
    spread: float | None
    regions: tuple[Region, ...] | None


@dataclass(frozen=True)
class ModelRef:
    """The model of a generative engine: where it is, what it is, and the number format it computes in.

    uri: ``tiny`` or a converted model's folder. No part of the settings: a model that moves is the same model, its hash
    is in ``Settings.model_sha256``, its precision in ``Settings.precision``.
    """

    uri: str
    config: ModelConfig = field(repr=False)
    precision: Precision = "float32"


@dataclass(frozen=True)
class SigningKey:
    """Whose content credentials outputs get: where private key and certificates lie (PEM), and who stamps the time."""

    key: str
    certificates: str
    timestamp: str | None = None  # address of a time stamp authority (RFC 3161)


@dataclass(frozen=True)
class Job:
    """One image and all that was decided about it before its pixels were read.

    ``output_stem`` is the output URI without its extension: the format may follow the source's.
    ``captioner`` is where the captioner is loaded from, a folder or a hub id.
    """

    source: Source
    settings: Settings
    settings_sha256: str
    output_stem: str
    output_root: str  # the output folder of the run
    model: ModelRef | None = None  # None: the engine has none
    captioner: str = ""
    sidecars: tuple[Sidecar, ...] = ("json",)  # what is written beside the output; no part of what the image looks like
    signing: SigningKey | None = None


@dataclass(frozen=True)
class ImageFacts:
    """What the decoder learned about a source (header, hash, color), and what the writer needs to answer in kind.

    ``tone`` and ``tone_curve`` are color.Tone's.
    """

    sha256: str
    format: str  # loader's name: "tiff", "png", "jpeg", ...
    width: int  # after orientation
    height: int
    bands: int  # color bands, 1 or 3
    bit_depth: Literal[8, 16]
    has_alpha: bool
    orientation: int  # EXIF value that was applied
    icc: bytes | None = field(repr=False)
    dpi: tuple[float, float] | None
    output_width: int  # == round(width * upscale)
    output_height: int
    work_width: int  # size the engine works at; differs from output only through min_size
    work_height: int
    notes: tuple[str, ...] = ()
    carries_color: bool = False  # tiles bring along what their colors lose on the way through sRGB
    tone: Literal["color", "neutral", "toned"] = "color"
    tone_curve: tuple[tuple[float, float], ...] = ()
    regions: tuple[Region, ...] | None = None  # faces and text that were found; None: nobody looked


@dataclass(frozen=True)
class TileBox:
    """A tile's place in the working image, in pixels; ``index`` of ``count`` in row-major order."""

    index: int
    count: int
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Failure:
    """Why an image has no output: ``kind`` is a short stable word, ``message`` the full sentence for people."""

    stage: str
    kind: str
    message: str
    retryable: bool = False


@dataclass(frozen=True)
class StageRecord:
    """What a stage measured while it worked on one tile."""

    stage: str
    seconds: float
    peak_memory_bytes: int
    device: str


@dataclass(frozen=True)
class TileTicket:
    """Everything about a tile but its pixels; travels from decode to write beside the arrays.

    ``fingerprint`` is hash(source hash, settings hash): the identity of the work on the whole image.
    ``recovered``: the output with this fingerprint was already committed; ``kept``: an earlier run restored all tiles
    of the image and did not get to assembling them. Later stages pass both on.
    """

    job: Job
    facts: ImageFacts | None = None
    box: TileBox | None = None
    fingerprint: str = ""
    seed: int = 0
    caption: str = ""
    prompt: str = ""  # the full positive prompt the engine used
    scores: GateScores | None = None  # of the tile; of the image once it is whole
    again: bool = False  # the tile went wrong and was restored a second time
    tile_audit: TileAudit | None = None
    audit: AuditScores | None = None  # of the image once it is whole
    execution: str = ""  # how the engine worked on the tile; on the image once it is whole. Decides rounding alone
    failure: Failure | None = None
    recovered: bool = False
    kept: bool = False
    records: tuple[StageRecord, ...] = ()
    source_metadata: bytes = field(default=b"", repr=False)  # metadata.SourceMetadata, serialized
    started_at: str = ""  # UTC, ISO 8601; when decoding began

    @property
    def has_work(self) -> bool:
        """Whether the engine still has something to do for this tile."""
        return self.failure is None and not self.recovered and not self.kept


@dataclass(frozen=True)
class Outcome:
    """One row of the run log: one image, its settings, and how it ended."""

    ticket: TileTicket
    status: Status
    output_uri: str = ""
    output_sha256: str = ""
    output_bytes: int = 0
    finished_at: str = ""  # UTC, ISO 8601
    record_sha256: str = ""  # of the JSON beside the output
    premis_sha256: str = ""  # of the PREMIS XML beside the output; "" if none was written
    c2pa_sha256: str = ""  # of the content credentials beside the output; "" if it has none or holds them
