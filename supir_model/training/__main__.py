"""Train supir-tiny, stage by stage: ``python -m supir_model.training vae --data PHOTOGRAPHS --run FOLDER --steps N``.

Stages in order: vae, robust-encoder, then prior and control, or joint. Each reads ``FOLDER/model.safetensors`` of the
stage before it (vae starts from scratch) and replaces it when done; a stage that is interrupted continues where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from supir_model.config import TINY
from supir_model.convert import write
from supir_model.folder import FORMAT, Description
from supir_model.networks import Networks
from supir_model.training.datasets import PhotographCrops, load_images
from supir_model.training.degradations import Degradation
from supir_model.training.loop import LoopConfig, train
from supir_model.training.stages import (
    AutoencoderStage,
    DiffusionStage,
    RobustEncoderStage,
    Stage,
    pixel_energy,
    start_from_pca,
)

STAGES = ("vae", "robust-encoder", "prior", "control", "joint")


def main() -> None:
    """Parse the command line; train one stage, evaluate or export."""
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    networks = Networks(TINY)
    model_file: Path = arguments.run / "model.safetensors"
    if arguments.stage != "vae":
        networks.load_state_dict(load_file(model_file), strict=True)
    if arguments.stage == "export":
        write(networks, Description(FORMAT, TINY, ()), arguments.run / "model", "float16")
    else:
        _train(networks, arguments)
        partial = model_file.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in networks.cpu().state_dict().items()}, partial)
        partial.replace(model_file)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m supir_model.training", description=__doc__)
    parser.add_argument(
        "stage",
        choices=[*STAGES, "export"],
        help="a stage to train; export: write FOLDER/model, a model folder that a manifest can name, in half precision",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and metrics")
    parser.add_argument("--data", type=Path, help="folder of photographs")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=128, help="pixels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--half-precision", action="store_true", help="bf16 inside the networks")
    arguments = parser.parse_args()
    if arguments.data is None and arguments.stage != "export":
        parser.error("--data is required")
    return arguments


def _train(networks: Networks, arguments: argparse.Namespace) -> None:
    networks.to(arguments.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    crops = PhotographCrops(load_images(arguments.data), arguments.device)
    sample = crops.batch(torch.Generator().manual_seed(arguments.seed), 64, arguments.crop)
    stage: Stage
    if arguments.stage == "vae":
        start_from_pca(networks.vae, sample)
        stage = AutoencoderStage(networks)
    elif arguments.stage == "robust-encoder":
        stage = RobustEncoderStage(networks, Degradation())
    else:
        stage = DiffusionStage(networks, Degradation(), arguments.stage, pixel_energy(networks.vae, sample))
    config = LoopConfig(
        steps=arguments.steps,
        batch=arguments.batch,
        crop=arguments.crop,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        half_precision=arguments.half_precision,
    )
    train(networks, stage, crops, config, arguments.run / arguments.stage)


if __name__ == "__main__":
    main()
