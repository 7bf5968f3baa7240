"""Networks with weights, whatever the weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from supir_model import weights
from supir_model.config import ModelConfig, Precision
from supir_model.folder import TOKENIZER
from supir_model.lora import fuse
from supir_model.networks import Networks, build_on_meta
from supir_model.text import SDXLTextEncoder, read_words
from supir_model.vae import RobustVAE
from supir_model.weights import Checkpoint


@dataclass(frozen=True)
class Formats:
    """Number formats of a model's networks (section 13): the VAE overflows in float16, so it never gets that."""

    denoiser: torch.dtype  # control encoder, UNet
    conditioner: torch.dtype  # VAE, text

    def of(self, key: str, tensor: Tensor) -> torch.dtype:
        """In which format a weight is held: vectors (norms, biases) in full, they cost nothing."""
        if tensor.ndim < 2:
            return torch.float32
        return self.conditioner if key.startswith(("vae.", "text.")) else self.denoiser


FORMATS: dict[Precision, Formats] = {
    "float32": Formats(torch.float32, torch.float32),
    "bfloat16": Formats(torch.bfloat16, torch.bfloat16),
    "float16": Formats(torch.float16, torch.bfloat16),
    "float8": Formats(torch.bfloat16, torch.bfloat16),  # for the rest, see float8.py
}


def load_networks(
    source: str | Path | Checkpoint, device: torch.device, precision: Precision = "float32"
) -> tuple[Networks, ModelConfig]:
    """Networks on ``device`` with their vocabulary, and their configuration. Raises WeightsError.

    On the CPU, float32 weights stay mapped to their file until something changes them.
    """
    formats = FORMATS[precision]
    if isinstance(source, Checkpoint):
        config, tokenizer = source.config, source.tokenizer_folder
        networks = build_on_meta(config)
        state = weights.read_checkpoint(source, networks.state_dict())
        weights.assign(networks, state, formats.of, device)
        for lora in source.loras:
            fuse(networks, lora)
    else:
        config, path = weights.find(source)
        tokenizer = path.parent / TOKENIZER
        networks = build_on_meta(config)
        weights.load_into(networks, path, formats.of, device)
    if isinstance(networks.text, SDXLTextEncoder):
        networks.text.words = read_words(tokenizer, config.text.vocabulary)
    networks.to(device)  # token positions are not among the weights
    return networks, config


def load_vae(
    source: str | Path, device: torch.device, precision: Precision = "float32"
) -> tuple[RobustVAE, ModelConfig]:
    """The VAE alone, on ``device``, of ``tiny`` or of a converted model's folder. Raises WeightsError.

    The other networks' weights are checked by name and shape, and never leave their file.
    """
    config, path = weights.find(source)
    networks = build_on_meta(config)
    state = weights.read_tensors(path)
    weights.check(networks.state_dict(), state, path.name)
    prefix = "vae."
    weights.assign(
        networks.vae,
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
        lambda key, value: FORMATS[precision].of(prefix + key, value),
        device,
    )
    return networks.vae, config
