"""Networks with weights, whatever the weights come from."""

from __future__ import annotations

from pathlib import Path

import torch

from supir_model import weights
from supir_model.config import ModelConfig
from supir_model.folder import TOKENIZER
from supir_model.lora import fuse
from supir_model.networks import Networks, build_on_meta
from supir_model.text import SDXLTextEncoder, read_words
from supir_model.weights import Checkpoint


def load_networks(source: str | Path | Checkpoint, device: torch.device) -> tuple[Networks, ModelConfig]:
    """Float32 networks on ``device`` with their vocabulary, and their configuration. Raises WeightsError.

    On the CPU, float32 weights stay mapped to their file until something changes them.
    """
    if isinstance(source, Checkpoint):
        config, tokenizer = source.config, source.tokenizer_folder
        networks = build_on_meta(config)
        state = weights.read_checkpoint(source, networks.state_dict())
        weights.assign(networks, state, torch.float32, device)
        for lora in source.loras:
            fuse(networks, lora)
    else:
        config, path = weights.find(source)
        tokenizer = path.parent / TOKENIZER
        networks = build_on_meta(config)
        weights.load_into(networks, path, torch.float32, device)
    if isinstance(networks.text, SDXLTextEncoder):
        networks.text.words = read_words(tokenizer)
    networks.to(device)  # token positions are not among the weights
    return networks, config
