"""The training loop all stages share: AdamW, warm-up and cosine decay, clipping, averaged weights, resume."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from supir_model.networks import Networks
from supir_model.training.datasets import PhotographCrops
from supir_model.training.stages import Stage


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train; ``crop`` in pixels, ``save_seconds`` between resumable checkpoints."""

    steps: int
    batch: int
    crop: int
    learning_rate: float
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    half_precision: bool = False  # bf16 autocast inside the networks
    save_seconds: float = 120.0


def train(networks: Networks, stage: Stage, crops: PhotographCrops, config: LoopConfig, run: Path) -> None:
    """Train one stage in place; ``run/state.pt`` makes it resumable, ``run/metrics.jsonl`` says how it went.

    At the end the averaged (EMA) weights are in ``networks``.
    """
    run.mkdir(parents=True, exist_ok=True)
    networks.requires_grad_(False)
    trained = nn.ModuleList(stage.modules()).requires_grad_(True)
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    generator = Generator().manual_seed(config.seed)
    step = 0

    state_file = run / "state.pt"
    if state_file.exists():
        state: dict[str, Any] = torch.load(state_file, weights_only=True)
        step = state["step"]
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        generator.set_state(state["generator"])
    metrics_path = run / "metrics.jsonl"
    if metrics_path.exists():  # what was done after the checkpoint is done again
        kept = [line for line in metrics_path.read_text().splitlines() if json.loads(line)["step"] <= step]
        metrics_path.write_text("".join(f"{line}\n" for line in kept))

    device = parameters[0].device
    started = saved = time.monotonic()
    with metrics_path.open("a") as metrics_file:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config)
            clean = crops.batch(generator, config.batch, config.crop)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.half_precision):
                loss, metrics = stage.loss(clean, step / config.steps, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(parameters, config.clip, error_if_nonfinite=True)
            optimizer.step()
            step += 1
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)

            line = {"step": step, "loss": loss.item(), "norm": float(norm), "seconds": time.monotonic() - started}
            metrics_file.write(json.dumps(line | metrics) + "\n")
            if step % 50 == 0 or step == config.steps:
                metrics_file.flush()
                print(json.dumps(line | metrics), file=sys.stderr)
            if time.monotonic() - saved > config.save_seconds or step == config.steps:
                _save(state_file, step, trained, optimizer, average, generator)
                saved = time.monotonic()

    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    stage.finish(crops.batch(generator, 4 * config.batch, config.crop))


def _save(
    path: Path,
    step: int,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    generator: Generator,
) -> None:
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "step": step,
            "trained": trained.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "generator": generator.get_state(),
        },
        partial,
    )
    partial.replace(path)


def _schedule(step: int, config: LoopConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
