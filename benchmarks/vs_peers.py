"""The engine against two other ways to the same kind of image, in one run on one card.

    python benchmarks/vs_peers.py

``engine`` is this project. ``eager`` is a plain loop over the same networks that works as the release does
(specification sections 1, 6, 7 and 13): one image, weights in float32 under autocast to float16 (VAE and text to
bfloat16), windows one by one, each with and without its prompt in one batch of two. ``diffusers`` is diffusers' own
StableDiffusionXLControlNetPipeline as it comes, with SDXL's networks, a full control net, Euler steps, guidance, in the
engine's number format; its prompt embeddings are given to it, so that it reads no text. Weights are random.

Each runs ``--turns`` times after a first run that does not count; the median is told. FLOPs of each are counted on its
own networks. ``speed-up`` is how much longer another takes per image than the best row of the engine; ``per FLOP``
divides that by how much more it computes. Where several images in one call are faster, diffusers is judged by that.

Prints JSON and a table, and exits with 1 if a target is missed, at full width on a card.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import table
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from gpu import (
    PROMPT,
    Setup,
    arguments,
    build,
    digits,
    draw,
    draw_networks,
    flops,
    image_flops,
    machine,
    matmul_rate,
    once,
    peak_memory,
    picture,
    report,
    restore,
    setup_of,
)
from torch import Tensor

from supir_model.color import fix_color
from supir_model.config import Precision
from supir_model.denoiser import denoise, guide, legacy_sigmas, linear_cfg
from supir_model.first_stage import autocast
from supir_model.loading import FORMATS
from supir_model.networks import Conditioning, Networks
from supir_model.sampler import window_weights, windows_of
from supir_model.unet import build_sdxl_unet
from supir_model.vae import RobustVAE

EAGER, DIFFUSERS = 3.0, 1.5  # how much faster the engine is to be, per image and FLOP

Peer = tuple[str, int, int, Callable[[int], object]]
"""Name, images in one call, FLOPs of an image, and the call with so many steps"""


def main() -> None:
    """Parse the command line, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=1024, help="side of the images; an eighth if reduced")
    parser.add_argument("--steps", type=int, help="default: 50, reduced 5")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 4], help="images in one call, where one can")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    setup = setup_of(given)
    side, steps = setup.scaled(given.size), given.steps or (50 if setup.full else 5)
    matmul = matmul_rate(setup.device, setup.dtype)
    rows: list[dict[str, Any]] = []
    kinds = [(_engine, count) for count in given.together] + [(_eager, 1)]
    kinds += [(_diffusers, count) for count in given.together]
    for kind, count in kinds:
        rows.append(_measure(kind(setup, side, steps, count), setup, steps, given.turns, matmul))
        gc.collect()  # one after the other: not every card holds all of them
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    ratios = _ratios(rows)
    measured = {"machine": machine(setup), "matmul_tflops": digits(matmul / 1e12), "side": side, "steps": steps}
    measured |= {"runs": rows, "ratios": ratios}
    per_flop = {ratio["against"]: ratio["per FLOP"] for ratio in ratios}
    wanted = {"eager": EAGER, "diffusers": DIFFUSERS}
    targets = [(f"{goal} times as fast as {name}, per FLOP", per_flop[name] >= goal) for name, goal in wanted.items()]
    held = report(measured, targets, setup.judged)
    print(f"{table(rows)}\n\n{table(ratios)}")
    sys.exit(not held)


