"""What the user asked for (the manifest: YAML, then environment, then flags) and what it means for one image.

Sections of a manifest are pydantic models that refuse unknown keys; :func:`resolve` turns them into the frozen
:class:`~supir_batch.types.Settings` in which no default is left open. :func:`settings_hash` and :func:`fingerprint`
give a piece of work its identity.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import hashlib
import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from supir_batch import model_folder, store
from supir_batch.errors import ManifestError, StoreError
from supir_batch.types import Compression, FewLevels, GateLimits, Settings, Sidecar, SigningKey, Source
from supir_model.config import (
    MODELS,
    TINY,
    ModelConfig,
    Precision,
    Prompts,
    SamplerName,
    SamplingDefaults,
    VAETilingMode,
)

ENVIRONMENT_PREFIX = "SUPIR_BATCH__"
DEFAULT_NOTICE = "AI-assisted reconstruction; details may not be in the original"
NAMING_FIELDS = ("stem", "id", "engine", "upscale")
MAX_SEED = 2**63 - 1

Preset = Literal["fidelity", "quality", "fidelity-lightning", "quality-lightning"]
Material = Literal["photograph", "painting", "drawing", "document", "map"]

# Weights under these licenses run only after the manifest names the license.
_ACCEPTANCE_NEEDED = {"supir-noncommercial"}


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
        if needed in _ACCEPTANCE_NEEDED and self.accept_license != needed:
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

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)  # dotted key -> manifest | environment | flag

    @model_validator(mode="after")
    def _keys_of_the_sampler(self) -> Manifest:
        if self.engine.name == "supir" and self.engine.preset in self.engine.config.presets:
            sampler = _sampling(self)["sampler"]
            for key in _UNUSED[sampler]:
                if getattr(self.engine, key) is not None:
                    raise ValueError(
                        f"engine.{key}: is not used by sampler '{sampler}'; remove it or choose another sampler"
                    )
        return self

    @model_validator(mode="after")
    def _stride_within_window(self) -> Manifest:
        if self.engine.name == "supir":
            window, stride = _window(self)
            if stride > window:
                raise ValueError(f"tiling.stride: {stride} exceeds the window of {window}; windows would leave gaps")
        return self


class Explained(NamedTuple):
    """One resolved value and where it came from."""

    key: str
    value: object
    origin: str


# --- loading -------------------------------------------------------------------------------------------------------


def load_manifest(
    uri: str, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Manifest:
    """Read a manifest, layer ``SUPIR_BATCH__SECTION__KEY`` variables and then ``overrides`` (dotted keys) over it.

    Relative local paths count from the manifest's folder, those in variables and overrides from the current folder.
    ``environ`` is the process's environment when None. Raises ManifestError with one line per problem.
    """
    if not store.exists(uri):
        raise ManifestError(f"{uri}: no such manifest; give the path of a YAML file")
    return _layered(_parse_yaml(store.read_text(uri), uri), uri, overrides, environ)


def manifest_name(uri: str) -> str:
    """What the manifest at ``uri`` calls itself; "" if it does not, or cannot be read."""
    try:
        found = _parse_yaml(store.read_text(uri), uri).get("name")
    except (ManifestError, StoreError):
        return ""
    return found if isinstance(found, str) else ""


def manifest_of_folder(
    folder: str, output: str, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Manifest:
    """The manifest that names a folder, an output and nothing else, with the layers of ``load_manifest``."""
    here = store.resolve(os.getcwd(), folder)
    data = {"inputs": [here], "output": {"uri": store.resolve(os.getcwd(), output)}}
    return _layered(data, folder, overrides, environ)


def _layered(
    data: dict[str, Any], uri: str, overrides: Mapping[str, str] | None, environ: Mapping[str, str] | None
) -> Manifest:
    _refuse_credentials(data, uri)
    origins = dict.fromkeys(_leaves(data), "manifest")
    _make_absolute(data, store.parent(store.resolve(os.getcwd(), uri)))

    layers = [("environment", variable, value) for variable, value in _from_environment(environ).items()]
    layers += [("flag", key, value) for key, value in (overrides or {}).items()]
    for origin, label, text in layers:
        key = _environment_key(label) if origin == "environment" else label
        layer = _override(key, text, f"{origin} {label}")
        _refuse_credentials(layer, f"{origin} {label}")
        _make_absolute(layer, os.getcwd())
        _merge(data, layer)
        origins[key] = origin

    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        lines = _joined(dict.fromkeys(_error_lines(error, origins)))
        raise ManifestError("\n".join(f"{uri}: {line}" for line in lines)) from error
    manifest._origins.update(origins)
    return manifest


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: ``off`` and ``no`` are words, ``1e-3`` is a number, no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                problem = f"key '{key.value}' is already given on line {seen[key.value]}; remove one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_TAG_ERRORS = (ValueError, TypeError, AttributeError)  # what PyYAML raises for a tag that does not fit: !!int x


def _parse_yaml(text: str, uri: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, *_TAG_ERRORS) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{uri}:{mark.line + 1}" if mark else uri
        raise ManifestError(f"{place}: {getattr(error, 'problem', None) or 'is not valid YAML'}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{uri}: is no manifest: expected keys such as 'inputs' and 'output', saw {_shown(data)}")
    return {str(key): value for key, value in data.items()}


def _from_environment(environ: Mapping[str, str] | None) -> dict[str, str]:
    values = os.environ if environ is None else environ
    return {key: values[key] for key in sorted(values) if key.startswith(ENVIRONMENT_PREFIX)}


def _environment_key(variable: str) -> str:
    return variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")


def _override(key: str, text: str, label: str) -> dict[str, Any]:
    """The nested mapping that ``key=text`` stands for."""
    parts = key.split(".")
    if not all(parts):
        raise ManifestError(f"{label}: '{key}' is not a key; write section.key=value, such as engine.steps=20")
    value: Any = text
    if not _takes_only_text(parts):
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, *_TAG_ERRORS) as error:
            raise ManifestError(f"{label}: cannot read the value {text!r}") from error
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _takes_only_text(parts: Sequence[str]) -> bool:
    """Whether the field is a plain string, so that ``--set name=1911`` stays one; ``null`` then is only a word."""
    model: type[BaseModel] = Manifest
    for part in parts[:-1]:
        section = _section(model, part)
        if section is None:
            return False
        model = section
    field = model.model_fields.get(parts[-1])
    if field is None:
        return False
    return field.annotation is str


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            base[key] = value


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in data.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _refuse_credentials(value: object, place: str) -> None:
    """The whole manifest is copied beside the run log."""
    if isinstance(value, str):
        try:
            store.refuse_credentials(value)
        except StoreError as error:
            raise ManifestError(f"{place}: {error}") from None
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            _refuse_credentials(one, place)


def _make_absolute(data: dict[str, Any], folder: str) -> None:
    """Resolve what names places against ``folder``; values of a wrong type are left to validation."""
    inputs = data.get("inputs")
    if isinstance(inputs, str) and inputs:
        data["inputs"] = [_absolute_input(folder, inputs)]
    elif isinstance(inputs, list):
        data["inputs"] = [_absolute_input(folder, one) if isinstance(one, str) and one else one for one in inputs]
    engine = data.get("engine")
    weights = engine.get("weights") if isinstance(engine, dict) else None
    if isinstance(engine, dict) and isinstance(weights, str) and weights and weights != TINY.name:
        absolute = store.resolve(folder, weights)
        # a bare name of a model is a folder only if there is one, so that the message can speak of the name
        data["engine"] = {
            **engine,
            "weights": weights if weights in MODELS and not store.is_folder(absolute) else absolute,
        }
    output = data.get("output")
    if isinstance(output, dict) and isinstance(output.get("uri"), str) and output["uri"]:
        data["output"] = {**output, "uri": store.resolve(folder, output["uri"])}
    caption = data.get("caption")
    if isinstance(caption, dict) and isinstance(caption.get("model"), str) and is_model_folder(caption["model"]):
        data["caption"] = {**caption, "model": store.resolve(folder, caption["model"])}
    signing = data.get("signing")
    if isinstance(signing, dict):
        files = {key: signing[key] for key in ("key", "certificates") if isinstance(signing.get(key), str)}
        files = {key: store.resolve(folder, name) for key, name in files.items() if name and "-----" not in name}
        data["signing"] = {**signing, **files}


def _absolute_input(folder: str, reference: str) -> str:
    literal = store.resolve(folder, reference)
    if literal != reference and store.has_glob(reference) and not (store.exists(literal) or store.is_folder(literal)):
        return store.resolve(glob.escape(folder), reference)  # a folder named "[1911]" is not part of the pattern
    return literal


# --- messages ------------------------------------------------------------------------------------------------------


def _error_lines(error: ValidationError, origins: Mapping[str, str]) -> Iterable[str]:
    for problem in error.errors():
        path, model = _path(problem["loc"])
        source = {"environment": " (from the environment)", "flag": " (from --set)"}.get(origins.get(path, ""), "")
        kind, message = problem["type"], problem["msg"]
        if kind == "extra_forbidden":
            yield f"{path}{source}: unknown key{_key_hint(path.rpartition('.')[2], model)}"
        elif kind == "missing":
            yield f"{path}: is required but missing"
        elif kind == "value_error":
            text = str(problem["ctx"]["error"])
            given = problem["input"]
            where = f"{path}{source}: " if path else ""
            yield f"{where}{_shown(given)} {text}" if isinstance(given, str) else f"{where}{text}"
        elif kind in ("model_type", "model_attributes_type"):
            yield f"{path}{source}: is a section; write 'key: value' lines below it, saw {_shown(problem['input'])}"
        else:
            text = plain_words(message)
            yield f"{path}{source}: {text[:1].lower()}{text[1:]}, saw {_shown(problem['input'])}"


def plain_words(message: str) -> str:
    """A pydantic message in the words of ours: ``must be an integer`` for ``Input should be a valid integer``."""
    message = message.replace("Input should be", "must be").replace("should have", "must have")
    return message.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _joined(lines: Iterable[str]) -> list[str]:
    """One line for each value that fits none of its alternatives: ``must be a number or 'off', saw 'abc'``."""
    merged: list[str] = []
    for line in lines:
        head, _, seen = line.rpartition(", saw ")
        subject, separator, wanted = head.partition(": must be ")
        if separator and merged and merged[-1].startswith(f"{subject}: must be ") and merged[-1].endswith(seen):
            merged[-1] = f"{merged[-1].rpartition(', saw ')[0]} or {wanted}, saw {seen}"
        else:
            merged.append(line)
    return merged


def _path(location: Sequence[int | str]) -> tuple[str, type[BaseModel]]:
    """The dotted key of an error and the section it is in; what pydantic appends for union members is dropped."""
    model: type[BaseModel] = Manifest
    keys: list[str] = []
    for part in location:
        keys.append(str(part))
        section = _section(model, str(part))
        if section is None:
            break
        model = section
    return ".".join(keys), model


def _key_hint(key: str, model: type[BaseModel]) -> str:
    near = _hint(key, model.model_fields)
    if near:
        return near
    for section, field in Manifest.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and key in inner.model_fields:
            return f"; did you mean '{section}.{key}'?"
    return f"; known keys: {', '.join(model.model_fields)}"


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), {k.lower(): k for k in known}, n=1)
    return "".join(f"; did you mean '{k}'?" for k in known if near and k.lower() == near[0])


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_yaml(manifest: Manifest) -> str:
    """The manifest with what environment and flags laid over it, and every place absolute: for another machine."""
    given = manifest.model_dump(mode="json", exclude_unset=True)
    return json.dumps(given, indent=2, ensure_ascii=False) + "\n"  # is YAML, and no word in it becomes a number


# --- resolving -----------------------------------------------------------------------------------------------------


def resolve(
    manifest: Manifest,
    source: Source,
    model_sha256: str,
    sidecar: str | None = None,
    captioner_identity: str = "",
) -> Settings:
    """Everything that decides this image's output besides its bytes.

    ``model_sha256`` is the hash of the weights ("" for engines without). ``sidecar`` is the text beside the image, for
    caption mode ``sidecar``; ``captioner_identity`` says what the captioner is, for mode ``llava``. Raises
    ManifestError when the caption mode needs a text that is not there.
    """
    manifest = _overridden(manifest, source)
    engine, generative = manifest.engine, manifest.engine.name == "supir"
    sampling = _sampling(manifest)
    prompt, prompt_source = _prompt(manifest, source, sidecar)
    config, prompts = engine.config, _prompts(manifest, source)
    window, stride = _window(manifest) if generative else (0, 0)
    vae_tiling: VAETilingMode = manifest.tiling.vae_tiling if generative else "off"
    asked = manifest.caption if prompt_source == "llava" else None
    tau = sampling["restoration_tau"]
    may_be_tiff = manifest.output.format in ("source", "tiff")
    return Settings(
        engine=engine.name,
        engine_name=config.display_name if generative else "Lanczos",
        model_sha256=model_sha256 if generative else "",
        weights=config.name if generative else "",
        precision=_precision(manifest) if generative else "",
        preset=engine.preset if generative else "",
        sampler=sampling["sampler"] if generative else "",
        steps=int(sampling["steps"]),
        cfg_start=float(sampling["cfg_start"]),
        cfg_end=float(sampling["cfg_end"]),
        guidance_from=float(manifest.approximate.guidance_from) if generative else 0.0,
        guidance_to=manifest.approximate.guidance_to if generative else None,
        control_scale=float(sampling["control_scale"]),
        restoration_tau=None if tau is None or tau == "off" else float(tau),
        restoration_to_end=sampling["restoration_to_end"],
        churn=float(sampling["churn"]),
        eta=float(sampling["eta"]),
        noise=float(sampling["noise"]),
        color_fix=sampling["color_fix"],
        upscale=float(engine.upscale if source.upscale is None else source.upscale),
        min_size=_min_size(manifest) if generative else 0,
        window=window,
        stride=stride,
        max_pixels=manifest.tiling.max_pixels,
        overlap=manifest.tiling.overlap,
        geometry=engine.geometry if generative else "pad",
        vae_tiling=vae_tiling,
        vae_tile=0 if vae_tiling == "off" else manifest.tiling.vae_tile,
        caption_mode=manifest.caption.mode if generative else "none",
        prompt=prompt,
        prompt_source=prompt_source,
        positive_prompt=prompts.positive if generative else "",
        negative_prompt=prompts.negative if generative else "",
        captioner=asked.model.rstrip("/").rpartition("/")[2] if asked and asked.model else "",
        captioner_identity=captioner_identity if asked else "",
        caption_question=asked.question.replace("{material}", _material(manifest, source)) if asked else "",
        caption_template=asked.template if asked else "",
        caption_max_new_tokens=asked.max_new_tokens if asked else 0,
        caption_temperature=asked.temperature if asked else 0.0,
        caption_top_p=asked.top_p if asked and asked.temperature > 0 else 0.0,
        caption_precision=asked.precision if asked else "",
        caption_quantization=asked.quantization if asked else "",
        material=_material(manifest, source) if generative else "",
        run_seed=engine.seed if generative else 0,
        seed=source.seed if generative else None,
        page=manifest.reading.page if source.page is None else source.page,
        few_levels=manifest.reading.few_levels,
        format=manifest.output.format,
        bit_depth=None if manifest.output.bit_depth == "source" else manifest.output.bit_depth,
        compression=manifest.output.compression if may_be_tiff else "deflate",
        tiled=may_be_tiff and (manifest.output.tiled or manifest.output.pyramid),
        pyramid=may_be_tiff and manifest.output.pyramid,
        quality=manifest.output.quality,
        **{f"gate_{key}": value for key, value in dataclasses.asdict(_gate(manifest)).items()},
        audit_enabled=manifest.audit.enabled,
        audit_samples=manifest.audit.samples if generative and manifest.audit.enabled else 0,
        notice=manifest.provenance.notice,
        operator=manifest.provenance.operator,
        organization=manifest.provenance.organization,
        accepted_license=engine.accept_license if generative and config.license in _ACCEPTANCE_NEEDED else None,
        signed=manifest.signing.key is not None,
    )


def _overridden(manifest: Manifest, source: Source) -> Manifest:
    """The manifest with the engine's settings that a reviewer wants for this image."""
    wanted = {"preset": source.preset, "restoration_tau": source.restoration_tau}
    given = {key: value for key, value in wanted.items() if value is not None}
    if not given:
        return manifest
    return manifest.model_copy(update={"engine": manifest.engine.model_copy(update=given)})


