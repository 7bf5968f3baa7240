"""What a manifest may say: its sections are pydantic models that refuse unknown keys.

They are read in manifest_file.py; resolve.py makes of them the settings of one image, in which no default is left open.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from supir_batch import model_folder
from supir_batch.errors import ManifestError
from supir_batch.types import Compression, FewLevels, Sidecar, SigningKey
from supir_model.config import (
    TINY,
    ModelConfig,
    Precision,
    SamplerName,
    SamplingDefaults,
    VAETilingMode,
)

DEFAULT_NOTICE = "AI-assisted reconstruction; details may not be in the original"
NAMING_FIELDS = ("stem", "id", "engine", "upscale")
MAX_SEED = 2**63 - 1

Preset = Literal["fidelity", "quality", "fidelity-lightning", "quality-lightning"]
Material = Literal["photograph", "painting", "drawing", "document", "map"]

ACCEPTANCE_NEEDED = {"supir-noncommercial"}
"""Weights under these licenses run only after the manifest names the license."""

UNUSED: dict[SamplerName, tuple[str, ...]] = {"edm": ("eta",), "dpmpp_2m_sde": ("churn",)}
"""The keys of sampling that a sampler has no use for."""

_NOT_GENERATIVE = SamplingDefaults(0, 0.0, 0.0, 0.0, None, 0.0, 0.0, "none")


class _Section(BaseModel):
    # strict: YAML already gives numbers their type, so a string or a bool where a number belongs is a mistake
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _one_or_many(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class Output(_Section):
    """Where restored images go and in which form."""

    uri: str = Field(min_length=1, description="Folder or prefix for outputs and run log; a path or an fsspec URI.")
    format: Literal["source", "tiff", "png", "jpeg", "webp", "jpeg2000"] = Field(
        default="source", description="File format; source: as the input, or PNG where that is not written."
    )
    bit_depth: Literal["source", 8, 16] = Field(default="source", description="Bits per channel; source: as the input.")
    compression: Compression = Field(default="deflate", description="Of a TIFF; all are lossless.")
    tiled: bool = Field(default=False, description="A TIFF in tiles of 256 pixels instead of strips.")
    pyramid: bool = Field(
        default=False, description="A tiled TIFF with reduced copies of itself, as IIIF image servers want it."
    )
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="JPEG and WebP: 1 to 100; JPEG 2000: PSNR in dB. Left out: 95 for JPEG, lossless for the others.",
    )
    naming: str = Field(
        default="{stem}", description="Output name, no extension; may use {stem} {id} {engine} {upscale}."
    )
    sidecars: Annotated[tuple[Sidecar, ...], BeforeValidator(_one_or_many)] = Field(
        default=("json", "premis"),
        description="What lies beside each output: json, the record, always; premis: the same as PREMIS 3 XML.",
    )

    @field_validator("sidecars")
    @classmethod
    def _holds_the_record(cls, sidecars: tuple[Sidecar, ...]) -> tuple[Sidecar, ...]:
        if "json" not in sidecars or len(set(sidecars)) != len(sidecars):
            raise ValueError("must name json, by which a run knows what is done, and nothing twice: [json, premis]")
        return sidecars

    @model_validator(mode="after")
    def _format_can_hold_it(self) -> Output:
        if self.format in ("jpeg", "webp") and self.bit_depth == 16:
            raise ValueError(f"format '{self.format}' holds 8 bits per channel; remove bit_depth or use tiff")
        if self.format in ("tiff", "png") and self.quality is not None:
            raise ValueError(f"format '{self.format}' is lossless; remove quality")
        return self

    @field_validator("naming")
    @classmethod
    def _names_the_image(cls, naming: str) -> str:
        try:
            parsed = list(string.Formatter().parse(naming))
            fields = {field for _, field, _, _ in parsed if field is not None}
        except ValueError as error:
            raise ValueError(f"is not a naming template ({error})") from error
        unknown = sorted(fields - set(NAMING_FIELDS))
        if unknown:
            raise ValueError(f"has no field {{{unknown[0]}}}; it knows {' '.join(f'{{{f}}}' for f in NAMING_FIELDS)}")
        if any(form or conversion for _, _, form, conversion in parsed):
            raise ValueError("must name its fields alone, without ':' or '!', such as {stem}")
        if not fields & {"stem", "id"}:
            raise ValueError("must contain {stem} or {id}, otherwise all outputs of a folder share one name")
        if "/" in naming or "\\" in naming or naming.startswith("."):
            raise ValueError("must be a file name: no slashes, no leading dot; the folder tree is mirrored by itself")
        return naming


class Reading(_Section):
    """How sources are read."""

    page: int = Field(
        default=1, ge=1, le=65_535, description="Page of a TIFF with several; the list column page says it per row."
    )
    few_levels: FewLevels = Field(
        default="expand", description="Images of fewer than 8 bits or with a palette: expanded with a note, or refused."
    )


class Engine(_Section):
    """What restores the pixels. A sampling value left out comes from the preset of the weights."""

    name: Literal["supir", "lanczos"] = Field(
        default="supir", description="supir: generative; lanczos: plain enlargement."
    )
    weights: str = Field(
        default="tiny", min_length=1, description="Model: tiny, or the folder (path or URI) of a converted model."
    )
    precision: Precision | None = Field(
        default=None,
        description="Number format inside control encoder and UNet; unless float32, autoencoder and text use bfloat16. "
        "float8: bfloat16 with products of 8 bits, for recent cards. Left out: the model's own.",
    )
    preset: Preset = Field(
        default="fidelity",
        description="fidelity: close to the source; lightning: few steps, for a model with a Lightning base or LoRA.",
    )
    sampler: SamplerName | None = Field(
        default=None, description="edm: the release's; dpmpp_2m_sde: its choice for Lightning."
    )
    steps: int | None = Field(default=None, ge=1, le=1000, description="Sampling steps.")
    cfg_start: float | None = Field(
        default=None, ge=0, le=30, description="Guidance scale at the largest sigma; 1 = none."
    )
    cfg_end: float | None = Field(default=None, ge=0, le=30, description="Guidance scale at sigma 0.")
    control_scale: float | None = Field(
        default=None, ge=0, le=2, description="Strength of the control encoder's features."
    )
    restoration_tau: Annotated[float, Field(gt=0, le=100)] | Literal["off"] | None = Field(
        default=None, description="Exponent of restoration guidance; larger is weaker; off: no restoration guidance."
    )
    restoration_to_end: bool | None = Field(
        default=None,
        description="true: restoration guidance at every step, as in the paper; false: not at the last, as released.",
    )
    churn: float | None = Field(default=None, ge=0, le=100, description="S_churn of the EDM sampler; 0: deterministic.")
    eta: float | None = Field(
        default=None, ge=0, le=1, description="Share of new noise of sampler dpmpp_2m_sde; 0: deterministic."
    )
    noise: float | None = Field(
        default=None, gt=0, le=2, description="S_noise: factor on the noise that churn or eta adds."
    )
    color_fix: Literal["wavelet", "adain", "none"] | None = Field(
        default=None, description="How colors follow the source."
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Run seed; each image's seed is a hash of it and the source."
    )
    upscale: float = Field(default=1.0, ge=0.1, le=16, description="Output side / input side.")
    min_size: int | None = Field(
        default=None,
        ge=0,
        le=8192,
        description="Shorter sides are enlarged to this many pixels while working; 0: never.",
    )
    geometry: Literal["pad", "released"] = Field(
        default="pad",
        description="pad: the model pads and crops; released: sides squashed to multiples of 64 and 8-bit resampling, "
        "as the released script does.",
    )
    accept_license: str | None = Field(
        default=None, description="Name of the license of restricted weights, as acceptance."
    )

    _config: ModelConfig = PrivateAttr(default=TINY)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model that ``weights`` names; of ``tiny`` for an engine without a model."""
        return self._config

    @model_validator(mode="after")
    def _license_accepted(self) -> Engine:
        if self.name != "supir":
            return self
        try:
            self._config = model_folder.config(self.weights)
        except ManifestError as error:
            raise ValueError(str(error)) from error
        needed = self._config.license
        if needed in ACCEPTANCE_NEEDED and self.accept_license != needed:
            raise ValueError(
                f"weights '{self._config.name}' may be used under the license '{needed}' only; "
                f"read it and add 'accept_license: {needed}'"
            )
        if self.precision == "float16" and self._config.name == TINY.name:
            raise ValueError("precision 'float16' overflows in weights 'tiny'; use bfloat16 or float32")
        return self


