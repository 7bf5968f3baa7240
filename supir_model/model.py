"""The one door: load a SUPIR model once, restore images with it (specification section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from supir_model.color import fix_color
from supir_model.config import ColorFix, ModelConfig, Precision, SamplingDefaults
from supir_model.denoiser import Origin, denoise, guide, linear_cfg
from supir_model.errors import RequestError
from supir_model.loading import FORMATS, load_networks, load_vae
from supir_model.networks import Conditioning, Networks
from supir_model.noise import latent_noise
from supir_model.sampler import DPMPP2MSettings, EDMSettings, SamplerSettings, Window, sample, windows_of
from supir_model.vae import RobustVAE
from supir_model.vae_tiling import WHOLE, VAETiling
from supir_model.weights import Checkpoint

_POSTERIOR_DRAW = 0  # noise draws before the sampler's own
_FIRST_SAMPLER_DRAW = 1


@dataclass(frozen=True)
class Sampling:
    """How to restore; defaults per model and preset are in ``config.ModelConfig.presets``.

    sampler: its settings, whose type says which one it is. cfg_start: guidance scale at the largest sigma, cfg_end
    at 0, linear between. vae_tiling: parts in which the VAE runs. clip: whether results are clipped to [-1, 1]; the
    release resizes before it clips.
    """

    sampler: SamplerSettings
    cfg_start: float
    cfg_end: float
    color_fix: ColorFix
    vae_tiling: VAETiling = WHOLE
    clip: bool = True

    @classmethod
    def of(
        cls, values: SamplingDefaults, window: int, stride: int, vae_tiling: VAETiling = WHOLE, clip: bool = True
    ) -> Self:
        """A preset, or what a user made of one, with windows and steps between them in latent positions."""
        sampler: SamplerSettings
        if values.sampler == "dpmpp_2m_sde":
            sampler = DPMPP2MSettings(
                steps=values.steps,
                eta=values.eta,
                noise=values.noise,
                restoration_tau=values.restoration_tau,
                restoration_to_end=values.restoration_to_end,
                control_scale=values.control_scale,
                window=window,
                stride=stride,
            )
        else:
            sampler = EDMSettings(
                steps=values.steps,
                restoration_tau=values.restoration_tau,
                restoration_to_end=values.restoration_to_end,
                churn=values.churn,
                noise=values.noise,
                control_scale=values.control_scale,
                window=window,
                stride=stride,
            )
        return cls(sampler, values.cfg_start, values.cfg_end, values.color_fix, vae_tiling, clip)


@dataclass(frozen=True)
class Request:
    """One image or tile to restore.

    image: [3, H, W] float32 RGB in [-1, 1], any size. prompt: complete, with its suffix. seed: [0, 2^63).
    top, left: where the tile's first pixel lies in the whole image; multiples of the VAE's factor.
    window_prompts: instead of ``prompt``, one complete prompt per window of the latent, rows outer; empty = none.
    """

    image: Tensor
    prompt: str
    negative_prompt: str
    seed: int
    top: int = 0
    left: int = 0
    window_prompts: tuple[str, ...] = ()


class FirstStage:
    """The robust encoder and the decoder: what is behind a degraded image. Captions are written from it.

    precision: number format inside the VAE; float16 means bfloat16 here, as the VAE overflows in float16.
    """

    def __init__(self, vae: RobustVAE, config: ModelConfig, device: torch.device, precision: Precision) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.config = config
        self.device = device
        self._dtype = FORMATS[precision].conditioner

    @classmethod
    def load(cls, source: str | Path = "tiny", device: str | None = None, precision: Precision = "float32") -> Self:
        """Load nothing but the VAE of ``tiny`` or of a converted model's folder. Raises WeightsError."""
        target = _device(device)
        vae, config = load_vae(source, target, precision)
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(vae, config, target, precision)

    @torch.inference_mode()
    def see(self, image: Tensor) -> Tensor:
        """[3, H, W] to [3, H, W], both in [-1, 1]."""
        decoded = self.decode(self.encode_robust(self.pad(image)))
        return decoded[0, :, : image.shape[1], : image.shape[2]].clamp(-1, 1)

    @torch.inference_mode()
    def encode_decode(self, image: Tensor) -> Tensor:
        """What the ordinary encoder and the decoder keep of a clean image: no restoration can come closer."""
        padded = self.pad(image)
        with autocast(self.device, self._dtype):
            decoded = self.vae.decode(self.vae.encode(padded)).float()
        return decoded[0, :, : image.shape[1], : image.shape[2]].clamp(-1, 1)

    def encode_robust(self, image: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """``RobustVAE.encode_robust`` in this precision, float32 out; so are the next two."""
        with autocast(self.device, self._dtype):
            return self.vae.encode_robust(image, tiling).float()

    def encode(self, image: Tensor, noise: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """``RobustVAE.encode``."""
        with autocast(self.device, self._dtype):
            return self.vae.encode(image, noise, tiling).float()

    def decode(self, latent: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """``RobustVAE.decode``."""
        with autocast(self.device, self._dtype):
            return self.vae.decode(latent, tiling).float()

    def pad(self, image: Tensor) -> Tensor:
        """[1, 3, H', W'] on the device, sides padded right and bottom to multiples of the networks' alignment."""
        if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) == 0:
            raise RequestError(f"image must be [3, H, W] with H, W >= 1, got {list(image.shape)}")
        height, width = image.shape[1:]
        alignment = self.config.alignment
        bottom, right = -height % alignment, -width % alignment
        batch = image[None].to(self.device, torch.float32)
        padded = F.pad(batch, (0, right, 0, bottom), mode="replicate")
        return padded.contiguous(memory_format=torch.channels_last)


class SupirModel:
    """Networks, their configuration and the device they live on.

    precision: number format inside the networks, which hold their weights in it. Latents, noise levels, noise and
    guidance are float32 in any case (specification section 13).
    """

    def __init__(
        self, networks: Networks, config: ModelConfig, device: torch.device, precision: Precision = "float32"
    ) -> None:
        self.networks = networks.eval().requires_grad_(False)
        self.config = config
        self.device = device
        self._first = FirstStage(networks.vae, config, device, precision)
        self._formats = FORMATS[precision]

    @classmethod
    def load(
        cls,
        source: str | Path | Checkpoint = "tiny",
        device: str | None = None,
        precision: Precision = "float32",
    ) -> Self:
        """Load a model: ``tiny``, the folder of a converted one, or published files (``weights.Checkpoint``).

        device: torch device, default CUDA where there is one. Raises WeightsError.
        """
        target = _device(device)
        networks, config = load_networks(source, target, precision)
        networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(networks, config, target, precision)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 for a while; weights held in half precision are widened and come back as they were."""
        held = {name: parameter.dtype for name, parameter in self.networks.named_parameters()}
        formats, first = self._formats, self._first
        try:
            self.networks.float()  # may run out of memory half-way
            self._formats = FORMATS["float32"]
            self._first = FirstStage(self.networks.vae, self.config, self.device, "float32")
            yield
        finally:
            self._formats, self._first = formats, first
            for name, parameter in self.networks.named_parameters():
                parameter.data = parameter.data.to(held[name])

    def first_stage(self, image: Tensor) -> Tensor:
        """What the robust encoder sees behind a degraded image: [3, H, W] to [3, H, W], both in [-1, 1]."""
        return self._first.see(image)

    def encode_decode(self, image: Tensor) -> Tensor:
        """What the autoencoder keeps of a clean image: [3, H, W] to [3, H, W], both in [-1, 1]."""
        return self._first.encode_decode(image)

    @torch.inference_mode()
    def restore(self, requests: Sequence[Request], sampling: Sampling) -> list[Tensor]:
        """Restore images: [3, H, W] each, in [-1, 1] if clipped, same sizes and order as the requests, on the CPU.

        Each result depends on its own request alone, whatever the company.
        """
        if not requests:
            return []
        vae, factor, tiling = self._first, self.config.vae.factor, sampling.vae_tiling
        stage1, control, center, prompts = [], [], [], []
        for request in requests:
            if request.top % factor or request.left % factor:
                raise RequestError(f"tile origin ({request.top}, {request.left}) is not a multiple of {factor} pixels")
            padded = vae.pad(request.image)
            z_lq = vae.encode_robust(padded, tiling)
            decoded = vae.decode(z_lq, tiling)
            posterior = self._noise(request, _POSTERIOR_DRAW, z_lq.shape[-2:])
            stage1.append(decoded)
            control.append(z_lq[0])
            center.append(vae.encode(decoded, posterior[None], tiling)[0])
            self._check_window_prompts(request, z_lq.shape[-2:], sampling.sampler)
            positive = request.window_prompts or (request.prompt,)
            prompts.append(self._read([request.negative_prompt, *positive]))

        # at a guidance scale of 1 the negative prompt has no weight, and its half of the batch is not computed
        halves = 1 if sampling.cfg_start == sampling.cfg_end == 1 else 2

        def guided(x: Tensor, sigma: Tensor, control_scale: Tensor, windows: Sequence[Window]) -> Tensor:
            # row 0 is the negative prompt; then one prompt for all windows, or one for each
            rows = [[0, 1 + w.index if requests[w.item].window_prompts else 1][-halves:] for w in windows]
            contexts = [prompts[w.item][0][row] for w, row in zip(windows, rows, strict=True)]
            vectors = [prompts[w.item][1][row] for w, row in zip(windows, rows, strict=True)]
            crops = torch.stack([w.crop(control[w.item]) for w in windows])
            conditioning = Conditioning(
                # [halves, L, C] per window to [unconditional windows; conditional windows]
                context=torch.stack(contexts, dim=1).flatten(0, 1),
                vector=torch.stack(vectors, dim=1).flatten(0, 1),
                control_latent=crops.repeat(halves, 1, 1, 1),
            )

            def network(x_in: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
                channels_last = x_in.contiguous(memory_format=torch.channels_last)
                with autocast(self.device, self._formats.denoiser):
                    out: Tensor = self.networks(channels_last, timestep, scale, conditioning)
                return out.float()

            denoised = denoise(
                network,
                self.config.prediction,
                x.repeat(halves, 1, 1, 1),
                sigma.repeat(halves),
                control_scale.repeat(halves),
                Origin(conditioning.control_latent, self.config.residual_std),
            )
            if halves == 1:
                return denoised
            return guide(denoised, linear_cfg(sampling.cfg_start, sampling.cfg_end, sigma))

        def noise(item: int, draw: int) -> Tensor:
            return self._noise(requests[item], _FIRST_SAMPLER_DRAW + draw, center[item].shape[-2:])

        latents = sample(guided, center, noise, sampling.sampler)
        restored = []
        for request, latent, style in zip(requests, latents, stage1, strict=True):
            image = fix_color(vae.decode(latent[None], tiling), style, sampling.color_fix)
            image = image[0, :, : request.image.shape[1], : request.image.shape[2]].cpu()
            restored.append(image.clamp(-1, 1) if sampling.clip else image)
        return restored

    def _read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B, L, C] and vector [B, V] of the prompts, float32."""
        with autocast(self.device, self._formats.conditioner):
            context, vector = self.networks.text(prompts)
        return context.float(), vector.float()

    def _check_window_prompts(self, request: Request, size: torch.Size, settings: SamplerSettings) -> None:
        wanted = len(windows_of(0, size[0], size[1], settings.window, settings.stride))
        found = len(request.window_prompts)
        if found not in (0, wanted):
            raise RequestError(f"{found} window prompts for a latent of {wanted} windows; give {wanted}, or none")

    def _noise(self, request: Request, draw: int, size: torch.Size) -> Tensor:
        factor = self.config.vae.factor
        noise = latent_noise(
            request.seed,
            draw,
            self.config.vae.latent_channels,
            request.top // factor,
            request.left // factor,
            size[0],
            size[1],
        )
        return noise.to(self.device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Run networks in this number format; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
