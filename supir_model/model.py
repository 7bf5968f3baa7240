"""The one door: load a SUPIR model once, restore images with it (specification section 1)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from supir_model import memory
from supir_model.attention import fuse_projections
from supir_model.color import fix_color
from supir_model.compiled import Backend, CompiledNetworks
from supir_model.config import ColorFix, ModelConfig, Precision, SamplingDefaults
from supir_model.errors import RequestError
from supir_model.first_stage import FirstStage, autocast, device_of
from supir_model.float8 import use_float8
from supir_model.guidance import ALL_SIGMAS, Guide, GuidedDenoiser, RunNetworks
from supir_model.loading import FORMATS, load_networks
from supir_model.memory import Costs, Ladder, PeakOf, Rung
from supir_model.networks import Conditioning, Networks
from supir_model.noise import latent_noise
from supir_model.placement import Beside, Fetch, Placement, to_device, weight_bytes
from supir_model.prompts import PromptReader, Text, conditioning
from supir_model.sampler import DPMPP2MSettings, EDMSettings, SamplerSettings, sample, windows_of
from supir_model.vae_tiling import WHOLE, VAETiling
from supir_model.weights import Checkpoint

_POSTERIOR_DRAW = 0  # noise draws before the sampler's own
_FIRST_SAMPLER_DRAW = 1


@dataclass(frozen=True)
class Sampling:
    """How to restore; defaults per model and preset are in ``config.ModelConfig.presets``.

    sampler: its settings, whose type says which one it is. cfg_start: guidance scale at the largest sigma, cfg_end
    at 0, linear between. vae_tiling: parts in which the VAE runs. clip: whether results are clipped to [-1, 1]; the
    release resizes before it clips. guided_sigmas: noise levels from and to which the scale counts; elsewhere it is 1,
    and the half of the negative prompt is not computed (Kynkäänniemi et al. 2024, "Applying guidance in a limited
    interval").
    """

    sampler: SamplerSettings
    cfg_start: float
    cfg_end: float
    color_fix: ColorFix
    vae_tiling: VAETiling = WHOLE
    clip: bool = True
    guided_sigmas: tuple[float, float] = ALL_SIGMAS

    @classmethod
    def of(
        cls,
        values: SamplingDefaults,
        window: int,
        stride: int,
        vae_tiling: VAETiling = WHOLE,
        clip: bool = True,
        guided_sigmas: tuple[float, float] = ALL_SIGMAS,
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
        return cls(sampler, values.cfg_start, values.cfg_end, values.color_fix, vae_tiling, clip, guided_sigmas)


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


@dataclass(frozen=True)
class _Seen:
    """What the VAE makes of a request before sampling, on the device.

    stage1: [1, 3, H, W], what is behind the degradation; control, center: [C, h, w], the robust latent, and the latent
    of stage1.
    """

    stage1: Tensor
    control: Tensor
    center: Tensor


def fit(networks: Networks, device: torch.device, precision: Precision) -> None:
    """Make the denoising networks compute as ``device`` does it best: once, before they work in ``precision``.

    Raises RequestError if the device has no such precision.
    """
    for net in (networks.control, networks.unet):
        if device.type == "cuda":
            fuse_projections(net)
        if precision == "float8":
            use_float8(net, device)


class SupirModel:
    """Networks, their configuration and the device they live on.

    precision: number format inside the networks, which hold their weights in it. Latents, noise levels, noise and
    guidance are float32 in any case (specification section 13). rungs: how to work, and how when memory runs out.
    backend: of torch.compile, for the denoising networks on full windows; None: not compiled.
    """

    def __init__(
        self,
        networks: Networks,
        config: ModelConfig,
        device: torch.device,
        precision: Precision = "float32",
        rungs: Sequence[Rung] = (Rung(1),),
        backend: Backend | None = None,
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
        self._compiled = None if backend is None else CompiledNetworks(networks, backend)
        self._prompts = PromptReader(self._encode, self._project)

    @classmethod
    def load(
        cls,
        source: str | Path | Checkpoint = "tiny",
        device: str | None = None,
        precision: Precision = "float32",
        window_batch: int = 1,
    ) -> Self:
        """Load a model: ``tiny``, the folder of a converted one, or published files (``weights.Checkpoint``).

        device: torch device, default CUDA where there is one. window_batch: windows that the networks see at once; on
        CUDA at most, if memory allows, and the networks are compiled there. Raises WeightsError, and RequestError if
        the device has no such precision.
        """
        began, target = time.perf_counter(), device_of(device)
        try:
            networks, config = load_networks(source, target, precision)
        except torch.OutOfMemoryError:  # its parts come to the device when they are needed
            networks, config = load_networks(source, torch.device("cpu"), precision)
        networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        cuda = target.type == "cuda"
        fit(networks, target, precision)
        rungs = memory.rungs_of(window_batch)
        asked = (Rung(window_batch), *rungs[1:])
        model = cls(networks, config, target, precision, asked, backend="inductor" if cuda else None)
        model._began = began
        if cuda:
            model.ladder = Ladder(model._affordable(rungs), target)
        return model

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 for a while; weights held in half precision are widened and come back as they were."""
        held = {name: parameter.dtype for name, parameter in self.networks.named_parameters()}
        formats, first, compiled = self._formats, self._first, self._compiled
        self._prompts.forget()
        try:
            self.networks.float()  # may run out of memory half-way
            self._formats, self._compiled = FORMATS["float32"], None
            self._first = FirstStage(self.networks.vae, self.config, self.device, "float32")
            yield
        finally:
            self._formats, self._first, self._compiled = formats, first, compiled
            self._prompts.forget()
            for name, parameter in self.networks.named_parameters():
                parameter.data = parameter.data.to(held[name])

    def first_stage(self, image: Tensor) -> Tensor:
        """What the robust encoder sees behind a degraded image: [3, H, W] to [3, H, W], both in [-1, 1]."""
        self._placement.need("vae", alone=self.ladder.rung.offload)
        return self._first.see(image)

    def encode_decode(self, image: Tensor) -> Tensor:
        """What the autoencoder keeps of a clean image: [3, H, W] to [3, H, W], both in [-1, 1]."""
        self._placement.need("vae", alone=self.ladder.rung.offload)
        return self._first.encode_decode(image)

    @torch.inference_mode()
    def restore(self, requests: Sequence[Request], sampling: Sampling) -> list[Tensor]:
        """Restore images: [3, H, W] each, in [-1, 1] if clipped, same sizes and order as the requests, on the CPU.

        Each result depends on its own request and on ``execution`` alone, whatever the company.
        """
        self.ladder.left.clear()
        for request in requests:
            self._check(request, sampling)
        fetches: list[Fetch] = []
        for together in self._rounds(requests, sampling.sampler):
            fetches += self._restore_together(together, sampling)
        return [fetch() for fetch in fetches]

    @property
    def execution(self) -> str:
        """How the last call of ``restore`` worked, and with what it ran out of memory on the way."""
        rung = self.ladder.rung
        how = [str(rung), *([] if self._compiled is None or rung.offload else [self._compiled.state])]
        return "; ".join([", ".join(how), *(f"memory ran out with {rung}" for rung in self.ladder.left)])

    @torch.inference_mode()
    def costs(self, peak_of: PeakOf) -> Costs:
        """What this model takes of memory, as ``peak_of`` measures it on windows and images of zeros."""
        config, nets = self.config, self.networks
        text = self._prompts.read([""])[0]

        def step(windows: int) -> Tensor:
            shape = (2 * windows, config.unet.latent_channels, config.window, config.window)
            x = torch.zeros(shape, device=self.device)
            timestep = torch.zeros(len(x), dtype=torch.int64, device=self.device)
            scale = torch.ones(len(x), 1, 1, 1, device=self.device)
            return self._compute(nets, x, timestep, scale, conditioning([text] * len(x), x))

        def vae(side: int) -> Tensor:
            return self._first.decode(self._first.encode_robust(torch.zeros(1, 3, side, side, device=self.device)))

        weights = (weight_bytes(nets), weight_bytes(nets.control) + weight_bytes(nets.unet), weight_bytes(nets.vae))
        return memory.measure(weights, step, vae, peak_of)

    def _affordable(self, rungs: Sequence[Rung]) -> tuple[Rung, ...]:
        """The rungs that measured costs and free memory leave, on CUDA."""
        try:
            costs = self.costs(partial(memory.peak, self.device))
        except torch.OutOfMemoryError:
            return tuple(rung for rung in rungs if rung.offload)
        return memory.choose(rungs, costs, memory.free_memory(self.device) + torch.cuda.memory_allocated(self.device))

    def _rounds(self, requests: Sequence[Request], settings: SamplerSettings) -> Iterator[list[Request]]:
        """The requests in order, cut wherever that leaves no batch of windows unfilled.

        The results of one round are decoded while the next is sampled.
        """
        together: list[Request] = []
        shapes: Counter[tuple[int, int]] = Counter()
        for request in requests:
            together.append(request)
            windows = windows_of(0, *self._latent_size(request), settings.window, settings.stride)
            shapes[windows[0].height, windows[0].width] += len(windows)
            if not any(count % self.ladder.rung.window_batch for count in shapes.values()):
                yield together
                together, shapes = [], Counter()
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
            run = partial(self._run, None if rung.offload else sampling.sampler.window)
            cfg = sampling.cfg_start, sampling.cfg_end
            guided = GuidedDenoiser(run, self.config, guides, *cfg, sampling.guided_sigmas)
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

    def _run(self, compiled: int | None, x: Tensor, timestep: Tensor, scale: Tensor, told: Conditioning) -> Tensor:
        """The networks, compiled where there is a program and windows have the side ``compiled``."""
        networks: RunNetworks = self.networks
        if self._compiled is not None and x.shape[2] == x.shape[3] == compiled:
            networks = self._compiled
        out = self._compute(networks, x, timestep, scale, told)
        if self.seconds_to_first_window is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds_to_first_window = time.perf_counter() - self._began
        return out

    def _compute(self, networks: RunNetworks, x: Tensor, timestep: Tensor, scale: Tensor, told: Conditioning) -> Tensor:
        """Networks in their number format, float32 out."""
        with autocast(self.device, self._formats.denoiser):
            out = networks(x.contiguous(memory_format=torch.channels_last), timestep, scale, told)
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