class Approximate(_Section):
    """Ways to save time that change results. Off unless given; docs/performance.md has what each changes."""

    guidance_from: float = Field(
        default=0.0, ge=0, description="Smallest sigma at which the negative prompt is computed; below, guidance is 1."
    )
    guidance_to: float | None = Field(default=None, gt=0, description="Largest such sigma; left out: all.")

    @model_validator(mode="after")
    def _in_order(self) -> Approximate:
        if self.guidance_to is not None and self.guidance_to < self.guidance_from:
            raise ValueError(f"guidance_to {self.guidance_to:g} is smaller than guidance_from {self.guidance_from:g}")
        return self


class Caption(_Section):
    """Where the prompt comes from. A ``prompt`` in a list row always wins."""

    mode: Literal["attributes", "llava", "manifest", "sidecar", "fixed", "none"] = Field(
        default="attributes",
        description="attributes: measured on the image; llava: a vision-language model; manifest: list column prompt; "
        "sidecar: <image>.txt beside it; fixed: text; none: only the positive prompt.",
    )
    text: str | None = Field(default=None, description="The caption of every image, for mode fixed.")
    material: Material = Field(default="photograph", description="What the images are; a list row may say otherwise.")
    prompts: Literal["material", "release"] = Field(
        default="material", description="material: prompts for the material; release: those SUPIR was published with."
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        description="Captioner of mode llava: a hub id (owner/name), or a folder (/..., ./..., ../... or ~/...).",
    )
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit of a hub's model.")
    question: str = Field(
        default="Describe the content and the style of this {material} in great detail.",
        min_length=1,
        description="What the captioner is asked; {material} is the image's material.",
    )
    template: str = Field(default="", description="The prompt around {image} and {question}; empty: the model's own.")
    max_new_tokens: int = Field(
        default=128, ge=1, le=4096, description="Longest caption; the restorer reads 77 tokens, suffix included."
    )
    temperature: float = Field(default=0.0, ge=0, le=5, description="0: the likeliest words; above: drawn by seed.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Words are drawn from this share of the probability.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Number format of the captioner."
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="Smaller weights on a GPU, by bitsandbytes."
    )
    positive_prompt: str | None = Field(
        default=None, description="Appended to every caption; left out: as prompts says."
    )
    negative_prompt: str | None = Field(
        default=None, description="What guidance leads away from; left out: as prompts says."
    )

    @model_validator(mode="after")
    def _text_with_fixed(self) -> Caption:
        if self.mode == "fixed" and self.text is None:
            raise ValueError("mode 'fixed' needs 'text'")
        if self.mode != "fixed" and self.text is not None:
            raise ValueError(f"'text' is only used by mode 'fixed', but mode is '{self.mode}'")
        return self

    @model_validator(mode="after")
    def _model_with_llava(self) -> Caption:
        if self.mode == "llava" and self.model is None:
            raise ValueError("mode 'llava' needs 'model', such as llava-hf/llava-1.5-7b-hf or ./llava-1.5-7b-hf")
        if self.revision is not None and self.model is not None and is_model_folder(self.model):
            raise ValueError("'revision' is only used with a model of the hub, but 'model' is a folder")
        return self

    @field_validator("template")
    @classmethod
    def _holds_image_and_question(cls, template: str) -> str:
        if template and any(template.count(field) != 1 for field in ("{image}", "{question}")):
            raise ValueError("must contain {image} and {question} once each")
        return template

    @field_validator("model")
    @classmethod
    def _folder_or_hub_id(cls, model: str | None) -> str | None:
        if model is not None and not is_model_folder(model) and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            raise ValueError("is neither a hub id (owner/name) nor a folder; begin a folder with / ./ ../ or ~/")
        return model


