"""Sizes and defaults of every model this package can build. Nothing here imports torch.

Specification sections refer to docs/parity.md's source, the SUPIR v0 specification.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Prediction = Literal["epsilon", "v", "residual"]
ColorFix = Literal["wavelet", "adain", "none"]
VAETilingMode = Literal["off", "exact", "released"]
Precision = Literal["float32", "bfloat16", "float16", "float8"]
SamplerName = Literal["edm", "dpmpp_2m_sde"]


@dataclass(frozen=True)
class VAEConfig:
    """KL autoencoder with a second, degradation-robust encoder (specification section 8)."""

    channels: tuple[int, ...]  # width per level, finest first
    encoder_resblocks: int  # per level; the decoder has one more
    latent_channels: int
    norm_groups: int
    mid_attention: bool
    scale: float  # latent = scale * z
    pixel_shortcut: bool = False  # linear pixel-unshuffle path beside encoder and decoder (tiny only)

    @property
    def factor(self) -> int:
        """Pixels per latent position along one axis."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class UNetConfig:
    """SDXL-style UNet (specification section 2)."""

    latent_channels: int
    channels: tuple[int, ...]  # width per level, finest first
    resblocks: int  # per level; the decoder has one more
    transformer_depth: tuple[int, ...]  # transformer blocks per level; 0 = no attention on that level
    head_dim: int
    context_dim: int
    vector_dim: int  # pooled text + size embeddings
    norm_groups: int = 32


@dataclass(frozen=True)
class ControlConfig:
    """Control encoder (section 3) and the connectors that bring its features into the UNet (section 4)."""

    transformer_depth: tuple[int, ...]
    hidden: int = 128  # width inside ZeroSFT
    norm_groups: int = 32
    attention_head_dim: int = 64  # heads of ZeroCrossAttn
    attention_levels: tuple[int, ...] = (2, 1)  # UNet levels whose upsampler is preceded by a ZeroCrossAttn


@dataclass(frozen=True)
class TowerConfig:
    """One CLIP text transformer."""

    width: int
    layers: int
    heads: int
    projection: int = 0  # width of the pooled embedding after its projection; 0 = not projected


@dataclass(frozen=True)
class TextConfig:
    """Text conditioning.

    ``hashed``: one small CLIP text tower over hashed words, no vocabulary file (tiny).
    ``sdxl``: CLIP-L and OpenCLIP bigG, in this order, with SDXL's size embeddings (section 9).
    """

    kind: Literal["hashed", "sdxl"]
    length: int  # tokens
    towers: tuple[TowerConfig, ...]
    vocabulary: int
    size_embedding: int  # width of each of the six size embeddings; 0 = none


@dataclass(frozen=True)
class SamplingDefaults:
    """What a preset means for one model (specification section 12).

    ``cfg_start`` is the guidance scale at the largest sigma, ``cfg_end`` at sigma 0; linear in sigma between.
    ``restoration_tau`` is the exponent of restoration guidance (0 < tau; larger is weaker), None = off;
    ``restoration_to_end``: at every step, as in the paper, where the release leaves out the last ones. ``churn`` is
    read by sampler ``edm`` alone, ``eta`` by ``dpmpp_2m_sde`` alone.
    """

    steps: int
    cfg_start: float
    cfg_end: float
    control_scale: float
    restoration_tau: float | None
    churn: float
    noise: float
    color_fix: ColorFix
    sampler: SamplerName = "edm"
    eta: float = 1.0
    restoration_to_end: bool = False


@dataclass(frozen=True)
class Prompts:
    """What is appended to every caption, without a separator, and what guidance leads away from."""

    positive: str
    negative: str


@dataclass(frozen=True)
class ModelConfig:
    """One model: network sizes, denoiser scaling, latent window, defaults, and who may use it."""

    name: str
    display_name: str
    vae: VAEConfig
    unet: UNetConfig
    control: ControlConfig
    text: TextConfig
    prediction: Prediction
    window: int  # latent positions along one side of a window
    stride: int
    min_size: int  # pixels; shorter sides are enlarged to this before restoration, 0 = never
    presets: dict[str, SamplingDefaults] = field(hash=False)
    positive_prompt: str
    negative_prompt: str
    license: str
    # number format of control encoder and UNet; unless float32, VAE and text run in bfloat16 (section 13)
    precision: Precision = "float32"
    # prediction "residual": how far a clean latent lies from the robust encoder's, per channel
    residual_std: tuple[float, ...] = ()
    material_prompts: dict[str, Prompts] = field(default_factory=dict, hash=False)  # by material; may be empty

    @property
    def alignment(self) -> int:
        """Image sides must be multiples of this many pixels inside the networks; the model pads and crops."""
        return int(self.vae.factor * 2 ** (len(self.unet.channels) - 1))

    @property
    def release_prompts(self) -> Prompts:
        """The prompts the model was published with."""
        return Prompts(self.positive_prompt, self.negative_prompt)

    def prompts_for(self, material: str) -> Prompts:
        """The prompts for one material; those of the release where this model has none for it."""
        return self.material_prompts.get(material, self.release_prompts)


