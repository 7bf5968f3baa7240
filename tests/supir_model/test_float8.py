"""Products in 8-bit floats: near to those in float32, held in a byte each, refused where a card cannot."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from supir_model.config import TINY
from supir_model.errors import RequestError
from supir_model.float8 import Float8Linear, use_float8
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Networks

SAMPLING = Sampling.of(TINY.presets["quality"], TINY.window, TINY.stride)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(rows=st.integers(1, 40), inputs=st.sampled_from([16, 48, 64]), outputs=st.sampled_from([16, 32]))
def test_a_product_is_near_to_the_exact_one_whatever_the_size_of_its_rows(rows: int, inputs: int, outputs: int) -> None:
    linear = nn.Linear(inputs, outputs)
    sizes = torch.logspace(-3, 3, rows)[:, None]  # of each row; one scale for all would lose the small ones
    x = drawn(rows, inputs) * sizes
    with torch.no_grad():
        exact, found = linear(x), Float8Linear(linear)(x[None])[0]
    assert found.dtype == torch.bfloat16
    error = (found.float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.12  # e4m3 has 3 bits behind the first: up to 1/16 for each factor
    assert error.median() < 0.06


def test_zeros_stay_zeros() -> None:
    layer = Float8Linear(nn.Linear(16, 16, bias=False))
    assert torch.equal(layer(torch.zeros(3, 16)), torch.zeros(3, 16, dtype=torch.bfloat16))


def test_layers_of_the_transformers_hold_a_byte_for_each_weight_and_those_of_the_text_are_left() -> None:
    networks = Networks(TINY)
    before = {name for name, layer in networks.unet.named_modules() if isinstance(layer, nn.Linear)}
    use_float8(networks.unet, torch.device("cpu"))
    changed = {name for name, layer in networks.unet.named_modules() if isinstance(layer, Float8Linear)}
    blocks = [name for name, one in networks.unet.named_modules() if isinstance(one, BasicTransformerBlock)]
    assert changed == {
        name for name in before if name.startswith(tuple(blocks)) and not name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    for name in changed:
        assert networks.unet.get_parameter(f"{name}.weight").element_size() == 1


def test_a_restoration_in_float8_is_near_to_that_in_float32_and_never_depends_on_its_company() -> None:
    exact = SupirModel.load("tiny", device="cpu")
    rounded = SupirModel.load("tiny", device="cpu", precision="float8")
    requests = [Request(drawn(3, 64, side).clamp(-1, 1), "a harbor", "blurry", seed=side) for side in (64, 40)]
    for one, near, wanted in zip(
        requests, rounded.restore(requests, SAMPLING), exact.restore(requests, SAMPLING), strict=True
    ):
        assert 0 < (near - wanted).norm() / wanted.norm() < 0.05
        assert torch.equal(rounded.restore([one], SAMPLING)[0], near)


def test_computing_in_float32_for_a_while_keeps_the_rounded_weights() -> None:
    model = SupirModel.load("tiny", device="cpu", precision="float8")
    request = Request(drawn(3, 32, 32).clamp(-1, 1), "a harbor", "blurry", seed=1)
    (before,) = model.restore([request], SAMPLING)
    held = [parameter.clone() for parameter in model.networks.parameters()]
    with model.in_float32():
        (inside,) = model.restore([request], SAMPLING)
        assert {parameter.dtype for parameter in model.networks.parameters()} == {torch.float32}
    assert 0 < (inside - before).norm() / before.norm() < 0.05
    for kept, parameter in zip(held, model.networks.parameters(), strict=True):
        assert parameter.dtype == kept.dtype
        assert torch.equal(parameter.float(), kept.float())
    assert torch.equal(model.restore([request], SAMPLING)[0], before)


def test_an_old_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(RequestError, match=r"needs compute capability 8\.9 or later, A100 has 8\.0; choose bfloat16"):
        use_float8(Networks(TINY).unet, torch.device("cuda"))
