"""Train a model, stage by stage.

    python -m supir_model.training tiny-vae                   --data PHOTOGRAPHS --into FOLDER
    python -m supir_model.training tiny-robust-encoder        --data PHOTOGRAPHS --into FOLDER
    python -m supir_model.training tiny-robust-encoder-polish --data PHOTOGRAPHS --into FOLDER
    python -m supir_model.training tiny-joint                 --data PHOTOGRAPHS --into FOLDER
    python -m supir_model.training tiny-joint-polish          --data PHOTOGRAPHS --into FOLDER
    python -m supir_model.training export                     --into FOLDER

RECIPE is one of the project's own (see the end) or a YAML file like them. A stage reads FOLDER/model.safetensors of the
stage before it and replaces it when done; a stage that is interrupted continues where it was. vae starts from nothing;
a model of full size starts from --base. export writes FOLDER/model, which a manifest can name as engine.weights.
Several GPUs or machines: torchrun --nproc-per-node N -m supir_model.training ...
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from supir_model import weights
from supir_model.config import ModelConfig
from supir_model.convert import write
from supir_model.errors import RequestError, SupirModelError
from supir_model.folder import FORMAT, Description
from supir_model.networks import Networks
from supir_model.text import SDXLTextEncoder, read_words
from supir_model.training.datasets import PhotographCrops, find_photographs, read_captions
from supir_model.training.loop import train
from supir_model.training.recipe import DiffusionRecipe, Recipe, VAERecipe, bundled, load_recipe
from supir_model.training.stages import (
    AutoencoderStage,
    DiffusionStage,
    RobustEncoderStage,
    Stage,
    channel_energy,
    start_from_pca,
)
from supir_model.training.start import from_scratch, from_sdxl

_SAMPLE = 64  # crops by which latent channels are judged


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line; train one stage, or export."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.recipe == "export":
            _export(given)
        else:
            if given.data is None:
                parser.error("--data is required")
            _train(load_recipe(given.recipe, _overrides(given)), given)
    except SupirModelError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m supir_model.training",
        description=__doc__,
        epilog=f"recipes: {', '.join(bundled())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name or YAML file of a recipe; or export")
    parser.add_argument("--into", type=Path, required=True, help="folder for checkpoints, metrics and samples")
    parser.add_argument("--data", type=Path, help="folder of photographs, or a text file that lists them")
    parser.add_argument("--captions", type=Path, help="TSV: file name, tab, what the photograph shows")
    parser.add_argument("--base", type=Path, help="SDXL, one file or a folder in diffusers layout; for full size")
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt; left out: the base's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for key, kind in (("steps", int), ("batch", int), ("accumulate", int), ("crop", int), ("learning-rate", float)):
        parser.add_argument(f"--{key}", type=kind, help="instead of the recipe's")
    return parser


def _overrides(given: argparse.Namespace) -> dict[str, int | float]:
    keys = ("steps", "batch", "accumulate", "crop", "learning_rate")
    return {key: getattr(given, key) for key in keys if getattr(given, key) is not None}


def _train(recipe: Recipe, given: argparse.Namespace) -> None:
    device = _device(given.device)
    model_file: Path = given.into / "model.safetensors"
    networks = _start(recipe, given, model_file)
    networks.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    captions = read_captions(given.captions) if given.captions else {}
    crops = PhotographCrops(find_photographs(given.data), captions, device, recipe.in_memory)
    sample = crops.batch(torch.Generator().manual_seed(recipe.seed), _SAMPLE, recipe.crop).clean
    stage: Stage
    if isinstance(recipe, VAERecipe):
        start_from_pca(networks.vae, sample)
        stage = AutoencoderStage(networks, recipe)
    elif isinstance(recipe, DiffusionRecipe):
        stage = DiffusionStage(networks, recipe, channel_energy(networks.vae, sample))
    else:
        stage = RobustEncoderStage(networks, recipe, channel_energy(networks.vae, sample))
    train(networks, stage, crops, recipe, given.into / Path(given.recipe).stem)
    if not dist.is_initialized() or dist.get_rank() == 0:
        partial = model_file.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in networks.cpu().state_dict().items()}, partial)
        partial.replace(model_file)


def _device(name: str) -> torch.device:
    """The device of this process; under torchrun it joins the others first."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device(name)


def _start(recipe: Recipe, given: argparse.Namespace, model_file: Path) -> Networks:
    config = recipe.model_configuration()
    if model_file.exists():
        networks = from_scratch(config, recipe.seed)
        state = load_file(model_file)
        weights.check(networks.state_dict(), state, str(model_file))
        networks.load_state_dict(state)
        if isinstance(networks.text, SDXLTextEncoder):
            networks.text.words = read_words(_tokenizer(given), config.text.vocabulary)
        return networks
    if config.text.kind == "sdxl":
        if given.base is None:
            raise RequestError(f"model {config.name} starts from SDXL; give it with --base")
        return from_sdxl(config, given.base, _tokenizer(given), recipe.seed)
    if recipe.stage != "vae":
        raise RequestError(f"'{model_file}' does not exist; train the stages before {recipe.stage} into '{given.into}'")
    return from_scratch(config, recipe.seed)


def _tokenizer(given: argparse.Namespace) -> Path:
    if given.tokenizer is not None:
        return Path(given.tokenizer)
    if given.base is not None and given.base.is_dir():
        return Path(given.base) / "tokenizer"
    raise RequestError("the text towers need CLIP's vocabulary; give its folder with --tokenizer")


def _export(given: argparse.Namespace) -> None:
    """The newest recipe of the run says which model it is."""
    recipes = sorted(given.into.glob("*/recipe.json"), key=lambda path: path.stat().st_mtime)
    if not recipes:
        raise RequestError(f"'{given.into}' holds no trained stage")
    config: ModelConfig = load_recipe(str(recipes[-1])).model_configuration()
    networks = from_scratch(config, 0)
    model_file = given.into / "model.safetensors"
    weights.check(networks.state_dict(), state := weights.read_tensors(model_file), str(model_file))
    networks.load_state_dict(state)
    of_sdxl = config.text.kind == "sdxl"
    tokenizer = _tokenizer(given) if of_sdxl else None
    config = dataclasses.replace(  # a model of the same sizes is not the published one
        config,
        display_name=f"{given.into.resolve().name}, trained on {config.name}'s configuration",
        license=f"as its trainer says{'; CreativeML Open RAIL++-M of SDXL applies' if of_sdxl else ''}",
    )
    write(networks, Description(FORMAT, config, ()), given.into / "model", "float16", tokenizer)


if __name__ == "__main__":
    main()
