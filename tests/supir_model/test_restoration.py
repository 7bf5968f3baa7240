"""The shipped weights restore: on photographs they were not trained on, the result is nearer to the original."""

from __future__ import annotations

import pytest
import skimage.data
import torch

from supir_model.caption import describe
from supir_model.config import TINY
from supir_model.metrics import gmsd
from supir_model.model import Request, Sampling, SupirModel
from supir_model.training.degradations import BENCHMARKS

MATTERS = 0.01  # of a range of 2; measured: 0.029 for the caption, 0.036 for the negative prompt
PHOTOGRAPHS = {"astronaut": (0, 140), "coffee": (80, 180), "chelsea": (40, 120)}


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * ((a - b).square().mean() / 4).log10())


@pytest.mark.slow
def test_sampled_results_beat_their_inputs_and_their_structure_stage_1() -> None:
    model = SupirModel.load("tiny", device="cpu")
    sampling = Sampling.of(TINY.presets["fidelity"], TINY.window, TINY.stride)
    gains, deviations = {}, {}
    for name, (top, left) in PHOTOGRAPHS.items():
        pixels = getattr(skimage.data, name)()[top : top + 192, left : left + 192]
        clean = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
        lq = BENCHMARKS["D1"].apply(clean[None], torch.Generator().manual_seed(0))[0]
        first = model.first_stage(lq)
        prompt = describe(first[None])[0] + TINY.positive_prompt
        restored = model.restore([Request(lq, prompt, TINY.negative_prompt, seed=0)], sampling)[0]
        gains[name] = psnr(restored, clean) - psnr(lq, clean)
        sampled, stage_1 = (gmsd((image + 1) / 2, (clean + 1) / 2) for image in (restored, first))
        deviations[name] = sampled - stage_1
    assert sum(gains.values()) / len(gains) > 0.3, gains
    assert min(gains.values()) > -0.5, gains
    assert sum(deviations.values()) < 0, deviations


def test_captions_and_the_negative_prompt_matter() -> None:
    """Opposite captions pull a result apart, and so does what guidance leads away from."""
    model = SupirModel.load("tiny", device="cpu")
    pixels = skimage.data.astronaut()[0:128, 140:268]
    clean = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
    lq = BENCHMARKS["blur-SRx4-noise-JPEG"].apply(clean[None], torch.Generator().manual_seed(0))
    lq = torch.nn.functional.interpolate(lq, size=(128, 128), mode="bicubic").clamp(-1, 1)[0]
    sampling = Sampling.of(TINY.presets["quality"], TINY.window, TINY.stride)

    def restored(prompt: str, negative: str) -> torch.Tensor:
        return model.restore([Request(lq, prompt, negative, seed=0)], sampling)[0]

    sharp = "a color photograph, evenly lit, medium contrast, richly detailed" + TINY.positive_prompt
    soft = "a color photograph, evenly lit, low contrast, plain"
    base = restored(sharp, TINY.negative_prompt)
    for other in (restored(soft, TINY.negative_prompt), restored(sharp, "")):
        assert (other - base).abs().mean() > MATTERS
    energy = [float(x.diff(dim=-1).square().mean()) for x in (base, restored(soft, TINY.negative_prompt))]
    assert energy[0] > energy[1], "the caption that promises detail must give more of it"
