"""Each stage learns on two small photographs; an interrupted run continues as if it had not been."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from supir_model.config import TINY, ControlConfig, TowerConfig, UNetConfig
from supir_model.errors import RequestError
from supir_model.networks import Networks
from supir_model.training.datasets import Batch, PhotographCrops
from supir_model.training.loop import train
from supir_model.training.recipe import DiffusionRecipe, Recipe, RobustEncoderRecipe, VAERecipe
from supir_model.training.stages import (
    AutoencoderStage,
    DiffusionStage,
    RobustEncoderStage,
    Stage,
    _gradient_dissimilarity,
    channel_energy,
    start_from_pca,
)

# supir-tiny, narrower
SMALL = dataclasses.replace(
    TINY,
    vae=dataclasses.replace(TINY.vae, channels=(8, 16, 24)),
    unet=UNetConfig(8, (16, 32, 48), 1, (0, 0, 1), 16, context_dim=32, vector_dim=32, norm_groups=8),
    control=ControlConfig((0, 0, 1), hidden=8, norm_groups=8, attention_head_dim=16, attention_levels=(2,)),
    text=dataclasses.replace(TINY.text, towers=(TowerConfig(32, 1, 2),)),
)
STAGES = ("vae", "robust-encoder", "prior", "control", "joint")


def recipe(stage: str, steps: int, **changes: Any) -> Recipe:
    common: dict[str, Any] = {
        "steps": steps,
        "batch": 2,
        "crop": 32,
        "learning_rate": 1e-3,
        "warmup": 2,
        "ema": 0.5,
        "precision": "float32",
        "save_seconds": 1e9,
    }
    kinds: dict[str, Callable[..., Recipe]] = {"vae": VAERecipe, "robust-encoder": RobustEncoderRecipe}
    return kinds.get(stage, DiffusionRecipe)(stage=stage, **(common | changes))


def stage_of(networks: Networks, chosen: Recipe, crops: PhotographCrops) -> Stage:
    if isinstance(chosen, VAERecipe):
        return AutoencoderStage(networks, chosen)
    energy = channel_energy(networks.vae, crops.batch(torch.Generator().manual_seed(0), 4, 32).clean)
    kind = DiffusionStage if isinstance(chosen, DiffusionRecipe) else RobustEncoderStage
    return kind(networks, chosen, energy)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> PhotographCrops:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    first = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], 2)
    folder = tmp_path_factory.mktemp("photographs")
    paths = [folder / "first.png", folder / "second.png"]
    for path, pixels in zip(paths, (first, 255 - first), strict=True):
        Image.fromarray(pixels).save(path)
    return PhotographCrops(paths, {"first.png": "a ramp"})


def networks_of(seed: int, crops: PhotographCrops) -> Networks:
    torch.manual_seed(seed)
    networks = Networks(SMALL)
    start_from_pca(networks.vae, crops.batch(torch.Generator().manual_seed(seed), 16, 32).clean)
    networks.vae.robust_encoder.load_state_dict(networks.vae.encoder.state_dict())
    return networks


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
def test_a_stage_trains_its_part_alone_and_shows_it(
    stage: str, trained: set[str], crops: PhotographCrops, tmp_path: Path
) -> None:
    networks, told = networks_of(0, crops), recipe(stage, 3, sample_every=2)
    before = {key: value.clone() for key, value in networks.state_dict().items()}
    train(networks, stage_of(networks, told, crops), crops, told, tmp_path)
    assert changed(before, networks.state_dict()) == trained
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    pictures = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert pictures == ["step-000002.png", "step-000003.png"]
    with Image.open(tmp_path / "samples" / pictures[0]) as sheet:
        assert sheet.size == (32 * (3 if stage == "robust-encoder" else 5), 4 * 32)


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_every_stage_falls(stage: str, crops: PhotographCrops, tmp_path: Path) -> None:
    networks, told = networks_of(0, crops), recipe(stage, 40, batch=4, learning_rate=2e-3)
    judged = stage_of(networks, told, crops)

    def loss() -> float:
        """On the same crops, damage and noise each time."""
        with torch.no_grad():
            generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
            return sum(judged.loss(crops.batch(g, 8, 32), g)[0].item() for g in generators)

    before = loss()
    train(networks, judged, crops, told, tmp_path)
    if stage == "vae":  # its end gives the latents another scale
        assert metrics_of(tmp_path)[-1]["loss"] < metrics_of(tmp_path)[0]["loss"]
    else:
        assert loss() < 0.97 * before


def test_the_vae_ends_with_latents_of_unit_variance_and_a_robust_encoder(
    crops: PhotographCrops, tmp_path: Path
) -> None:
    networks, told = networks_of(0, crops), recipe("vae", 25)
    train(networks, stage_of(networks, told, crops), crops, told, tmp_path)
    mean, _ = networks.vae.moments(crops.batch(torch.Generator().manual_seed(9), 32, 32).clean)
    assert torch.allclose(mean.std(dim=(0, 2, 3)), torch.ones(8), atol=0.5)
    ordinary, robust = networks.vae.encoder.state_dict(), networks.vae.robust_encoder.state_dict()
    assert all(torch.equal(ordinary[key], robust[key]) for key in ordinary)


class TrainingInterruptedError(Exception):
    pass


class Stopping:
    """A stage that breaks off before its third batch."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.batches = stage, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        self.batches += 1
        if self.batches > 2:
            raise TrainingInterruptedError
        return self.stage.loss(batch, generator)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_identical(stage: str, crops: PhotographCrops, tmp_path: Path) -> None:
    told = recipe(stage, 4, save_seconds=0)
    whole, first, second = (networks_of(0, crops) for _ in range(3))
    train(whole, stage_of(whole, told, crops), crops, told, tmp_path / "whole")
    with pytest.raises(TrainingInterruptedError):
        train(first, Stopping(stage_of(first, told, crops)), crops, told, tmp_path / "cut")  # type: ignore[arg-type]
    assert len(metrics_of(tmp_path / "cut")) == 2
    train(second, stage_of(second, told, crops), crops, told, tmp_path / "cut")
    resumed = second.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed[key]), key
    assert [line["loss"] for line in metrics_of(tmp_path / "cut")] == [
        line["loss"] for line in metrics_of(tmp_path / "whole")
    ]