_SDXL_VAE = VAEConfig((128, 256, 512, 512), 2, 4, 32, mid_attention=True, scale=0.13025)
_SDXL_UNET = UNetConfig(4, (320, 640, 1280), 2, (0, 2, 10), 64, context_dim=2048, vector_dim=2816)
_SDXL_TEXT = TextConfig(
    "sdxl", 77, (TowerConfig(768, 12, 12), TowerConfig(1280, 32, 20, projection=1280)), 49408, size_embedding=256
)
_V0_FIDELITY = SamplingDefaults(50, 1.0, 4.0, 1.0, None, 5.0, 1.003, "wavelet")
_V0_QUALITY = SamplingDefaults(50, 4.0, 7.5, 1.0, None, 5.0, 1.003, "wavelet")
# for a few-step base such as a Lightning fine-tune; with plain SDXL weights eight steps are too few
_V0_FIDELITY_LIGHTNING = SamplingDefaults(8, 1.5, 1.5, 1.0, None, 0.0, 1.003, "wavelet", "dpmpp_2m_sde")
_V0_QUALITY_LIGHTNING = SamplingDefaults(8, 2.0, 2.0, 1.0, None, 0.0, 1.003, "wavelet", "dpmpp_2m_sde")
_V0_POSITIVE = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed photo - realistic "
    "maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing, hyper sharpness, "
    "perfect without deformations."
)
_V0_NEGATIVE = (
    "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, unreal "
    "engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, "
    "deformed, lowres, over-smooth"
)

# The release's negative prompt names painting, drawing, art, sketch, frames and signature: it fights archives. These
# lead away from damage and from the other materials, never from the material itself or from marks it may carry.
_SDXL_MATERIALS = {
    "photograph": Prompts(
        ", photograph, sharp focus, natural detail, natural skin texture, fine film grain, faithful tones",
        "blurry, out of focus, scratches, dust, stains, fading, jpeg artifacts, noise, low quality, over-smooth, "
        "over-sharpened, plastic skin, cartoon, CG style, 3D render",
    ),
    "painting": Prompts(
        ", painting, visible brushwork, canvas texture, original pigments, fine detail, high quality reproduction",
        "blurry, stains, dust, jpeg artifacts, noise, low quality, over-smooth, over-sharpened, plastic, photograph, "
        "CG style, 3D render",
    ),
    "drawing": Prompts(
        ", drawing, clear lines, fine hatching, paper texture, even paper, fine detail, high quality reproduction",
        "blurry, smudges, stains, foxing, jpeg artifacts, noise, low quality, over-smooth, broken lines, photograph, "
        "CG style, 3D render",
    ),
    "document": Prompts(
        ", document, crisp legible letters, original typeface and handwriting, even paper, high quality scan",
        "blurry, garbled letters, invented text, broken strokes, bleed-through, stains, foxing, jpeg artifacts, noise, "
        "low quality, over-smooth, photograph, 3D render",
    ),
    "map": Prompts(
        ", map, crisp thin lines, legible place names, flat even colors, paper texture, high quality scan",
        "blurry, garbled letters, invented text, broken lines, color bleeding, stains, foxing, jpeg artifacts, noise, "
        "low quality, over-smooth, photograph, 3D render",
    ),
}


def _v0(name: str) -> ModelConfig:
    return ModelConfig(
        name=name,
        display_name=f"SUPIR {name}",
        vae=_SDXL_VAE,
        unet=_SDXL_UNET,
        control=ControlConfig((0, 2, 10)),
        text=_SDXL_TEXT,
        prediction="epsilon",
        window=128,
        stride=64,
        min_size=1024,
        presets={
            "fidelity": _V0_FIDELITY,
            "quality": _V0_QUALITY,
            "fidelity-lightning": _V0_FIDELITY_LIGHTNING,
            "quality-lightning": _V0_QUALITY_LIGHTNING,
        },
        positive_prompt=_V0_POSITIVE,
        negative_prompt=_V0_NEGATIVE,
        license="supir-noncommercial",
        precision="float16",
        material_prompts=_SDXL_MATERIALS,
    )


V0Q = _v0("v0Q")
V0F = _v0("v0F")

TINY = ModelConfig(
    name="tiny",
    display_name="supir-tiny",
    vae=VAEConfig((24, 48, 80), 1, 8, 8, mid_attention=False, scale=1.0, pixel_shortcut=True),
    unet=UNetConfig(8, (48, 96, 128), 1, (0, 0, 1), 32, context_dim=128, vector_dim=128, norm_groups=8),
    control=ControlConfig((0, 0, 1), hidden=32, norm_groups=8, attention_head_dim=32, attention_levels=(2,)),
    text=TextConfig("hashed", 48, (TowerConfig(128, 2, 4),), 1024, size_embedding=0),
    prediction="residual",
    window=128,
    stride=96,
    min_size=0,
    presets={
        "fidelity": SamplingDefaults(10, 1.0, 1.0, 1.0, 0.15, 0.0, 1.0, "wavelet", restoration_to_end=True),
        "quality": SamplingDefaults(10, 1.0, 1.5, 1.0, 1.0, 0.0, 1.0, "wavelet"),
    },
    positive_prompt=", sharp, clean, high quality",
    negative_prompt="blurry, noisy, jpeg artifacts, scratched, faded, low quality",
    residual_std=(0.12, 0.12, 0.6, 0.65, 0.25, 1.1, 1.0, 1.1),
    license="Apache-2.0; trained on photographs listed in docs/supir-tiny/",
)

MODELS: dict[str, ModelConfig] = {config.name: config for config in (TINY, V0Q, V0F)}

TINY_WEIGHTS = Path(__file__).parent / "weights" / "supir-tiny.safetensors"
