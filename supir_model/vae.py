"""KL autoencoder with a second, degradation-robust encoder (specification section 8).

The robust encoder has the ordinary encoder's architecture and shares ``quant_conv`` with it: it reads a degraded image
and answers with the latent of a clean one.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from torch import Tensor, nn
from torch.nn import functional as F

from supir_model.config import VAEConfig
from supir_model.vae_tiling import WHOLE, VAETiling, run_decoder, run_encoder

LOGVAR_RANGE = (-30.0, 20.0)


class ShortcutEncoder(nn.Module):
    """A convolutional encoder plus a linear path: pixel-unshuffle, then 1x1.

    A small autoencoder starts from the linear (PCA) solution instead of from noise; only the tiny model has it.
    """

    def __init__(self, encoder: nn.Module, factor: int, latent_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.shortcut = nn.Conv2d(3 * factor**2, 2 * latent_channels, 1)
        self.factor = factor

    def forward(self, image: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to moments before ``quant_conv`` [B, 2C, H/f, W/f]."""
        encoded = run_encoder(self.encoder, image, tiling, self.factor)
        return torch.add(encoded, self.shortcut(F.pixel_unshuffle(image, self.factor)))


class RobustVAE(nn.Module):
    """Ordinary encoder, robust encoder, decoder. Latents are scaled: ``latent = config.scale * z``.

    Image sides must be multiples of ``config.factor``. ``tiling`` says in which parts the networks run.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(config.channels),
            up_block_types=("UpDecoderBlock2D",) * len(config.channels),
            block_out_channels=config.channels,
            layers_per_block=config.encoder_resblocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
            scaling_factor=config.scale,
        )
        self.encoder = self._with_shortcut(self.autoencoder.encoder)
        self.robust_encoder = self._with_shortcut(self._new_encoder())
        # the ordinary encoder is registered once, as `encoder`
        del self.autoencoder.encoder
        self.decoder_shortcut = (
            nn.Conv2d(config.latent_channels, 3 * config.factor**2, 1) if config.pixel_shortcut else None
        )

    def _new_encoder(self) -> nn.Module:
        config = self.config
        encoder: nn.Module = Encoder(
            out_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(config.channels),
            block_out_channels=config.channels,
            layers_per_block=config.encoder_resblocks,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
        )
        return encoder

    def _with_shortcut(self, encoder: nn.Module) -> nn.Module:
        if not self.config.pixel_shortcut:
            return encoder
        return ShortcutEncoder(encoder, self.config.factor, self.config.latent_channels)

    def _encoded(self, encoder: nn.Module, image: Tensor, tiling: VAETiling) -> Tensor:
        """Posterior mean and log variance, [B, 2C, h, w]."""
        if isinstance(encoder, ShortcutEncoder):
            encoded = encoder(image, tiling)
        else:
            encoded = run_encoder(encoder, image, tiling, self.config.factor)
        both: Tensor = self.autoencoder.quant_conv(encoded)
        return both

    def moments(self, image: Tensor, tiling: VAETiling = WHOLE) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance [B, C, h, w] of the ordinary encoder, unscaled."""
        mean, logvar = self._encoded(self.encoder, image, tiling).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, image: Tensor, noise: Tensor | None = None, tiling: VAETiling = WHOLE) -> Tensor:
        """Scaled latent of a clean image: the mode, or the sample that unit normal ``noise`` [B, C, h, w] selects."""
        mean, logvar = self.moments(image, tiling)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale * mean

    def encode_robust(self, image: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """Scaled latent (mode) the robust encoder sees behind a degraded image [B, 3, H, W] in [-1, 1]."""
        mean, _ = self._encoded(self.robust_encoder, image, tiling).chunk(2, dim=1)
        return torch.mul(mean, self.config.scale)

    def decode(self, latent: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """Scaled latent [B, C, h, w] to image [B, 3, H, W], about [-1, 1], not clipped."""
        z = self.autoencoder.post_quant_conv(latent / self.config.scale)
        image = run_decoder(self.autoencoder.decoder, z, tiling, self.config.factor)
        if self.decoder_shortcut is not None:
            image = image + F.pixel_shuffle(self.decoder_shortcut(z), self.config.factor)
        return image

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Move per-channel statistics [C] of z into the 1x1 convolutions, so that latents have mean 0 and std 1."""
        channels = self.config.latent_channels
        quant, post = self.autoencoder.quant_conv, self.autoencoder.post_quant_conv
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.bias[:channels] -= mean
        quant.bias[:channels] /= std
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[channels:] -= 2 * std.log()
