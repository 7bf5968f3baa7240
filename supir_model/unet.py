"""SDXL's UNet with twelve (in general: one per skip, middle and upsampler) control connectors.

The weights live in diffusers' own modules, so SDXL checkpoints, LoRA and attention backends of that ecosystem fit; only
the walk through them is ours, because control enters between a skip connection and the block that consumes it
(specification section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from supir_model.attention import KeysValues, read_text_once
from supir_model.config import ControlConfig, UNetConfig
from supir_model.zero_sft import ZeroCrossAttn, ZeroSFT


def build_sdxl_unet(config: UNetConfig, transformer_depth: Sequence[int]) -> UNet2DConditionModel:
    """diffusers' UNet with SDXL's options at any width; the coarsest level always has a middle transformer."""
    levels = range(len(config.channels))
    return UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if transformer_depth[i] else "DownBlock2D" for i in levels),
        up_block_types=tuple("CrossAttnUpBlock2D" if transformer_depth[i] else "UpBlock2D" for i in reversed(levels)),
        block_out_channels=config.channels,
        layers_per_block=config.resblocks,
        transformer_layers_per_block=tuple(max(1, depth) for depth in transformer_depth),
        # diffusers calls the number of heads "attention_head_dim"
        attention_head_dim=tuple(width // config.head_dim or 1 for width in config.channels),
        cross_attention_dim=config.context_dim,
        use_linear_projection=True,
        norm_num_groups=config.norm_groups,
        norm_eps=1e-5,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,  # unused: the vector arrives with its size embeddings already in it
        projection_class_embeddings_input_dim=config.vector_dim,
    )


def embed(net: UNet2DConditionModel, timestep: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Time plus vector embedding [B, 4 * channels[0]]; timestep: [B] int64 table index; vector: [B, vector_dim]."""
    sinusoid = net.time_proj(timestep).to(dtype)
    return torch.add(net.time_embedding(sinusoid), net.add_embedding(vector.to(dtype)))


def encode_down(net: UNet2DConditionModel, h: Tensor, emb: Tensor, context: Tensor | KeysValues) -> list[Tensor]:
    """The encoder half from the output of ``conv_in`` on: every skip connection, finest first, ``h`` included."""
    skips = [h]
    for block in net.down_blocks:
        attentions = getattr(block, "attentions", None)
        for i, resnet in enumerate(block.resnets):
            h = resnet(h, emb)
            if attentions is not None:
                h = attentions[i](h, encoder_hidden_states=context, return_dict=False)[0]
            skips.append(h)
        for downsample in block.downsamplers or ():
            h = downsample(h)
            skips.append(h)
    return skips


class ControlledUNet(nn.Module):
    """SDXL UNet whose decoder is steered by control features.

    ``connectors`` are in order of execution: middle, then per decoder block its ZeroSFTs and, where the configuration
    has one, the ZeroCrossAttn before its upsampler. The released file lists them in reverse.
    """

    def __init__(self, config: UNetConfig, control: ControlConfig) -> None:
        super().__init__()
        self.config = config
        self.base = build_sdxl_unet(config, config.transformer_depth)
        read_text_once(self.base)
        self.connectors = nn.ModuleList(_connectors(config, control))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | KeysValues,
        vector: Tensor,
        control: Sequence[Tensor],
        control_scale: Tensor,
    ) -> Tensor:
        """Network output F [B, C, h, w].

        x: [B, C, h, w] scaled noisy latent; timestep: [B] int64; context: [B, L, context_dim], or what
        ``project_text`` makes of it for ``base``; vector: [B, vector_dim]; control: features of ``ControlEncoder``,
        skips then middle; control_scale: [B, 1, 1, 1].
        """
        base = self.base
        emb = embed(base, timestep, vector, x.dtype)
        skips = encode_down(base, base.conv_in(x), emb, context)
        h = base.mid_block(skips[-1], emb, encoder_hidden_states=context)

        connectors = iter(self.connectors)
        h = next(connectors)(control[-1], h, None, control_scale)
        index = len(skips)
        for block in base.up_blocks:
            attentions = getattr(block, "attentions", None)
            for i, resnet in enumerate(block.resnets):
                index -= 1  # control feature i always meets skip i
                h = resnet(next(connectors)(control[index], skips[index], h, control_scale), emb)
                if attentions is not None:
                    h = attentions[i](h, encoder_hidden_states=context, return_dict=False)[0]
            if block.upsamplers is not None:
                if index in self._attended:
                    h = next(connectors)(control[index], h, control_scale)
                h = block.upsamplers[0](h)
        out: Tensor = base.conv_out(base.conv_act(base.conv_norm_out(h)))
        return out

    @property
    def _attended(self) -> set[int]:
        """Skip indices after whose block a ZeroCrossAttn follows."""
        per_level = self.config.resblocks + 1
        executed = list(self.connectors)
        found, skip = set(), per_level * len(self.config.channels)
        for connector in executed[1:]:
            if isinstance(connector, ZeroSFT):
                skip -= 1
            else:
                found.add(skip)
        return found


def skip_channels(config: UNetConfig) -> list[int]:
    """Width of every skip connection, in the order ``encode_down`` returns them."""
    widths = [config.channels[0]]
    for level, width in enumerate(config.channels):
        widths += [width] * config.resblocks
        if level < len(config.channels) - 1:
            widths.append(width)
    return widths


def _connectors(config: UNetConfig, control: ControlConfig) -> list[nn.Module]:
    skips = skip_channels(config)
    middle = config.channels[-1]
    connectors: list[nn.Module] = [ZeroSFT(middle, middle, 0, control.hidden, control.norm_groups)]
    decoder = middle
    for level in reversed(range(len(config.channels))):
        for _ in range(config.resblocks + 1):
            skip = skips.pop()  # control features have the widths of the skips they meet
            connectors.append(ZeroSFT(skip, skip, decoder, control.hidden, control.norm_groups))
            decoder = config.channels[level]
        if level > 0 and level in control.attention_levels:
            connectors.append(ZeroCrossAttn(decoder, skip, control.attention_head_dim, control.norm_groups))
    return connectors
