"""The one door: load a SUPIR model once, restore images with it (specification section 1)."""

from __future__ import annotations

import time
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
from supir_model.errors import RequestError
from supir_model.guidance import Guide, GuidedDenoiser
from supir_model.loading import FORMATS, load_networks, load_vae
from supir_model.memory import Ladder, Rung
from supir_model.networks import Conditioning, Networks
from supir_model.noise import latent_noise
from supir_model.placement import Beside, Fetch, Placement, to_device
from supir_model.prompts import PromptReader, Text
from supir_model.sampler import DPMPP2MSettings, EDMSettings, SamplerSettings, sample, windows_of
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
        batch = to_device(image[None].float(), self.device)
        padded = F.pad(batch, (0, right, 0, bottom), mode="replicate")
        return padded.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _Seen:
    """What the VAE makes of a request before sampling, on the device.

    stage1: [1, 3, H, W], what is behind the degradation; control, center: [C, h, w], the robust latent, and the latent
    of stage1.
    """

    stage1: Tensor
    control: Tensor
    center: Tensor


class SupirModel:
    """Networks, their configuration and the device they live on.

    precision: number format inside the networks, which hold their weights in it. Latents, noise levels, noise and
    guidance are float32 in any case (specification section 13). rungs: how to work while memory lasts, and how when it
    runs out; the first alone decides about results, to rounding.
    """

    def __init__(
        self,
        networks: Networks,
        config: ModelConfig,
        device: torch.device,
        precision: Precision = "float32",
        rungs: Sequence[Rung] = (Rung(1),),
    ) -> None:
        self.networks = networks.eval().requires_grad_(False)
        self.config = config
        self.device = device
        self.ladder = Ladder(rungs, device)
        self.seconds_to_first_window: float | None = None
        self._began = time.perf_counter()
        self._first = FirstStage(networks.vae, config, device, precision)
        self._formats = FORMATS[precision]
        self._placement = Placement(networks, device)
        self._beside = Beside(device)
        self._prompts = PromptReader(self._encode, self._project)

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
        self._prompts.forget()
        try:
            self.networks.float()  # may run out of memory half-way
            self._formats = FORMATS["float32"]
            self._first = FirstStage(self.networks.vae, self.config, self.device, "float32")
            yield
        finally:
            self._formats, self._first = formats, first
            self._prompts.forget()
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

        Each result depends on its own request and the rung of ``ladder`` alone, whatever the company.
        """
        for request in requests:
            self._check(request, sampling)
        fetches: list[Fetch] = []
        for together in self._rounds(requests, sampling.sampler):
            fetches += self._restore_together(together, sampling)
        return [fetch() for fetch in fetches]

    def _rounds(self, requests: Sequence[Request], settings: SamplerSettings) -> Iterator[list[Request]]:
        """The requests in order, cut wherever that leaves no batch of windows unfilled.

        The results of one round are decoded while the next is sampled.
        """
        together: list[Request] = []
        windows = 0
        for request in requests:
            together.append(request)
            windows += len(windows_of(0, *self._latent_size(request), settings.window, settings.stride))
            if windows % self.ladder.rung.window_batch == 0:
                yield together
                together, windows = [], 0
        if together:
            yield together

    def _restore_together(self, requests: Sequence[Request], sampling: Sampling) -> list[Fetch]:
        attempt = self.ladder.attempt
        seen = [attempt(lambda rung, one=one: self._see(one, sampling, rung)) for one in requests]  # type: ignore[misc]
        prompts = [one for r in requests for one in (r.negative_prompt, *(r.window_prompts or (r.prompt,)))]

        def noise(item: int, draw: int) -> Tensor:
            return self._noise(requests[item], _FIRST_SAMPLER_DRAW + draw, seen[item].center.shape[-2:])

        def sampled(rung: Rung) -> list[Tensor]:
            texts = dict(zip(prompts, self._prompts.read(prompts), strict=True))
            self._placement.need("control", "unet", alone=rung.offload)
            guides = [
                Guide(
                    texts[request.negative_prompt],
                    tuple(texts[prompt] for prompt in request.window_prompts or (request.prompt,)),
                    one.control,
                )
                for request, one in zip(requests, seen, strict=True)
            ]
            guided = GuidedDenoiser(self._run, self.config, guides, sampling.cfg_start, sampling.cfg_end)
            return sample(guided, [one.center for one in seen], noise, sampling.sampler, rung.window_batch)

        latents = attempt(sampled)
        return [
            attempt(lambda rung, r=r, s=s, z=z: self._finish(r, s, z, sampling, rung))  # type: ignore[misc]
            for r, s, z in zip(requests, seen, latents, strict=True)
        ]

    def _see(self, request: Request, sampling: Sampling, rung: Rung) -> _Seen:
        self._placement.need("vae", alone=rung.offload)
        vae, tiling = self._first, rung.tiling(sampling.vae_tiling)
        z_lq = vae.encode_robust(vae.pad(request.image), tiling)
        decoded = vae.decode(z_lq, tiling)
        posterior = self._noise(request, _POSTERIOR_DRAW, z_lq.shape[-2:])
        return _Seen(decoded, z_lq[0], vae.encode(decoded, posterior[None], tiling)[0])

    def _finish(self, request: Request, seen: _Seen, latent: Tensor, sampling: Sampling, rung: Rung) -> Fetch:
        self._placement.need("vae", alone=rung.offload)

        def finished() -> Tensor:
            decoded = self._first.decode(latent[None], rung.tiling(sampling.vae_tiling))
            image = fix_color(decoded, seen.stage1, sampling.color_fix)
            image = image[0, :, : request.image.shape[1], : request.image.shape[2]]
            return image.clamp(-1, 1) if sampling.clip else image

        if rung.offload:  # weights must not leave while another stream reads them
            restored = finished().cpu()
            return lambda: restored
        return self._beside.run(finished, latent, seen.stage1)

    def _run(self, x: Tensor, timestep: Tensor, control_scale: Tensor, conditioning: Conditioning) -> Tensor:
        """``Networks`` in their format, float32 out."""
        channels_last = x.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self._formats.denoiser):
            out: Tensor = self.networks(channels_last, timestep, control_scale, conditioning)
        if self.seconds_to_first_window is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds_to_first_window = time.perf_counter() - self._began
        return out.float()

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Context [1, L, C] and vector [1, V] of a prompt, float32."""
        self._placement.need("text", alone=self.ladder.rung.offload)
        with autocast(self.device, self._formats.conditioner):
            context, vector = self.networks.text([prompt])
        return context.float(), vector.float()

    def _project(self, context: Tensor, vector: Tensor) -> Text:
        self._placement.need("control", "unet", alone=self.ladder.rung.offload)
        with autocast(self.device, self._formats.denoiser):
            return Text(self.networks.project(context), vector)

    def _check(self, request: Request, sampling: Sampling) -> None:
        factor, settings = self.config.vae.factor, sampling.sampler
        if request.top % factor or request.left % factor:
            raise RequestError(f"tile origin ({request.top}, {request.left}) is not a multiple of {factor} pixels")
        wanted = len(windows_of(0, *self._latent_size(request), settings.window, settings.stride))
        found = len(request.window_prompts)
        if found not in (0, wanted):
            raise RequestError(f"{found} window prompts for a latent of {wanted} windows; give {wanted}, or none")

    def _latent_size(self, request: Request) -> tuple[int, int]:
        """Rows and columns of the latent of a request."""
        alignment, factor = self.config.alignment, self.config.vae.factor
        height, width = (-(-side // alignment) * alignment // factor for side in request.image.shape[-2:])
        return height, width

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
        return to_device(noise, self.device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Run networks in this number format; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
