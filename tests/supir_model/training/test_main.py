"""The command itself: stages into one folder, export, several processes, and full size at reduced width."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from supir_model.checkpoint_keys import to_released
from supir_model.config import MODELS, V0Q, ControlConfig, ModelConfig, TextConfig, TowerConfig, UNetConfig, VAEConfig
from supir_model.errors import WeightsError
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Networks
from supir_model.training.__main__ import main
from supir_model.training.start import from_sdxl

SMALL = dataclasses.replace(
    V0Q,
    vae=VAEConfig((16, 32), 1, 4, 8, mid_attention=True, scale=0.13025),
    unet=UNetConfig(4, (16, 32), 1, (0, 2), 16, context_dim=20, vector_dim=22, norm_groups=8),
    control=ControlConfig((0, 2), hidden=8, norm_groups=8, attention_head_dim=16, attention_levels=(1,)),
    text=TextConfig("sdxl", 77, (TowerConfig(8, 2, 2), TowerConfig(12, 3, 2, projection=10)), 600, size_embedding=2),
    window=16,
    stride=8,
    min_size=0,
)
ADDED = ("model.control_model.", "model.diffusion_model.project_modules.", "first_stage_model.denoise_encoder.")
QUICK = ["--steps", "2", "--batch", "2", "--crop", "32"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 64), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def test_stages_follow_each_other_and_end_as_a_model_folder(photographs: Path, tmp_path: Path) -> None:
    run, captions = tmp_path / "run", tmp_path / "captions.tsv"
    captions.write_text("0.png\tclouds\n")
    for recipe in ("tiny-vae", "tiny-robust-encoder", "tiny-joint"):
        main([recipe, "--data", str(photographs), "--captions", str(captions), "--into", str(run), *QUICK])
    folders = {"tiny-vae", "tiny-robust-encoder", "tiny-joint"}
    assert {path.name for path in run.iterdir()} == folders | {"model.safetensors"}
    assert json.loads((run / "tiny-joint/recipe.json").read_text())["steps"] == 2
    main(["export", "--into", str(run)])
    model = SupirModel.load(run / "model", "cpu")
    assert model.config.display_name == "run, trained on tiny's configuration"
    state = load_file(run / "model.safetensors")
    assert torch.equal(model.networks.state_dict()["control.hint.bias"], state["control.hint.bias"].half().float())


def test_a_stage_out_of_order_and_a_missing_folder_are_named(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="train the stages before joint"):
        main(["tiny-joint", "--data", str(photographs), "--into", str(tmp_path)])
    with pytest.raises(SystemExit, match="neither a folder with photographs"):
        main(["tiny-vae", "--data", str(tmp_path / "none"), "--into", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no trained stage"):
        main(["export", "--into", str(tmp_path)])


def test_two_processes_are_one_that_accumulates(photographs: Path, tmp_path: Path) -> None:
    common = ["tiny-vae", "--data", str(photographs), "--device", "cpu", *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "-m", "supir_model.training", *common, "--into", str(tmp_path / "two")],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    subprocess.run(
        [sys.executable, "-m", "supir_model.training", *common, "--into", str(tmp_path / "one"), "--accumulate", "2"],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)
    lines = (tmp_path / "two/tiny-vae/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]  # one process writes


# --- full size, at reduced width -----------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An SDXL file in the released layout, and a vocabulary."""
    torch.manual_seed(0)
    released = to_released(Networks(SMALL).state_dict(), SMALL)
    sdxl = {key: value.contiguous() for key, value in released.items() if not key.startswith(ADDED)}
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    (tmp_path / "tokenizer").mkdir()
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    return tmp_path


@pytest.mark.parametrize("depth", [(0, 2), (0, 1)])
def test_an_untrained_adaptor_starts_from_sdxl(published: Path, depth: tuple[int, ...]) -> None:
    config = dataclasses.replace(SMALL, control=dataclasses.replace(SMALL.control, transformer_depth=depth))
    networks = from_sdxl(config, published / "sdxl.safetensors", published / "tokenizer", seed=1)
    state = networks.state_dict()
    assert torch.equal(state["vae.robust_encoder.conv_in.weight"], state["vae.encoder.conv_in.weight"])
    copied = [key for key in state if key.startswith("control.base.")]
    assert all(torch.equal(state[key], state[key.replace("control.", "unet.", 1)]) for key in copied)
    assert any("transformer_blocks.1." in key for key in copied) == (depth == (0, 2))
    assert not state["control.hint.weight"].any()
    save_file({"stranger": torch.zeros(1)}, published / "other.safetensors")
    with pytest.raises(WeightsError, match="1 unexpected: stranger"):
        from_sdxl(config, published / "other.safetensors", published / "tokenizer", seed=1)


def test_an_adaptor_of_ones_own_is_trained_and_restores(
    published: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "v0Q", SMALL)  # the released widths would need 40 GB
    recipes = {
        "robust": "stage: robust-encoder\nmodel: v0Q\n",
        "control": "stage: control\nmodel: v0Q\ncontrol_depth: [0, 1]\naccumulate: 2\n",
    }
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="starts from SDXL; give it with --base"):
        _train(recipes["control"], published, photographs, run, base=False)
    _train(recipes["control"], published, photographs, run)
    before = load_file(run / "model.safetensors")
    _train(recipes["control"].replace("control\n", "control\nseed: 1\n", 1), published, photographs, tmp_path / "other")
    other = load_file(tmp_path / "other/model.safetensors")
    trained = {key.split(".")[0] for key in before if not torch.equal(before[key], other[key])}
    assert trained == {"control", "unet"}  # of the unet the connectors: their seed differs, and they learn
    assert all(torch.equal(before[key], other[key]) for key in before if key.startswith(("unet.base", "vae", "text")))
    main(["export", "--into", str(run), "--tokenizer", str(published / "tokenizer")])
    model = SupirModel.load(run / "model", "cpu")
    assert model.config.control.transformer_depth == (0, 1)
    assert model.config.license == "as its trainer says; CreativeML Open RAIL++-M of SDXL applies"
    sampling = Sampling.of(dataclasses.replace(SMALL.presets["fidelity"], steps=2), 16, 8)
    restored = model.restore([Request(torch.zeros(3, 40, 33), "a boat", "blurry", seed=1)], sampling)[0]
    assert restored.shape == (3, 40, 33)
    assert torch.isfinite(restored).all()


def _train(recipe: str, published: Path, photographs: Path, run: Path, base: bool = True) -> None:
    run.mkdir(exist_ok=True)
    path = run / "recipe.yaml"
    path.write_text(f"{recipe}steps: 2\nbatch: 2\ncrop: 32\nlearning_rate: 1.0e-3\n")
    options = ["--base", str(published / "sdxl.safetensors")] if base else []
    options += ["--tokenizer", str(published / "tokenizer"), "--device", "cpu"]
    main([str(path), "--data", str(photographs), "--into", str(run), *options])


def test_the_small_configuration_is_of_the_released_kind() -> None:
    config: ModelConfig = SMALL
    assert config.prediction == "epsilon"
    assert config.text.kind == "sdxl"
