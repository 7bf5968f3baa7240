"""What each training stage learns: which parameters, which loss.

A stage turns a batch of clean crops into a loss; the loop around it (``loop.py``) is the same for all.
Stages follow the paper: autoencoder, robust encoder, then diffusion. The paper trains prior and control one after the
other with the prior frozen; ``joint`` trains both together, which a small prior needs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from supir_model.caption import describe
from supir_model.denoiser import Origin, denoise, sigma_table
from supir_model.networks import Conditioning, Networks
from supir_model.training.degradations import Degradation, degrade
from supir_model.vae import RobustVAE, ShortcutEncoder

DiffusionPart = Literal["prior", "control", "joint"]


class Stage(Protocol):
    """One stage of the training."""

    def modules(self) -> Iterator[nn.Module]:
        """The modules this stage trains; everything else stays frozen."""
        ...

    def loss(self, clean: Tensor, progress: float, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of clean crops [B, 3, H, W] in [-1, 1]; progress: [0, 1] of the stage."""
        ...

    def finish(self, clean: Tensor) -> None:
        """Called once after the last step with the averaged weights in place and a large batch of clean crops."""
        ...


def _image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def _gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([F.l1_loss(p, q) for p, q in zip(_image_gradients(a), _image_gradients(b), strict=True)]).mean()


def _spectrum_l1(a: Tensor, b: Tensor) -> Tensor:
    return torch.fft.rfft2(a - b, norm="ortho").abs().mean()  # type: ignore[no-any-return]


@torch.no_grad()
def start_from_pca(vae: RobustVAE, clean: Tensor) -> None:
    """Set the linear path of a shortcut VAE to the principal components of pixel blocks, and everything else to add 0.

    clean: [B, 3, H, W] in [-1, 1], enough blocks for a covariance of 3 f^2 values.
    """
    encoder, decoder = vae.encoder, vae.decoder_shortcut
    if not isinstance(encoder, ShortcutEncoder) or decoder is None:
        return
    channels = vae.config.latent_channels
    blocks = F.pixel_unshuffle(clean, vae.config.factor).permute(1, 0, 2, 3).flatten(1)
    mean = blocks.mean(dim=1)
    components = torch.linalg.eigh(torch.cov(blocks)).eigenvectors.flip(1)[:, :channels]  # [3 f^2, C]
    for conv in (encoder.shortcut, decoder, encoder.encoder.conv_out, vae.autoencoder.decoder.conv_out):
        for parameter in conv.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)
    encoder.shortcut.weight[:channels] = components.T[:, :, None, None]
    encoder.shortcut.bias[:channels] = -components.T @ mean  # type: ignore[index]
    encoder.shortcut.bias[channels:] = -8.0  # type: ignore[index]
    decoder.weight.copy_(components[:, :, None, None])
    decoder.bias.copy_(mean)  # type: ignore[union-attr]
    for conv, size in ((vae.autoencoder.quant_conv, 2 * channels), (vae.autoencoder.post_quant_conv, channels)):
        conv.weight.copy_(torch.eye(size)[:, :, None, None])
        conv.bias.zero_()


