"""Agreement with the released program, number by number, on every file of a folder of recorded vectors.

Nothing here knows the files' widths, steps or names: what a file is follows from what is in it, so that another folder
of the same format (``--vectors DIR``) runs as it is. Weights are a function of their released name (``weight``).
"""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from supir_batch import released
from supir_model import folder as model_folder
from supir_model import model, weights
from supir_model.checkpoint_keys import IGNORED, from_released, origin, to_released
from supir_model.color import adain, decompose, wavelet
from supir_model.config import MODELS, V0Q, ControlConfig, ModelConfig, TextConfig, TowerConfig, UNetConfig, VAEConfig
from supir_model.control import ControlEncoder
from supir_model.convert import convert
from supir_model.denoiser import (
    denoise,
    guide,
    karras_sigmas,
    legacy_sigmas,
    linear_cfg,
    nearest_timestep,
    sigma_table,
)
from supir_model.networks import build_on_meta
from supir_model.sampler import (
    DPMPP2MSettings,
    EDMSettings,
    SamplerSettings,
    Window,
    trajectory,
    window_weights,
    windows_of,
)
from supir_model.text import SDXLTextEncoder, Words, sinusoid
from supir_model.unet import ControlledUNet, build_sdxl_unet, embed
from supir_model.vae import RobustVAE
from supir_model.vae_tiling import Box, VAETiling, released_tiles, run_decoder, run_encoder
from supir_model.zero_sft import ZeroCrossAttn, ZeroSFT

# One float32 rounding of a frequency near 1 moves t * frequency by up to 6e-5 at t = 1024, and exp() of two processors
# differs by one or two of them. The networks' own tolerances, which cover what follows from it, are the README's.
SINUSOID = 1.3e-4

Tensors = Mapping[str, Tensor]
Json = Any  # whatever json.loads gives


# --- the recorded files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One thing to check: ``kind`` names the check, ``stem`` the file, ``facts`` what its JSON says."""

    kind: str
    folder: Path
    stem: str
    facts: Json = None

    @property
    def tensors(self) -> Tensors:
        return load_file(self.folder / f"{self.stem}.safetensors")

    @property
    def keys(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = json.loads((self.folder / f"{self.stem}.keys.json").read_text())
        return found


# What a file is follows from what it says, never from its name: the first that applies.
_BY_FACTS: dict[str, Callable[[Json], bool]] = {
    "windows": lambda facts: isinstance(facts, list),
    "vae": lambda facts: "ddconfig" in facts and "scale_factor" in facts,
    "vae_tiled": lambda facts: "ddconfig" in facts,
    "units": lambda facts: "modules" in facts,
    "net": lambda facts: "control" in facts.get("config", {}),
    "conditioning": lambda facts: "cond_prompts" in facts,
    "e2e": lambda facts: "runs" in facts,
    "bf16": lambda facts: "first_call_dtypes" in facts,
    "sizes": lambda facts: "PIL2Tensor" in facts,
    "sampler": lambda facts: all(isinstance(v, dict) and "sampler" in v for v in facts.values()),
    "weight_rule": lambda facts: all(isinstance(v, dict) and "crc32" in v for v in facts.values()),
    "not_covered": lambda facts: True,
}
_BY_NAMES: dict[str, Callable[[Tensors], bool]] = {
    "denoiser": lambda tensors: "sigmas_table_1000" in tensors,
    "color": lambda tensors: "wavelet" in tensors,
    "image_io": lambda tensors: "img_hwc_u8" in tensors,
    "window_weights": lambda tensors: all(name.startswith("gaussian_") for name in tensors),
    "not_covered": lambda tensors: True,
}


def find_cases(folder: Path) -> Iterator[Case]:
    """Everything in the folder."""
    runs: set[str] = set()
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".keys.json"):
            continue
        facts, stem = json.loads(path.read_text()), path.stem
        kind = next(kind for kind, applies in _BY_FACTS.items() if applies(facts))
        if kind == "sampler":
            yield from (Case(kind, folder, f"sampler_{name}", run) for name, run in facts.items())
            runs |= {f"sampler_{name}" for name in facts}
        elif kind == "e2e":
            yield from (Case(kind, folder, stem, {**facts, "run": name, **run}) for name, run in facts["runs"].items())
        else:
            yield Case(kind, folder, stem, facts)
    for path in sorted(folder.glob("*.json.gz")):
        facts = json.loads(gzip.decompress(path.read_bytes()))
        yield Case("full_keys", folder, path.name.removesuffix(".json.gz"), facts)
    for path in sorted(folder.glob("*.safetensors")):
        if not path.with_suffix(".json").exists() and path.stem not in runs:
            tensors = load_file(path)
            kind = next(kind for kind, applies in _BY_NAMES.items() if applies(tensors))
            yield Case(kind, folder, path.stem)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder: Path = metafunc.config.getoption("--vectors")
        cases = list(find_cases(folder)) if folder.is_dir() else []
        metafunc.parametrize("case", cases or [None], ids=[_name(c) for c in cases] or ["absent"])


def _name(case: Case) -> str:
    return f"{case.stem}-{case.facts['run']}" if case.kind == "e2e" else case.stem


# --- measuring -----------------------------------------------------------------------------------------------------

_measured: dict[tuple[str, str], tuple[float, str]] = {}


@dataclass
class Measure:
    """Compares, remembers the largest difference per (file, quantity), and keeps what is too large for the end."""

    name: str
    failures: list[str] = field(default_factory=list)

    def close(self, quantity: str, got: Tensor, wanted: Tensor, atol: float, rtol: float = 0.0) -> None:
        if got.shape != wanted.shape:
            self.failures.append(f"{quantity}: shape {list(got.shape)}, recorded {list(wanted.shape)}")
            return
        difference = (got.double() - wanted.double()).abs()
        excess = (difference - rtol * wanted.double().abs()).max().item()
        largest = difference.max().item()
        allowed = " + ".join([f"{atol:g}"] * (atol > 0) + [f"{rtol:g} relative"] * (rtol > 0))
        known, _ = _measured.get((self.name, quantity), (0.0, ""))
        _measured[self.name, quantity] = (max(known, largest), allowed)
        if not excess <= atol:  # NaN is a failure, too
            self.failures.append(f"{quantity}: {largest:.3g} away, allowed {allowed}")

    def equal(self, quantity: str, got: object, wanted: object) -> None:
        _measured.setdefault((self.name, quantity), (0.0, "exact"))
        if got != wanted:
            self.failures.append(f"{quantity}: got {got}, recorded {wanted}")


