from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
import vs_peers
from torch import Tensor

from supir_model.model import Request, Sampling
from supir_model.noise import latent_noise
from tests.benchmarks.conftest import Run

# diffusers' scheduler hands a tensor to NumPy in a way that NumPy 2 warns of
_numpy_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("size", [(1024, 1024), (1024, 2048)])
def test_the_plain_loop_does_what_the_engine_does(size: tuple[int, int]) -> None:
    setup = gpu.setup_of(gpu.arguments(None).parse_args(["--width", "reduced", "--device", "cpu"]))
    model, config = gpu.build(setup), setup.config
    height, width = (setup.scaled(side) for side in size)
    latent = (config.vae.latent_channels, 0, 0, height // config.vae.factor, width // config.vae.factor)

    def noise(draw: int) -> Tensor:
        return latent_noise(7, draw, *latent)[None]

    image = gpu.picture(height, width)
    values = replace(config.presets["fidelity"], steps=3)
    sampling = Sampling.of(values, config.window, config.stride, clip=False)
    (engine,) = model.restore([Request(image, gpu.PROMPT, config.negative_prompt, seed=7)], sampling)
    eager = vs_peers.eager_loop(model.networks, image[None], gpu.PROMPT, 3, noise, "float32")[0]
    assert float((engine - eager).norm() / engine.norm()) < 1e-4


@_numpy_2
def test_all_three_are_measured(run: Run) -> None:
    options = ("--size", "512", "--steps", "2", "--together", "1", "2", "--turns", "1")
    measured, printed, code = run("vs_peers", *options)
    assert code == 0
    runs = [(row["run"], row["together"]) for row in measured["runs"]]
    assert runs == [("engine", 1), ("engine", 2), ("eager", 1), ("diffusers", 1), ("diffusers", 2)]
    assert {ratio["against"] for ratio in measured["ratios"]} == {"eager", "diffusers"}
    assert "not judged here" in printed


@_numpy_2
def test_diffusers_is_counted_as_it_is_computed() -> None:
    setup = gpu.setup_of(gpu.arguments(None).parse_args(["--width", "reduced", "--device", "cpu"]))
    _, _, counted, call = vs_peers._diffusers(setup, 64, 2, 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one of CPUs is not counted
        assert gpu.flops(lambda: call(2)) == counted


def test_ratios_are_of_the_best_rows_and_corrected_for_flops() -> None:
    rows = [
        {"run": "engine", "s per image": 3.0, "TFLOP": 8.0},
        {"run": "engine", "s per image": 2.0, "TFLOP": 8.0},
        {"run": "eager", "s per image": 8.0, "TFLOP": 8.0},
        {"run": "diffusers", "s per image": 4.0, "TFLOP": 4.0},
        {"run": "diffusers", "s per image": 5.0, "TFLOP": 4.0},
    ]
    assert vs_peers._ratios(rows) == [
        {"against": "eager", "speed-up": 4.0, "per FLOP": 4.0},
        {"against": "diffusers", "speed-up": 2.0, "per FLOP": 4.0},
    ]