# What a non-generative engine records for the values it does not use.
_NEUTRAL = SamplingDefaults(0, 0.0, 0.0, 0.0, None, 0.0, 0.0, "none")
_UNUSED: dict[SamplerName, tuple[str, ...]] = {"edm": ("eta",), "dpmpp_2m_sde": ("churn",)}  # by sampler
_SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingDefaults))


def _preset(manifest: Manifest) -> SamplingDefaults:
    presets = manifest.engine.config.presets
    if manifest.engine.preset not in presets:
        raise ManifestError(
            f"engine.preset: weights '{manifest.engine.weights}' have no preset '{manifest.engine.preset}'; "
            f"choose one of {', '.join(presets)}"
        )
    return presets[manifest.engine.preset]


def _sampling(manifest: Manifest) -> dict[str, Any]:
    """The sampling values: the manifest's where given, else the preset's."""
    if manifest.engine.name != "supir":
        return dataclasses.asdict(_NEUTRAL)
    values = dataclasses.asdict(_preset(manifest))
    for key in _SAMPLING_KEYS:
        given = getattr(manifest.engine, key)
        if given is not None:
            values[key] = given
    for key in _UNUSED[values["sampler"]]:
        values[key] = 0.0
    return values


# Far above what sound outputs score and far below ruined ones; docs/gate.md has the measurements.
_CLOSE = GateLimits(color_drift=5.0, similarity=0.85, dead=0.02, seam=0.05)
_FREE = GateLimits(color_drift=8.0, similarity=0.75, dead=0.02, seam=0.08)


