"""Names of weights: the released files' on one side, our modules' on the other (specification section 14).

The table is written from our side: every key of our state dict knows the released tensor it comes from. Both directions
of a conversion, and the strict check of a file, follow from that one function.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from supir_model.config import ModelConfig, UNetConfig, VAEConfig
from supir_model.errors import WeightsError

Form = Literal["same", "pointwise", "transposed", "third"]
"""How a released tensor holds ours: as it is; as a 1x1 convolution [O, I, 1, 1]; as [in, out]; with two others."""

IGNORED = (
    "model.control_model.mask_LQ",  # in the released file, belongs to no module
    "denoiser.sigmas",  # computed
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",  # computed
    "conditioner.embedders.1.model.logit_scale",  # of CLIP's contrastive loss
)
"""Released keys that hold no weight of ours."""

_UNET = "model.diffusion_model."
_CONTROL = "model.control_model."
_VAE = "first_stage_model."
_CLIP_L = "conditioner.embedders.0.transformer.text_model."
_BIGG = "conditioner.embedders.1.model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_CONNECTOR = {
    # ZeroSFT
    "norm": "param_free_norm",
    "shared": "mlp_shared.0",
    "gamma": "zero_mul",
    "beta": "zero_add",
    "zero_conv": "zero_conv",
    # ZeroCrossAttn
    "norm_query": "norm1",
    "norm_control": "norm2",
    "to_q": "attn.to_q",
    "to_k": "attn.to_k",
    "to_v": "attn.to_v",
    "to_out": "attn.to_out.0",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_BIGG_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BIGG_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class Origin:
    """The released tensor one of ours comes from; ``part`` is its place among three when ``form`` is "third"."""

    key: str
    form: Form = "same"
    part: int = 0


def origin(key: str, config: ModelConfig) -> Origin:
    """Where the weight ``key`` of ``Networks`` lies in the released layout. Raises WeightsError if it has no place."""
    part, _, rest = key.partition(".")
    found = None
    if part == "unet" and (match := re.match(r"connectors\.(\d+)\.(\w+)\.(\w+)$", rest)):
        # we list connectors in order of execution, the release lists them backwards
        index = _connector_count(config) - 1 - int(match[1])
        found = Origin(f"{_UNET}project_modules.{index}.{_CONNECTOR[match[2]]}.{match[3]}")
    elif part == "unet":
        found = _unet(rest.removeprefix("base."), _UNET, config.unet)
    elif part == "control" and rest.startswith("hint."):
        found = Origin(f"{_CONTROL}input_hint_block.0.{rest.removeprefix('hint.')}")
    elif part == "control":
        found = _unet(rest.removeprefix("base."), _CONTROL, config.unet)
    elif part == "vae":
        found = _vae(rest, config.vae)
    elif part == "text":
        found = _text(rest)
    if found is None:
        raise WeightsError(f"weight '{key}' of {config.display_name} has no place in the layout of the released files")
    return found


def from_released(released: Mapping[str, Tensor], wanted: Iterable[str], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict out of released tensors, without copying (views).

    ``wanted``: keys of the state dict to fill; those whose released tensor is absent stay absent. Released tensors with
    no place among ``wanted`` are returned under their own names, so that ``weights.check`` can name them, save IGNORED.
    """
    state: dict[str, Tensor] = {}
    used = set(IGNORED)
    for key in wanted:
        source = origin(key, config)
        if source.key in released:
            used.add(source.key)
            state[key] = _unpack(released[source.key], source)
    return state | {key: value for key, value in released.items() if key not in used}