def is_model_folder(model: str) -> bool:
    """Whether ``caption.model`` names a folder of this machine; otherwise it is a hub id."""
    return model.startswith(("/", "./", "../", "~/"))


class Tiling(_Section):
    """How large images are cut. Sizes of tiles in pixels, of windows in latent positions."""

    max_pixels: int = Field(
        default=4_194_304, ge=65_536, le=2**30, description="A larger working image is cut into tiles."
    )
    overlap: int = Field(default=128, ge=0, le=2048, description="Pixels shared by neighboring tiles.")
    window: int | None = Field(
        default=None, ge=16, le=512, multiple_of=8, description="Side of a window, latent positions."
    )
    stride: int | None = Field(
        default=None, ge=8, le=512, multiple_of=8, description="Step between windows, latent positions."
    )
    vae_tiling: VAETilingMode = Field(
        default="off",
        description="off: the autoencoder runs as one; exact: in parts, with the same result, slower and with less "
        "memory; released: in tiles as the released program, which changes results.",
    )
    vae_tile: int = Field(
        default=512, ge=64, le=8192, multiple_of=32, description="Side of the autoencoder's tiles, pixels."
    )

    @model_validator(mode="after")
    def _tiles_wider_than_overlap(self) -> Tiling:
        if (2 * self.overlap + 64) ** 2 > self.max_pixels:
            raise ValueError(
                f"overlap {self.overlap} is too large for tiles of {self.max_pixels} pixels; "
                f"use max_pixels of at least {(2 * self.overlap + 64) ** 2}"
            )
        return self