def _gate(manifest: Manifest) -> GateLimits:
    """The limits: the manifest's where given, else the preset's."""
    free = manifest.engine.name == "supir" and manifest.engine.preset.startswith("quality")
    given = {key: value for key, value in manifest.gate.model_dump().items() if value is not None}
    return dataclasses.replace(_FREE if free else _CLOSE, **given)


def _window(manifest: Manifest) -> tuple[int, int]:
    """Window and stride in latent positions. A narrower window keeps the model's stride within it."""
    config = manifest.engine.config
    window = config.window if manifest.tiling.window is None else manifest.tiling.window
    stride = min(config.stride, window) if manifest.tiling.stride is None else manifest.tiling.stride
    return window, stride


def _min_size(manifest: Manifest) -> int:
    given = manifest.engine.min_size
    return manifest.engine.config.min_size if given is None else given


def _precision(manifest: Manifest) -> Precision:
    return manifest.engine.precision or manifest.engine.config.precision


def _material(manifest: Manifest, source: Source | None) -> str:
    return (source.material if source else None) or manifest.caption.material


def _prompts(manifest: Manifest, source: Source | None) -> Prompts:
    """Positive suffix and negative prompt: the row's, else the manifest's, else those of material or release."""
    caption, model = manifest.caption, manifest.engine.config
    chosen = model.release_prompts if caption.prompts == "release" else model.prompts_for(_material(manifest, source))
    negatives = (source.negative_prompt if source else None, caption.negative_prompt, chosen.negative)
    return Prompts(
        chosen.positive if caption.positive_prompt is None else caption.positive_prompt,
        next(negative for negative in negatives if negative is not None),
    )


