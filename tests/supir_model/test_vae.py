from __future__ import annotations

import dataclasses

import torch

from supir_model.config import TINY
from supir_model.training.stages import start_from_pca
from supir_model.vae import RobustVAE

SMALL = dataclasses.replace(TINY.vae, channels=(8, 8, 16), norm_groups=4)


def photographs(count: int, size: int) -> torch.Tensor:
    """Smooth random pictures: their pixel blocks have few principal components."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def test_pca_start_reconstructs_before_any_training() -> None:
    torch.manual_seed(0)
    vae = RobustVAE(SMALL)
    images = photographs(8, 32)
    untrained = (vae.decode(vae.encode(images)) - images).square().mean()
    start_from_pca(vae, images)
    started = (vae.decode(vae.encode(images)) - images).square().mean()
    assert started < 5e-3
    assert untrained > 0.1


def test_folding_latent_statistics_changes_latents_but_not_images() -> None:
    torch.manual_seed(0)
    vae = RobustVAE(SMALL)
    images = photographs(8, 32)
    start_from_pca(vae, images)
    before = vae.decode(vae.encode(images))
    mean, logvar = vae.moments(images)
    scale, shift = mean.std(dim=(0, 2, 3)), mean.mean(dim=(0, 2, 3))
    vae.fold_latent_statistics(shift, scale)
    folded, folded_logvar = vae.moments(images)
    assert torch.allclose(folded.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4)
    assert torch.allclose(folded.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3)
    assert torch.allclose(folded_logvar, logvar - 2 * scale.log()[:, None, None], atol=1e-4)
    assert torch.allclose(vae.decode(vae.encode(images)), before, atol=1e-4)


def test_posterior_sample_follows_the_noise() -> None:
    vae = RobustVAE(SMALL)
    images = photographs(2, 16)
    noise = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    mean, logvar = vae.moments(images)
    assert torch.allclose(vae.encode(images, noise), mean + torch.exp(0.5 * logvar) * noise)
    assert torch.equal(vae.encode(images), mean)
