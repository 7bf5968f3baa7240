"""Each stage trains on two small photographs; an interrupted run continues as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from supir_model.config import TINY
from supir_model.networks import Networks
from supir_model.training.datasets import PhotographCrops
from supir_model.training.degradations import Degradation
from supir_model.training.loop import LoopConfig, train
from supir_model.training.stages import (
    AutoencoderStage,
    DiffusionStage,
    RobustEncoderStage,
    Stage,
    start_from_pca,
)

STAGES: dict[str, Callable[[Networks], Stage]] = {
    "vae": AutoencoderStage,
    "robust-encoder": lambda networks: RobustEncoderStage(networks, Degradation()),
    "prior": lambda networks: DiffusionStage(networks, Degradation(), "prior"),
    "control": lambda networks: DiffusionStage(networks, Degradation(), "control"),
    "joint": lambda networks: DiffusionStage(networks, Degradation(), "joint"),
}


@pytest.fixture(scope="module")
def crops() -> PhotographCrops:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    first = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], 2)
    return PhotographCrops([first, 255 - first])


def networks_of(seed: int, crops: PhotographCrops) -> Networks:
    torch.manual_seed(seed)
    networks = Networks(TINY)
    start_from_pca(networks.vae, crops.batch(torch.Generator().manual_seed(seed), 16, 32))
    return networks


def config(steps: int, save_seconds: float = 1e9) -> LoopConfig:
    return LoopConfig(steps=steps, batch=2, crop=32, learning_rate=1e-3, warmup=2, ema=0.5, save_seconds=save_seconds)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Top-level parts (vae, text, control, unet.base, unet.connectors) with a changed tensor."""
    keys = {key for key in before if not torch.equal(before[key], after[key])}
    return {".".join(key.split(".")[: 2 if key.startswith(("unet", "vae")) else 1]) for key in keys}


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("robust-encoder", {"vae.robust_encoder"}),
        ("prior", {"unet.base", "text"}),
        ("control", {"control", "unet.connectors"}),
        ("joint", {"unet.base", "text", "control", "unet.connectors"}),
    ],
)
def test_a_stage_trains_its_part_alone(stage: str, trained: set[str], crops: PhotographCrops, tmp_path: Path) -> None:
    networks = networks_of(0, crops)
    before = {key: value.clone() for key, value in networks.state_dict().items()}
    train(networks, STAGES[stage](networks), crops, config(steps=3), tmp_path)
    assert changed(before, networks.state_dict()) == trained
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_vae_loss_falls_and_latents_get_unit_variance(crops: PhotographCrops, tmp_path: Path) -> None:
    networks = networks_of(0, crops)
    train(networks, STAGES["vae"](networks), crops, config(steps=25), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5])
    mean, _ = networks.vae.moments(crops.batch(torch.Generator().manual_seed(9), 32, 32))
    assert torch.allclose(mean.std(dim=(0, 2, 3)), torch.ones(8), atol=0.5)
    ordinary, robust = networks.vae.encoder.state_dict(), networks.vae.robust_encoder.state_dict()
    assert all(torch.equal(ordinary[key], robust[key]) for key in ordinary)


def test_resume_is_bit_identical(crops: PhotographCrops, tmp_path: Path) -> None:
    whole = networks_of(0, crops)
    train(whole, STAGES["joint"](whole), crops, config(steps=4), tmp_path / "whole")

    class TrainingInterruptedError(Exception):
        pass

    class Stopping(DiffusionStage):
        def loss(
            self, clean: torch.Tensor, progress: float, generator: torch.Generator
        ) -> tuple[torch.Tensor, dict[str, float]]:
            if progress >= 0.5:
                raise TrainingInterruptedError
            return super().loss(clean, progress, generator)

    first = networks_of(0, crops)
    with pytest.raises(TrainingInterruptedError):
        train(first, Stopping(first, Degradation(), "joint"), crops, config(4, save_seconds=0), tmp_path / "cut")
    second = networks_of(0, crops)
    train(second, STAGES["joint"](second), crops, config(steps=4), tmp_path / "cut")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == 4