@dataclass(frozen=True)
class AutoencoderStage:
    """Stage 0: the VAE on clean photographs; L1, gradients, spectrum and a light KL."""

    networks: Networks

    def modules(self) -> Iterator[nn.Module]:
        """Encoder and decoder."""
        vae = self.networks.vae
        yield vae.encoder
        yield vae.autoencoder
        if vae.decoder_shortcut is not None:
            yield vae.decoder_shortcut

    def loss(self, clean: Tensor, progress: float, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Reconstruction of sampled latents."""
        vae = self.networks.vae
        mean, logvar = vae.moments(clean)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        decoded = vae.decode(vae.config.scale * (mean + torch.exp(0.5 * logvar) * noise)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        l1 = F.l1_loss(decoded, clean)
        loss = l1 + 0.25 * _gradient_l1(decoded, clean) + 0.05 * _spectrum_l1(decoded, clean) + 1e-6 * kl
        return loss, {"psnr": _psnr(decoded, clean), "kl": kl.item()}

    def finish(self, clean: Tensor) -> None:
        """Give the latents unit variance and start the robust encoder as a copy of the ordinary one."""
        vae = self.networks.vae
        if vae.config.pixel_shortcut:
            with torch.no_grad():
                mean, _ = vae.moments(clean)
            vae.fold_latent_statistics(mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3)))
        vae.robust_encoder.load_state_dict(copy.deepcopy(vae.encoder.state_dict()))


@dataclass(frozen=True)
class RobustEncoderStage:
    """Stage 1: the robust encoder on degraded photographs, decoder frozen (SUPIR, equation 1)."""

    networks: Networks
    mix: Degradation

    def modules(self) -> Iterator[nn.Module]:
        """The robust encoder."""
        yield self.networks.vae.robust_encoder

    def loss(self, clean: Tensor, progress: float, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """|D(E_dr(LQ)) - D(E_dr(GT))|^2, L1 to the clean image, and a light L1 to the clean latent."""
        vae = self.networks.vae
        pair = degrade(clean, _curriculum(self.mix, progress), generator)
        latent = vae.encode_robust(pair.lq)
        decoded = vae.decode(latent).float()
        with torch.no_grad():
            clean_latent = vae.encode(pair.target)
            clean_decoded = vae.decode(vae.encode_robust(pair.target)).float()
        loss = (
            F.mse_loss(decoded, clean_decoded)
            + F.l1_loss(decoded, pair.target)
            + 0.25 * _gradient_l1(decoded, pair.target)
            + 0.1 * F.l1_loss(latent, clean_latent)
        )
        return loss, {"psnr": _psnr(decoded, pair.target), "psnr_input": _psnr(pair.lq, pair.target)}

    def finish(self, clean: Tensor) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def pixel_energy(vae: RobustVAE, clean: Tensor) -> Tensor:
    """How much of an image each latent channel carries, [C], mean 1: squared change of the image without the channel.

    Latents of unit variance hide that one channel may hold most of the picture. clean: [B, 3, H, W] in [-1, 1].
    """
    latent = vae.encode(clean)
    whole = vae.decode(latent)
    energy = []
    for channel in range(latent.shape[1]):
        without = latent.clone()
        without[:, channel] = latent[:, channel].mean()
        energy.append((vae.decode(without) - whole).square().mean())
    stacked = torch.stack(energy)
    return stacked / stacked.mean()


@dataclass(frozen=True)
class DiffusionStage:
    """Stages 2 and 3: text-conditioned prior, control adaptor, or both together.

    channel_weight: [C], mean 1, what an error in each latent channel costs. negative: share of samples whose target is
    the degraded image under the negative prompt (SUPIR, section 3.3). drop_text: share without a caption.
    max_weight: most that an error of the denoised latent may cost at small noise levels, where 1 is its cost at large
    ones; in terms of min-SNR (Hang et al. 2023) snr + 1 is clamped, not snr, because with control even the largest
    noise level leaves a picture to be predicted.
    """

    networks: Networks
    mix: Degradation
    part: DiffusionPart
    channel_weight: Tensor
    drop_text: float = 0.1
    negative: float = 0.15
    max_weight: float = 6.0

    def modules(self) -> Iterator[nn.Module]:
        """Prior: UNet and text. Control: control encoder and connectors. Joint: all of them."""
        networks = self.networks
        if self.part in ("prior", "joint"):
            yield networks.unet.base
            yield networks.text
        if self.part in ("control", "joint"):
            yield networks.control
            yield networks.unet.connectors

    def loss(self, clean: Tensor, progress: float, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Weighted error of the denoised latent on a uniformly drawn noise level."""
        networks, config = self.networks, self.networks.config
        device, size = clean.device, clean.shape[0]
        pair = degrade(clean, _curriculum(self.mix, progress), generator)
        uniform = torch.rand((3, size), generator=generator, device=generator.device).to(device)
        negative = uniform[0] < self.negative
        with torch.no_grad():
            target = torch.where(negative[:, None, None, None], pair.lq, pair.target)
            latent = networks.vae.encode(target)
            control_latent = networks.vae.encode_robust(pair.lq)
        captions = describe(target)
        prompts = [
            config.negative_prompt if bad else ("" if dropped else caption + config.positive_prompt)
            for caption, bad, dropped in zip(captions, negative, uniform[1] < self.drop_text, strict=True)
        ]
        context, vector = networks.text(prompts)

        q = sigma_table().to(device)[(uniform[2] * 1000).long()]  # [B]
        spread = q[:, None, None, None]
        noise = torch.randn(latent.shape, generator=generator, device=generator.device).to(latent)
        conditioning = Conditioning(context, vector, control_latent)

        def network(x_in: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = networks(x_in, timestep, scale, conditioning)
            return out

        scale = torch.full((size,), 0.0 if self.part == "prior" else 1.0, device=device)
        origin = Origin(control_latent, config.residual_std)
        denoised = denoise(network, config.prediction, latent + spread * noise, q, scale, origin)
        channels = self.channel_weight[None, :, None, None]
        weight = (1 + 1 / spread**2).clamp(max=self.max_weight)
        loss = (weight * channels * (denoised - latent).square()).mean()
        return loss, {
            "error": (channels * (denoised - latent).square()).mean().item(),
            "error_control": (channels * (control_latent - latent).square()).mean().item(),
        }

    def finish(self, clean: Tensor) -> None:
        """Nothing is left to do."""


def _curriculum(mix: Degradation, progress: float) -> Degradation:
    """Mild at first; full strength from 40% of the stage on."""
    return replace(mix, strength=mix.strength * min(1.0, 0.3 + progress / 0.4 * 0.7))


def _psnr(a: Tensor, b: Tensor) -> float:
    """Mean PSNR in dB of images in [-1, 1]."""
    mse = (a.detach().clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * mse.clamp(min=1e-10).log10()).mean())
