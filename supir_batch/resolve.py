"""What the settings of a manifest mean for one image, with no default left open, and where each value is from."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from supir_batch.errors import ManifestError
from supir_batch.settings import ACCEPTANCE_NEEDED, UNUSED, Manifest
from supir_batch.types import GateLimits, Settings, Source
from supir_model.config import Precision, Prompts, VAETilingMode


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
    sampling = manifest.sampling()
    prompt, prompt_source = _prompt(manifest, source, sidecar)
    config, prompts = engine.config, _prompts(manifest, source)
    window, stride = manifest.window_and_stride() if generative else (0, 0)
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
        accepted_license=engine.accept_license if generative and config.license in ACCEPTANCE_NEEDED else None,
        signed=manifest.signing.key is not None,
    )


def _overridden(manifest: Manifest, source: Source) -> Manifest:
    """The manifest with the engine's settings that a reviewer wants for this image."""
    wanted = {"preset": source.preset, "restoration_tau": source.restoration_tau}
    given = {key: value for key, value in wanted.items() if value is not None}
    if not given:
        return manifest
    return manifest.model_copy(update={"engine": manifest.engine.model_copy(update=given)})


# Far above what sound outputs score and far below ruined ones; docs/gate.md has the measurements.
_CLOSE = GateLimits(color_drift=5.0, similarity=0.85, dead=0.02, seam=0.05)
_FREE = GateLimits(color_drift=8.0, similarity=0.75, dead=0.02, seam=0.08)


def _gate(manifest: Manifest) -> GateLimits:
    """The limits: the manifest's where given, else the preset's."""
    free = manifest.engine.name == "supir" and manifest.engine.preset.startswith("quality")
    given = {key: value for key, value in manifest.gate.model_dump().items() if value is not None}
    return dataclasses.replace(_FREE if free else _CLOSE, **given)


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


class Explained(NamedTuple):
    """One resolved value and where it came from."""

    key: str
    value: object
    origin: str


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
        filled |= {f"engine.{key}": (value, preset) for key, value in manifest.sampling().items()}
        window, stride = manifest.window_and_stride()
        filled |= {
            "engine.min_size": (_min_size(manifest), model),
            "engine.precision": (_precision(manifest), model),
            "tiling.window": (window, model),
            "tiling.stride": (stride, model),
            "caption.positive_prompt": (prompts.positive, origin),
            "caption.negative_prompt": (prompts.negative, origin),
        }
    sampler = manifest.sampling()["sampler"]
    unused = {f"engine.{key}" for key in UNUSED[sampler]}
    used_by_lanczos = {"engine.name", "engine.upscale", "tiling.max_pixels", "tiling.overlap"}
    of_model = ("engine.", "approximate.", "caption.", "tiling.")
    explained = []
    for key, value, given_by in manifest.values():
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
            explained.append(Explained(key, value, given_by))
    return explained


_TIFF_KEYS = {f"output.{key}" for key in ("compression", "tiled", "pyramid")}
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
