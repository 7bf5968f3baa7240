"""The noise levels at which text guides, and what is not computed at all others."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from supir_model.config import TINY
from supir_model.denoiser import legacy_sigmas
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Networks
from supir_model.sampler import EDMSettings

STEPS = 6
SAMPLING = Sampling(EDMSettings(STEPS, window=16, stride=8), 4.0, 4.0, "wavelet")
REQUEST = Request(torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64), "a harbor", "blurry", seed=1)


@pytest.fixture(scope="module")
def supir(networks: Networks) -> SupirModel:
    return SupirModel(networks, TINY, torch.device("cpu"))


def restored(supir: SupirModel, sampling: Sampling) -> tuple[torch.Tensor, list[int]]:
    """The image, and the rows that the networks saw at each step."""
    rows: list[int] = []
    watch = supir.networks.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    (image,) = supir.restore([REQUEST], sampling)
    watch.remove()
    return image, rows


def test_the_negative_prompt_is_computed_between_two_noise_levels_alone(supir: SupirModel) -> None:
    sigmas = legacy_sigmas(STEPS)[:STEPS].tolist()
    within = dataclasses.replace(SAMPLING, guided_sigmas=(sigmas[4], sigmas[2]))
    image, rows = restored(supir, within)
    assert rows == [1, 1, 2, 2, 2, 1]
    assert not torch.equal(image, restored(supir, SAMPLING)[0])


def test_all_noise_levels_are_no_limit_and_none_are_no_guidance(supir: SupirModel) -> None:
    everywhere, rows = restored(supir, SAMPLING)
    assert rows == [2] * STEPS
    assert torch.equal(restored(supir, dataclasses.replace(SAMPLING, guided_sigmas=(0.0, math.inf)))[0], everywhere)
    nowhere, rows = restored(supir, dataclasses.replace(SAMPLING, guided_sigmas=(1000.0, math.inf)))
    assert rows == [1] * STEPS
    assert torch.equal(nowhere, restored(supir, dataclasses.replace(SAMPLING, cfg_start=1.0, cfg_end=1.0))[0])