def _prompt(manifest: Manifest, source: Source, sidecar: str | None) -> tuple[str | None, str]:
    """The caption if it is known before the image is read, and where it comes from."""
    caption = manifest.caption
    if manifest.engine.name != "supir":
        return "", "none"
    if source.prompt is not None:
        return source.prompt, "manifest" if source.replaces is None else "review"
    if caption.mode == "fixed":
        return caption.text, "fixed"
    if caption.mode == "none":
        return "", "none"
    if caption.mode in ("attributes", "llava"):
        return None, caption.mode
    if caption.mode == "sidecar" and sidecar is not None:
        return sidecar.strip(), "sidecar"
    raise ManifestError(
        f"{source.origin}: '{source.id}' has no prompt, but caption.mode is '{caption.mode}'; "
        f"{'add a prompt to its row' if caption.mode == 'manifest' else 'put a .txt file beside it'} "
        f"or choose another caption.mode"
    )


def explain(manifest: Manifest) -> list[Explained]:
    """Every key with the value that will be used and where that comes from; values a list row gives come on top.

    ``origin`` is ``manifest``, ``environment``, ``flag``, ``default``, ``preset <preset> of <model>``,
    ``model <model>``, ``prompts for <material> of <model>``, ``prompts of the release of <model>``, ``not used by
    lanczos`` or ``only used by caption.mode llava``.
    """
    engine, generative = manifest.engine, manifest.engine.name == "supir"
    preset, model = f"preset {engine.preset} of {engine.config.name}", f"model {engine.config.name}"
    of_release = manifest.caption.prompts == "release"
    origin = f"prompts {'of the release' if of_release else f'for {manifest.caption.material}'} of {engine.config.name}"
    prompts = _prompts(manifest, None)
    gate_origin = f"preset {engine.preset}" if generative else "default"
    filled: dict[str, tuple[object, str]] = {
        f"gate.{key}": (value, gate_origin) for key, value in dataclasses.asdict(_gate(manifest)).items()
    }
    if generative:
        filled |= {f"engine.{key}": (value, preset) for key, value in _sampling(manifest).items()}
        window, stride = _window(manifest)
        filled |= {
            "engine.min_size": (_min_size(manifest), model),
            "engine.precision": (_precision(manifest), model),
            "tiling.window": (window, model),
            "tiling.stride": (stride, model),
            "caption.positive_prompt": (prompts.positive, origin),
            "caption.negative_prompt": (prompts.negative, origin),
        }
    sampler = _sampling(manifest)["sampler"]
    unused = {f"engine.{key}" for key in _UNUSED[sampler]}
    used_by_lanczos = {"engine.name", "engine.upscale", "tiling.max_pixels", "tiling.overlap"}
    of_model = ("engine.", "approximate.", "caption.", "tiling.")
    explained = []
    for key, value, given in _flat(manifest):
        if not generative and key.startswith(of_model) and key not in used_by_lanczos:
            explained.append(Explained(key, None, "not used by lanczos"))
        elif key in _LLAVA_KEYS and manifest.caption.mode != "llava":
            explained.append(Explained(key, None, "only used by caption.mode llava"))
        elif key == "audit.samples" and not (generative and manifest.audit.enabled):
            reason = "not used by lanczos" if manifest.audit.enabled else "not used without audit.enabled"
            explained.append(Explained(key, 0, reason))
        elif key in unused:
            explained.append(Explained(key, 0.0, f"not used by sampler {sampler}"))
        elif key in _TIFF_KEYS and manifest.output.format not in ("source", "tiff"):
            explained.append(Explained(key, None, f"not used by format {manifest.output.format}"))
        elif key == "output.tiled" and manifest.output.pyramid:
            explained.append(Explained(key, True, "with output.pyramid"))
        elif key == "tiling.vae_tile" and manifest.tiling.vae_tiling == "off":
            explained.append(Explained(key, 0, "not used with tiling.vae_tiling off"))
        elif key in filled and value is None:
            explained.append(Explained(key, *filled[key]))
        else:
            explained.append(Explained(key, value, manifest._origins.get(key, "manifest" if given else "default")))
    return explained


