"""The training loop all stages share: AdamW, warm-up and cosine decay, clipping, averaged weights, resume.

Everything random in a step is a function of seed, step and place among the step's batches. So a resumed run goes on as
if it had not stopped, and a step over several processes is the step of one that accumulates as many batches.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from supir_model.errors import RequestError
from supir_model.networks import Networks
from supir_model.training.datasets import PhotographCrops
from supir_model.training.recipe import Recipe, differences
from supir_model.training.stages import Stage

_FREE = {"steps", "in_memory", "sample_every", "save_seconds"}  # may change when a run goes on
_PICTURES = 4  # rows of a sample grid


def train(networks: Networks, stage: Stage, crops: PhotographCrops, recipe: Recipe, run: Path) -> None:
    """Train one stage in place; at the end the averaged (EMA) weights are in ``networks``.

    ``run/state.pt`` makes it resumable, ``run/metrics.jsonl`` says how it went, ``run/recipe.json`` what it was told,
    ``run/samples/`` shows it. Under ``torchrun`` every process computes its batches and the first one writes. Raises
    RequestError where ``run`` holds another recipe's work.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _keep_recipe(recipe, run)
    networks.requires_grad_(False)
    trained = nn.ModuleList(stage.modules()).requires_grad_(True)
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    step = _resume(run, trained, optimizer, average)

    device = parameters[0].device
    half = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    saved = time.monotonic()
    with _Journal(run, recipe.steps, step, writes=rank == 0) as journal:
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
            optimizer.zero_grad(set_to_none=True)
            parts = []
            for index in range(rank * recipe.accumulate, (rank + 1) * recipe.accumulate):
                generator = _generator(recipe.seed, step, index)
                batch = crops.batch(generator, recipe.batch, recipe.crop)
                with half:
                    loss, metrics = stage.loss(batch, generator)
                (loss / (recipe.accumulate * processes)).backward()  # type: ignore[no-untyped-call]
                parts.append({"loss": loss.item()} | metrics)
            if processes > 1:
                for parameter in parameters:
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip, error_if_nonfinite=True)
            optimizer.step()
            step += 1
            decay = min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)

            last = step == recipe.steps
            journal.note(step, _means(parts) | {"norm": float(norm)})
            if rank == 0 and (last or step % recipe.sample_every == 0):
                with torch.no_grad(), half:
                    generator = _generator(recipe.seed, 0, -1)  # always the same photographs and damage
                    columns = stage.pictures(crops.batch(generator, _PICTURES, recipe.crop), generator)
                _save_grid(columns, run / "samples" / f"step-{step:06d}.png")
            if rank == 0 and (last or time.monotonic() - saved > recipe.save_seconds):
                _save(run / "state.pt", step, trained, optimizer, average)
                saved = time.monotonic()

    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    stage.finish(crops.batch(_generator(recipe.seed, recipe.steps, -1), 4 * recipe.batch, recipe.crop).clean)


def _generator(seed: int, step: int, index: int) -> Generator:
    """Randomness of one batch: seeds far apart, so that no two batches of a run share theirs."""
    return Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + index + 1)


def _schedule(step: int, recipe: Recipe) -> float:
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def _means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: math.fsum(part[key] for part in parts) / len(parts) for key in parts[0]}


# --- what a run leaves behind --------------------------------------------------------------------------------------


def _keep_recipe(recipe: Recipe, run: Path) -> None:
    """Write the recipe into a new run; a run goes on only with the recipe it was begun with, but for what is free."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "recipe.json"
    if path.exists():
        changed = [key for key in differences(recipe, json.loads(path.read_text("utf-8"))) if key not in _FREE]
        if changed:
            raise RequestError(
                f"'{run}' was begun with another recipe: {', '.join(changed)} differ; choose another folder"
            )
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n", "utf-8")
    partial.replace(path)


def _resume(run: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> int:
    """Load the checkpoint, if there is one. Returns the steps that are done."""
    path = run / "state.pt"
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    for mean, value in zip(average, state["average"], strict=True):
        mean.copy_(value)
    return int(state["step"])


def _save(path: Path, step: int, trained: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> None:
    partial = path.with_suffix(".partial")
    state = {
        "step": step,
        "trained": trained.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    torch.save(state, partial)
    partial.replace(path)


def _save_grid(columns: Sequence[Tensor], path: Path) -> None:
    """One row per crop, one column per tensor [B, 3, H, W] in [-1, 1]."""
    sheet = torch.cat([torch.cat(list(column.float().cpu()), dim=1) for column in columns], dim=2)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


class _Journal:
    """``metrics.jsonl``, and a bar on a terminal or a line now and then elsewhere."""

    def __init__(self, run: Path, steps: int, done: int, writes: bool) -> None:
        self._path, self._steps, self._done, self._writes = run / "metrics.jsonl", steps, done, writes
        self._started = time.monotonic()
        self._file: TextIO | None = None
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not (writes and console.is_terminal))
        self._task = TaskID(0)

    def __enter__(self) -> _Journal:
        if self._writes:
            if self._path.exists():  # what was done after the checkpoint is done again
                lines = self._path.read_text().splitlines()
                kept = [line for line in lines if json.loads(line)["step"] <= self._done]
                self._path.write_text("".join(f"{line}\n" for line in kept))
            self._file = self._path.open("a")
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._steps, completed=self._done)
        return self

    def note(self, step: int, values: dict[str, float]) -> None:
        """Record one step."""
        if self._file is None:
            return
        line = json.dumps({"step": step, "seconds": time.monotonic() - self._started} | values)
        self._file.write(f"{line}\n")
        self._bar.update(self._task, completed=step, description=f"loss {values['loss']:.4f}")
        if step % 50 == 0 or step == self._steps:
            self._file.flush()
            if self._bar.disable:
                print(line, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._bar.stop()
            self._file.close()
