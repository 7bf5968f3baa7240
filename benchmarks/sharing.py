"""What windows gain by sharing: a batch of them against one by one, and text projected once against at every step.

    python benchmarks/sharing.py

Networks of the SDXL kind at reduced width, with random weights, on the CPU in float32. Both sides of a ratio are timed
in turns in one run, and the medians are compared; above 1, sharing is faster. That says nothing of a GPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from supir_model.attention import project_text
from supir_model.config import ControlConfig, UNetConfig
from supir_model.control import ControlEncoder
from supir_model.unet import ControlledUNet

WINDOW, WINDOWS, TOKENS, TURNS = 16, 4, 77, 7
WIDTH = UNetConfig(4, (32, 64, 128), 2, (0, 2, 4), 64, context_dim=2048, vector_dim=512)
CONTROL = ControlConfig((0, 2, 4))


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Median seconds of ``slow`` over those of ``fast``."""
    seconds: tuple[list[float], list[float]] = ([], [])
    slow(), fast()
    for _ in range(TURNS):
        for work, times in zip((slow, fast), seconds, strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


@torch.inference_mode()
def main() -> None:
    """Measure, and print JSON and a table."""
    torch.manual_seed(0)
    control, unet = ControlEncoder(WIDTH, CONTROL).eval(), ControlledUNet(WIDTH, CONTROL).eval()
    x = torch.randn(WINDOWS, 4, WINDOW, WINDOW)
    context, vector = torch.randn(WINDOWS, TOKENS, 2048), torch.randn(WINDOWS, 512)
    timestep, scale = torch.full((WINDOWS,), 500), torch.ones(WINDOWS, 1, 1, 1)
    once = (project_text(control.base, context), project_text(unet.base, context))

    def step(rows: slice, text: tuple | None = None) -> Tensor:
        for_control, for_unet = text or (context[rows], context[rows])
        features = control(x[rows], timestep[rows], for_control, vector[rows], x[rows])
        return unet(x[rows], timestep[rows], for_unet, vector[rows], features, scale[rows])

    found = {
        "windows_batched": ratio(lambda: [step(slice(i, i + 1)) for i in range(WINDOWS)], lambda: step(slice(None))),
        "text_projected_once": ratio(lambda: step(slice(None)), lambda: step(slice(None), once)),
    }
    print(json.dumps({"threads": torch.get_num_threads(), "windows": WINDOWS, "latents": WINDOW, **found}))
    print(f"\n{WINDOWS} windows of {WINDOW} x {WINDOW} latents | faster by\n---|---")
    for name, value in found.items():
        print(f"{name.replace('_', ' ')} | {value:.2f}x")


if __name__ == "__main__":
    main()
