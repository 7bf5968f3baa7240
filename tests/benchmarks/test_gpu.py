"""Counting and random models: what every figure of a card rests on."""

from __future__ import annotations

import time
from pathlib import Path

import gpu
import pytest
import torch

from supir_model.config import V0F
from supir_model.model import SupirModel


@pytest.fixture(scope="module")
def setup() -> gpu.Setup:
    return gpu.setup_of(gpu.arguments(None).parse_args(["--width", "reduced", "--device", "cpu"]))


@pytest.fixture(scope="module")
def model(setup: gpu.Setup) -> SupirModel:
    return gpu.build(setup)


def test_the_counter_agrees_with_the_specification() -> None:
    # section 18, in T: control, control and UNet with connectors, the pair of guidance, one encoding, one decoding
    assert gpu.control_flops(V0F, 1, 64, 64) / 1e12 == pytest.approx(0.690, abs=5e-4)
    assert gpu.step_flops(V0F, 1, 64, 64) / 1e12 == pytest.approx(2.381, abs=5e-4)
    assert gpu.step_flops(V0F, 2, 64, 64) / 1e12 == pytest.approx(4.763, abs=5e-4)
    assert gpu.encode_flops(V0F, 512, 512) / 1e12 == pytest.approx(1.117, abs=5e-4)
    assert gpu.decode_flops(V0F, 512, 512) / 1e12 == pytest.approx(2.515, abs=5e-4)


def test_an_image_is_counted_as_it_is_computed(setup: gpu.Setup, model: SupirModel) -> None:
    """Three windows of an image that is longer than one."""
    image = torch.zeros(3, setup.scaled(1024), setup.scaled(2048))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one of CPUs is not counted
        computed = gpu.flops(lambda: gpu.restore(model, [image], 1))
    text = gpu.flops(lambda: model.networks.text([model.config.negative_prompt, "a"]))
    counted = gpu.image_flops(setup.config, image.shape[1], image.shape[2], 1)
    # the wavelet's 3 x 3 blurs are the rest
    assert computed - text == pytest.approx(counted, rel=0.01)


def test_random_weights_give_images_that_differ(setup: gpu.Setup, model: SupirModel) -> None:
    side = setup.scaled(1024)
    ramp = torch.linspace(-1, 1, side).expand(3, side, side)
    first, second = gpu.restore(model, [ramp, -ramp], 2)
    assert first.shape == ramp.shape
    assert first.isfinite().all()
    assert 0.05 < float(first.std()) < 1.5
    assert not torch.allclose(first, second, atol=0.05)


def test_a_written_model_is_the_model(setup: gpu.Setup, model: SupirModel, tmp_path: Path) -> None:
    gpu.write_model(model.networks, tmp_path / "model")
    loaded = SupirModel.load(tmp_path / "model", "cpu")
    assert loaded.config == model.config
    wanted = model.networks.state_dict()
    assert all(torch.equal(value, wanted[key].half().float()) for key, value in loaded.networks.state_dict().items())


def test_busy_counts_what_overlaps_once() -> None:
    assert gpu.covered([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (0.6, 0.7)]) == pytest.approx(3.0)
    assert gpu.covered([]) == 0


def test_busy_is_less_where_the_networks_wait(model: SupirModel, setup: gpu.Setup) -> None:
    call = gpu.network_call(model, setup, 2)
    with gpu.busy(model) as working:
        call()
    with gpu.busy(model) as waiting:
        call()
        time.sleep(2 * working["seconds"])
    assert 0.5 < working["share"] <= 1
    assert waiting["share"] < working["share"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_busy_while_it_computes_and_idle_while_it_waits() -> None:
    setup = gpu.setup_of(gpu.arguments(None).parse_args(["--width", "reduced", "--device", "cuda"]))
    model = gpu.build(setup)
    call = gpu.network_call(model, setup, 8)
    call()
    with gpu.busy(model) as working:
        call()
    with gpu.busy(model) as waiting:
        call()
        time.sleep(10 * working["seconds"])
    assert 0 < waiting["share"] < working["share"] <= 1
