"""LoRA: diffusers reads the file and names its layers, PEFT adds them to the weights they belong to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_base import fuse_text_encoder_lora
from diffusers.utils import is_peft_available, recurse_remove_peft_layers
from torch import Tensor

from supir_model.errors import WeightsError
from supir_model.networks import Networks
from supir_model.text import SDXLTextEncoder
from supir_model.weights import Lora, read_tensors

_UP = (".lora_B.weight", ".lora.up.weight", ".lora_up.weight", ".up.weight")  # one per adapted layer


@torch.no_grad()
def fuse(networks: Networks, lora: Lora) -> None:
    """Add a LoRA to the weights of the UNet and the text towers, in place; the control encoder stays as it is.

    Afterwards the networks have the same keys as before. Raises WeightsError when the file is none, when one of its
    layers has no place in an SDXL model, or when PEFT is not installed.
    """
    if not is_peft_available():
        raise WeightsError("a LoRA needs the package peft; install supir-batch with the extra 'lora'")
    if lora.path.suffix.lower() != ".safetensors":
        raise WeightsError(f"LoRA {lora.path.name}: only safetensors files are read")
    unet, text = networks.unet.base, networks.text
    targets: dict[str, Any] = {"unet": unet}
    if isinstance(text, SDXLTextEncoder):
        targets |= {"text_encoder": text.clip_l, "text_encoder_2": text.bigg}
    # clones: PEFT keeps references, and the file must stay free to be moved or replaced
    read = {key: value.clone() for key, value in read_tensors(lora.path).items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers, about what we check ourselves
            state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(read, unet_config=unet.config)
            _refuse_unplaced(state, targets, lora.path)
            for prefix, module in targets.items():
                _fuse_one(module, prefix, state, alphas, lora)
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"LoRA {lora.path.name} cannot be used with this model: {reason}") from error


def _fuse_one(module: Any, prefix: str, state: dict[str, Tensor], alphas: dict[str, float] | None, lora: Lora) -> None:
    layers = [key for key in state if key.startswith(f"{prefix}.") and key.endswith(_UP)]
    if not layers:
        return
    mixin = StableDiffusionXLLoraLoaderMixin
    before = set(module.state_dict())
    if prefix == "unet":
        mixin.load_lora_into_unet(dict(state), alphas, module)
    else:
        mixin.load_lora_into_text_encoder(dict(state), alphas, module, prefix=prefix)
    placed = [key for key in module.state_dict() if ".lora_B." in key]
    if len(placed) != len(layers):
        raise ValueError(f"{len(layers)} layers for {prefix}, of which {len(placed)} have a place in it")
    if prefix == "unet":
        module.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
        module.unload_lora()
    else:
        fuse_text_encoder_lora(module, lora_scale=lora.scale, safe_fusing=True)
        recurse_remove_peft_layers(module)
        module._hf_peft_config_loaded = False
    if set(module.state_dict()) != before:
        raise ValueError(f"it leaves {prefix} with other weights than before")


def _refuse_unplaced(state: dict[str, Tensor], targets: dict[str, Any], path: Path) -> None:
    strangers = sorted(key for key in state if key.partition(".")[0] not in targets)
    if strangers or not state:
        raise ValueError(f"{len(strangers)} keys are of no SDXL network: {', '.join(strangers[:10]) or 'it is empty'}")