@pytest.fixture(scope="module", autouse=True)
def _table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    target = request.config.getoption("--parity-table")
    if target is not None:
        rows = [f"| {name} | {what} | {got:.1e} | {allowed} |" for (name, what), (got, allowed) in _measured.items()]
        target.write_text("\n".join(["| file | quantity | measured | allowed |", "|---|---|---|---|", *rows, ""]))


@torch.inference_mode()
def test_vectors(case: Case | None, request: pytest.FixtureRequest) -> None:
    if case is None:
        pytest.skip(
            f"no recorded vectors in {request.config.getoption('--vectors')}: networks, samplers, VAE, conditioning, "
            "color fixes and key names are not compared with the released program; give the folder with --vectors"
        )
    if case.kind == "not_covered":
        pytest.skip(f"{case.stem} is not compared: nothing here knows this file")
    measure = Measure(_name(case))
    _CHECKS[case.kind](case, measure)
    for (name, quantity), (got, allowed) in _measured.items():
        if name == measure.name:
            print(f"{name:45} {quantity:28} {got:.1e}  of {allowed}")
    assert not measure.failures, f"{measure.name}: " + "; ".join(measure.failures)


# --- weights -------------------------------------------------------------------------------------------------------


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """The recorded models' weight of a released name: normal numbers seeded by the name, scaled by fan-in."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    values = torch.randn(list(shape), generator=generator)
    if len(shape) >= 2:
        return values / math.sqrt(values.numel() / shape[0])
    return 1 + 0.1 * values if key.endswith(".weight") else 0.1 * values


def released_shapes(module: nn.Module, config: ModelConfig) -> dict[str, list[int]]:
    """What a module named like ``Networks`` looks like in a released file, for vectors that list no keys."""
    return {key: list(value.shape) for key, value in to_released(module.state_dict(), config).items()}


def fill(module: nn.Module, shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> None:
    """Give a module on the meta device, named like ``Networks``, the rule's weights for these released tensors."""
    wanted = module.state_dict()
    state = from_released({key: weight(key, shape) for key, shape in shapes.items()}, wanted, config)
    weights.check(wanted, state, "weight rule")
    module.load_state_dict(state, assign=True)
    module.eval()


def fill_unit(module: nn.Module, ours: str, theirs: str, config: ModelConfig) -> nn.Module:
    """Give one module, which is ``ours`` inside ``Networks``, the rule's weights under the prefix ``theirs``."""
    named = {f"{ours}.{key}": value for key, value in module.state_dict().items()}
    released = {key: list(value.shape) for key, value in to_released(named, config).items()}
    inside = _common_prefix([origin(key, config).key for key in named])
    filled = {key: weight(theirs + key.removeprefix(inside), shape) for key, shape in released.items()}
    state = from_released(filled, named, config)
    module.load_state_dict({key.removeprefix(f"{ours}."): value for key, value in state.items()})
    return module.eval()


def _common_prefix(keys: Sequence[str]) -> str:
    """The module path that all these keys share; a lone convolution's own name ("op.", "conv.") belongs to the unit."""
    shared = [parts[0] for parts in zip(*(key.split(".") for key in keys), strict=False) if len(set(parts)) == 1]
    if shared[-1] in ("op", "conv"):
        shared.pop()
    return ".".join(shared) + "."


# --- configurations ------------------------------------------------------------------------------------------------


def unet_config(recorded: Json) -> UNetConfig:
    width = recorded["model_channels"]
    return UNetConfig(
        latent_channels=recorded["in_channels"],
        channels=tuple(width * factor for factor in recorded["channel_mult"]),
        resblocks=recorded["num_res_blocks"],
        transformer_depth=depths(recorded),
        head_dim=recorded["num_head_channels"],
        context_dim=recorded["context_dim"],
        vector_dim=recorded["adm_in_channels"],
    )


def depths(recorded: Json) -> tuple[int, ...]:
    """Transformer blocks per level; the released configuration also names a depth for levels without attention."""
    levels = range(len(recorded["channel_mult"]))
    return tuple(recorded["transformer_depth"][i] if 2**i in recorded["attention_resolutions"] else 0 for i in levels)