def _measure(peer: Peer, setup: Setup, steps: int, turns: int, matmul: float) -> dict[str, Any]:
    name, together, arithmetic, call = peer
    call(steps)
    with peak_memory(setup.device) as memory:
        seconds = statistics.median(once(lambda: call(steps), setup.device) for _ in range(turns)) / together
    return {
        "run": name,
        "together": together,
        "s per image": digits(seconds),
        "TFLOP": digits(arithmetic / 1e12, 4),
        "TFLOP/s": digits(arithmetic / seconds / 1e12),
        "share": digits(arithmetic / seconds / matmul),
        "peak memory GB": digits(memory["peak_memory_bytes"] / 1e9),
    }


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How the engine's best row compares with the best of each other, in seconds and in seconds for each FLOP."""
    best = {}
    for row in sorted(rows, key=lambda row: -row["s per image"]):
        best[row["run"]] = row
    engine = best.pop("engine")
    found = []
    for name, row in best.items():
        times = row["s per image"] / engine["s per image"]
        per_flop = times * engine["TFLOP"] / row["TFLOP"]
        found.append({"against": name, "speed-up": digits(times), "per FLOP": digits(per_flop)})
    return found


# --- the engine ------------------------------------------------------------------------------------------------------


def _engine(setup: Setup, side: int, steps: int, together: int) -> Peer:
    model = build(setup, together)
    images = [picture(side, side, seed) for seed in range(together)]
    return "engine", together, image_flops(setup.config, side, side, steps), partial(restore, model, images)


# --- a plain loop ----------------------------------------------------------------------------------------------------


