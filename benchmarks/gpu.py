"""What the benchmarks of the GPU stage share, and all that they know of the engine: how it is built, called, counted.

Weights are random: they cost what trained ones cost. ``full`` is SUPIR v0 on SDXL; ``reduced`` has a tenth of its
width, fewer transformers, and sides an eighth as long, for a CPU: its figures say that the benchmark works, no more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
from common import load
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import supir_batch
from supir_batch.bookkeeping import peak_memory_bytes
from supir_model.compiled import CompiledNetworks
from supir_model.config import V0F, ControlConfig, ModelConfig, Precision, TowerConfig, UNetConfig, VAEConfig
from supir_model.first_stage import FirstStage, autocast
from supir_model.folder import FORMAT, VOCABULARY, Description
from supir_model.loading import FORMATS
from supir_model.memory import Rung
from supir_model.model import Request, Sampling, SupirModel, fit
from supir_model.networks import Conditioning, Networks, build_on_meta
from supir_model.sampler import windows_of
from supir_model.text import SDXLTextEncoder, read_words
from supir_model.weights import DtypeOf, assign

_REDUCED = replace(
    V0F,
    display_name="SUPIR v0 at reduced width",
    vae=VAEConfig((32, 32, 64, 64), 2, 4, 32, mid_attention=True, scale=0.13025),
    unet=UNetConfig(4, (32, 64, 128), 2, (0, 1, 2), 16, context_dim=80, vector_dim=144),
    control=ControlConfig((0, 1, 2), hidden=16, attention_head_dim=16),
    text=replace(V0F.text, towers=(TowerConfig(32, 2, 2), TowerConfig(48, 2, 3, projection=48)), size_embedding=16),
    window=16,
    stride=8,
)
PROMPT = "a photograph of a harbor with sailing boats, seen from the pier in the morning"


# --- what is measured, and where -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Model, device and number format of one run of a benchmark."""

    config: ModelConfig
    device: torch.device
    precision: Precision

    @property
    def full(self) -> bool:
        """Whether figures are of the model that people use."""
        return self.config is V0F

    @property
    def judged(self) -> bool:
        """Whether targets mean anything here."""
        return self.full and self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What control encoder and UNet compute in."""
        return FORMATS[self.precision].denoiser

    def scaled(self, pixels: int) -> int:
        """A side in pixels of the full model, for this one."""
        return pixels * self.config.window // V0F.window


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=("full", "reduced"), help="of the networks; default: full where CUDA is")
    parser.add_argument("--device", help="torch device; default: cuda where it is, else cpu")
    parser.add_argument("--precision", choices=tuple(FORMATS), help="default: bfloat16 on a card, else float32")
    return parser


def setup_of(given: argparse.Namespace) -> Setup:
    """What the options of ``arguments`` mean on this machine."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_card = device.type == "cuda"
    full = given.width == "full" if given.width else on_card
    return Setup(V0F if full else _REDUCED, device, given.precision or ("bfloat16" if on_card else "float32"))


def machine(setup: Setup) -> dict[str, Any]:
    """What made the figures: hardware, number format, versions, command."""
    here: dict[str, Any] = {"model": setup.config.display_name, "weights": "random", "precision": setup.precision}
    if setup.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setup.device)
        here |= {"device": properties.name, "memory_bytes": properties.total_memory}
        here |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    else:
        here |= {"device": f"CPU, {torch.get_num_threads()} threads, {_processor()}", "load": load()}
        here |= {"seconds": "of processor time, but for load and stream"}
    packages = ("torch", "diffusers", "transformers")
    here |= {package: importlib.metadata.version(package) for package in packages}
    here |= {"python": platform.python_version(), "supir_batch": supir_batch.__version__, "commit": _commit()}
    return here | {"command": shlex.join(["python", *sys.argv])}


def report(measured: dict[str, Any], targets: Sequence[tuple[str, bool]], judged: bool) -> bool:
    """Print the figures as JSON and what made them in a line of words, then each target; False if one is missed."""
    print(json.dumps(measured))
    print("\n" + ", ".join(f"{key} {value}" for key, value in measured["machine"].items()) + "\n")
    if not judged:
        print("Targets are for full width on a card and are not judged here: " + "; ".join(text for text, _ in targets))
        return True
    for text, held in targets:
        print(f"{'held' if held else 'MISSED'}: {text}")
    return all(held for _, held in targets)