def control_config(recorded: Json, adapters: Json = None) -> ControlConfig:
    if adapters is None:
        return replace(V0Q.control, transformer_depth=depths(recorded))
    per_level = recorded["num_res_blocks"] + 1
    return ControlConfig(
        transformer_depth=depths(recorded),
        hidden=adapters["nhidden"],
        attention_head_dim=adapters["cross_attn_head_dim"],
        attention_levels=tuple(index // per_level for index in adapters["cross_attn_insert_idx"]),
    )


def vae_config(recorded: Json, scale: float) -> VAEConfig:
    return VAEConfig(
        channels=tuple(recorded["ch"] * factor for factor in recorded["ch_mult"]),
        encoder_resblocks=recorded["num_res_blocks"],
        latent_channels=recorded["z_channels"],
        norm_groups=32,
        mid_attention=True,
        scale=scale,
    )


# --- networks ------------------------------------------------------------------------------------------------------


def check_net(case: Case, measure: Measure) -> None:
    recorded = case.facts["config"]
    config = replace(
        V0Q,
        unet=unet_config(recorded["unet"]),
        control=control_config(recorded["control"], recorded["adapters"]),
    )
    with torch.device("meta"):
        networks = nn.ModuleDict(
            {
                "control": ControlEncoder(config.unet, config.control),
                "unet": ControlledUNet(config.unet, config.control),
            }
        )
    fill(networks, case.keys, config)
    control, unet = networks["control"], networks["unet"]
    t = case.tensors
    context, vector, latent = t["context"], t["y"], t["lq_latent"]

    measure.close("t_sinusoid", unet.base.time_proj(t["timesteps"]), t["t_sinusoid"], SINUSOID)
    measure.close("control_emb", embed(control.base, t["timesteps"], vector, torch.float32), t["control_emb"], 2e-4)
    features = control(t["x"], t["timesteps"], context, vector, latent)
    for i, feature in enumerate(features):
        measure.close("control features", feature, t[f"control_{i}"], 2e-4)

    outputs: dict[int, Tensor] = {}
    backwards = list(reversed(unet.connectors))  # the recorded numbers count from the end
    for i, connector in enumerate(backwards):
        connector.register_forward_hook(lambda _m, _i, out, i=i: outputs.__setitem__(i, out))
    for name, wanted in t.items():
        if not (match := re.fullmatch(r"unet_out_cs([\d.]+)", name)):
            continue
        scale = torch.full((len(vector), 1, 1, 1), float(match[1]))
        out = unet(t["x"], t["timesteps"], context, vector, features, scale)
        measure.close("UNet output", out, wanted, 5e-5)
        for i in range(len(backwards)):
            flat = outputs[i][0].flatten()
            probe = flat[:: max(1, flat.numel() // 64)][:64]
            measure.close("adapter probes", probe, t[f"adapter_probe_{i}_cs{match[1]}"], 2e-4)

    def network(x_in: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = unet(x_in, timestep, context, vector, control(x_in, timestep, context, vector, latent), scale)
        return out

    scale = torch.full_like(t["den_sigma"], case.facts["denoiser_control_scale"])
    measure.close("denoised", denoise(network, "epsilon", t["den_x"], t["den_sigma"], scale), t["den_out"], 3e-4)


def check_units(case: Case, measure: Measure) -> None:
    modules, t = case.facts["modules"], case.tensors
    tolerance = 2e-5

    for name in ("sft_concat", "sft_mid"):
        facts = modules[name]
        sft = ZeroSFT(facts["label_nc"], facts["norm_nc"], facts["concat"], 128, 32)
        fill_unit(sft, "unet.connectors.0", facts["prefix"], V0Q)
        skip, decoder = t.get(f"{name}_skip", t.get(f"{name}_h")), t.get(f"{name}_dec")
        for key, scale in _scales(t, f"{name}_out"):
            measure.close(name, sft(t[f"{name}_c"], skip, decoder, scale), t[key], tolerance)

    facts = modules["xattn"]
    cross = ZeroCrossAttn(facts["query_dim"], facts["context_dim"], 64, 32)
    fill_unit(cross, "unet.connectors.0", facts["prefix"], V0Q)
    for key, scale in _scales(t, "xattn_out"):
        measure.close("xattn", cross(t["xattn_c"], t["xattn_x"], scale), t[key], tolerance)

    # blocks as they stand in our UNet: two narrow levels, then the one with ResBlock and transformer
    res, transformer = modules["resblock"], modules["spatial_transformer"]
    narrow, wide = res["cin"], res["cout"]
    unet = build_sdxl_unet(
        UNetConfig(
            latent_channels=4,
            channels=(narrow, narrow, wide),
            resblocks=1,
            transformer_depth=(0, 0, transformer["depth"]),
            head_dim=transformer["channels"] // transformer["heads"],
            context_dim=transformer["context_dim"],
            vector_dim=8,
        ),
        (0, 0, transformer["depth"]),
    )
    sizes = replace(V0Q.unet, channels=(narrow, narrow, wide), resblocks=1, transformer_depth=(0, 0, 1))
    config = replace(V0Q, unet=sizes)

    def unit(path: str, name: str) -> nn.Module:
        return fill_unit(unet.get_submodule(path), f"unet.base.{path}", modules[name]["prefix"], config)

    block = unit("down_blocks.2.resnets.0", "resblock")
    measure.close("resblock", block(t["resblock_x"], t["resblock_emb"]), t["resblock_out"], tolerance)
    block = unit("down_blocks.2.attentions.0", "spatial_transformer")
    out = block(t["spatial_transformer_x"], encoder_hidden_states=t["spatial_transformer_context"], return_dict=False)[
        0
    ]
    measure.close("spatial_transformer", out, t["spatial_transformer_out"], tolerance)
    for name, path in {"unet_down": "down_blocks.0.downsamplers.0", "unet_up": "up_blocks.1.upsamplers.0"}.items():
        # up and down were recorded on the same input
        x = t.get(f"{name}_x", t["unet_down_x"])
        measure.close(name, unit(path, name)(x), t[f"{name}_out"], tolerance)

    narrow, wide = modules["vae_resnet"]["cin"], modules["vae_resnet"]["cout"]
    config = replace(V0Q, vae=VAEConfig((narrow, narrow, wide), 1, 4, 32, mid_attention=True, scale=1.0))
    vae = RobustVAE(config.vae)

    def vae_unit(path: str, name: str) -> nn.Module:
        return fill_unit(vae.get_submodule(path), f"vae.{path}", modules[name]["prefix"], config)

    for name, path in {
        "vae_resnet": "encoder.down_blocks.2.resnets.0",
        "vae_attn": "encoder.mid_block.attentions.0",
        "vae_down": "encoder.down_blocks.0.downsamplers.0",
        "vae_up": "autoencoder.decoder.up_blocks.1.upsamplers.0",
    }.items():
        block, x = vae_unit(path, name), t.get(f"{name}_x", t["vae_down_x"])
        out = block(x, None) if name == "vae_resnet" else block(x)
        measure.close(name, out, t[f"{name}_out"], tolerance)

    steps = t["timestep_embedding_t"]
    for name, wanted in t.items():
        if match := re.fullmatch(r"timestep_embedding_(\d+)", name):
            measure.close("timestep_embedding", sinusoid(steps, int(match[1])), wanted, SINUSOID)


def _scales(tensors: Tensors, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key in tensors:
        if match := re.fullmatch(rf"{prefix}_cs([\d.]+)", key):
            yield key, torch.tensor(float(match[1])).reshape(1, 1, 1, 1)


# --- VAE -----------------------------------------------------------------------------------------------------------


def check_vae(case: Case, measure: Measure) -> None:
    config = replace(V0Q, vae=vae_config(case.facts["ddconfig"], case.facts["scale_factor"]))
    with torch.device("meta"):
        vae = RobustVAE(config.vae)
    fill(nn.ModuleDict({"vae": vae}), case.keys, config)
    t, tolerance = case.tensors, 1e-4
    image = t["image"]
    mean, logvar = vae.moments(image)
    measure.close("moments", torch.cat([mean, logvar], dim=1), t["encoder_moments"], tolerance)
    measure.close("posterior std", torch.exp(0.5 * logvar), t["posterior_std"], tolerance)
    measure.close("mode", vae.encode(image), t["encode_mode_scaled"], tolerance)
    sampled = vae.encode(image, t["encode_noise"])
    measure.close("sample", sampled, t["encode_first_stage_sampled_scaled"], tolerance)
    robust = vae.encode_robust(image)
    measure.close("robust mode", robust, t["denoise_encode_mode_scaled"], tolerance)
    measure.close("stage-1 image", vae.decode(robust), t["stage1_image"], tolerance)
    measure.close("decoded", vae.decode(t["latent_scaled"]), t["decoded"], tolerance)


def check_vae_tiled(case: Case, measure: Measure) -> None:
    facts, t, tolerance = case.facts, case.tensors, 1e-4
    config = replace(V0Q, vae=vae_config(facts["ddconfig"], 1.0))
    with torch.device("meta"):
        vae = RobustVAE(config.vae)
    module = nn.ModuleDict({"vae": vae})
    fill(module, released_shapes(module, config), config)
    factor, tile = config.vae.factor, facts["encoder_tile"]
    image, z, decoder = t["image"], t["decoder_in"], vae.autoencoder.decoder
    for mode in ("off", "exact"):
        encoded = run_encoder(vae.encoder, image, VAETiling(mode, tile), factor)
        measure.close(f"encoder, {mode}", encoded, t["encoder_untiled_h"], tolerance)
        decoded = run_decoder(decoder, z, VAETiling(mode, facts["decoder_tile"] * factor), factor)
        measure.close(f"decoder, {mode}", decoded, t["decoder_untiled"], tolerance)
    encoded = run_encoder(vae.encoder, image, VAETiling("released", tile), factor)
    measure.close("encoder, released", encoded, t["encoder_tiled_h"], tolerance)
    decoded = run_decoder(decoder, z, VAETiling("released", facts["decoder_tile"] * factor), factor)
    measure.close("decoder, released", decoded, t["decoder_tiled"], tolerance)

    for table in facts["split_tables"]:
        tiles = released_tiles(table["h"], table["w"], table["tile"], table["pad"])
        scaled = [tile.enlarged(factor) if table["decoder"] else tile.reduced(factor) for tile in tiles]
        measure.equal("tiled or not", bool(tiles), table["tiled"])
        measure.equal("boxes", [corners(tile.read) for tile in tiles], table.get("in_bboxes") or [])
        measure.equal("boxes", [corners(tile.keep) for tile in scaled], table.get("out_bboxes") or [])


def corners(box: Box) -> list[int]:
    """As recorded: x1, x2, y1, y2."""
    return [box.left, box.right, box.top, box.bottom]


# --- sizes and pixels ----------------------------------------------------------------------------------------------


def check_sizes(case: Case, measure: Measure) -> None:
    for facts in case.facts["PIL2Tensor"]:
        found = released.sizes(facts["w"], facts["h"], facts["upscale"], facts["min_size"], shorter=facts["fix_resize"])
        measure.equal("work sizes", found.work, (facts["tensor_w"], facts["tensor_h"]))
        measure.equal("output sizes", found.output, (facts["w0"], facts["h0"]))
    for group, listed in case.facts.items():
        # the demo program: the same rule with another unit
        if match := re.fullmatch(r"gradio_unit(\d+)", group):
            for facts in listed:
                width, height = facts["w"], facts["h"]
                work = released.sizes(width, height, facts["upscale"], facts["min_size"], unit=int(match[1])).work
                measure.equal("demo's work sizes", list(work[::-1]), facts["upscale_image_hw"])
                for name, wanted in facts.items():
                    if fixed := re.fullmatch(r"fix_resize(\d+)_hw", name):
                        work = released.sizes(width, height, 1, 0, shorter=int(fixed[1])).work
                        measure.equal("demo's caption sizes", list(work[::-1]), wanted)


def check_image_io(case: Case, measure: Measure) -> None:
    """Not the demo program's own resizing (OpenCV), of which nothing here makes use, but for its sizes."""
    t = case.tensors
    image = t["img_hwc_u8"].numpy().astype(np.float32) / np.float32(255)
    height, width = image.shape[:2]
    for name in t:
        if not (match := re.fullmatch(r"up([\d.]+)_min(\d+)_fix(\d+|None)_tensor", name)):
            continue
        shorter = None if match[3] == "None" else int(match[3])
        found = released.sizes(width, height, float(match[1]), int(match[2]), shorter)
        run = name.removesuffix("_tensor")
        measure.equal("output size", list(found.output[::-1]), t[f"{run}_h0w0"].tolist())
        read = torch.from_numpy(released.to_work(image, *found.work)).permute(2, 0, 1) * 2 - 1
        measure.close("image read", read, t[name], 1e-6)
        pixels = (t[f"{run}_t2p_in"].permute(1, 2, 0).numpy() + 1) / 2
        written = torch.from_numpy(released.to_output(pixels, *found.output))
        measure.close("image written, levels", written, t[f"{run}_t2p_out_u8"], 1)


# --- samplers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Conditioning of the analytic denoisers: crossattn [B, L, C], vector [B, V], control latent [B, 4, h, w]."""

    crossattn: Tensor
    vector: Tensor
    control: Tensor

    @property
    def m(self) -> Tensor:
        return self.crossattn.mean(dim=(1, 2))[:, None, None, None]

    @property
    def v(self) -> Tensor:
        return self.vector.mean(dim=1)[:, None, None, None]


def analytic_denoiser(x: Tensor, sigma: Tensor, c: Prompt, scale: Tensor) -> Tensor:
    """D of the vectors' README; sigma and scale: [B]."""
    sigma, scale = sigma[:, None, None, None], scale[:, None, None, None]
    pulled = (x + sigma**2 * torch.tanh(scale * c.control + 0.3 * c.m)) / (1 + sigma**2)
    return pulled + 0.05 * c.v * torch.sin(x) + 0.1 * x.mean(dim=(2, 3), keepdim=True) / torch.sqrt(1 + sigma**2)


def analytic_network(x: Tensor, timestep: Tensor, c: Prompt, scale: Tensor) -> Tensor:
    """N of the vectors' README; timestep: [B], scale: [B, 1, 1, 1]."""
    t = (timestep / 1000)[:, None, None, None]
    out = 0.8 * x - 0.3 * (1 - t) * torch.tanh(scale * c.control + 0.3 * c.m)
    return out + 0.05 * c.v * torch.cos(3 * x) + 0.1 * t * x.mean(dim=(2, 3), keepdim=True)


def check_sampler(case: Case, measure: Measure) -> None:
    facts, t = case.facts, case.tensors
    guider = facts["guider"]
    tiled, dpm = facts["sampler"].startswith("Tiled"), "DPMPP2M" in facts["sampler"]
    x_center, control = t["x_center"], t["control"]
    settings = sampler_settings(facts, window=max(x_center.shape[-2:]))
    calls: list[tuple[float, float]] = []
    answers: list[Tensor] = []

    def guided(x: Tensor, sigma: Tensor, scale: Tensor, windows: Sequence[Window]) -> Tensor:
        calls.append((sigma[0].item(), scale[0].item()))
        crops = torch.stack([w.crop(control[w.item]) for w in windows])
        items = [w.item for w in windows]
        # several prompts: one per window of the only image
        own = windows[0].index if facts["n_cond"] > 1 else items
        cond = Prompt(
            torch.cat([t["uc_crossattn"][items], t["c_crossattn"][own]]),
            torch.cat([t["uc_vector"][items], t["c_vector"][own]]),
            crops.repeat(2, 1, 1, 1),
        )
        both, sigmas, scales = x.repeat(2, 1, 1, 1), sigma.repeat(2), scale.repeat(2)
        if facts["denoiser"] == "D":
            denoised = analytic_denoiser(both, sigmas, cond, scales)
        else:
            denoised = denoise(lambda a, b, c: analytic_network(a, b, cond, c), "epsilon", both, sigmas, scales)
        answers.append(guide(denoised, linear_cfg(guider["scale"], guider["scale_min"], sigma)))
        return answers[-1]

    def noise(item: int, draw: int) -> Tensor:
        # DPM++ draws none on its first step, so its record starts with the second
        drawn: Tensor = t["x_T_noise"][item] if draw == 0 else t["noise"][draw - 1 - dpm, item]
        return drawn

    if "karras_sigmas" in t:
        measure.close("Karras sigmas", karras_sigmas(settings.steps), t["karras_sigmas"], 0, 1e-6)
    else:
        measure.close("sigmas", legacy_sigmas(settings.steps), t["sigmas"], 0, 1e-6)
    if "tiles" in t:
        windows = windows_of(0, x_center.shape[2], x_center.shape[3], settings.window, settings.stride)
        corners = [[w.top, w.top + w.height, w.left, w.left + w.width] for w in windows]
        measure.equal("windows", corners, t["tiles"].tolist())

    together = 1 if tiled else len(x_center)
    recorded = t["x_after_step"]
    for step, latents in enumerate(trajectory(guided, list(x_center), noise, settings, together)):
        if facts["final_isnan"] and step == settings.steps - 1:
            # the release multiplies 0 by infinity here; the limit is the denoised itself
            measure.close("last step", torch.stack(latents), answers[-1], 1e-5)
        else:
            measure.close("x_after_step", torch.stack(latents), recorded[step], 3e-4)
    sigmas, scales = zip(*calls, strict=True)
    measure.close("sigma of calls", torch.tensor(sigmas), t["call_sigma"], 0, 1e-6)
    measure.close("control_scale of calls", torch.tensor(scales), t["call_control_scale"], 1e-6, 1e-6)


def check_bf16(case: Case, measure: Measure) -> None:
    """One run from a bfloat16 latent, whose sigmas became bfloat16; indices of both paths."""
    facts, t = case.facts, case.tensors
    x_center, control, guider = t["x_center"], t["control"], facts["guider"]
    cond = Prompt(
        torch.cat([t["uc_crossattn"], t["c_crossattn"]]),
        torch.cat([t["uc_vector"], t["c_vector"]]),
        control.repeat(2, 1, 1, 1),
    )
    calls: list[Tensor] = []

    def guided(x: Tensor, sigma: Tensor, scale: Tensor, _windows: Sequence[Window]) -> Tensor:
        calls.append(sigma[:1])
        both, sigmas, scales = x.repeat(2, 1, 1, 1), sigma.repeat(2), scale.repeat(2)
        denoised = denoise(lambda a, b, c: analytic_network(a, b, cond, c), "epsilon", both, sigmas, scales)
        return guide(denoised, linear_cfg(guider["scale"], guider["scale_min"], sigma))

    def noise(item: int, draw: int) -> Tensor:
        drawn: Tensor = t["x_T_noise_bf16"][item] if draw == 0 else t["noise"][draw - 1, item]
        return drawn.float()

    exact = EDMSettings(
        steps=facts["num_steps"],
        restoration_tau=facts["restore_cfg"] if facts["restore_cfg"] > 0 else None,
        churn=facts["s_churn"],
        noise=facts["s_noise"],
    )
    rounded = replace(exact, bfloat16_sigmas=True)
    centers = [center.float() for center in x_center]
    sigmas = legacy_sigmas(facts["num_steps"])
    measure.close("sigmas", sigmas, t["sigmas_fp32"].float(), 0, 1e-6)
    measure.equal("sigmas in bfloat16", sigmas.bfloat16().tolist(), t["sigmas_as_bf16"].tolist())

    *_, (latent,) = trajectory(guided, centers, noise, rounded)
    seen = torch.cat(calls)
    measure.equal("sigma of calls", seen.tolist(), t["sigma_hat_seen_by_denoiser"].tolist())
    measure.equal("timesteps in bfloat16", nearest_timestep(seen).tolist(), t["idx_bf16_path"].tolist())
    measure.close("last latent", latent[None], t["x_final"].float(), 1e-2)
    calls.clear()
    for _ in trajectory(guided, centers, noise, exact):
        pass
    measure.equal("timesteps in float32", nearest_timestep(torch.cat(calls)).tolist(), t["idx_fp32_path"].tolist())


def sampler_settings(facts: Json, window: int) -> SamplerSettings:
    parameters, call = facts["params"], facts["call"]
    window, stride = parameters.get("tile_size", window), parameters.get("tile_stride", window)
    if "DPMPP2M" in facts["sampler"]:
        # restore_cfg is recorded and was ignored
        return DPMPP2MSettings(
            steps=parameters["num_steps"],
            eta=parameters["eta"],
            noise=parameters["s_noise"],
            control_scale=call["control_scale"],
            window=window,
            stride=stride,
        )
    return EDMSettings(
        steps=parameters["num_steps"],
        restoration_tau=parameters["restore_cfg"] if parameters["restore_cfg"] > 0 else None,
        churn=parameters["s_churn"],
        noise=parameters["s_noise"],
        control_scale=call["control_scale"],
        control_scale_start=call["control_scale_start"] if call.get("use_linear_control_scale") else None,
        window=window,
        stride=stride,
    )


def check_windows(case: Case, measure: Measure) -> None:
    for facts in case.facts:
        windows = windows_of(0, facts["h"], facts["w"], facts["tile"], facts["stride"])
        corners = [[w.top, w.top + w.height, w.left, w.left + w.width] for w in windows]
        measure.equal("windows", corners, facts["windows"])


def check_window_weights(case: Case, measure: Measure) -> None:
    for name, wanted in case.tensors.items():
        match = re.fullmatch(r"gaussian_(\d+)x(\d+)_f64", name)
        assert match is not None, name
        measure.close("weights", window_weights(int(match[2]), int(match[1]))[None], wanted, 1e-12, 1e-9)


# --- noise levels, denoiser, guidance ------------------------------------------------------------------------------


def check_denoiser(case: Case, measure: Measure) -> None:
    t = case.tensors
    measure.close("table", sigma_table(), t["sigmas_table_1000"], 0, 1e-6)
    for name, wanted in t.items():
        if match := re.fullmatch(r"sigmas_n(\d+)", name):
            measure.close("schedules", legacy_sigmas(int(match[1])), wanted, 0, 1e-6)
        elif match := re.fullmatch(r"timesteps_n(\d+)", name):
            measure.equal("timesteps", nearest_timestep(legacy_sigmas(int(match[1]))[:-1]).tolist(), wanted.tolist())

    x, sigma = t["x"], t["sigma_in"]
    index = nearest_timestep(sigma)
    measure.equal("timestep of sigma", index.tolist(), t["sigma_idx"].tolist())
    measure.close("quantized sigma", sigma_table()[index], t["sigma_quantized"], 0, 1e-6)

    seen: dict[str, Tensor] = {}

    def recording(answer: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def network(x_in: Tensor, timestep: Tensor, _scale: Tensor) -> Tensor:
            seen.update(x_in=x_in, timestep=timestep)
            return answer

        return network

    one = torch.ones_like(sigma)
    column = (slice(None), None, None, None)
    skipped = denoise(recording(torch.zeros_like(x)), "epsilon", x, sigma, one)
    measure.close("c_in", seen["x_in"], x * t["c_in"][column], 1e-6, 1e-6)
    measure.equal("c_noise", seen["timestep"].tolist(), t["c_noise_idx"].tolist())
    measure.close("c_skip", skipped, x * t["c_skip"][column], 1e-6, 1e-6)
    pushed = denoise(recording(torch.ones_like(x)), "epsilon", torch.zeros_like(x), sigma, one)
    measure.close("c_out", pushed, t["c_out"][column].expand_as(x), 1e-6, 1e-6)

    cond = Prompt(t["cond_crossattn"], t["cond_vector"], t["cond_control"])
    for name, wanted in t.items():
        if match := re.fullmatch(r"denoised_cs([\d.]+)", name):
            out = denoise(lambda a, b, c: analytic_network(a, b, cond, c), "epsilon", x, sigma, one * float(match[1]))
            measure.close("denoised", out, wanted, 1e-4, 1e-5)
        elif match := re.fullmatch(r"linear_cfg_scale([\d.]+)_min([\d.]+)", name):
            measure.close("guidance scale", linear_cfg(float(match[1]), float(match[2]), sigma), wanted, 1e-6, 1e-6)
        elif match := re.fullmatch(r"linear_cfg_out_scale([\d.]+)_min([\d.]+)", name):
            scale = linear_cfg(float(match[1]), float(match[2]), sigma[: len(wanted)])
            measure.close("guided", guide(t["linear_cfg_in"], scale), wanted, 1e-4, 1e-5)


# --- conditioning --------------------------------------------------------------------------------------------------


def text_config(recorded: Json, keys: Mapping[str, Sequence[int]]) -> TextConfig:
    """Widths and heads are recorded; CLIP-L's depth and the vocabulary's size follow from the keys."""
    prefix = "conditioner.embedders.0.transformer.text_model."
    layers = {key.split(".")[7] for key in keys if key.startswith(f"{prefix}encoder.layers.")}
    vocabulary, _ = keys[f"{prefix}embeddings.token_embedding.weight"]
    length, _ = keys[f"{prefix}embeddings.position_embedding.weight"]
    return TextConfig(
        "sdxl",
        length,
        (
            TowerConfig(recorded["l_hidden"], len(layers), recorded["l_heads"]),
            TowerConfig(recorded["g_width"], recorded["g_layers"], recorded["g_heads"], recorded["g_embed"]),
        ),
        vocabulary,
        recorded["outdim"],
    )


def recorded_words(folder: Path) -> Words:
    """A vocabulary of just the recorded prompts: CLIP's own is not shipped.

    A prompt with the suffix behind it reads as both one after the other, where it ends in a mark and not in a word.
    """
    known: dict[str, list[int]] = {}
    suffixes: list[str] = []
    for path in folder.glob("*.json"):
        facts = json.loads(path.read_text())
        if "cond_prompts" not in facts:
            continue
        suffix = facts["positive_default_scripts"]
        suffixes.append(suffix)
        prompts = [*facts["prompts"], suffix, facts["negative_default_scripts"], facts["prompts"][0] + suffix]
        rows = load_file(path.with_suffix(".safetensors"))["tokens_clip_l"].tolist()
        for prompt, row in zip(prompts, rows, strict=True):
            known[prompt] = row[1 : row.index(row[-1])]  # rows end in the end mark, padding or not

    def words(prompt: str) -> list[int]:
        if prompt in known:
            return known[prompt]
        for suffix in suffixes:
            caption = prompt.removesuffix(suffix)
            if caption != prompt and caption in known and not caption[-1].isalnum():
                return known[caption] + known[suffix]
        raise AssertionError(f"no recorded tokens for the prompt {prompt!r}")

    return words


def check_conditioning(case: Case, measure: Measure) -> None:
    facts, t = case.facts, case.tensors
    text = text_config(facts["text_config"], case.keys)
    with torch.device("meta"):
        encoder = SDXLTextEncoder(text)
    fill(nn.ModuleDict({"text": encoder}), case.keys, replace(V0Q, text=text))
    encoder.fill_positions()
    encoder.words = recorded_words(case.folder)
    tolerance = 1e-5

    prompts, suffix, negative = facts["prompts"], facts["positive_default_scripts"], facts["negative_default_scripts"]
    ids_l, ids_bigg = encoder.tokenize([*prompts, suffix, negative, prompts[0] + suffix])
    measure.equal("CLIP-L tokens", ids_l.tolist(), t["tokens_clip_l"].tolist())
    measure.equal("bigG tokens", ids_bigg.tolist(), t["tokens_bigg"].tolist())

    context, vector = encoder(prompts)
    clip_l, bigg = (tower.width for tower in text.towers)
    measure.close("CLIP-L hidden state", context[..., :clip_l], t["clip_l_hidden11"], tolerance)
    measure.close("bigG hidden state", context[..., clip_l : clip_l + bigg], t["bigg_penultimate"], tolerance)
    measure.close("bigG pooled", vector[:, : text.towers[1].projection], t["bigg_pooled"], tolerance)

    context, vector = encoder([prompt + suffix for prompt in facts["cond_prompts"]])
    uncond_context, uncond_vector = encoder([negative] * len(facts["cond_prompts"]))
    measure.close("crossattn", context, t["c_crossattn"], tolerance)
    measure.close("crossattn", uncond_context, t["uc_crossattn"], tolerance)
    measure.close("crossattn", torch.cat([uncond_context, context]), t["batched_crossattn"], tolerance)
    measure.close("vector", vector, t["c_vector"], tolerance)
    measure.close("vector", uncond_vector, t["uc_vector"], tolerance)
    measure.close("vector", torch.cat([uncond_vector, vector]), t["batched_vector"], tolerance)
    for i, prompt in enumerate(facts["local_prompts"]):
        measure.close("local crossattn", encoder([prompt + suffix])[0], t[f"local_c{i}_crossattn"], tolerance)
    measure.close("local crossattn", uncond_context[:1], t["local_uc_crossattn"], tolerance)
    for name, wanted in t.items():
        if match := re.fullmatch(r"size_embed_(\d+)_(\d+)_outdim(\d+)", name):
            sizes = torch.tensor([float(match[1]), float(match[2])])
            measure.close("size embedding", sinusoid(sizes, int(match[3])).flatten()[None], wanted, SINUSOID)

    config = MODELS["v0Q"]
    measure.equal("positive suffix", config.positive_prompt, suffix)
    measure.equal("negative prompt", config.negative_prompt, negative)


# --- color ---------------------------------------------------------------------------------------------------------


def check_color(case: Case, measure: Measure) -> None:
    t, tolerance = case.tensors, 1e-5
    high, low = decompose(t["content"])
    measure.close("bands", high, t["content_high"], tolerance)
    measure.close("bands", low, t["content_low"], tolerance)
    measure.close("wavelet", wavelet(t["content"], t["style"]), t["wavelet"], tolerance)
    measure.close("AdaIN", adain(t["content"], t["style"]), t["adain"], tolerance)


# --- whole model ---------------------------------------------------------------------------------------------------


class ReplayingModel(model.SupirModel):
    """The model with recorded noise: the posterior's, then the sampler's first, then one per step."""

    draws: Sequence[Tensor]

    def _noise(self, request: model.Request, draw: int, size: torch.Size) -> Tensor:
        noise = self.draws[draw][0]
        assert noise.shape[-2:] == size
        return noise


def e2e_config(case: Case) -> ModelConfig:
    facts = case.facts
    return replace(
        V0Q,
        unet=unet_config(facts["net"]),
        control=control_config(facts["net"]),
        vae=vae_config(facts["vae_ddconfig"], V0Q.vae.scale),
        text=text_config(facts["text_config"], case.keys),
    )


def check_e2e(case: Case, measure: Measure) -> None:
    config = e2e_config(case)
    networks = build_on_meta(config)
    fill(networks, case.keys, config)
    compare_e2e(case, measure, ReplayingModel(networks, config, torch.device("cpu")))


def compare_e2e(case: Case, measure: Measure, supir: ReplayingModel) -> None:
    """Restore the recorded image with the recorded noise and tokens; compare every recorded step."""
    facts, run, networks = case.facts, case.facts["run"], supir.networks
    t = {key.removeprefix(f"{run}_"): value for key, value in case.tensors.items() if key.startswith(f"{run}_")}
    networks.text.words = recorded_words(case.folder)
    supir.draws = [t[f"draw{i}"] for i in range(facts["n_draws"])]

    (prompt,) = facts["prompts"]
    window_prompts = tuple(p + facts["positive"] for p in prompt) if isinstance(prompt, list) else ()
    request = model.Request(
        image=case.tensors["image"][0],
        prompt="" if window_prompts else prompt + facts["positive"],
        negative_prompt=facts["negative"],
        seed=0,
        window_prompts=window_prompts,
    )
    seen: dict[str, Tensor] = {}

    def remember(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*arguments: Any) -> Tensor:
            seen[name] = function(*arguments)
            return seen[name]

        return wrapped

    def fix_color(content: Tensor, style: Tensor, method: Any) -> Tensor:
        seen.update(content=content, style=style, out=original(content, style, method))
        return seen["out"]

    original = model.fix_color
    vae = networks.vae
    with (
        patch.object(vae, "encode_robust", remember("z_lq", vae.encode_robust)),
        patch.object(vae, "encode", remember("z_center", vae.encode)),
        patch.object(model, "fix_color", fix_color),
    ):
        (restored,) = supir.restore([request], e2e_sampling(facts, max(t["z_lq"].shape[-2:])))
    tolerance = 2e-4
    measure.close("z_lq", seen["z_lq"], t["z_lq"], tolerance)
    measure.close("stage-1 image", seen["style"], t["stage1_image"], tolerance)
    measure.close("z_center", seen["z_center"], t["z_center"], tolerance)
    measure.close("decoded", seen["content"], t["decoded_before_colorfix"], tolerance)
    measure.close("out", seen["out"], t["out"], tolerance)
    measure.close("restored (clipped)", restored, t["out"][0].clamp(-1, 1), tolerance)


def e2e_sampling(facts: Json, window: int) -> model.Sampling:
    arguments = facts["args"]
    window, stride = facts["tiled"] or (window, window)
    tau = arguments["restoration_scale"]
    edm = EDMSettings(
        steps=arguments["num_steps"],
        restoration_tau=tau if tau > 0 else None,
        churn=arguments["s_churn"],
        noise=arguments["s_noise"],
        control_scale=arguments.get("control_scale", 1.0),
        control_scale_start=arguments["control_scale_start"] if arguments.get("use_linear_control_scale") else None,
        window=window,
        stride=stride,
    )
    cfg_end = arguments["cfg_scale"]
    cfg_start = arguments["cfg_scale_start"] if arguments.get("use_linear_CFG") else cfg_end
    return model.Sampling(edm, cfg_start, cfg_end, arguments["color_fix_type"].lower())


# --- published files -----------------------------------------------------------------------------------------------

_SUPIR_PREFIXES = (
    "model.control_model.",
    "model.diffusion_model.project_modules.",
    "first_stage_model.denoise_encoder.",
)


@dataclass(frozen=True)
class Published:
    """The recorded models' weights in files, laid out as SDXL and SUPIR publish theirs."""

    config: ModelConfig
    base: dict[str, Tensor]
    supir: dict[str, Tensor]
    tokenizer: Path

    def write(self, form: str, folder: Path) -> Path | weights.Checkpoint:
        """What to give to ``SupirModel.load`` for one form of the files."""
        base, supir = folder / "sdxl.safetensors", folder / "SUPIR.ckpt"
        if form == "fp16":
            save_file({key: value.half() for key, value in self.base.items()}, base)
            torch.save({key: value.half() for key, value in self.supir.items()}, supir)
        elif form == "diffusers folder":
            base = folder / "sdxl"
            self._write_diffusers(base)
            torch.save(self.supir, supir)
        else:
            save_file(self.base, base)
            torch.save({"state_dict": self.supir} if form == "wrapped ckpt" else self.supir, supir)
        if form == "safetensors":
            supir = folder / "SUPIR.safetensors"
            save_file(self.supir, supir)
        checkpoint = weights.Checkpoint(self.config, base, supir, None if base.is_dir() else self.tokenizer)
        if form == "converted":
            convert(checkpoint, folder / "model")
            return folder / "model"
        return checkpoint

    def _write_diffusers(self, base: Path) -> None:
        """By the libraries' own writers."""
        networks = build_on_meta(self.config)
        state = from_released({**self.base, **self.supir}, networks.state_dict(), self.config)
        networks.load_state_dict(state, assign=True)
        vae = networks.vae.autoencoder
        vae.encoder = networks.vae.encoder
        vae.save_pretrained(base / "vae")
        networks.unet.base.save_pretrained(base / "unet")
        networks.text.clip_l.save_pretrained(base / "text_encoder")
        networks.text.bigg.save_pretrained(base / "text_encoder_2")
        shutil.copytree(self.tokenizer, base / "tokenizer")


def published(case: Case, folder: Path) -> Published:
    tokenizer = folder / "clip"
    tokenizer.mkdir()
    ends = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (tokenizer / "vocab.json").write_text(json.dumps(ends))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    every = {key: weight(key, shape) for key, shape in case.keys.items()}
    supir = {key: value for key, value in every.items() if key.startswith(_SUPIR_PREFIXES)}
    base = {key: value for key, value in every.items() if key not in supir}
    supir["model.control_model.mask_LQ"] = torch.zeros(1, 4, 64, 64)
    base["denoiser.sigmas"] = sigma_table().clone()
    return Published(e2e_config(case), base, supir, tokenizer)


def whole_model_cases(request: pytest.FixtureRequest) -> list[Case]:
    folder = request.config.getoption("--vectors")
    cases = [case for case in find_cases(folder) if case.kind == "e2e"] if folder.is_dir() else []
    if not cases:
        pytest.skip(f"no recorded whole model in {folder}: loading published files is not compared; use --vectors")
    return cases


@pytest.mark.parametrize("form", ["ckpt", "wrapped ckpt", "safetensors", "diffusers folder", "converted"])
@torch.inference_mode()
def test_published_files_give_the_recorded_images(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    cases = whole_model_cases(request)
    supir = ReplayingModel.load(published(cases[0], tmp_path).write(form, tmp_path), "cpu")
    assert supir.networks.text.words("a") == [2]  # the folder's vocabulary; the recorded tokens take its place
    for case in cases if form in ("ckpt", "safetensors") else cases[:1]:
        measure = Measure(f"{_name(case)} from {form}")
        compare_e2e(case, measure, supir)
        assert not measure.failures, f"{measure.name}: " + "; ".join(measure.failures)


def test_half_precision_files_give_the_rounded_weights(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case = whole_model_cases(request)[0]
    files = published(case, tmp_path)
    state = model.SupirModel.load(files.write("fp16", tmp_path), "cpu").networks.state_dict()
    rounded = {key: value.half().float() for key, value in {**files.base, **files.supir}.items()}
    wanted = from_released(rounded, state, files.config)
    assert state.keys() == wanted.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, wanted[key]) for key, value in state.items())


_LOAD = """
import sys, torch
from pathlib import Path
from supir_model import folder, weights
from supir_model.model import SupirModel

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

tokenizer, config, base, supir = map(Path, sys.argv[1:])
config = folder.read_description(config.read_text(), "config").model
before = peak()
model = SupirModel.load(weights.Checkpoint(config, base, supir, tokenizer), "cpu")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("form", "copies"), [("ckpt", 1.7), ("safetensors", 1.7)])
def test_loading_holds_little_more_than_one_copy(
    form: str, copies: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    files = published(whole_model_cases(request)[0], tmp_path)
    checkpoint = files.write(form, tmp_path)
    assert isinstance(checkpoint, weights.Checkpoint)
    described = model_folder.to_text(model_folder.Description(model_folder.FORMAT, files.config, ()))
    (tmp_path / "config.json").write_text(described)
    arguments = [files.tokenizer, tmp_path / "config.json", checkpoint.base, checkpoint.supir]
    command = [sys.executable, "-c", _LOAD, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    size = checkpoint.base.stat().st_size + checkpoint.supir.stat().st_size
    print(f"peak memory {int(ran.stdout) / size:.2f} of the files' {size} bytes")
    assert int(ran.stdout) < copies * size


# --- names and shapes ----------------------------------------------------------------------------------------------


def check_weight_rule(case: Case, measure: Measure) -> None:
    """The rule itself: where this fails, the processor's normal numbers differ and the rest cannot agree."""
    t = case.tensors
    for key, facts in case.facts.items():
        values = weight(key, facts["shape"])
        measure.close("first values", values.flatten()[: t[key].numel()], t[key], 1e-6)
        measure.close("sums", values.double().sum(), torch.tensor(facts["sum_f64"], dtype=torch.float64), 1e-3)


def check_full_keys(case: Case, measure: Measure) -> None:
    """Every key and shape of the full-size released files, both directions, and the parameter counts."""
    recorded = {key: facts["shape"] for key, facts in case.facts["keys"].items()}
    extra = case.facts["extra_reported_in_released_supir_ckpt"]
    components = case.facts["components"]
    for name in ("v0Q", "v0F"):
        config = MODELS[name]
        networks = build_on_meta(config)
        ours = networks.state_dict()
        released = {key: list(value.shape) for key, value in to_released(ours, config).items()}
        measure.equal("released keys and shapes", released, {k: s for k, s in recorded.items() if k not in IGNORED})
        meta = {key: torch.empty(shape, device="meta") for key, shape in {**recorded, **extra}.items()}
        found = {key: value.shape for key, value in from_released(meta, ours, config).items()}
        measure.equal("our keys and shapes", found, {key: value.shape for key, value in ours.items()})

        counted = {component: 0 for component in components}
        for key, value in to_released(ours, config).items():
            counted[case.facts["keys"][key]["component"]] += value.numel()
        counted["clip_bigg"] += 1  # logit_scale, of which we have no use
        measure.equal("parameters", counted, {component: facts["params"] for component, facts in components.items()})


_CHECKS: dict[str, Callable[[Case, Measure], None]] = {
    "bf16": check_bf16,
    "color": check_color,
    "conditioning": check_conditioning,
    "denoiser": check_denoiser,
    "e2e": check_e2e,
    "full_keys": check_full_keys,
    "image_io": check_image_io,
    "net": check_net,
    "sampler": check_sampler,
    "sizes": check_sizes,
    "units": check_units,
    "vae": check_vae,
    "vae_tiled": check_vae_tiled,
    "weight_rule": check_weight_rule,
    "window_weights": check_window_weights,
    "windows": check_windows,
}
