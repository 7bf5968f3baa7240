"""Measure a tiny model: PSNR and sharpness of its input, encode-decode, stage 1 and sampled results."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Generator, Tensor

from supir_model.caption import describe
from supir_model.config import SamplingDefaults
from supir_model.model import Request, Sampling, SupirModel
from supir_model.sampler import EDMSettings
from supir_model.training.degradations import d1, d2

DEGRADATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"D1": d1, "D2": lambda x, _: d2(x)}


def sampling_of(model: SupirModel, defaults: SamplingDefaults) -> Sampling:
    """A preset's sampling with the model's own windows."""
    sampler = EDMSettings(
        steps=defaults.steps,
        restoration_tau=defaults.restoration_tau,
        churn=defaults.churn,
        noise=defaults.noise,
        control_scale=defaults.control_scale,
        window=model.config.window,
        stride=model.config.stride,
    )
    return Sampling(sampler, defaults.cfg_start, defaults.cfg_end, defaults.color_fix)


def evaluate(
    model: SupirModel,
    images: Sequence[npt.NDArray[np.uint8]],
    degradation: str,
    sampling: Sampling,
    pictures: Path | None = None,
) -> dict[str, float]:
    """Means over images [H, W, 3] of PSNR in dB and of gradient energy relative to the original.

    degradation: key of ``DEGRADATIONS``. pictures: folder for input | stage 1 | sampled | original strips.
    """
    sums: dict[str, float] = {}
    for index, pixels in enumerate(images):
        clean = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
        lq = DEGRADATIONS[degradation](clean[None], Generator().manual_seed(index))[0]
        started = time.perf_counter()
        stage1 = model.first_stage(lq)
        prompt = describe(stage1[None])[0] + model.config.positive_prompt
        request = Request(lq, prompt, model.config.negative_prompt, seed=index)
        sampled = model.restore([request], sampling)[0]
        seconds = time.perf_counter() - started
        results = {"input": lq, "coded": _encode_decode(model, clean), "stage1": stage1, "sampled": sampled}
        for name, result in results.items():
            for metric, value in (("psnr", _psnr(result, clean)), ("gradient", _gradient_ratio(result, clean))):
                sums[f"{name}_{metric}"] = sums.get(f"{name}_{metric}", 0.0) + value / len(images)
        sums["seconds"] = sums.get("seconds", 0.0) + seconds / len(images)
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            strip = torch.cat([lq, stage1, sampled, clean], dim=2)
            array = ((strip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(pictures / f"{degradation}-{index:02d}.png")
        print(json.dumps({"image": index, "sampled_psnr": round(_psnr(sampled, clean), 2)}), file=sys.stderr)
    return {name: round(value, 3) for name, value in sums.items()}


@torch.inference_mode()
def _encode_decode(model: SupirModel, image: Tensor) -> Tensor:
    """The ceiling: what the autoencoder keeps of a clean image whose sides fit its grid, else of its top left part."""
    alignment = model.config.alignment
    height, width = (side // alignment * alignment for side in image.shape[1:])
    vae = model.networks.vae
    coded = vae.decode(vae.encode(image[None, :, :height, :width].to(model.device)))[0].cpu()
    whole = image.clone()
    whole[:, :height, :width] = coded
    return whole


def _psnr(a: Tensor, b: Tensor) -> float:
    mse = (a.clamp(-1, 1) - b).square().mean() / 4
    return float(-10 * mse.clamp(min=1e-10).log10())


def _gradient_ratio(a: Tensor, b: Tensor) -> float:
    """Energy of neighbor differences of a, relative to b's; 1 is as sharp as the original."""

    def energy(x: Tensor) -> float:
        return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())

    return energy(a) / max(energy(b), 1e-12)
