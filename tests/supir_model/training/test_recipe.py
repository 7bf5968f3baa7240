"""Recipes: the project's own are valid, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from supir_model.config import MODELS
from supir_model.errors import RequestError
from supir_model.training.recipe import DiffusionRecipe, bundled, differences, load_recipe

GOOD = "stage: joint\nsteps: 4\nbatch: 2\ncrop: 32\nlearning_rate: 1.0e-3\n"


@pytest.mark.parametrize("name", bundled())
def test_the_projects_own_are_valid_and_named_after_what_they_do(name: str) -> None:
    recipe = load_recipe(name)
    kind, _, stage = name.partition("-")
    assert recipe.stage == stage.removesuffix("-polish")
    assert recipe.model == {"tiny": "tiny", "sdxl": "v0Q"}[kind]


def test_there_is_one_for_every_stage() -> None:
    tiny = {name for name in bundled() if name.startswith("tiny-")}
    stages = {"tiny-vae", "tiny-robust-encoder", "tiny-prior", "tiny-control", "tiny-joint"}
    assert tiny == stages | {"tiny-robust-encoder-polish", "tiny-joint-polish"}


def test_a_trimmed_control_encoder_is_another_model() -> None:
    config = load_recipe("sdxl-control").model_configuration()
    assert config.control.transformer_depth == (0, 1, 2)
    assert config.unet == MODELS["v0Q"].unet


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("joint", "jiont"), "stage"),
        (f"{GOOD}stpes: 3\n", r"stpes: Extra inputs are not permitted"),
        (f"{GOOD}kl: 0.1\n", r"kl: Extra inputs are not permitted"),
        (GOOD.replace("batch: 2", "batch: many"), r"batch: .* saw 'many'"),
        (GOOD.replace("batch: 2", "batch: 0"), r"batch: .* saw 0"),
        (f"{GOOD}degradation: {{untouched: 0.9, archive: 0.9}}\n", "exceed 1"),
        (f"{GOOD}control_depth: [1]\n", "control_depth has 1 levels, tiny has 3"),
        ("- a\n", "holds list"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RequestError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_no_such_recipe_is_answered_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"one of sdxl-control, .*tiny-vae"):
        load_recipe(str(tmp_path / "none"))


def test_a_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    recipe = load_recipe(str(tmp_path / "mine.yaml"), {"steps": 9, "learning_rate": 1e-6})
    assert isinstance(recipe, DiffusionRecipe)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    assert load_recipe(str(tmp_path / "recipe.json")) == recipe
    assert differences(recipe, load_recipe(str(tmp_path / "mine.yaml")).model_dump(mode="json")) == [
        "learning_rate",
        "steps",
    ]
