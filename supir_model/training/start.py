"""What a stage starts from: nothing, the stage before it, or a published SDXL."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from supir_model import weights
from supir_model.checkpoint_keys import from_released
from supir_model.config import ModelConfig
from supir_model.networks import Networks
from supir_model.text import SDXLTextEncoder, read_words

# What SUPIR adds to SDXL; everything else is in an SDXL checkpoint.
_ADDED = ("control.", "unet.connectors.", "vae.robust_encoder.")


def from_scratch(config: ModelConfig, seed: int) -> Networks:
    """Networks with random weights."""
    torch.manual_seed(seed)
    return Networks(config)


def from_sdxl(config: ModelConfig, base: Path, tokenizer: Path, seed: int) -> Networks:
    """SDXL, with an untrained SUPIR around it (SUPIR, section 3.1; specification sections 3, 4 and 8).

    The robust encoder starts as the ordinary one, the control encoder as the UNet's encoder (what a trimmed one has of
    it), the connectors with zero convolutions; their norms act from the start. base: a single file or a folder in
    diffusers layout. Raises WeightsError.
    """
    networks = from_scratch(config, seed)
    wanted = {key: value for key, value in networks.state_dict().items() if not key.startswith(_ADDED)}
    folder = base.is_dir()
    state = weights.read_diffusers(base) if folder else from_released(weights.read_tensors(base), wanted, config)
    weights.check(wanted, state, base.name)
    networks.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    networks.vae.robust_encoder.load_state_dict(copy.deepcopy(networks.vae.encoder.state_dict()))
    _copy_same(networks.unet.base, networks.control.base)
    if isinstance(networks.text, SDXLTextEncoder):
        networks.text.words = read_words(tokenizer, config.text.vocabulary)
    return networks


def _copy_same(source: nn.Module, target: nn.Module) -> None:
    """Copy every weight that both have."""
    found = source.state_dict()
    target.load_state_dict({key: found[key] for key in target.state_dict() if key in found}, strict=False)
