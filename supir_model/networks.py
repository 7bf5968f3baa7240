"""The four trained networks of one SUPIR model, as one module with one state dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supir_model.attention import KeysValues, project_text
from supir_model.config import ModelConfig
from supir_model.control import ControlEncoder
from supir_model.text import build_text_encoder
from supir_model.unet import ControlledUNet
from supir_model.vae import RobustVAE


class ProjectedText(NamedTuple):
    """What the cross attentions of the two denoising networks read of B prompts."""

    control: KeysValues
    unet: KeysValues


@dataclass(frozen=True)
class Conditioning:
    """What the denoising networks are told besides the noisy latent.

    context: [B, L, C], or what ``Networks.project`` makes of it; vector: [B, V]; control_latent: [B, C, h, w] from the
    robust encoder.
    """

    context: Tensor | ProjectedText
    vector: Tensor
    control_latent: Tensor


class Networks(nn.Module):
    """VAE with robust encoder, text encoder, control encoder, UNet with connectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = RobustVAE(config.vae)
        self.text = build_text_encoder(config.text)
        self.control = ControlEncoder(config.unet, config.control)
        self.unet = ControlledUNet(config.unet, config.control)

    def forward(self, x: Tensor, timestep: Tensor, control_scale: Tensor, conditioning: Conditioning) -> Tensor:
        """Network output F [B, C, h, w] for a scaled noisy latent x [B, C, h, w] (specification sections 3 to 5)."""
        context, vector = conditioning.context, conditioning.vector
        for_control, for_unet = context if isinstance(context, ProjectedText) else (context, context)
        features = self.control(x, timestep, for_control, vector, conditioning.control_latent)
        out: Tensor = self.unet(x, timestep, for_unet, vector, features, control_scale)
        return out

    def project(self, context: Tensor) -> ProjectedText:
        """What every step and every window reads of context [B, L, C], computed once."""
        return ProjectedText(project_text(self.control.base, context), project_text(self.unet.base, context))


def build_on_meta(config: ModelConfig) -> Networks:
    """The networks without memory behind them, for ``load_state_dict(assign=True)``."""
    with torch.device("meta"):
        networks = Networks(config)
    networks.text.fill_positions()
    return networks
