"""What the VAE alone says of an image: what is behind its degradation (specification section 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from supir_model.config import ModelConfig, Precision
from supir_model.errors import RequestError
from supir_model.loading import FORMATS, load_vae
from supir_model.placement import to_device
from supir_model.vae import RobustVAE
from supir_model.vae_tiling import WHOLE, VAETiling


class FirstStage:
    """The robust encoder and the decoder: what is behind a degraded image. Captions are written from it.

    precision: number format inside the VAE; float16 means bfloat16 here, as the VAE overflows in float16.
    """

    def __init__(self, vae: RobustVAE, config: ModelConfig, device: torch.device, precision: Precision) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.config = config
        self.device = device
        self._dtype = FORMATS[precision].conditioner

    @classmethod
    def load(cls, source: str | Path = "tiny", device: str | None = None, precision: Precision = "float32") -> Self:
        """Load nothing but the VAE of ``tiny`` or of a converted model's folder. Raises WeightsError."""
        target = device_of(device)
        vae, config = load_vae(source, target, precision)
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(vae, config, target, precision)

    @torch.inference_mode()
    def see(self, image: Tensor) -> Tensor:
        """[3, H, W] to [3, H, W], both in [-1, 1]."""
        decoded = self.decode(self.encode_robust(self.pad(image)))
        return decoded[0, :, : image.shape[1], : image.shape[2]].clamp(-1, 1)

    @torch.inference_mode()
    def encode_decode(self, image: Tensor) -> Tensor:
        """What the ordinary encoder and the decoder keep of a clean image: no restoration can come closer."""
        padded = self.pad(image)
        with autocast(self.device, self._dtype):
            decoded = self.vae.decode(self.vae.encode(padded)).float()
        return decoded[0, :, : image.shape[1], : image.shape[2]].clamp(-1, 1)

    def encode_robust(self, image: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """``RobustVAE.encode_robust`` in this precision, float32 out; so are the next two."""
        with autocast(self.device, self._dtype):
            return self.vae.encode_robust(image, tiling).float()

    def encode(self, image: Tensor, noise: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """``RobustVAE.encode``."""
        with autocast(self.device, self._dtype):
            return self.vae.encode(image, noise, tiling).float()

    def decode(self, latent: Tensor, tiling: VAETiling = WHOLE) -> Tensor:
        """``RobustVAE.decode``."""
        with autocast(self.device, self._dtype):
            return self.vae.decode(latent, tiling).float()

    def pad(self, image: Tensor) -> Tensor:
        """[1, 3, H', W'] on the device, sides padded right and bottom to multiples of the networks' alignment."""
        if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) == 0:
            raise RequestError(f"image must be [3, H, W] with H, W >= 1, got {list(image.shape)}")
        height, width = image.shape[1:]
        alignment = self.config.alignment
        bottom, right = -height % alignment, -width % alignment
        batch = to_device(image[None].float(), self.device)
        padded = F.pad(batch, (0, right, 0, bottom), mode="replicate")
        return padded.contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Run networks in this number format; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def device_of(name: str | None) -> torch.device:
    """The torch device of this name, by default CUDA where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