_TIFF_KEYS = {f"output.{key}" for key in ("compression", "tiled", "pyramid")}


def _flat(model: BaseModel, prefix: str = "") -> list[tuple[str, Any, bool]]:
    rows: list[tuple[str, Any, bool]] = []
    for key in type(model).model_fields:
        value = getattr(model, key)
        if isinstance(value, BaseModel):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value, key in model.model_fields_set))
    return rows


_LLAVA_KEYS = {
    f"caption.{key}"
    for key in (
        "model",
        "revision",
        "question",
        "template",
        "max_new_tokens",
        "temperature",
        "top_p",
        "precision",
        "quantization",
    )
}


# --- identity ------------------------------------------------------------------------------------------------------


_FLOAT_FIELDS = {key for key, hint in get_type_hints(Settings).items() if hint is float or float in get_args(hint)}


IDENTIFYING = tuple(
    field.name for field in dataclasses.fields(Settings) if not field.name.startswith(("gate_", "audit_"))
)
"""The settings that make an output another one, and so are part of its identity.

The limits of the output gate are not: who allows more for a few images does not want all others made anew. Nor is the
audit, which changes no output.
"""


_ADDED: dict[str, object] = {"guidance_from": 0.0, "guidance_to": None}
"""Settings that came later, with what all work before them did: at that they are no part of the hash, which stays."""