def digits(value: float, count: int = 3) -> float:
    """Rounded to significant digits."""
    return float(f"{value:.{count}g}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return None


# --- the engine ------------------------------------------------------------------------------------------------------


def build(setup: Setup, window_batch: int = 1) -> SupirModel:
    """The model as ``SupirModel.load`` would make it, its weights drawn on the device.

    window_batch: windows that the networks see at once; fewer are filled up to it.
    """
    networks = draw_networks(setup, setup.precision)
    fit(networks, setup.device, setup.precision)
    backend = "inductor" if setup.device.type == "cuda" else None
    return SupirModel(networks, setup.config, setup.device, setup.precision, (Rung(window_batch),), backend)


def draw_networks(setup: Setup, precision: Precision) -> Networks:
    """The model's networks with random weights held as ``precision`` says, and a vocabulary of letters."""
    networks = build_on_meta(setup.config)
    draw(networks, FORMATS[precision].of, setup.device)
    networks.to(setup.device)  # token positions are not among the weights
    networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(networks.text, SDXLTextEncoder):
        with TemporaryDirectory() as folder:
            write_vocabulary(Path(folder))
            networks.text.words = read_words(Path(folder), setup.config.text.vocabulary)
    return networks.eval().requires_grad_(False)


def draw(network: nn.Module, dtype_of: DtypeOf, device: torch.device) -> None:
    """Give a network on the meta device random weights, drawn on ``device``.

    Each layer keeps the size of what passes through it: a card needs less power, and runs faster, on zeros.
    """
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, like in network.state_dict().items():
        to: dict[str, Any] = {"device": device, "dtype": dtype_of(name, like)}
        if like.ndim > 1:
            inputs = like[0].numel()
            state[name] = torch.randn(like.shape, generator=generator, **to).mul_(inputs**-0.5)
        else:  # of a norm, or a bias
            state[name] = torch.full(like.shape, float(name.endswith("weight")), **to)
    assign(network, state, dtype_of, device)


def write_vocabulary(folder: Path) -> None:
    """CLIP's files with single bytes for words: prompts become longer, and are cut to as many tokens as ever."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = VOCABULARY
    (folder / vocabulary).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / merges).write_text("#version: 0.2\n")


def write_model(networks: Networks, folder: Path) -> None:
    """Networks as a folder that ``SupirModel.load`` reads; weights in float16, as large archives keep them."""
    from supir_model.convert import write  # noqa: PLC0415  (only where weights are written)

    with TemporaryDirectory() as tokenizer:
        write_vocabulary(Path(tokenizer))
        write(networks, Description(FORMAT, networks.config, ()), folder, "float16", Path(tokenizer))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """[3, height, width] in [-1, 1]: a gradient with grain, so that compression has something to do."""
    ramp = torch.linspace(-0.8, 0.8, width).expand(3, height, width)
    grain = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
    return (ramp + 0.05 * grain).clamp(-1, 1)


def restore(model: SupirModel, images: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Restore images [3, H, W] in [-1, 1] with the settings of the model's preset ``fidelity``, in one call."""
    values = replace(model.config.presets["fidelity"], steps=steps)
    sampling = Sampling.of(values, model.config.window, model.config.stride)
    return model.restore(requests(model, images), sampling)


def requests(model: SupirModel, images: Sequence[Tensor]) -> list[Request]:
    """To restore each image with a prompt and a seed of its own."""
    negative = model.config.negative_prompt
    return [Request(image, f"{PROMPT}, {i}", negative, seed=i) for i, image in enumerate(images)]


def network_call(model: SupirModel, setup: Setup, rows: int) -> Callable[[], Tensor]:
    """Control encoder and UNet, once, as the sampler calls them: ``rows`` windows, both halves of guidance counted."""
    config, device = setup.config, setup.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    size = (rows, config.unet.latent_channels, config.window, config.window)
    x = normal(*size).contiguous(memory_format=torch.channels_last)
    timestep, scale = torch.full((rows,), 500, device=device), torch.ones(rows, 1, 1, 1, device=device)
    context = normal(rows, config.text.length, config.unet.context_dim)
    with torch.inference_mode(), autocast(device, setup.dtype):
        projected = model.networks.project(context)  # once for all steps
    conditioning = Conditioning(projected, normal(rows, config.unet.vector_dim), normal(*size))
    networks = CompiledNetworks(model.networks) if device.type == "cuda" else model.networks

    @torch.inference_mode()
    def call() -> Tensor:
        with autocast(device, setup.dtype):
            out: Tensor = networks(x, timestep, scale, conditioning)
        return out

    return call


def stages(model: SupirModel, setup: Setup, image: Tensor) -> dict[str, float]:
    """Seconds that one image costs outside of sampling, each stage on its own. image: [3, H, W] on the CPU."""
    first = FirstStage(model.networks.vae, model.config, model.device, setup.precision)

    @torch.inference_mode()
    def read() -> Tensor:
        with autocast(model.device, FORMATS[setup.precision].conditioner):
            context: Tensor = model.networks.text([model.config.negative_prompt, PROMPT])[0]
        return context

    with torch.inference_mode():
        padded = first.pad(image)
        latent = first.encode_robust(padded)

        def encode() -> Tensor:
            return first.encode_robust(padded) + first.encode(padded, torch.zeros_like(latent))

        return {
            "text": seconds_of(read, model.device),
            "encode": seconds_of(encode, model.device),
            "decode": 2 * seconds_of(lambda: first.decode(latent), model.device),
            "transfer": seconds_of(lambda: first.pad(image), model.device) + seconds_of(padded.cpu, model.device),
        }


# --- arithmetic ------------------------------------------------------------------------------------------------------


def flops(call: Callable[[], object]) -> int:
    """Two for each multiplication and addition of matrices and convolutions, attention included."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return int(counter.get_total_flops())


@cache
def control_flops(config: ModelConfig, rows: int, height: int, width: int) -> int:
    """FLOPs of the control encoder for latents [rows, C, height, width]; nothing is computed."""
    networks, (x, timestep, _, c) = _on_meta(config), _inputs(config, rows, height, width)
    return flops(lambda: networks.control(x, timestep, c.context, c.vector, c.control_latent))


@cache
def step_flops(config: ModelConfig, rows: int, height: int, width: int) -> int:
    """FLOPs of control encoder, UNet and connectors for latents [rows, C, height, width]; nothing is computed."""
    networks = _on_meta(config)
    return flops(lambda: networks(*_inputs(config, rows, height, width)))


@cache
def encode_flops(config: ModelConfig, height: int, width: int) -> int:
    """FLOPs of one encoder for an image of so many pixels."""
    vae = _on_meta(config).vae
    return flops(lambda: vae.encode(torch.empty(1, 3, height, width, device="meta")))


@cache
def decode_flops(config: ModelConfig, height: int, width: int) -> int:
    """FLOPs of the decoder for an image of so many pixels."""
    vae, factor = _on_meta(config).vae, config.vae.factor
    size = (1, config.vae.latent_channels, height // factor, width // factor)
    return flops(lambda: vae.decode(torch.empty(size, device="meta")))


def image_flops(config: ModelConfig, height: int, width: int, steps: int) -> int:
    """FLOPs of one restored image: two encodings, two decodings, both halves of guidance for every window and step.

    Without the text towers, which a full model runs once on two prompts: 0.2 of 1040 T. Sides in pixels, multiples of
    the networks' alignment.
    """
    factor = config.vae.factor
    windows = windows_of(0, height // factor, width // factor, config.window, config.stride)
    sampled = sum(step_flops(config, 2, window.height, window.width) for window in windows)
    return 2 * (encode_flops(config, height, width) + decode_flops(config, height, width)) + steps * sampled


@cache
def _on_meta(config: ModelConfig) -> Networks:
    return build_on_meta(config)


def _inputs(config: ModelConfig, rows: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    with torch.device("meta"):
        x = torch.empty(rows, config.unet.latent_channels, height, width)
        context = torch.empty(rows, config.text.length, config.unet.context_dim)
        conditioning = Conditioning(context, torch.empty(rows, config.unet.vector_dim), torch.empty_like(x))
        return x, torch.empty(rows, dtype=torch.int64), torch.empty(rows, 1, 1, 1), conditioning


# --- time and memory -------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Median seconds of one call, repeated for at least ``least`` seconds after a first one that does not count.

    Of a CPU, which others use as well, it is the time of this process on its cores.
    """
    call()
    synchronize(device)

    def complete() -> None:
        call()
        synchronize(device)

    timer = Timer(
        "complete()", globals={"complete": complete}, timer=_clock(device), num_threads=torch.get_num_threads()
    )
    return float(timer.blocked_autorange(min_run_time=least).median)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP per second of a product of large square matrices: what the device itself can do in this number format."""
    side = side or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / seconds_of(lambda: torch.mm(a, b, out=out), device)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with all that it put on the device; for a CPU processor time, as above."""
    synchronize(device)
    clock = _clock(device)
    started = clock()
    call()
    synchronize(device)
    return clock() - started


def _clock(device: torch.device) -> Callable[[], float]:
    """Wall time for a card; for a CPU, which others use as well, the time of this process on its cores."""
    return perf_counter if device.type == "cuda" else process_time


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """The most bytes of tensors on the card during the block; on a CPU those of the process, since it began."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    found["peak_memory_bytes"] = (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
    )


@contextmanager
def busy(model: SupirModel) -> Iterator[dict[str, float]]:
    """How long the block took, and for how much of it the device worked: ``seconds`` and ``share``, known at its end.

    A card's work is its kernels and copies, as its profiler sees them; a CPU's is the time inside the networks.
    """
    found: dict[str, float] = {}
    synchronize(model.device)
    watch = _kernels() if model.device.type == "cuda" else _calls(model.networks)
    with watch as intervals:
        started = perf_counter()
        yield found
        synchronize(model.device)
        found["seconds"] = perf_counter() - started
    found["share"] = covered(intervals) / found["seconds"]


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextmanager
def _kernels() -> Iterator[list[tuple[float, float]]]:
    intervals: list[tuple[float, float]] = []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield intervals
    # not events(): it builds a tree of millions
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            intervals.append((event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9))


@contextmanager
def _calls(networks: Networks) -> Iterator[list[tuple[float, float]]]:
    intervals: list[tuple[float, float]] = []
    started: list[float] = []
    vae = networks.vae
    modules = (vae.robust_encoder, vae.encoder, vae.autoencoder.decoder, networks.text, networks.control, networks.unet)
    hooks = [module.register_forward_pre_hook(lambda *_: started.append(perf_counter())) for module in modules]
    hooks += [
        module.register_forward_hook(lambda *_: intervals.append((started.pop(), perf_counter()))) for module in modules
    ]
    try:
        yield intervals
    finally:
        for hook in hooks:
            hook.remove()
