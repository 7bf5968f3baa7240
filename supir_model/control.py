"""Control encoder (GLVControl, specification section 3): reads the robust latent beside the noisy one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from supir_model.attention import KeysValues, read_text_once
from supir_model.config import ControlConfig, UNetConfig
from supir_model.unet import build_sdxl_unet, embed, encode_down


class ControlEncoder(nn.Module):
    """A full copy of the UNet's encoder and middle block with weights of its own, plus one hint convolution."""

    def __init__(self, config: UNetConfig, control: ControlConfig) -> None:
        super().__init__()
        self.base = build_sdxl_unet(config, control.transformer_depth)
        self.base.up_blocks = nn.ModuleList()  # encoder and middle only
        self.base.conv_norm_out = self.base.conv_act = self.base.conv_out = None
        read_text_once(self.base)
        self.hint = nn.Conv2d(config.latent_channels, config.channels[0], 3, padding=1)
        nn.init.zeros_(self.hint.weight)
        nn.init.zeros_(self.hint.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | KeysValues,
        vector: Tensor,
        control_latent: Tensor,
    ) -> list[Tensor]:
        """One feature per UNet skip, finest first, then the middle block's.

        x: [B, C, h, w] scaled noisy latent; control_latent: [B, C, h, w] from the robust encoder; the rest as in
        ``ControlledUNet``.
        """
        base = self.base
        emb = embed(base, timestep, vector, x.dtype)
        h = torch.add(base.conv_in(x), self.hint(control_latent.to(x.dtype)))
        features = encode_down(base, h, emb, context)
        features.append(base.mid_block(features[-1], emb, encoder_hidden_states=context))
        return features
