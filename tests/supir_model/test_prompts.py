from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supir_model.attention import KeysValues, fuse_projections, project_text
from supir_model.config import TINY, UNetConfig
from supir_model.control import ControlEncoder
from supir_model.networks import Conditioning, Networks, ProjectedText
from supir_model.prompts import PromptReader, Text, conditioning
from supir_model.unet import build_sdxl_unet

NARROW = UNetConfig(4, (16, 32), 1, (0, 2), 16, context_dim=20, vector_dim=22, norm_groups=8)


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.manual_seed(0)
    networks = Networks(TINY).eval().requires_grad_(False)
    for parameter in networks.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return networks


def arguments(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.full((rows,), 500), torch.ones(rows, 1, 1, 1)


def test_projected_text_is_what_the_networks_would_have_made_of_the_context(networks: Networks) -> None:
    x, timestep, scale = arguments(2)
    context, vector = torch.randn(2, 48, 128), torch.randn(2, 128)
    plain = networks(x, timestep, scale, Conditioning(context, vector, x))
    once = networks(x, timestep, scale, Conditioning(networks.project(context), vector, x))
    torch.testing.assert_close(once, plain, rtol=0, atol=1e-5)
    other = networks(x, timestep, scale, Conditioning(networks.project(-context), vector, x))
    assert (other - plain).abs().max() > 1e-3


def test_every_cross_attention_reads_its_own_part() -> None:
    torch.manual_seed(0)
    net = build_sdxl_unet(NARROW, (0, 2))
    widths = [
        block.attn2.to_k.out_features
        for name, block in net.named_modules()
        if name.endswith("blocks.0") or name.endswith("blocks.1")
        if hasattr(block, "attn2")
    ]
    packed = project_text(net, torch.randn(3, 7, 20)).packed
    assert packed.shape == (3, 7, 2 * sum(widths))


def test_a_step_projects_no_text(networks: Networks) -> None:
    """The layers are called while a prompt is read, and never again."""
    called = []
    layers = [module for name, module in networks.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    watches = [layer.register_forward_pre_hook(lambda module, inputs: called.append(module)) for layer in layers]
    context = networks.project(torch.randn(1, 48, 128))
    assert len(called) == len(layers) > 0
    x, timestep, scale = arguments(1)
    networks(x, timestep, scale, Conditioning(context, torch.randn(1, 128), x))
    for watch in watches:
        watch.remove()
    assert len(called) == len(layers)


def test_fused_projections_compute_the_same_and_hold_weights_once() -> None:
    torch.manual_seed(0)
    config = TINY
    control = ControlEncoder(config.unet, config.control).eval().requires_grad_(False)
    x, timestep, _ = arguments(2)
    inputs = (x, timestep, torch.randn(2, 48, 128), torch.randn(2, 128), x)
    before, held = control(*inputs), sum(p.numel() for p in control.parameters())
    fuse_projections(control)
    assert sum(p.numel() for p in control.parameters()) == held
    assert not any(p.requires_grad for p in control.parameters())
    assert any(name.endswith("to_qkv.weight") for name in control.state_dict())
    for ours, wanted in zip(control(*inputs), before, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def _reader() -> tuple[PromptReader, list[str]]:
    read: list[str] = []

    def encode(prompt: str) -> tuple[Tensor, Tensor]:
        read.append(prompt)
        return torch.full((1, 3, 2), float(len(read))), torch.zeros(1, 2)

    def project(context: Tensor, vector: Tensor) -> Text:
        return Text(ProjectedText(KeysValues(context), KeysValues(context)), vector)

    return PromptReader(encode, project), read


def test_the_negative_prompt_of_a_run_is_read_once() -> None:
    reader, read = _reader()
    for image in range(50):
        reader.read(["blurry", f"picture {image}"])
    assert read.count("blurry") == 1
    assert len(read) == 51


def test_only_the_last_few_prompts_are_kept_and_more_at_once_are_no_problem() -> None:
    reader, read = _reader()
    many = [f"prompt {i % 30}" for i in range(60)]
    texts = reader.read(many)
    assert [int(text.projected.unet.packed[0, 0, 0]) for text in texts] == [1 + i % 30 for i in range(60)]
    assert len(reader._kept) < 10
    reader.read(["prompt 29", "prompt 0"])
    assert read.count("prompt 29") == 1
    assert read.count("prompt 0") == 2
    reader.forget()
    reader.read(["prompt 29"])
    assert read.count("prompt 29") == 2


def test_rows_of_a_batch_are_in_order() -> None:
    reader, _ = _reader()
    a, b = reader.read(["a", "b"])
    told = conditioning([b, a, b], torch.zeros(3, 4, 2, 2))
    assert isinstance(told.context, ProjectedText)
    assert told.context.unet.packed[:, 0, 0].tolist() == [2, 1, 2]