def to_released(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict in the released layout; also works on meta tensors. The inverse of ``from_released``."""
    thirds: dict[str, dict[int, Tensor]] = defaultdict(dict)
    released: dict[str, Tensor] = {}
    for key, value in state.items():
        source = origin(key, config)
        if source.form == "third":
            thirds[source.key][source.part] = value
        elif source.form == "pointwise":
            released[source.key] = value[:, :, None, None]
        elif source.form == "transposed":
            released[source.key] = value.T
        else:
            released[source.key] = value
    for key, parts in thirds.items():
        released[key] = torch.cat([parts[i] for i in range(3)])
    return released


def _unpack(tensor: Tensor, source: Origin) -> Tensor:
    if source.form == "pointwise" and tensor.ndim == 4:
        return tensor[:, :, 0, 0]
    if source.form == "transposed":
        return tensor.T
    if source.form == "third":
        return tensor.chunk(3)[source.part]
    return tensor


def _connector_count(config: ModelConfig) -> int:
    """One after the middle block, one per skip connection, one before each attended upsampler."""
    levels = len(config.unet.channels)
    attended = sum(0 < level < levels for level in config.control.attention_levels)
    return 1 + levels * (config.unet.resblocks + 1) + attended


Rules = Mapping[str, Callable[[re.Match[str]], str | None]]
"""Pattern of a whole module path of ours -> its released path, None if it has none"""


def _apply(rules: Rules, module: str) -> str | None:
    for pattern, name in rules.items():
        if match := re.fullmatch(pattern, module):
            return name(match)
    return None


def _unet(key: str, prefix: str, config: UNetConfig) -> Origin | None:
    module, _, leaf = key.rpartition(".")
    found = _apply(_unet_rules(config), module)
    return None if found is None else Origin(f"{prefix}{found}.{leaf}")


@cache
def _unet_rules(config: UNetConfig) -> Rules:
    per_level, last = config.resblocks + 1, len(config.channels) - 1

    def up(match: re.Match[str]) -> str:
        return f"output_blocks.{int(match[1]) * per_level + int(match[2])}"

    def down(match: re.Match[str]) -> str:
        return f"input_blocks.{1 + int(match[1]) * per_level + int(match[2])}"

    def upsampler(match: re.Match[str]) -> str:
        block = int(match[1])
        # after the ResBlock and, where there is one, the transformer
        place = 2 if config.transformer_depth[last - block] else 1
        return f"output_blocks.{(block + 1) * per_level - 1}.{place}.conv"

    ends = "|".join(re.escape(name) for name in _UNET_ENDS)
    resnet = "|".join(_RESNET)
    return {
        f"({ends})": lambda m: _UNET_ENDS[m[1]],
        rf"down_blocks\.(\d+)\.resnets\.(\d+)\.({resnet})": lambda m: f"{down(m)}.0.{_RESNET[m[3]]}",
        rf"up_blocks\.(\d+)\.resnets\.(\d+)\.({resnet})": lambda m: f"{up(m)}.0.{_RESNET[m[3]]}",
        rf"mid_block\.resnets\.([01])\.({resnet})": lambda m: f"middle_block.{2 * int(m[1])}.{_RESNET[m[2]]}",
        # names inside a transformer are the same
        r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)": lambda m: f"{down(m)}.1.{m[3]}",
        r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)": lambda m: f"{up(m)}.1.{m[3]}",
        r"mid_block\.attentions\.0\.(.+)": lambda m: f"middle_block.1.{m[1]}",
        r"down_blocks\.(\d+)\.downsamplers\.0\.conv": lambda m: f"input_blocks.{(int(m[1]) + 1) * per_level}.0.op",
        r"up_blocks\.(\d+)\.upsamplers\.0\.conv": upsampler,
    }


def _vae(key: str, config: VAEConfig) -> Origin | None:
    module, _, leaf = key.removeprefix("autoencoder.").rpartition(".")
    found = _apply(_vae_rules(len(config.channels)), module)
    if found is None:
        return None
    form: Form = "pointwise" if leaf == "weight" and re.search(r"attn_1\.(q|k|v|proj_out)$", found) else "same"
    return Origin(f"{_VAE}{found}.{leaf}", form)


@cache
def _vae_rules(levels: int) -> Rules:
    networks = {"encoder": "encoder", "robust_encoder": "denoise_encoder", "decoder": "decoder"}
    attention = "|".join(re.escape(name) for name in _VAE_ATTENTION)

    def resnet(name: str) -> str:
        return "nin_shortcut" if name == "conv_shortcut" else name

    inside: Rules = {
        "(conv_in|conv_out)": lambda m: m[1],
        "conv_norm_out": lambda m: "norm_out",
        rf"mid_block\.attentions\.0\.({attention})": lambda m: f"mid.attn_1.{_VAE_ATTENTION[m[1]]}",
        r"mid_block\.resnets\.([01])\.(\w+)": lambda m: f"mid.block_{int(m[1]) + 1}.{resnet(m[2])}",
        r"down_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)": lambda m: f"down.{m[1]}.block.{m[2]}.{resnet(m[3])}",
        r"down_blocks\.(\d+)\.downsamplers\.0\.conv": lambda m: f"down.{m[1]}.downsample.conv",
        # the decoder's levels are numbered from the finest, its blocks run from the coarsest
        r"up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)": (
            lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}.{resnet(m[3])}"
        ),
        r"up_blocks\.(\d+)\.upsamplers\.0\.conv": lambda m: f"up.{levels - 1 - int(m[1])}.upsample.conv",
    }

    def network(match: re.Match[str]) -> str | None:
        found = _apply(inside, match[2])
        return None if found is None else f"{networks[match[1]]}.{found}"

    return {"(quant_conv|post_quant_conv)": lambda m: m[1], r"(encoder|robust_encoder|decoder)\.(.+)": network}


def _text(key: str) -> Origin | None:
    if key.startswith("clip_l."):
        return Origin(_CLIP_L + key.removeprefix("clip_l."))
    if key == "bigg.text_projection.weight":
        return Origin(f"{_BIGG}text_projection", "transposed")
    fused = r"bigg\.text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)"
    if match := re.fullmatch(fused, key):
        attention = f"{_BIGG}transformer.resblocks.{match[1]}.attn"
        return Origin(f"{attention}.in_proj_{match[3]}", "third", "qkv".index(match[2]))
    found = _apply(_bigg_rules(), key)
    return None if found is None else Origin(_BIGG + found)


@cache
def _bigg_rules() -> Rules:
    ends = "|".join(re.escape(name) for name in _BIGG_ENDS)
    layer = "|".join(re.escape(name) for name in _BIGG_LAYER)
    return {
        rf"bigg\.text_model\.({ends})": lambda m: _BIGG_ENDS[m[1]],
        rf"bigg\.text_model\.encoder\.layers\.(\d+)\.({layer})\.(\w+)": (
            lambda m: f"transformer.resblocks.{m[1]}.{_BIGG_LAYER[m[2]]}.{m[3]}"
        ),
    }
