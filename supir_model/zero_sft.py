"""The two connectors that bring control features into the UNet (specification section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ZeroSFT(nn.Module):
    """Spatial feature transform with zero-initialized inputs (SUPIR, figure 3).

    ``control_scale`` 1 is the trained model, 0 gives the UNet's own concatenation back, values between and beyond
    interpolate and extrapolate.
    """

    def __init__(
        self, control_channels: int, skip_channels: int, decoder_channels: int, hidden: int, groups: int
    ) -> None:
        super().__init__()
        width = skip_channels + decoder_channels
        self.norm = nn.GroupNorm(groups, width, eps=1e-5)
        self.shared = nn.Conv2d(control_channels, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, width, 3, padding=1)
        self.beta = nn.Conv2d(hidden, width, 3, padding=1)
        self.zero_conv = nn.Conv2d(control_channels, skip_channels, 1)
        for conv in (self.gamma, self.beta, self.zero_conv):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, control: Tensor, skip: Tensor, decoder: Tensor | None, control_scale: Tensor) -> Tensor:
        """Modulated features [B, decoder + skip, h, w], the decoder's part first.

        control: [B, control, h, w]; skip: [B, skip, h, w]; decoder: [B, decoder, h, w] or None (after the middle
        block); control_scale: [B, 1, 1, 1].
        """
        raw = skip if decoder is None else torch.cat([decoder, skip], dim=1)
        lifted = skip + self.zero_conv(control)
        features = lifted if decoder is None else torch.cat([decoder, lifted], dim=1)
        hidden = F.silu(self.shared(control))
        modulated = self.norm(features) * (1 + self.gamma(hidden)) + self.beta(hidden)
        return torch.lerp(raw, modulated, control_scale.to(raw.dtype))


class ZeroCrossAttn(nn.Module):
    """Attention from UNet features to control features; every pixel is a token, no positional encoding."""

    def __init__(self, query_channels: int, control_channels: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.heads = query_channels // head_dim
        self.norm_query = nn.GroupNorm(groups, query_channels, eps=1e-5)
        self.norm_control = nn.GroupNorm(groups, control_channels, eps=1e-5)
        self.to_q = nn.Linear(query_channels, query_channels, bias=False)
        self.to_k = nn.Linear(control_channels, query_channels, bias=False)
        self.to_v = nn.Linear(control_channels, query_channels, bias=False)
        self.to_out = nn.Linear(query_channels, query_channels)

    def forward(self, control: Tensor, features: Tensor, control_scale: Tensor) -> Tensor:
        """features [B, query, h, w] + control_scale [B, 1, 1, 1] * attention over control [B, control, h, w]."""
        query = self.norm_query(features).flatten(2).transpose(1, 2)  # [B, h*w, C]
        context = self.norm_control(control).flatten(2).transpose(1, 2)

        def heads(tokens: Tensor) -> Tensor:
            batch, length, _ = tokens.shape
            return tokens.view(batch, length, self.heads, -1).transpose(1, 2)  # [B, heads, h*w, head_dim]

        attended = F.scaled_dot_product_attention(
            heads(self.to_q(query)), heads(self.to_k(context)), heads(self.to_v(context))
        )
        tokens = self.to_out(attended.transpose(1, 2).flatten(2))  # [B, h*w, C]
        out = tokens.transpose(1, 2).reshape(features.shape)
        return torch.add(features, control_scale.to(out.dtype) * out)