class Gate(_Section):
    """What an output must be like to be kept. Left out: as the preset says. A tile that fails is restored once more."""

    color_drift: float | None = Field(
        default=None, gt=0, description="Largest mean Delta E 2000 against the source, both reduced."
    )
    similarity: float | None = Field(
        default=None, ge=-1, le=1, description="Smallest SSIM of luma against the source, both reduced."
    )
    dead: float | None = Field(
        default=None, ge=0, le=1, description="Largest share of the area that is constant and was not."
    )
    seam: float | None = Field(
        default=None, gt=0, le=1, description="Most that tiles may differ where they overlap, mean of [0, 1]."
    )


class Audit(_Section):
    """What is measured on each output to say where to look. It decides nothing: changing it makes no image anew."""

    enabled: bool = Field(
        default=True, description="Compare each output with its source, and draw a map of what was invented."
    )
    samples: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Restore images with faces or text with so many seeds, for a map of where they differ; "
        "takes as many times as long. The output is that of the first seed.",
    )

    @model_validator(mode="after")
    def _samples_are_audited(self) -> Audit:
        if self.samples > 1 and not self.enabled:
            raise ValueError("samples are part of the audit; set enabled to true or leave samples out")
        return self


class Provenance(_Section):
    """What is written into each output about its making."""

    notice: str = Field(default=DEFAULT_NOTICE, description="Sentence embedded in every output of a generative engine.")
    operator: str | None = Field(default=None, description="Person who runs this.")
    organization: str | None = Field(default=None, description="Institution in whose name this runs.")


class Signing(_Section):
    """Content credentials (C2PA) in or beside every output. Files are named here; the key itself never stands here."""

    key: str | None = Field(default=None, min_length=1, description="File with the private key, PEM, unencrypted.")
    certificates: str | None = Field(
        default=None, min_length=1, description="File with the certificates, PEM: the key's own first, no root."
    )
    timestamp: str | None = Field(
        default=None, min_length=1, description="Address of a time stamp authority; without, signatures expire."
    )

    @model_validator(mode="after")
    def _files_together(self) -> Signing:
        if any("-----BEGIN" in text for text in (self.key or "", self.certificates or "")):
            raise ValueError("name files; a key or certificate itself must not stand in a manifest")
        if (self.key is None) != (self.certificates is None):
            raise ValueError("key and certificates go together; name both files or neither")
        if self.timestamp is not None and self.key is None:
            raise ValueError("timestamp is only used with key and certificates")
        return self

    @property
    def files(self) -> SigningKey | None:
        """What to sign with, None if nothing is signed."""
        if self.key is None or self.certificates is None:
            return None
        return SigningKey(self.key, self.certificates, self.timestamp)


class Runtime(_Section):
    """Where and how wide the work runs; never decides what an output looks like."""

    actors: int = Field(default=1, ge=1, le=4096, description="Restoring workers; each loads the model once.")
    max_actors: int | None = Field(
        default=None, ge=1, le=4096, description="Up to so many restoring workers while work waits; left out: actors."
    )
    cpus: int | None = Field(default=None, ge=1, le=65_536, description="CPU cores a local Ray may use; left out: all.")
    gpus_per_actor: float = Field(
        default=0.0, ge=0, le=16, description="GPUs of one restoring worker; fractions share one."
    )
    accelerator: str | None = Field(
        default=None, min_length=1, description="Kind of card for restoring workers, such as H100; left out: any."
    )
    batch: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Tiles restored at once by one worker; on a GPU as many windows, if memory allows.",
    )
    caption_actors: int = Field(default=1, ge=1, le=4096, description="Captioning workers.")
    max_caption_actors: int | None = Field(
        default=None, ge=1, le=4096, description="Up to so many while images wait; left out: caption_actors."
    )
    caption_gpus_per_actor: float | None = Field(
        default=None, ge=0, le=16, description="GPUs of one captioning worker; left out: it halves gpus_per_actor."
    )
    caption_accelerator: str | None = Field(
        default=None, min_length=1, description="Kind of card for captioning workers, such as L4; left out: any."
    )
    caption_batch: int = Field(default=1, ge=1, le=256, description="Images captioned at once by one worker.")
    address: str | None = Field(default=None, description="Address of a Ray cluster; left out: a local Ray.")
    images_in_flight: int = Field(
        default=64, ge=1, le=65_536, description="Images that are anywhere between reading and writing at one time."
    )
    deadline_seconds: float = Field(
        default=3600.0,
        gt=0,
        le=7 * 86_400,
        description="Time one stage may take for one image or tile; a worker that takes longer is ended.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where a worker has it, else CPU."
    )

    @model_validator(mode="after")
    def _pools_grow(self) -> Runtime:
        for least, most in (("actors", "max_actors"), ("caption_actors", "max_caption_actors")):
            limit = getattr(self, most)
            if limit is not None and limit < getattr(self, least):
                raise ValueError(
                    f"{most} {limit} is less than {least} {getattr(self, least)}; raise it or leave it out"
                )
        return self


