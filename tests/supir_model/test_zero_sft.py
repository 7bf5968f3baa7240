from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from supir_model.zero_sft import ZeroCrossAttn, ZeroSFT


def scale(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn((2, 6, 5, 7), generator=generator),  # control
        torch.randn((2, 8, 5, 7), generator=generator),  # skip
        torch.randn((2, 16, 5, 7), generator=generator),  # decoder
    )


def trained(module: nn.Module) -> nn.Module:
    """Weights as after training: nothing is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval()


@torch.no_grad()
def test_control_scale_zero_is_the_plain_concatenation(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    control, skip, decoder = inputs
    sft = trained(ZeroSFT(6, 8, 16, 4, 8))
    assert torch.equal(sft(control, skip, decoder, scale(0, 0)), torch.cat([decoder, skip], dim=1))
    middle = trained(ZeroSFT(6, 8, 0, 4, 8))
    assert torch.equal(middle(control, skip, None, scale(0, 0)), skip)


@torch.no_grad()
def test_control_scale_interpolates_and_extrapolates(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    sft = trained(ZeroSFT(6, 8, 16, 4, 8))
    off, on = (sft(*inputs, scale(value, value)) for value in (0.0, 1.0))
    for value in (0.3, 1.4):
        torch.testing.assert_close(sft(*inputs, scale(value, value)), off + value * (on - off), rtol=0, atol=1e-5)


@torch.no_grad()
def test_control_scale_is_per_image(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    sft = trained(ZeroSFT(6, 8, 16, 4, 8))
    mixed = sft(*inputs, scale(0.2, 0.9))
    torch.testing.assert_close(mixed[:1], sft(*inputs, scale(0.2, 0.2))[:1])
    torch.testing.assert_close(mixed[1:], sft(*inputs, scale(0.9, 0.9))[1:])


@torch.no_grad()
def test_untrained_sft_only_normalizes(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    control, skip, decoder = inputs
    sft = ZeroSFT(6, 8, 16, 4, 8)
    wanted = sft.norm(torch.cat([decoder, skip], dim=1))
    torch.testing.assert_close(sft(control, skip, decoder, scale(1, 1)), wanted)


@torch.no_grad()
def test_cross_attention_adds_in_proportion(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    control, _, features = inputs
    cross = trained(ZeroCrossAttn(16, 6, 8, 2))
    assert torch.equal(cross(control, features, scale(0, 0)), features)
    added = cross(control, features, scale(1, 1)) - features
    scaled = cross(control, features, scale(0.5, 2)) - features
    torch.testing.assert_close(scaled, added * scale(0.5, 2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_cross_attention_knows_no_position(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    control, _, features = inputs
    cross = trained(ZeroCrossAttn(16, 6, 8, 2))
    torch.testing.assert_close(
        cross(control.flip(2), features, scale(1, 1)), cross(control, features, scale(1, 1)), rtol=0, atol=1e-5
    )
