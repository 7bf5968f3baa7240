from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from supir_model import weights
from supir_model.checkpoint_keys import IGNORED, from_released, origin, to_released
from supir_model.config import TINY, V0Q, ControlConfig, ModelConfig, TextConfig, TowerConfig, UNetConfig, VAEConfig
from supir_model.errors import WeightsError
from supir_model.networks import Networks

# other depths, widths and level counts than the release has
SMALL = replace(
    V0Q,
    vae=VAEConfig((8, 16, 16), 1, 4, 8, mid_attention=True, scale=0.13025),
    unet=UNetConfig(4, (16, 16, 32, 32), 1, (0, 1, 0, 2), 16, context_dim=20, vector_dim=24, norm_groups=8),
    control=ControlConfig((0, 1, 0, 1), hidden=8, norm_groups=8, attention_head_dim=16, attention_levels=(3, 2, 1)),
    text=TextConfig("sdxl", 8, (TowerConfig(8, 2, 2), TowerConfig(12, 3, 2, projection=10)), 32, size_embedding=2),
)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = Networks(SMALL).state_dict()
    return found


def test_there_and_back_again(state: dict[str, torch.Tensor]) -> None:
    released = to_released(state, SMALL)
    again = from_released(released, state, SMALL)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_no_two_weights_share_a_place(state: dict[str, torch.Tensor]) -> None:
    places = [origin(key, SMALL) for key in state]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("ours", "released"),
    [
        ("unet.connectors.0.norm.weight", "model.diffusion_model.project_modules.11.param_free_norm.weight"),
        ("unet.connectors.4.to_out.bias", "model.diffusion_model.project_modules.7.attn.to_out.0.bias"),
        ("unet.connectors.11.gamma.weight", "model.diffusion_model.project_modules.0.zero_mul.weight"),
        ("unet.base.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
        ("unet.base.down_blocks.1.downsamplers.0.conv.bias", "model.diffusion_model.input_blocks.6.0.op.bias"),
        ("unet.base.up_blocks.1.upsamplers.0.conv.bias", "model.diffusion_model.output_blocks.5.2.conv.bias"),
        ("unet.base.up_blocks.2.resnets.1.norm2.bias", "model.diffusion_model.output_blocks.7.0.out_layers.0.bias"),
        ("control.base.mid_block.resnets.1.norm1.weight", "model.control_model.middle_block.2.in_layers.0.weight"),
        ("control.hint.weight", "model.control_model.input_hint_block.0.weight"),
        ("vae.robust_encoder.conv_norm_out.bias", "first_stage_model.denoise_encoder.norm_out.bias"),
        ("vae.encoder.mid_block.resnets.1.conv1.bias", "first_stage_model.encoder.mid.block_2.conv1.bias"),
        (
            "vae.autoencoder.decoder.up_blocks.0.resnets.2.conv1.bias",
            "first_stage_model.decoder.up.3.block.2.conv1.bias",
        ),
        ("text.bigg.text_projection.weight", "conditioner.embedders.1.model.text_projection"),
    ],
)
def test_places_in_the_released_files(ours: str, released: str) -> None:
    assert origin(ours, V0Q).key == released


def test_ignored_keys_are_dropped_and_unknown_ones_kept_for_the_check(state: dict[str, torch.Tensor]) -> None:
    released = to_released(state, SMALL)
    released |= {key: torch.zeros(1) for key in IGNORED}
    assert from_released(released, state, SMALL).keys() == state.keys()

    released["model.diffusion_model.surprise.weight"] = torch.zeros(1)
    del released["model.control_model.input_hint_block.0.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: control\.hint\.bias.*1 unexpected: model\.diffus"):
        weights.check(state, from_released(released, state, SMALL), "some.safetensors")


def test_linear_attention_weights_of_a_converted_vae_are_taken_as_they_are(state: dict[str, torch.Tensor]) -> None:
    released = to_released(state, SMALL)
    key = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert released[key].ndim == 4
    released[key] = released[key][:, :, 0, 0]
    ours = "vae.autoencoder.decoder.mid_block.attentions.0.to_q.weight"
    assert torch.equal(from_released(released, state, SMALL)[ours], state[ours])


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("vae.encoder.shortcut.weight", TINY),  # what only the tiny model has
        ("text.tower.final_layer_norm.weight", TINY),
        ("unet.base.surprise.weight", V0Q),
        ("elsewhere.weight", V0Q),
    ],
)
def test_a_weight_without_a_place_is_named(key: str, config: ModelConfig) -> None:
    with pytest.raises(WeightsError, match=f"'{key}'.*no place"):
        origin(key, config)