class Manifest(_Section):
    """A whole run: what to restore, where to, how. ``inputs`` and ``output.uri`` are absolute after loading."""

    name: str = Field(default="", max_length=200, description="A title for people; shown in report and log.")
    inputs: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_many)] = Field(
        min_length=1, description="Files, folders, globs, or .csv / .jsonl / .parquet lists."
    )
    output: Output
    reading: Reading = Reading()
    engine: Engine = Engine()
    approximate: Approximate = Approximate()
    caption: Caption = Caption()
    tiling: Tiling = Tiling()
    gate: Gate = Gate()
    audit: Audit = Audit()
    provenance: Provenance = Provenance()
    signing: Signing = Signing()
    runtime: Runtime = Runtime()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _keys_of_the_sampler(self) -> Manifest:
        if self.engine.name == "supir" and self.engine.preset in self.engine.config.presets:
            sampler = self.sampling()["sampler"]
            for key in UNUSED[sampler]:
                if getattr(self.engine, key) is not None:
                    raise ValueError(
                        f"engine.{key}: is not used by sampler '{sampler}'; remove it or choose another sampler"
                    )
        return self

    @model_validator(mode="after")
    def _stride_within_window(self) -> Manifest:
        if self.engine.name == "supir":
            window, stride = self.window_and_stride()
            if stride > window:
                raise ValueError(f"tiling.stride: {stride} exceeds the window of {window}; windows would leave gaps")
        return self

    def sampling(self) -> dict[str, Any]:
        """The values of sampling: as given, else the preset's; neutral for an engine that does not generate."""
        if self.engine.name != "supir":
            return dataclasses.asdict(_NOT_GENERATIVE)
        values = dataclasses.asdict(self._preset())
        for key in values:
            given = getattr(self.engine, key)
            if given is not None:
                values[key] = given
        for key in UNUSED[values["sampler"]]:
            values[key] = 0.0
        return values

    def window_and_stride(self) -> tuple[int, int]:
        """In latent positions, as given, else the model's; a window narrower than the model's stride narrows that."""
        config = self.engine.config
        window = config.window if self.tiling.window is None else self.tiling.window
        stride = min(config.stride, window) if self.tiling.stride is None else self.tiling.stride
        return window, stride

    def note_origins(self, origins: Mapping[str, str]) -> None:
        """Keep, by dotted key, what gave it: ``manifest``, ``environment`` or ``flag``."""
        self._origins.update(origins)

    def values(self) -> list[tuple[str, Any, str]]:
        """Every key, dotted, with its value and where that is from: one of the above, or ``default``."""
        known = self._origins
        return [(key, value, known.get(key, "manifest" if given else "default")) for key, value, given in _values(self)]

    def _preset(self) -> SamplingDefaults:
        presets = self.engine.config.presets
        if self.engine.preset not in presets:
            raise ManifestError(
                f"engine.preset: weights '{self.engine.weights}' have no preset '{self.engine.preset}'; "
                f"choose one of {', '.join(presets)}"
            )
        return presets[self.engine.preset]


def _values(model: BaseModel, prefix: str = "") -> list[tuple[str, Any, bool]]:
    rows: list[tuple[str, Any, bool]] = []
    for key in type(model).model_fields:
        value = getattr(model, key)
        if isinstance(value, BaseModel):
            rows += _values(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value, key in model.model_fields_set))
    return rows
