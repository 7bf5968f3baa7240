"""The shipped model through its one door."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch

from supir_model import model as model_module
from supir_model import weights
from supir_model.config import TINY, TINY_WEIGHTS, Precision
from supir_model.errors import RequestError, WeightsError
from supir_model.first_stage import FirstStage
from supir_model.model import Request, Sampling, SupirModel
from supir_model.sampler import EDMSettings, Guided, Noise, SamplerSettings, Window, sample

QUICK = Sampling(EDMSettings(steps=2, restoration_tau=4.0, churn=5.0, window=16, stride=8), 1.0, 2.0, "wavelet")


@pytest.fixture(scope="module")
def model() -> SupirModel:
    return SupirModel.load("tiny", device="cpu")


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_shipped_weights_are_small_and_load_quickly() -> None:
    assert TINY_WEIGHTS.stat().st_size <= 20_000_000
    started = time.perf_counter()
    SupirModel.load("tiny", device="cpu")
    assert time.perf_counter() - started < 10  # about 0.3 s; the limit only catches a reading that went wrong


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (17, 31), (70, 100)])
def test_any_size_comes_back_at_its_size(model: SupirModel, height: int, width: int) -> None:
    restored = model.restore([Request(picture(height, width), "", "", seed=1)], QUICK)[0]
    assert restored.shape == (3, height, width)
    assert torch.isfinite(restored).all()
    assert restored.abs().max() <= 1
    assert model.first_stage(picture(height, width)).shape == (3, height, width)


def test_company_does_not_change_a_result(model: SupirModel) -> None:
    requests = [Request(picture(40, 56, i), f"prompt {i}", "blurry", seed=i) for i in range(3)]
    together = model.restore(requests, QUICK)
    for request, restored in zip(requests, together, strict=True):
        assert torch.equal(model.restore([request], QUICK)[0], restored)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_inside_the_networks(
    model: SupirModel, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = SupirModel.load("tiny", device="cpu", precision=precision)
    if precision == "float16":  # the shipped weights exceed its range there
        model = SupirModel.load("tiny", device="cpu")
        for one in (model, half):
            one.networks.unet.base.up_blocks[0].upsamplers[0].conv.weight.mul_(2**-10)
    formats = {key: value.dtype for key, value in half.networks.state_dict().items() if value.ndim > 1}
    inside = {key.split(".")[0]: dtype for key, dtype in formats.items()}
    assert inside == {
        "vae": torch.bfloat16,
        "text": torch.bfloat16,
        "control": getattr(torch, precision),
        "unet": getattr(torch, precision),
    }
    seen: set[torch.dtype] = set()

    def recording(
        guided: Guided, center: Sequence[torch.Tensor], noise: Noise, settings: SamplerSettings, window_batch: int
    ) -> object:
        def watched(x: torch.Tensor, sigma: torch.Tensor, scale: torch.Tensor, windows: Sequence[Window]) -> object:
            out = guided(x, sigma, scale, windows)
            seen.update(t.dtype for t in (x, sigma, scale, out, *center, noise(0, 0)))
            return out

        return sample(watched, center, noise, settings, window_batch)  # type: ignore[arg-type]

    request = Request(picture(40, 56), "a photograph", "blurry", seed=1)
    exact = model.restore([request], QUICK)[0]
    monkeypatch.setattr(model_module, "sample", recording)
    rounded = half.restore([request], QUICK)[0]
    assert seen == {torch.float32}
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.03  # measured: 0.006 and 0.004, of a range of 2
    assert torch.equal(half.restore([Request(picture(40, 56, 1), "", "", seed=2), request], QUICK)[1], rounded)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_computing_in_float32_for_a_while(model: SupirModel, precision: Precision) -> None:
    request = Request(picture(40, 56), "a photograph", "blurry", seed=1)
    half = SupirModel.load("tiny", device="cpu", precision=precision)
    exact, before = model.restore([request], QUICK)[0], half.restore([request], QUICK)[0]
    held = [parameter.clone() for parameter in half.networks.parameters()]
    with half.in_float32():
        inside = half.restore([request], QUICK)[0]
        assert {parameter.dtype for parameter in half.networks.parameters()} == {torch.float32}
    assert (inside - exact).abs().mean() <= (before - exact).abs().mean()
    assert torch.equal(inside, before) == (precision == "float32")
    for kept, parameter in zip(held, half.networks.parameters(), strict=True):
        assert parameter.dtype == kept.dtype
        assert torch.equal(parameter, kept)
    assert torch.equal(half.restore([request], QUICK)[0], before)


def test_a_widening_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    half = SupirModel.load("tiny", device="cpu", precision="bfloat16")
    request = Request(picture(32, 32), "a photograph", "blurry", seed=1)
    before = half.restore([request], QUICK)[0]

    def half_way() -> None:
        half.networks.unet.to(torch.float32)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(half.networks, "float", half_way)
    with pytest.raises(torch.OutOfMemoryError), half.in_float32():
        pass
    assert torch.equal(half.restore([request], QUICK)[0], before)


def test_the_first_stage_alone_sees_the_same_and_holds_the_vae_only(model: SupirModel) -> None:
    alone = FirstStage.load("tiny", "cpu")
    assert torch.equal(alone.see(picture(40, 56)), model.first_stage(picture(40, 56)))
    assert len(list(alone.vae.parameters())) == len(list(model.networks.vae.parameters()))


def test_seed_and_prompt_change_a_result(model: SupirModel) -> None:
    base = Request(picture(32, 32), "a photograph", "blurry", seed=1)
    restored = model.restore([base], QUICK)[0]
    for other in (
        Request(base.image, "a photograph", "blurry", seed=2),
        Request(base.image, "a black and white photograph", "blurry", seed=1),
    ):
        assert not torch.equal(model.restore([other], QUICK)[0], restored)


def test_control_scale_reaches_the_networks(model: SupirModel) -> None:
    request = Request(picture(32, 32), "", "", seed=1)
    weak = Sampling(EDMSettings(steps=2, control_scale=0.5), 1.0, 1.0, "none")
    full = Sampling(EDMSettings(steps=2, control_scale=1.0), 1.0, 1.0, "none")
    assert not torch.allclose(model.restore([request], weak)[0], model.restore([request], full)[0], atol=1e-3)


def test_a_tile_off_the_latent_grid_is_refused(model: SupirModel) -> None:
    with pytest.raises(RequestError, match="multiple of 4"):
        model.restore([Request(picture(16, 16), "", "", seed=1, top=3)], QUICK)


def test_an_image_of_the_wrong_shape_is_refused(model: SupirModel) -> None:
    with pytest.raises(RequestError, match=r"got \[1, 16, 16\]"):
        model.restore([Request(torch.zeros(1, 16, 16), "", "", seed=1)], QUICK)


def test_unknown_weights_are_refused_with_the_choices() -> None:
    with pytest.raises(WeightsError, match="tiny"):
        weights.find("huge")


def test_presets_name_settings_the_sampler_accepts() -> None:
    for preset in TINY.presets.values():
        assert preset.steps >= 1
        assert preset.restoration_tau is None or preset.restoration_tau > 0


def test_a_guidance_scale_of_one_ignores_the_negative_prompt_and_is_the_limit_of_guidance(model: SupirModel) -> None:
    sampler = EDMSettings(steps=2)
    requests = [Request(picture(32, 32), "a photograph", negative, seed=1) for negative in ("blurry", "")]
    unguided = [model.restore([request], Sampling(sampler, 1.0, 1.0, "none"))[0] for request in requests]
    assert torch.equal(unguided[0], unguided[1])
    almost = model.restore([requests[0]], Sampling(sampler, 1.0, 1.0 + 1e-6, "none"))[0]
    assert torch.allclose(almost, unguided[0], atol=1e-3)
