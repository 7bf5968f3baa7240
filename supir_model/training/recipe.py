"""What a training stage is told: one YAML file, checked when it is read; ``configs/`` holds the project's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from supir_model.config import MODELS, ModelConfig
from supir_model.errors import RequestError
from supir_model.training.degradations import Degradation

CONFIGS = Path(__file__).parent / "configs"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Mix(_Section):
    """Shares of the damage that training inputs get; see ``degradations.Degradation``."""

    untouched: float = 0.10
    archive: float = 0.25
    halftone: float = 0.05
    monochrome: float = 0.10
    sepia: float = 0.05
    strength: float = 1.0

    def degradation(self) -> Degradation:
        """The same as what degrades. Raises RequestError where shares make no sense."""
        return Degradation(**self.model_dump())


class _Stage(_Section):
    model: Literal["tiny", "v0Q", "v0F"] = "tiny"
    control_depth: tuple[int, ...] | None = Field(
        default=None, description="Transformer blocks per level of the control encoder; left out: the model's."
    )
    steps: int = Field(ge=1)
    batch: int = Field(ge=1, description="Crops at once, per process.")
    accumulate: int = Field(default=1, ge=1, description="Batches per step and process.")
    crop: int = Field(ge=16, description="Pixels along one side.")
    learning_rate: float = Field(gt=0)
    warmup: int = Field(default=100, ge=0, description="Steps.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    ema: float = Field(default=0.999, ge=0, lt=1, description="Decay of the averaged weights.")
    seed: int = Field(default=0, ge=0)
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Inside the networks.")
    in_memory: bool = Field(default=True, description="Hold the photographs in memory instead of reading them anew.")
    sample_every: int = Field(default=500, ge=1, description="Steps between pictures.")
    save_seconds: float = Field(default=120.0, ge=0, description="Between checkpoints.")

    def model_configuration(self) -> ModelConfig:
        """The model that is trained."""
        config = MODELS[self.model]
        if self.control_depth is None:
            return config
        control = dataclasses.replace(config.control, transformer_depth=self.control_depth)
        return dataclasses.replace(config, control=control)


class VAERecipe(_Stage):
    """Stage 0: weights of gradient L1, spectrum L1 and KL beside an L1 of weight 1."""

    stage: Literal["vae"]
    gradient: float = Field(default=0.25, ge=0)
    spectrum: float = Field(default=0.05, ge=0)
    kl: float = Field(default=1e-6, ge=0)


class RobustEncoderRecipe(_Stage):
    """Stage 1: weights of the paper's loss on images, of 1 - SSIM beside it, and of a distance of latents.

    The last needs no decoder.
    """

    stage: Literal["robust-encoder"]
    degradation: Mix = Mix()
    image: float = Field(default=1.0, ge=0)
    structure: float = Field(default=0.0, ge=0)
    latent: float = Field(default=0.1, ge=0)


class DiffusionRecipe(_Stage):
    """Stages 2 and 3, or both at once; see ``stages.DiffusionStage``."""

    stage: Literal["prior", "control", "joint"]
    degradation: Mix = Mix()
    drop_text: float = Field(default=0.1, ge=0, le=1)
    negative: float = Field(default=0.15, ge=0, le=1)
    max_weight: float = Field(default=6.0, ge=1)
    image: float = Field(default=0.0, ge=0)
    structure: float = Field(default=0.0, ge=0)
    contours: float = Field(default=0.0, ge=0)
    own: float = Field(default=0.0, ge=0, le=1)


Recipe = VAERecipe | RobustEncoderRecipe | DiffusionRecipe
_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="stage")])


def bundled() -> list[str]:
    """Names of the project's own recipes."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe of that bundled name or path, with some values replaced. Raises RequestError with every problem."""
    path = CONFIGS / f"{name}.yaml" if name in bundled() else Path(name)
    try:
        text = path.read_text("utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(
            f"recipe '{name}' cannot be read ({error}); give a YAML or JSON file or one of {', '.join(bundled())}"
        ) from error
    if not isinstance(data, dict):
        raise RequestError(f"recipe '{name}' holds {type(data).__name__}, expected keys such as stage and steps")
    return _parse(data | (overrides or {}), name)


def _parse(data: dict[str, Any], name: str) -> Recipe:
    if isinstance(data.get("control_depth"), list):
        data["control_depth"] = tuple(data["control_depth"])
    try:
        recipe = _RECIPE.validate_python(data)
    except ValidationError as error:
        lines = [
            f"recipe '{name}': {'.'.join(str(part) for part in one['loc'][1:]) or 'stage'}: {one['msg']}, "
            f"saw {one['input']!r}"
            for one in error.errors()
        ]
        raise RequestError("\n".join(lines)) from error
    if not isinstance(recipe, VAERecipe):
        recipe.degradation.degradation()
    if recipe.control_depth is not None and len(recipe.control_depth) != len(MODELS[recipe.model].unet.channels):
        raise RequestError(
            f"recipe '{name}': control_depth has {len(recipe.control_depth)} levels, "
            f"{recipe.model} has {len(MODELS[recipe.model].unet.channels)}"
        )
    return recipe


def differences(recipe: Recipe, other: dict[str, Any]) -> list[str]:
    """Keys by which a recipe differs from the record of another (``recipe.model_dump(mode='json')``)."""
    mine = recipe.model_dump(mode="json")
    return sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
