"""Names of weights: the released files' on one side, our modules' on the other (specification section 14).

The table is written from our side: every key of our state dict knows the released tensor it comes from. Both directions
of a conversion, and the strict check of a file, follow from that one function.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from supir_model.config import ModelConfig, UNetConfig, VAEConfig
from supir_model.errors import WeightsError

Form = Literal["same", "pointwise", "transposed", "third"]
"""How a released tensor holds ours: as it is; as a 1x1 convolution [O, I, 1, 1]; as [in, out]; fused with two others."""

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
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
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


def _unet(key: str, prefix: str, config: UNetConfig) -> Origin | None:
    module, _, leaf = key.rpartition(".")
    if module in _UNET_ENDS:
        return Origin(f"{prefix}{_UNET_ENDS[module]}.{leaf}")
    per_level, last = config.resblocks + 1, len(config.channels) - 1

    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv$", module):
        return Origin(f"{prefix}input_blocks.{(int(match[1]) + 1) * per_level}.0.op.{leaf}")
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv$", module):
        block = int(match[1])
        place = 2 if config.transformer_depth[last - block] else 1  # after ResBlock and, where there is one, transformer
        return Origin(f"{prefix}output_blocks.{(block + 1) * per_level - 1}.{place}.conv.{leaf}")

    match = re.match(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\.(resnets|attentions)\.(\d+)\.(.+)$", key)
    if match is None:
        return None
    kind, index, inner = match[4], int(match[5]), match[6]
    if match[1] == "mid_block":
        block_name = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    else:
        place = int(kind == "attentions")
        if match[2] is not None:
            block_name = f"input_blocks.{1 + int(match[2]) * per_level + index}.{place}"
        else:
            block_name = f"output_blocks.{int(match[3]) * per_level + index}.{place}"
    if kind == "attentions":
        return Origin(f"{prefix}{block_name}.{inner}")  # names inside a transformer are the same
    module, _, leaf = inner.rpartition(".")
    return Origin(f"{prefix}{block_name}.{_RESNET[module]}.{leaf}") if module in _RESNET else None


def _vae(key: str, config: VAEConfig) -> Origin | None:
    part, _, rest = key.removeprefix("autoencoder.").partition(".")
    prefix = f"{_VAE}{'denoise_encoder' if part == 'robust_encoder' else part}."
    if part in ("quant_conv", "post_quant_conv"):
        return Origin(prefix + rest)
    if part not in ("encoder", "robust_encoder", "decoder"):
        return None
    module, _, leaf = rest.rpartition(".")
    if module in ("conv_in", "conv_out"):
        return Origin(prefix + rest)
    if module == "conv_norm_out":
        return Origin(f"{prefix}norm_out.{leaf}")
    if match := re.match(r"mid_block\.attentions\.0\.(.+)$", module):
        name = _VAE_ATTENTION.get(match[1])
        form: Form = "pointwise" if leaf == "weight" and name != "norm" else "same"
        return None if name is None else Origin(f"{prefix}mid.attn_1.{name}.{leaf}", form)
    if match := re.match(r"mid_block\.resnets\.(\d)\.(\w+)$", module):
        return Origin(f"{prefix}mid.block_{int(match[1]) + 1}.{_vae_resnet(match[2])}.{leaf}")
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers\.0)\.(\w+)$", module):
        direction, index = match[1], int(match[2])
        level = index if direction == "down" else len(config.channels) - 1 - index
        if match[3] is None:
            return Origin(f"{prefix}{direction}.{level}.{direction}sample.{match[4]}.{leaf}")
        return Origin(f"{prefix}{direction}.{level}.block.{match[3]}.{_vae_resnet(match[4])}.{leaf}")
    return None


def _vae_resnet(name: str) -> str:
    return "nin_shortcut" if name == "conv_shortcut" else name


def _text(key: str) -> Origin | None:
    if key.startswith("clip_l."):
        return Origin(_CLIP_L + key.removeprefix("clip_l."))
    if not key.startswith("bigg."):
        return None
    key = key.removeprefix("bigg.")
    if key in _BIGG_ENDS:
        return Origin(_BIGG + _BIGG_ENDS[key])
    if key == "text_projection.weight":
        return Origin(f"{_BIGG}text_projection", "transposed")
    match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", key)
    if match is None:
        return None
    block = f"{_BIGG}transformer.resblocks.{match[1]}"
    if match[2] in _BIGG_LAYER:
        return Origin(f"{block}.{_BIGG_LAYER[match[2]]}.{match[3]}")
    if found := re.match(r"self_attn\.([qkv])_proj$", match[2]):
        return Origin(f"{block}.attn.in_proj_{match[3]}", "third", "qkv".index(found[1]))
    return None
