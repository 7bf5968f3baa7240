"""Promises of ``SupirModel.restore`` on a model of random weights: company, order and parts change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_model import sampler
from supir_model.config import TINY
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Networks
from supir_model.sampler import EDMSettings, windows_of
from supir_model.vae_tiling import VAETiling

SAMPLING = Sampling(EDMSettings(2, restoration_tau=1.0, churn=2.0, window=16, stride=8), 1.5, 2.0, "wavelet")
SIZES = [(70, 93), (33, 20), (64, 64), (1, 5)]


@pytest.fixture(scope="module")
def supir(networks: Networks) -> SupirModel:
    return SupirModel(networks, TINY, torch.device("cpu"))


def request(height: int, width: int, seed: int = 0) -> Request:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator) * 2 - 1
    return Request(image, f"picture {seed}", "blurry", seed)


def test_batched_is_single(supir: SupirModel) -> None:
    requests = [request(*size, seed) for seed, size in enumerate(SIZES)]
    together = supir.restore(requests, SAMPLING)
    backwards = supir.restore(requests[::-1], SAMPLING)[::-1]
    for one, batched, reversed_ in zip(requests, together, backwards, strict=True):
        (alone,) = supir.restore([one], SAMPLING)
        assert alone.shape == one.image.shape
        torch.testing.assert_close(batched, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(reversed_, alone, rtol=0, atol=1e-5)


def test_seeds_and_prompts_do_matter(supir: SupirModel) -> None:
    plain = request(64, 64)
    (first,) = supir.restore([plain], SAMPLING)
    for other in (replace(plain, seed=1), replace(plain, prompt="a boat"), replace(plain, negative_prompt="")):
        (second,) = supir.restore([other], SAMPLING)
        assert (second - first).abs().max() > 1e-4


def test_the_order_of_windows_does_not_matter(supir: SupirModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one = request(70, 93)
    (forwards,) = supir.restore([one], SAMPLING)
    generator = torch.Generator().manual_seed(3)

    def shuffled(*arguments: int) -> list[sampler.Window]:
        windows = windows_of(*arguments)
        return [windows[i] for i in torch.randperm(len(windows), generator=generator)]

    monkeypatch.setattr(sampler, "windows_of", shuffled)
    torch.testing.assert_close(supir.restore([one], SAMPLING), [forwards], rtol=0, atol=1e-5)


@hypothesis_settings(deadline=None, max_examples=6)
@given(height=st.integers(1, 120), width=st.integers(1, 120))
def test_an_exactly_tiled_vae_changes_nothing(supir: SupirModel, height: int, width: int) -> None:
    one = request(height, width)
    tiled = supir.restore([one], replace(SAMPLING, vae_tiling=VAETiling("exact", 32)))
    torch.testing.assert_close(tiled, supir.restore([one], SAMPLING), rtol=0, atol=1e-3)


def test_the_released_tiling_is_used(supir: SupirModel) -> None:
    one = request(40, 180)
    (whole,) = supir.restore([one], SAMPLING)
    (tiled,) = supir.restore([one], replace(SAMPLING, vae_tiling=VAETiling("released", 32)))
    assert (tiled - whole).abs().max() > 1e-4


def test_clipping_can_be_left_to_the_caller(supir: SupirModel) -> None:
    one = replace(request(64, 64), image=torch.ones(3, 64, 64))
    (clipped,) = supir.restore([one], SAMPLING)
    (free,) = supir.restore([one], replace(SAMPLING, clip=False))
    assert free.abs().max() > 1
    assert torch.equal(free.clamp(-1, 1), clipped)
