"""Agreement with the released program, number by number, on every file of a folder of recorded vectors.

Nothing here knows the files' widths, steps or names: what a file is follows from what is in it, so that another folder of
the same format (``--vectors DIR``) runs as it is. Weights are a function of their released name (``weight``).
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from supir_model import weights
from supir_model.checkpoint_keys import from_released, origin, to_released
from supir_model.config import V0Q, ControlConfig, ModelConfig, UNetConfig, VAEConfig
from supir_model.control import ControlEncoder
from supir_model.denoiser import denoise, guide, linear_cfg
from supir_model.sampler import EDMSettings, Window, sample_edm
from supir_model.unet import ControlledUNet, build_sdxl_unet, embed
from supir_model.vae import RobustVAE
from supir_model.zero_sft import ZeroCrossAttn, ZeroSFT

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


def find_cases(folder: Path) -> Iterator[Case]:
    """Everything in the folder this module knows how to check."""
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".keys.json"):
            continue
        facts, stem = json.loads(path.read_text()), path.stem
        if "ddconfig" in facts:
            yield Case("vae", folder, stem, facts)
        elif "modules" in facts:
            yield Case("units", folder, stem, facts)
        elif "config" in facts and "control" in facts["config"]:
            yield Case("net", folder, stem, facts)
        elif isinstance(facts, dict) and all(isinstance(v, dict) and "sampler" in v for v in facts.values()):
            for name, run in facts.items():
                yield Case("sampler", folder, f"sampler_{name}", run)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder: Path = metafunc.config.getoption("--vectors")
        cases = list(find_cases(folder)) if folder.is_dir() else []
        metafunc.parametrize("case", cases or [None], ids=[c.stem for c in cases] or ["absent"])


# --- measuring -----------------------------------------------------------------------------------------------------

_measured: dict[tuple[str, str], tuple[float, float]] = {}


@dataclass
class Measure:
    """Compares, remembers the largest difference per (file, quantity), and fails at the end with all that are too large."""

    stem: str
    failures: list[str]

    def close(self, quantity: str, got: Tensor, wanted: Tensor, atol: float, rtol: float = 0.0) -> None:
        assert got.shape == wanted.shape, f"{self.stem} {quantity}: shape {list(got.shape)}, recorded {list(wanted.shape)}"
        difference = (got.double() - wanted.double()).abs()
        excess = (difference - rtol * wanted.double().abs()).max().item()
        largest = difference.max().item()
        known, _ = _measured.get((self.stem, quantity), (0.0, atol))
        _measured[self.stem, quantity] = (max(known, largest), atol)
        if not excess <= atol:  # NaN is a failure, too
            self.failures.append(f"{quantity}: {largest:.3g} away, allowed {atol:g} + {rtol:g} relative")

    def equal(self, quantity: str, got: object, wanted: object) -> None:
        _measured.setdefault((self.stem, quantity), (0.0, 0.0))
        if got != wanted:
            self.failures.append(f"{quantity}: got {got}, recorded {wanted}")


@pytest.fixture(scope="module", autouse=True)
def _table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    target = request.config.getoption("--parity-table")
    if target is not None:
        rows = [f"| {stem} | {quantity} | {got:.1e} | {atol:g} |" for (stem, quantity), (got, atol) in _measured.items()]
        target.write_text("\n".join(["| file | quantity | measured | allowed |", "|---|---|---|---|", *rows, ""]))


@torch.inference_mode()
def test_vectors(case: Case | None, request: pytest.FixtureRequest) -> None:
    if case is None:
        pytest.skip(
            f"no recorded vectors in {request.config.getoption('--vectors')}: networks, samplers, VAE, conditioning and "
            "color fixes are not compared with the released program; give the folder with --vectors"
        )
    measure = Measure(case.stem, [])
    _CHECKS[case.kind](case, measure)
    for (stem, quantity), (got, atol) in _measured.items():
        if stem == case.stem:
            print(f"{stem:45} {quantity:28} {got:.1e} of {atol:g}")
    assert not measure.failures, f"{case.stem}: " + "; ".join(measure.failures)


# --- weights -------------------------------------------------------------------------------------------------------


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """The recorded models' weight of a released name: normal numbers seeded by the name, scaled by fan-in."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    values = torch.randn(list(shape), generator=generator)
    if len(shape) >= 2:
        return values / math.sqrt(values.numel() / shape[0])
    return 1 + 0.1 * values if key.endswith(".weight") else 0.1 * values


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
            {"control": ControlEncoder(config.unet, config.control), "unet": ControlledUNet(config.unet, config.control)}
        )
    fill(networks, case.keys, config)
    control, unet = networks["control"], networks["unet"]
    t = case.tensors
    context, vector, latent = t["context"], t["y"], t["lq_latent"]

    measure.close("t_sinusoid", unet.base.time_proj(t["timesteps"]), t["t_sinusoid"], 1e-6)
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
    config = replace(V0Q, unet=replace(V0Q.unet, channels=(narrow, narrow, wide), resblocks=1, transformer_depth=(0, 0, 1)))

    def unit(path: str, name: str) -> nn.Module:
        return fill_unit(unet.get_submodule(path), f"unet.base.{path}", modules[name]["prefix"], config)

    block = unit("down_blocks.2.resnets.0", "resblock")
    measure.close("resblock", block(t["resblock_x"], t["resblock_emb"]), t["resblock_out"], tolerance)
    block = unit("down_blocks.2.attentions.0", "spatial_transformer")
    out = block(
        t["spatial_transformer_x"], encoder_hidden_states=t["spatial_transformer_context"], return_dict=False
    )[0]
    measure.close("spatial_transformer", out, t["spatial_transformer_out"], tolerance)
    measure.close("unet_down", unit("down_blocks.0.downsamplers.0", "unet_down")(t["unet_down_x"]), t["unet_down_out"], tolerance)
    if "unet_up_x" not in t:  # same input as the other direction
        t = {**t, "unet_up_x": t["unet_down_x"], "vae_up_x": t["vae_down_x"]}
    measure.close("unet_up", unit("up_blocks.1.upsamplers.0", "unet_up")(t["unet_up_x"]), t["unet_up_out"], tolerance)

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
        block, x = vae_unit(path, name), t[f"{name}_x"]
        out = block(x, None) if name == "vae_resnet" else block(x)
        measure.close(name, out, t[f"{name}_out"], tolerance)


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
    parameters, call, guider = facts["params"], facts["call"], facts["guider"]
    tiled = facts["sampler"].startswith("Tiled")
    x_center, control = t["x_center"], t["control"]
    side = max(x_center.shape[-2:])
    settings = EDMSettings(
        steps=parameters["num_steps"],
        restoration_tau=parameters["restore_cfg"] if parameters["restore_cfg"] > 0 else None,
        churn=parameters["s_churn"],
        noise=parameters["s_noise"],
        control_scale=call["control_scale"],
        control_scale_start=call["control_scale_start"] if call.get("use_linear_control_scale") else None,
        window=parameters["tile_size"] if tiled else side,
        stride=parameters["tile_stride"] if tiled else side,
    )

    def guided(x: Tensor, sigma: Tensor, scale: Tensor, windows: Sequence[Window]) -> Tensor:
        crops = torch.stack([w.crop(control[w.item]) for w in windows])
        items = [w.item for w in windows]
        cond = Prompt(
            torch.cat([t["uc_crossattn"][items], t["c_crossattn"][items]]),
            torch.cat([t["uc_vector"][items], t["c_vector"][items]]),
            crops.repeat(2, 1, 1, 1),
        )
        both, sigmas, scales = x.repeat(2, 1, 1, 1), sigma.repeat(2), scale.repeat(2)
        if facts["denoiser"] == "D":
            denoised = analytic_denoiser(both, sigmas, cond, scales)
        else:
            denoised = denoise(lambda a, b, c: analytic_network(a, b, cond, c), "epsilon", both, sigmas, scales)
        return guide(denoised, linear_cfg(guider["scale"], guider["scale_min"], sigma))

    def noise(item: int, draw: int) -> Tensor:
        drawn: Tensor = t["x_T_noise"][item] if draw == 0 else t["noise"][draw - 1, item]
        return drawn

    final = sample_edm(guided, list(x_center), noise, settings)
    measure.close("x_final", torch.stack(final), t["x_final"], 3e-4)


_CHECKS: dict[str, Callable[[Case, Measure], None]] = {
    "net": check_net,
    "units": check_units,
    "vae": check_vae,
    "sampler": check_sampler,
}