def test_accumulated_batches_count_as_one(crops: PhotographCrops, tmp_path: Path) -> None:
    """The mean of the gradients of two batches, whether they come one after the other or in one step's average."""
    networks = networks_of(0, crops)
    told = recipe("robust-encoder", 1, accumulate=2)
    train(networks, stage_of(networks, told, crops), crops, told, tmp_path / "two")
    single = recipe("robust-encoder", 1)
    other = networks_of(0, crops)
    train(other, stage_of(other, single, crops), crops, single, tmp_path / "one")
    two, one = metrics_of(tmp_path / "two")[0], metrics_of(tmp_path / "one")[0]
    assert two["loss"] != one["loss"]
    assert changed(networks.state_dict(), other.state_dict()) == {"vae.robust_encoder"}


def test_a_run_goes_on_with_its_own_recipe_only(crops: PhotographCrops, tmp_path: Path) -> None:
    networks = networks_of(0, crops)
    told = recipe("control", 1)
    train(networks, stage_of(networks, told, crops), crops, told, tmp_path)
    other = recipe("control", 2, learning_rate=1e-4, batch=1)
    with pytest.raises(RequestError, match="another recipe: batch, learning_rate differ"):
        train(networks, stage_of(networks, other, crops), crops, other, tmp_path)
    longer = recipe("control", 2)
    train(networks, stage_of(networks, longer, crops), crops, longer, tmp_path)
    assert len(metrics_of(tmp_path)) == 2


def test_the_image_loss_is_the_papers_and_optional(crops: PhotographCrops) -> None:
    networks = networks_of(0, crops)
    batch = crops.batch(torch.Generator().manual_seed(3), 4, 32)
    found = {}
    for image, latent in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        told = recipe("robust-encoder", 1, image=image, latent=latent)
        loss, metrics = stage_of(networks, told, crops).loss(batch, torch.Generator().manual_seed(4))
        found[image, latent] = loss.item()
        assert ("psnr" in metrics) == (image > 0)
    assert found[1.0, 1.0] == pytest.approx(found[1.0, 0.0] + found[0.0, 1.0], rel=1e-5)


def test_structure_counts_beside_the_papers_loss(crops: PhotographCrops) -> None:
    networks = networks_of(0, crops)
    batch = crops.batch(torch.Generator().manual_seed(3), 4, 32)
    found = []
    for structure in (0.0, 1.0, 2.0):
        stage = stage_of(networks, recipe("robust-encoder", 1, structure=structure), crops)
        found.append(stage.loss(batch, torch.Generator().manual_seed(4))[0].item())
    assert 0 < found[1] - found[0] < 2  # 1 - SSIM
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], rel=1e-4)


def test_contours_weaker_and_stronger_than_the_originals_cost() -> None:
    sharp = torch.rand((1, 3, 24, 24), generator=torch.Generator().manual_seed(0)) - 0.5
    costs = [float(_gradient_dissimilarity(strength * sharp, sharp)) for strength in (0.0, 0.5, 1.0, 2.0)]
    assert costs[2] == pytest.approx(0, abs=1e-6)
    assert costs[0] > costs[1] > costs[2] < costs[3]
    assert float(_gradient_dissimilarity(-sharp, sharp)) == pytest.approx(0, abs=1e-6)  # strength, not sign


def test_decoded_estimates_count_at_small_noise_alone(crops: PhotographCrops) -> None:
    networks = networks_of(0, crops)
    batch = crops.batch(torch.Generator().manual_seed(3), 8, 32)
    losses, metrics = [], {}
    for image, contours in ((0.0, 0.0), (1.0, 0.0), (1.0, 2.0)):
        stage = stage_of(networks, recipe("joint", 1, image=image, contours=contours, batch=8), crops)
        loss, metrics = stage.loss(batch, torch.Generator().manual_seed(4))
        assert ("l1" in metrics) == (image > 0)
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(metrics["l1"], rel=1e-3)
    assert losses[2] - losses[1] == pytest.approx(2 * metrics["contours"], rel=1e-3)


def test_noise_on_the_models_own_estimates_is_another_input(crops: PhotographCrops) -> None:
    """Where the noise is small, the clean latent nearly answers by itself, an estimate does not."""
    networks = networks_of(0, crops)
    batch = crops.batch(torch.Generator().manual_seed(3), 8, 32)
    errors = []
    for own in (0.0, 1.0):
        stage = stage_of(networks, recipe("joint", 1, own=own, batch=8), crops)
        errors.append(stage.loss(batch, torch.Generator().manual_seed(4))[1]["error"])
    assert errors[1] > errors[0]  # an estimate knows less of the picture than the picture does


def test_captions_reach_the_text(crops: PhotographCrops) -> None:
    networks = networks_of(0, crops)
    stage = DiffusionStage(networks, recipe("joint", 1), torch.ones(8))  # type: ignore[arg-type]
    batch = crops.batch(torch.Generator().manual_seed(0), 8, 32)
    assert set(batch.captions) == {"a ramp", ""}
    for caption, prompt in zip(batch.captions, stage._prompts(batch.clean, batch.captions), strict=True):
        assert prompt.startswith("a ramp, a color photograph" if caption else "a color photograph")
        assert prompt.endswith(TINY.positive_prompt)
