"""Published files that do not fit, and what a LoRA and a conversion make of those that do."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from supir_model import folder, weights
from supir_model.checkpoint_keys import to_released
from supir_model.config import V0Q, ControlConfig, TextConfig, TowerConfig, UNetConfig, VAEConfig
from supir_model.convert import convert
from supir_model.errors import WeightsError
from supir_model.model import SupirModel
from supir_model.networks import Networks
from supir_model.weights import Checkpoint, Lora

SMALL = replace(
    V0Q,
    vae=VAEConfig((8, 16), 1, 4, 4, mid_attention=True, scale=0.13025),
    unet=UNetConfig(4, (16, 32), 1, (0, 1), 16, context_dim=20, vector_dim=22, norm_groups=8),
    control=ControlConfig((0, 1), hidden=8, norm_groups=8, attention_head_dim=16, attention_levels=(1,)),
    text=TextConfig("sdxl", 8, (TowerConfig(8, 2, 2), TowerConfig(12, 3, 2, projection=10)), 32, size_embedding=2),
)
SUPIR = ("model.control_model.", "model.diffusion_model.project_modules.", "first_stage_model.denoise_encoder.")


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {key: value.contiguous() for key, value in to_released(Networks(SMALL).state_dict(), SMALL).items()}


@pytest.fixture
def files(tmp_path: Path, released: dict[str, Tensor]) -> Checkpoint:
    base = {key: value for key, value in released.items() if not key.startswith(SUPIR)}
    save_file(base, tmp_path / "sdxl.safetensors")
    torch.save({key: value for key, value in released.items() if key not in base}, tmp_path / "SUPIR.ckpt")
    (tmp_path / "clip").mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\n")
    return Checkpoint(SMALL, tmp_path / "sdxl.safetensors", tmp_path / "SUPIR.ckpt", tmp_path / "clip")


def refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(WeightsError) as caught:
        SupirModel.load(checkpoint, "cpu")
    return str(caught.value)


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_named_as_in_the_files_ten_at_most(files: Checkpoint) -> None:
    supir = torch.load(files.supir, weights_only=True)
    renamed = {f"other.{key}": value for key, value in supir.items()}
    torch.save({**renamed, "model.control_model.mask_LQ": torch.zeros(1)}, files.supir)
    message = refusal(files)
    assert message.startswith("weights file sdxl.safetensors with SUPIR.ckpt does not fit the network; ")
    missing, unexpected = message.split("; ")[1:]
    assert missing.startswith(f"{len(supir)} missing: first_stage_model.denoise_encoder.conv_in.bias, ")
    assert unexpected.startswith(f"{len(supir)} unexpected: other.first_stage_model.denoise_encoder.conv_in.bias, ")
    assert len(missing.split(", ")) == len(unexpected.split(", ")) == 10
    assert "mask_LQ" not in message


def test_another_shape_is_named(files: Checkpoint) -> None:
    supir = torch.load(files.supir, weights_only=True)
    torch.save({**supir, "model.control_model.input_hint_block.0.bias": torch.zeros(7)}, files.supir)
    assert "1 of another shape: model.control_model.input_hint_block.0.bias" in refusal(files)


def test_two_files_must_not_hold_the_same_weight(files: Checkpoint) -> None:
    base = load_file(files.base)
    supir = torch.load(files.supir, weights_only=True)
    torch.save({**supir, "model.diffusion_model.out.2.bias": base["model.diffusion_model.out.2.bias"]}, files.supir)
    assert "both hold 1 weights: model.diffusion_model.out.2.bias" in refusal(files)


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("form", ["torch", "state_dict", "bare pickle"])
@pytest.mark.parametrize("name", ["SUPIR.ckpt", "SUPIR.pth", "SUPIR.safetensors"])
def test_a_malicious_checkpoint_is_refused_and_nothing_of_it_runs(
    files: Checkpoint, tmp_path: Path, name: str, form: str
) -> None:
    bomb = {"model.control_model.input_hint_block.0.bias": Bomb(tmp_path / "ran")}
    path = tmp_path / name
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"state_dict": bomb} if form == "state_dict" else bomb, path)
    message = refusal(replace(files, supir=path))
    assert name in message
    assert "cannot be read" in message
    assert not (tmp_path / "ran").exists()
    if path.suffix != ".safetensors":  # the bomb is live: read without care, it goes off
        loads = pickle.loads(path.read_bytes()) if form == "bare pickle" else torch.load(path, weights_only=False)
        assert loads
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("which", ["base", "supir"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(files: Checkpoint, which: str, share: float) -> None:
    path: Path = getattr(files, which)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert f"weights file {path.name} cannot be read" in refusal(files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "SUPIR.ckpt holds list, expected tensors by name"),
        ({"epoch": 3}, "SUPIR.ckpt holds more than tensors: epoch"),
        ({1: torch.zeros(1)}, "SUPIR.ckpt holds dict, expected tensors by name"),
    ],
)
def test_what_is_no_state_dict_is_refused(files: Checkpoint, content: object, message: str) -> None:
    torch.save(content, files.supir)
    assert message in refusal(files)


def test_files_that_are_not_there_or_of_no_known_kind(files: Checkpoint, tmp_path: Path) -> None:
    assert "none.ckpt cannot be read" in refusal(replace(files, supir=tmp_path / "none.ckpt"))
    assert "unknown extension" in refusal(replace(files, supir=tmp_path / "SUPIR.bin"))
    assert "holds no CLIP vocabulary" in refusal(replace(files, tokenizer=None))
    (tmp_path / "clip" / "merges.txt").unlink()
    assert "merges.txt not found" in refusal(files)
    (tmp_path / "sdxl").mkdir()
    assert "unet/diffusion_pytorch_model.safetensors not found" in refusal(replace(files, base=tmp_path / "sdxl"))


def test_a_list_of_shards_cannot_lead_out_of_its_folder(files: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "sdxl" / "unet").mkdir(parents=True)
    index = {"weight_map": {"conv_in.weight": "../../sdxl.safetensors"}}
    (tmp_path / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "shards outside its folder" in refusal(replace(files, base=tmp_path / "sdxl"))


# --- identity ------------------------------------------------------------------------------------------------------


def test_every_file_and_scale_is_part_of_the_identity(files: Checkpoint, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "l.safetensors")
    adapted = replace(files, loras=(Lora(tmp_path / "l.safetensors"),))
    variants = [files, adapted, replace(adapted, loras=(Lora(tmp_path / "l.safetensors", 0.5),))]
    variants.append(replace(files, config=replace(SMALL, prediction="v")))
    found = {weights.identity(variant) for variant in variants}
    assert weights.identity(files) in found
    for path in (files.base, files.supir, tmp_path / "clip" / "vocab.json", tmp_path / "clip" / "merges.txt"):
        with path.open("ab") as file:
            file.write(b"x")
        found.add(weights.identity(files))
    assert len(found) == 8


# --- conversion ----------------------------------------------------------------------------------------------------


def test_a_converted_folder_is_the_same_model(files: Checkpoint, tmp_path: Path) -> None:
    checksums = convert(files, tmp_path / "model")
    original = SupirModel.load(files, "cpu")
    again = SupirModel.load(tmp_path / "model", "cpu")
    assert again.networks.text.words is not None
    state, wanted = again.networks.state_dict(), original.networks.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in state.items())
    assert replace(again.config, display_name="") == replace(SMALL, display_name="")
    assert again.config.display_name == "SUPIR v0Q on sdxl"
    assert weights.identity(tmp_path / "model") == checksums.identity
    card = (tmp_path / "model" / "README.md").read_text()
    assert checksums.identity in card
    assert weights.sha256(files.supir) in card
    assert "accept_license: supir-noncommercial" in card


def test_the_same_files_give_the_same_bytes(files: Checkpoint, tmp_path: Path) -> None:
    assert convert(files, tmp_path / "a") == convert(files, tmp_path / "b")
    assert convert(files, tmp_path / "c", "float16").identity != convert(files, tmp_path / "d").identity


def test_conversion_never_overwrites_and_leaves_nothing_behind(files: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(WeightsError, match="exists and is not overwritten"):
        convert(files, tmp_path / "model")
    files.supir.write_bytes(b"")
    with pytest.raises(WeightsError):
        convert(files, tmp_path / "other")
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


@pytest.mark.parametrize("name", [folder.WEIGHTS, f"{folder.TOKENIZER}/vocab.json"])
def test_a_folder_whose_files_changed_size_is_refused(files: Checkpoint, tmp_path: Path, name: str) -> None:
    convert(files, tmp_path / "model")
    with (tmp_path / "model" / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(WeightsError, match=rf"model folder model: {name} has \d+ bytes, recorded are \d+"):
        SupirModel.load(tmp_path / "model", "cpu")


def test_a_folder_that_is_none_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is no model folder"):
        SupirModel.load(tmp_path, "cpu")
    with pytest.raises(WeightsError, match="'v0Q' is not in the package"):
        SupirModel.load("v0Q", "cpu")


# --- LoRA ----------------------------------------------------------------------------------------------------------

UNET_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def pair(width: int, down: str, up: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        down: torch.randn(2, width, generator=generator),
        up: torch.randn(width, 2, generator=generator),
    }


def diffusers_lora() -> dict[str, Tensor]:
    tower = "encoder.layers.1.self_attn.out_proj"
    return {
        **pair(32, f"unet.{UNET_LAYER}.lora_A.weight", f"unet.{UNET_LAYER}.lora_B.weight"),
        **pair(8, *(f"text_encoder.text_model.{tower}.lora_{x}.weight" for x in "AB")),
        **pair(12, *(f"text_encoder_2.text_model.{tower}.lora_{x}.weight" for x in "AB")),
    }


def kohya_lora() -> dict[str, Tensor]:
    unet = f"lora_unet_{UNET_LAYER.replace('.', '_')}"
    tower = "text_model_encoder_layers_1_self_attn_out_proj"
    found: dict[str, Tensor] = {}
    for width, name in [(32, unet), (8, f"lora_te1_{tower}"), (12, f"lora_te2_{tower}")]:
        found |= pair(width, f"{name}.lora_down.weight", f"{name}.lora_up.weight")
        found[f"{name}.alpha"] = torch.tensor(2.0)  # of rank 2: factor 1
    return found


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("naming", [diffusers_lora, kohya_lora])
def test_a_lora_is_added_to_the_weights_it_names(
    files: Checkpoint, tmp_path: Path, naming: object, scale: float
) -> None:
    pytest.importorskip("peft", reason="LoRA needs the extra 'lora'")
    assert callable(naming)
    save_file(naming(), tmp_path / "l.safetensors")
    plain = SupirModel.load(files, "cpu").networks.state_dict()
    adapted = replace(files, loras=(Lora(tmp_path / "l.safetensors", scale),))
    state = SupirModel.load(adapted, "cpu").networks.state_dict()
    assert state.keys() == plain.keys()
    changed = {key for key, value in state.items() if not torch.equal(value, plain[key])}
    tower = "encoder.layers.1.self_attn.out_proj.weight"
    widths = {
        f"unet.base.{UNET_LAYER}.weight": 32,
        f"text.clip_l.{tower}": 8,
        f"text.bigg.text_model.{tower}": 12,
    }
    assert changed == widths.keys()
    for key, width in widths.items():
        lora = pair(width, "down", "up")
        torch.testing.assert_close(state[key], plain[key] + scale * lora["up"] @ lora["down"])


def test_a_lora_is_part_of_a_converted_model(files: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs the extra 'lora'")
    save_file(diffusers_lora(), tmp_path / "light.safetensors")
    adapted = replace(files, loras=(Lora(tmp_path / "light.safetensors", 0.5),))
    convert(adapted, tmp_path / "model")
    model = SupirModel.load(tmp_path / "model", "cpu")
    assert model.config.display_name == "SUPIR v0Q on sdxl + light x 0.5"
    wanted = SupirModel.load(adapted, "cpu").networks.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.networks.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transformer.x.lora_A.weight": torch.zeros(2, 4)}, "1 keys are of no SDXL network: transformer.x"),
        (
            pair(32, "unet.no.such.to_q.lora_A.weight", "unet.no.such.to_q.lora_B.weight"),
            "l.safetensors cannot be used",
        ),
        (
            pair(5, f"unet.{UNET_LAYER}.lora_A.weight", f"unet.{UNET_LAYER}.lora_B.weight"),
            "l.safetensors cannot be used",
        ),
    ],
)
def test_a_lora_for_another_model_is_refused(
    files: Checkpoint, tmp_path: Path, keys: dict[str, Tensor], message: str
) -> None:
    pytest.importorskip("peft", reason="LoRA needs the extra 'lora'")
    save_file(keys, tmp_path / "l.safetensors")
    assert message in refusal(replace(files, loras=(Lora(tmp_path / "l.safetensors"),)))
