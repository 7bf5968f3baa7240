"""What each training stage learns: which parameters, which loss.

A stage turns a batch of clean crops into a loss; the loop around it (``loop.py``) is the same for all.
Stages follow the paper: autoencoder, robust encoder, then diffusion. The paper trains prior and control one after the
other with the prior frozen; ``joint`` trains both together, which a small prior needs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from supir_model.caption import describe
from supir_model.denoiser import Origin, denoise, sigma_table
from supir_model.networks import Conditioning, Networks
from supir_model.training.datasets import Batch
from supir_model.training.degradations import degrade_by_strength
from supir_model.training.recipe import DiffusionRecipe, RobustEncoderRecipe, VAERecipe
from supir_model.vae import RobustVAE, ShortcutEncoder

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Stage(Protocol):
    """One stage of the training."""

    def modules(self) -> Iterator[nn.Module]:
        """The modules this stage trains; everything else stays frozen."""
        ...

    def loss(self, batch: Batch, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of a batch; all that is random is drawn from the generator."""
        ...

    def pictures(self, batch: Batch, generator: Generator) -> list[Tensor]:
        """What the stage makes of a batch, for people: columns [B, 3, H, W], the target last."""
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


def _structure(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM of images in [-1, 1]."""
    similarity = structural_similarity_index_measure(a, b, data_range=2.0)
    assert isinstance(similarity, Tensor)  # it returns more only when asked to
    return 1 - similarity


def _gradient_dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean gradient magnitude similarity (Xue et al. 2014, equation 4) of images [B, 3, H, W] in [-1, 1], and GMSD.

    The mean is one over windows of 1 and 5 pixels, in which magnitudes are root mean squares. It asks for contours and
    texture as strong as the target's, near where the target has them, and not, as a mean error does, for none where
    their exact place is unknown. GMSD, the deviation of that similarity at half size, asks for it everywhere alike.
    """
    constant = 170 / 127.5**2

    def energy(x: Tensor) -> Tensor:
        horizontal, vertical = _image_gradients(x.mean(dim=1, keepdim=True))
        return horizontal[:, :, 1:].square() + vertical[..., 1:].square() + 1e-6

    def similarity(p: Tensor, q: Tensor) -> Tensor:
        return (2 * (p * q).sqrt() + constant) / (p + q + constant)

    p, q = energy(a), energy(b)
    means = [
        similarity(*(F.avg_pool2d(one, window, stride=(window + 1) // 2) for one in (p, q))).mean() for window in (1, 5)
    ]
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3, device=a.device).expand(1, 1, 3, 3) / 3

    def halved(x: Tensor) -> Tensor:
        luma = F.avg_pool2d(torch.einsum("bchw,c->bhw", x, torch.tensor(_LUMA, device=x.device))[:, None], 2)
        across, down = F.conv2d(luma, prewitt), F.conv2d(luma, prewitt.transpose(2, 3))
        return across.square() + down.square() + 1e-6

    deviation = similarity(halved(a), halved(b)).std(dim=(1, 2, 3), correction=0).mean()
    return 1 - torch.stack(means).mean() + deviation


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
    recipe: VAERecipe

    def modules(self) -> Iterator[nn.Module]:
        """Encoder and decoder."""
        vae = self.networks.vae
        yield vae.encoder
        yield vae.autoencoder
        if vae.decoder_shortcut is not None:
            yield vae.decoder_shortcut

    def loss(self, batch: Batch, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Reconstruction of sampled latents."""
        vae, recipe, clean = self.networks.vae, self.recipe, batch.clean
        mean, logvar = vae.moments(clean)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        decoded = vae.decode(vae.config.scale * (mean + torch.exp(0.5 * logvar) * noise)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        l1 = F.l1_loss(decoded, clean)
        loss = (
            l1
            + recipe.gradient * _gradient_l1(decoded, clean)
            + recipe.spectrum * _spectrum_l1(decoded, clean)
            + recipe.kl * kl
        )
        return loss, {"psnr": _psnr(decoded, clean), "kl": kl.item()}

    def pictures(self, batch: Batch, generator: Generator) -> list[Tensor]:
        """Decoded, and the original."""
        vae = self.networks.vae
        return [vae.decode(vae.encode(batch.clean)).float(), batch.clean]

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
    """Stage 1: the robust encoder on degraded photographs, decoder frozen (SUPIR, equation 1).

    channel_weight: [C], mean 1, what an error in each latent channel costs.
    """

    networks: Networks
    recipe: RobustEncoderRecipe
    channel_weight: Tensor

    def modules(self) -> Iterator[nn.Module]:
        """The robust encoder."""
        yield self.networks.vae.robust_encoder

    def loss(self, batch: Batch, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """On images |D(E_dr(LQ)) - D(E_dr(GT))|^2 and L1 to the clean image; on latents a distance to the clean one."""
        vae, recipe = self.networks.vae, self.recipe
        pair = degrade_by_strength(batch.clean, recipe.degradation.degradation(), generator)
        latent = vae.encode_robust(pair.lq).float()
        with torch.no_grad():
            clean_latent = vae.encode(pair.target).float()
        error = (latent - clean_latent).square().mean(dim=(0, 2, 3))
        weighted = (self.channel_weight * error).mean()
        loss = recipe.latent * (weighted + 0.1 * F.l1_loss(latent, clean_latent))
        metrics = {"error": weighted.item()}
        if recipe.image > 0:
            decoded = vae.decode(latent).float()
            with torch.no_grad():
                clean_decoded = vae.decode(vae.encode_robust(pair.target)).float()
            loss = loss + recipe.image * (
                F.mse_loss(decoded, clean_decoded)
                + F.l1_loss(decoded, pair.target)
                + 0.25 * _gradient_l1(decoded, pair.target)
            )
            if recipe.structure > 0:
                loss = loss + recipe.structure * _structure(decoded, pair.target)
            metrics |= {"psnr": _psnr(decoded, pair.target), "psnr_input": _psnr(pair.lq, pair.target)}
        return loss, metrics

    def pictures(self, batch: Batch, generator: Generator) -> list[Tensor]:
        """Degraded, as the robust encoder sees it, and the original."""
        vae = self.networks.vae
        pair = degrade_by_strength(batch.clean, self.recipe.degradation.degradation(), generator)
        return [pair.lq, vae.decode(vae.encode_robust(pair.lq)).float(), pair.target]

    def finish(self, clean: Tensor) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def channel_energy(vae: RobustVAE, clean: Tensor) -> Tensor:
    """How much of an image each latent channel carries, [C], mean 1; half by its pixels, half by their differences.

    Measured as the squared change of the image without the channel. Latents of unit variance hide that one channel may
    hold most of the picture, pixels alone that the others hold its detail. clean: [B, 3, H, W] in [-1, 1].
    """
    latent = vae.encode(clean)
    whole = vae.decode(latent)
    pixels, differences = [], []
    for channel in range(latent.shape[1]):
        without = latent.clone()
        without[:, channel] = latent[:, channel].mean()
        change = vae.decode(without) - whole
        pixels.append(change.square().mean())
        differences.append(torch.stack([d.square().mean() for d in _image_gradients(change)]).mean())
    shares = [torch.stack(energy) / torch.stack(energy).mean() for energy in (pixels, differences)]
    return (shares[0] + shares[1]) / 2


@dataclass(frozen=True)
class DiffusionStage:
    """Stages 2 and 3: text-conditioned prior, control adaptor, or both together.

    channel_weight: [C], mean 1, what an error in each latent channel costs. Of the recipe: negative is the share of
    samples whose target is the degraded image under the negative prompt (SUPIR, section 3.3), drop_text the share
    without a caption; max_weight is the most that an error of the denoised latent may cost at small noise levels, where
    1 is its cost at large ones; in terms of min-SNR (Hang et al. 2023) snr + 1 is clamped, not snr, because with
    control even the largest noise level leaves a picture to be predicted.

    image is the weight of the L1 loss of decoded estimates at noise levels below 1, structure that of 1 - SSIM,
    contours that of a loss on the strength of their gradients. own is the share of samples with a noise level below 1
    whose noise lies, as it does when sampling, on an estimate of the model itself from a larger level, pulled to the
    control latent, instead of on the clean latent (backward simulation; Yin et al. 2024, "Improved Distribution
    Matching Distillation", section 4.5); where images are compared, an error of their latents does not count.
    """

    networks: Networks
    recipe: DiffusionRecipe
    channel_weight: Tensor

    def modules(self) -> Iterator[nn.Module]:
        """Prior: UNet and text. Control: control encoder and connectors. Joint: all of them."""
        networks = self.networks
        if self.recipe.stage in ("prior", "joint"):
            yield networks.unet.base
            yield networks.text
        if self.recipe.stage in ("control", "joint"):
            yield networks.control
            yield networks.unet.connectors

    def loss(self, batch: Batch, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Weighted error of the denoised latent on a uniformly drawn noise level."""
        recipe, size, device = self.recipe, len(batch.captions), batch.clean.device
        pair = degrade_by_strength(batch.clean, recipe.degradation.degradation(), generator)
        uniform = torch.rand((6, size), generator=generator, device=generator.device).to(device)
        negative = uniform[0] < recipe.negative
        with torch.no_grad():
            target = torch.where(negative[:, None, None, None], pair.lq, pair.target)
            latent = self.networks.vae.encode(target).float()
        prompts = [
            self.networks.config.negative_prompt if bad else ("" if dropped else prompt)
            for prompt, bad, dropped in zip(
                self._prompts(target, batch.captions), negative, uniform[1] < recipe.drop_text, strict=True
            )
        ]
        table = sigma_table().to(device)
        own = uniform[3] < recipe.own
        index = (uniform[2] * torch.where(own, int((table < 1).sum()), len(table))).long()
        q = table[index]  # [B]
        origin = latent
        if recipe.own > 0:
            larger = table[index + (uniform[4] * (len(table) - index)).long()]
            with torch.no_grad():
                estimate, center = self._denoise(pair.lq, latent, prompts, larger, generator)
                pull = (larger / table[-1]) ** (0.25 + 0.75 * uniform[5])  # taus from 0.25 to 1
                estimate = estimate.lerp(center, pull[:, None, None, None])
            origin = torch.where(own[:, None, None, None], estimate, latent)
        denoised, control_latent = self._denoise(pair.lq, origin, prompts, q, generator)
        channels = self.channel_weight[None, :, None, None]
        weight = (1 + 1 / q**2).clamp(max=recipe.max_weight)[:, None, None, None]
        errors = weight * channels * (denoised - latent).square()
        loss = errors.mean()
        metrics = {
            "error": (channels * (denoised - latent).square()).mean().item(),
            "error_control": (channels * (control_latent - latent).square()).mean().item(),
        }
        if recipe.image > 0 and bool((low := q < 1).any()):
            decoded, wanted = self.networks.vae.decode(denoised[low]).float(), target[low]
            l1, contours = F.l1_loss(decoded, wanted), _gradient_dissimilarity(decoded, wanted)
            # a mean error of latents, beside it, would ask for the smooth mean again
            images = recipe.image * l1 + recipe.structure * _structure(decoded, wanted) + recipe.contours * contours
            loss = errors[~own].sum() / errors.numel() + images
            metrics |= {"l1": l1.item(), "contours": contours.item()}
        return loss, metrics

    def pictures(self, batch: Batch, generator: Generator) -> list[Tensor]:
        """Degraded, stage 1, denoised from the largest noise and from noise as strong as the picture, the original."""
        vae = self.networks.vae
        pair = degrade_by_strength(batch.clean, self.recipe.degradation.degradation(), generator)
        latent = vae.encode(pair.target).float()
        prompts = self._prompts(pair.target, batch.captions)
        columns = [pair.lq, vae.decode(vae.encode_robust(pair.lq)).float()]
        for q in (sigma_table()[-1], torch.ones(())):
            levels = q.to(latent).expand(len(prompts))
            denoised, _ = self._denoise(pair.lq, latent, prompts, levels, generator)
            columns.append(vae.decode(denoised).float())
        return [*columns, pair.target]

    def _prompts(self, target: Tensor, captions: Sequence[str]) -> list[str]:
        """What a photograph shows, as far as someone wrote it down, what it looks like, and the positive suffix."""
        suffix = self.networks.config.positive_prompt
        return [
            (f"{caption}, {look}" if caption else look) + suffix
            for caption, look in zip(captions, describe(target), strict=True)
        ]

    def _denoise(
        self, lq: Tensor, latent: Tensor, prompts: Sequence[str], q: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Latents denoised from noise levels q [B] under the control of degraded images, and the control latent."""
        networks, config = self.networks, self.networks.config
        with torch.no_grad():
            control_latent = networks.vae.encode_robust(lq).float()
        context, vector = networks.text(prompts)
        noise = torch.randn(latent.shape, generator=generator, device=generator.device).to(latent)
        conditioning = Conditioning(context, vector, control_latent)

        def network(x_in: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = networks(x_in, timestep, scale, conditioning)
            return out

        scale = torch.full_like(q, 0.0 if self.recipe.stage == "prior" else 1.0)
        origin = Origin(control_latent, config.residual_std)
        noisy = latent + q[:, None, None, None] * noise
        return denoise(network, config.prediction, noisy, q, scale, origin), control_latent

    def finish(self, clean: Tensor) -> None:
        """Nothing is left to do."""


def _psnr(a: Tensor, b: Tensor) -> float:
    """Mean PSNR in dB of images in [-1, 1]."""
    mse = (a.detach().clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * mse.clamp(min=1e-10).log10()).mean())