@functools.lru_cache(maxsize=4096)  # most images of a run share their settings
def settings_hash(settings: Settings) -> str:
    """SHA-256 (hex) of the canonical JSON of what is ``IDENTIFYING``: sorted keys, no spaces, floats by their shortest
    exact form."""
    values = {name: getattr(settings, name) for name in IDENTIFYING}
    values = {name: value for name, value in values.items() if name not in _ADDED or value != _ADDED[name]}
    for key in _FLOAT_FIELDS & values.keys():
        if values[key] is not None:
            values[key] = float(values[key])  # 1 and 1.0 are the same setting
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def fingerprint(source_sha256: str, settings_sha256: str) -> str:
    """The identity of one piece of work: SHA-256 (hex) over both hashes."""
    return hashlib.sha256(f"{source_sha256}:{settings_sha256}".encode("ascii")).hexdigest()


def item_seed(settings: Settings, source_sha256: str) -> int:
    """The seed of one image, in [0, 2**63): as given, else a hash of run seed and source, so no order matters."""
    if settings.seed is not None:
        return settings.seed
    digest = hashlib.sha256(f"{settings.run_seed}:{source_sha256}".encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def second_seed(seed: int) -> int:
    """The seed of another attempt at a tile that went wrong with ``seed``, in [0, 2**63)."""
    return _derived_seed(seed, "again")


def sample_seeds(seed: int, count: int) -> list[int]:
    """Seeds of ``count`` restorations that are only compared with that of ``seed``, each in [0, 2**63)."""
    return [_derived_seed(seed, f"sample {i + 1}") for i in range(count)]


def _derived_seed(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode("ascii")).digest()[:8], "big") >> 1
