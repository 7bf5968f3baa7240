"""What number formats and approximations change: the final latent against that of float32.

    python benchmarks/approximations.py
    python benchmarks/approximations.py --weights random

The same images are restored from the same noise by preset ``quality``, in each number format and with guidance between
some noise levels only; ``error`` is the norm of the difference over the norm of float32's latents. ``work`` is the
share of rows that the networks still compute. ``tiny`` has the shipped model's trained weights; ``random`` those of
benchmarks/gpu.py, which every format reads from the same files. On a card the networks are compiled first.

Prints JSON and a table, and exits with 1 if bfloat16 or float8 errs by more than its target, at full width on a card.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from common import table
from gpu import Setup, arguments, digits, draw_networks, machine, picture, report, requests, setup_of, write_model
from torch import Tensor

from supir_model import model as model_module
from supir_model.config import Precision
from supir_model.model import Sampling, SupirModel

TARGETS: dict[Precision, float] = {"bfloat16": 2e-2, "float8": 5e-2}

_INTERVALS = [(0.0, 5.0), (0.3, math.inf), (0.3, 5.0)]  # noise levels, of 0.03 to 14.6


def main() -> None:
    """Parse the command line, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--weights", choices=("tiny", "random"), default="tiny")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, help="default: those of the preset")
    given = parser.parse_args()
    setup = setup_of(given)
    with TemporaryDirectory() as folder:
        if given.weights == "random":
            write_model(draw_networks(setup, "float16"), Path(folder) / "model")
            source: str | Path = Path(folder) / "model"
        else:
            source = "tiny"
        rows = _measure(source, setup, given.images, given.steps)
    errors = {row["changed"]: row["error"] for row in rows}
    targets = [
        (f"{precision} errs by {errors[precision]:.1e}, {limit:.0e} at most", errors[precision] <= limit)
        for precision, limit in TARGETS.items()
    ]
    made = machine(setup) | {"weights": given.weights, "precision": "as told"}
    held = report({"machine": made, "rows": rows}, targets, setup.judged and given.weights == "random")
    print(table(rows))
    sys.exit(not held)


def _measure(source: str | Path, setup: Setup, count: int, steps: int | None) -> list[dict[str, Any]]:
    rows = []
    exact: list[Tensor] = []
    for precision in ("float32", *TARGETS):
        model = SupirModel.load(source, str(setup.device), precision)
        preset = model.config.presets["quality"]
        values = dataclasses.replace(preset, steps=steps or preset.steps)
        sampling = Sampling.of(values, model.config.window, model.config.stride)
        side = model.config.window * model.config.vae.factor
        images = [picture(side, side, seed) for seed in range(count)]
        latents, whole = _latents(model, images, sampling)
        if precision == "float32":
            exact, intervals = latents, _INTERVALS
        else:
            intervals = []
            rows.append({"changed": precision, "error": _error(latents, exact), "work": 1.0})
        for low, high in intervals:
            narrow = dataclasses.replace(sampling, guided_sigmas=(low, high))
            latents, computed = _latents(model, images, narrow)
            words = f"guidance from {low:g}" + (f" to {high:g}" if math.isfinite(high) else "")
            rows.append({"changed": words, "error": _error(latents, exact), "work": digits(computed / whole)})
        del model  # before the next one comes to the card
    return rows


def _latents(model: SupirModel, images: Sequence[Tensor], sampling: Sampling) -> tuple[list[Tensor], int]:
    """The final latents, and how many rows the networks computed for them."""
    with _watched(model) as (latents, rows):
        model.restore(requests(model, images), sampling)
    return latents, sum(rows)


@contextmanager
def _watched(model: SupirModel) -> Iterator[tuple[list[Tensor], list[int]]]:
    """What the sampler returns, and the rows of every call of the networks, while the block runs."""
    latents: list[Tensor] = []
    rows: list[int] = []
    sample, compute = model_module.sample, model._compute

    def sampled(*given: Any) -> list[Tensor]:
        made = sample(*given)
        latents.extend(latent.cpu() for latent in made)
        return made

    def computed(*given: Any) -> Tensor:
        rows.append(len(given[1]))
        return compute(*given)

    with mock.patch.object(model_module, "sample", sampled), mock.patch.object(model, "_compute", computed):
        yield latents, rows


def _error(latents: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative: over all images together."""
    wanted = torch.cat([latent.flatten() for latent in exact])
    return digits(float((torch.cat([latent.flatten() for latent in latents]) - wanted).norm() / wanted.norm()))


if __name__ == "__main__":
    main()