def _eager(setup: Setup, side: int, steps: int, together: int) -> Peer:
    networks = draw_networks(setup, "float32")
    factor, generator = setup.config.vae.factor, torch.Generator(setup.device).manual_seed(0)
    size = (1, setup.config.vae.latent_channels, side // factor, side // factor)
    image = picture(side, side)[None]
    precision: Precision = "float16" if setup.device.type == "cuda" else "float32"

    def noise(draw: int) -> Tensor:
        return torch.randn(size, generator=generator, device=setup.device)

    def call(steps: int) -> Tensor:
        return eager_loop(networks, image.to(setup.device), PROMPT, steps, noise, precision).cpu()

    return "eager", together, image_flops(setup.config, side, side, steps), call


@torch.inference_mode()
def eager_loop(
    networks: Networks, image: Tensor, prompt: str, steps: int, noise: Callable[[int], Tensor], precision: Precision
) -> Tensor:
    """Restore one image [1, 3, H, W] in [-1, 1] with the settings of preset ``fidelity``; not clipped.

    noise(draw): [1, C, h, w] unit normal; draw 0 is the posterior's, 1 starts the trajectory, i + 2 belongs to step i.
    H, W: multiples of the networks' alignment. precision: of autocast, whatever the weights are held in.
    """
    config, device, formats = networks.config, image.device, FORMATS[precision]
    preset = config.presets["fidelity"]
    with autocast(device, formats.conditioner):
        z_lq = networks.vae.encode_robust(image).float()
        stage1 = networks.vae.decode(z_lq).float()
        networks.vae.encode(stage1, noise(0))  # the center of restoration guidance, computed even where that is off
        context, vector = networks.text([config.negative_prompt, prompt])

    def denoise_window(x: Tensor, control: Tensor, sigma: Tensor) -> Tensor:
        conditioning = Conditioning(context.float(), vector.float(), torch.cat([control, control]))

        def network(x_in: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
            with autocast(device, formats.denoiser):
                out: Tensor = networks(x_in, timestep, scale, conditioning)
            return out.float()

        both, scale = sigma.expand(2), torch.full((2,), preset.control_scale, device=device)
        denoised = denoise(network, config.prediction, torch.cat([x, x]), both, scale)
        return guide(denoised, linear_cfg(preset.cfg_start, preset.cfg_end, sigma.expand(1)))

    sigmas = legacy_sigmas(steps).to(device)
    gamma = min(preset.churn / steps, math.sqrt(2) - 1)
    x = noise(1) * torch.sqrt(1 + sigmas[0] ** 2)
    windows = windows_of(0, x.shape[2], x.shape[3], config.window, config.stride)
    weight = window_weights(windows[0].height, windows[0].width).to(x)
    for i in range(steps):
        sigma, next_sigma, eps = sigmas[i], sigmas[i + 1], noise(i + 2)
        sigma_hat = sigma * (1 + gamma)
        churned = x + preset.noise * eps * torch.sqrt(sigma_hat**2 - sigma**2)
        total, weights = torch.zeros_like(x), torch.zeros_like(x)
        for window in windows:
            crop = window.crop(churned[0])[None]
            denoised = denoise_window(crop, window.crop(z_lq[0])[None], sigma_hat)
            stepped = crop + (next_sigma - sigma_hat) * (crop - denoised) / sigma_hat
            window.crop(total[0]).add_(weight * stepped[0])
            window.crop(weights[0]).add_(weight)
        x = total / weights
    with autocast(device, formats.conditioner):
        decoded = networks.vae.decode(x).float()
    return fix_color(decoded, stage1, preset.color_fix)


# --- diffusers -------------------------------------------------------------------------------------------------------


def _diffusers(setup: Setup, side: int, steps: int, together: int) -> Peer:
    pipeline = _sdxl_on_meta(setup)
    arithmetic = _sdxl_flops(pipeline, setup, side, steps)
    for network in (pipeline.unet, pipeline.controlnet, pipeline.vae):
        draw(network, lambda name, like: setup.dtype, setup.device)
        network.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(setup.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(together, *shape, generator=generator, device=setup.device, dtype=setup.dtype)

    text = setup.config.text
    context, pooled = (text.length, setup.config.unet.context_dim), (text.towers[-1].projection,)
    embeddings = {
        "prompt_embeds": normal(*context),
        "negative_prompt_embeds": normal(*context),
        "pooled_prompt_embeds": normal(*pooled),
        "negative_pooled_prompt_embeds": normal(*pooled),
    }
    hints = torch.stack([(picture(side, side, seed) + 1) / 2 for seed in range(together)])

    def call(steps: int) -> Tensor:
        found: Tensor = pipeline(
            image=hints,
            num_inference_steps=steps,
            guidance_scale=setup.config.presets["fidelity"].cfg_end,
            generator=generator,
            output_type="pt",
            **embeddings,
        ).images.cpu()
        return found

    return "diffusers", together, arithmetic, call


def _sdxl_on_meta(setup: Setup) -> StableDiffusionXLControlNetPipeline:
    config = setup.config
    with torch.device("meta"):
        ours = build_sdxl_unet(config.unet, config.unet.transformer_depth)
        # ours gets its size embeddings with the text; the pipeline's UNet makes them
        unet = UNet2DConditionModel.from_config(ours.config, addition_time_embed_dim=config.text.size_embedding)
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        vae = AutoencoderKL.from_config(RobustVAE(config.vae).autoencoder.config)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLControlNetPipeline(
        vae=vae, unet=unet, controlnet=controlnet, scheduler=scheduler, add_watermarker=False, **nothing
    )


def _sdxl_flops(pipeline: StableDiffusionXLControlNetPipeline, setup: Setup, side: int, steps: int) -> int:
    """FLOPs of one image, from the pipeline's networks on the meta device."""
    text, factor, channels = setup.config.text, setup.config.vae.factor, setup.config.vae.latent_channels
    with torch.device("meta"):
        x = torch.empty(2, channels, side // factor, side // factor)
        timestep = torch.empty((), dtype=torch.int64)
        context = torch.empty(2, text.length, setup.config.unet.context_dim)
        added = {"text_embeds": torch.empty(2, text.towers[-1].projection), "time_ids": torch.empty(2, 6)}
        hint = torch.empty(2, 3, side, side)

    def step() -> None:
        options = {"encoder_hidden_states": context, "added_cond_kwargs": added, "return_dict": False}
        down, middle = pipeline.controlnet(x, timestep, controlnet_cond=hint, **options)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        pipeline.unet(x, timestep, **options, **residuals)

    return steps * flops(step) + flops(lambda: pipeline.vae.decode(x[:1]))


if __name__ == "__main__":
    main()
