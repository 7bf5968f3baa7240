"""How much a model takes of its device's memory at once: a ladder, and on which rung of it the model stands.

The first rung is chosen by measurement: what the weights, one window and one pixel in the VAE take, against what is
free. What nobody foresaw raises an out-of-memory error, which costs the work at hand one rung and nothing else.

A rung says how a result is computed, not what it is: on another one it differs by the rounding of another batch size
and of the VAE's exact strips. So the rung belongs to what is told of a result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from supir_model.vae_tiling import VAETiling

T = TypeVar("T")

PeakOf = Callable[[Callable[[], object]], int]
"""Most bytes that a call takes beyond what was held before it"""


@dataclass(frozen=True)
class Rung:
    """How a model works in a certain memory.

    window_batch: windows that the denoising networks see at once. vae_tile: the VAE works on an image of up to this
    side squared as a whole, and through a larger one in exact strips of as many pixels; None: as the request says.
    offload: networks that are not at work wait in host memory.
    """

    window_batch: int
    vae_tile: int | None = None
    offload: bool = False

    def tiling(self, wanted: VAETiling) -> VAETiling:
        """How the VAE runs where ``wanted`` is asked for; the released tiling makes another picture, so it stays."""
        if self.vae_tile is None or wanted.mode == "released":
            return wanted
        tile = self.vae_tile if wanted.mode == "off" else min(self.vae_tile, wanted.tile)
        return VAETiling("exact", tile)

    def __str__(self) -> str:
        parts = [f"window batch {self.window_batch}"]
        parts += [f"VAE tile {self.vae_tile}"] if self.vae_tile is not None else []
        parts += ["offload"] if self.offload else []
        return ", ".join(parts)


LADDER = (
    Rung(8, 4096),
    Rung(8, 3072),
    Rung(4, 2048),
    Rung(2, 1536),
    Rung(1, 1024),
    Rung(1, 768, offload=True),
    Rung(1, 512, offload=True),
    Rung(1, 256, offload=True),
)
"""From much memory to little; made for the SDXL networks on cards of 80 GB and more, 48, 24, 16 and 12 GB."""

RESERVE = 0.08
"""Share of the free memory that a choice leaves alone: allocators lose some between their blocks"""


@dataclass(frozen=True)
class Costs:
    """Bytes, measured. denoiser, vae: weights that sampling, and the VAE, need at hand; weights: all of them.

    step: what a step takes whatever its windows; window: each window besides; pixel: each pixel that the VAE works on.
    """

    weights: int
    denoiser: int
    vae: int
    step: int
    window: int
    pixel: float

    def of(self, rung: Rung) -> int:
        """Most that a model on this rung takes, its weights included."""
        sampling = (self.denoiser if rung.offload else self.weights) + self.step + rung.window_batch * self.window
        pixels = 0 if rung.vae_tile is None else rung.vae_tile**2
        vae = (self.vae if rung.offload else self.weights) + int(pixels * self.pixel)
        return max(sampling, vae)


def choose(ladder: Sequence[Rung], costs: Costs, free: int) -> tuple[Rung, ...]:
    """The ladder from the first rung on whose costs fit into ``free`` bytes; of one that is too high, the last rung."""
    usable = int(free * (1 - RESERVE))
    for index, rung in enumerate(ladder):
        if costs.of(rung) <= usable:
            return tuple(ladder[index:])
    return tuple(ladder[-1:])


def rungs_of(window_batch: int) -> tuple[Rung, ...]:
    """``LADDER`` with at most so many windows at once, and no rung twice."""
    rungs = (replace(rung, window_batch=min(rung.window_batch, window_batch)) for rung in LADDER)
    return tuple(dict.fromkeys(rungs))


class Ladder:
    """The rungs that are left to a model, the one it stands on first."""

    def __init__(self, rungs: Sequence[Rung], device: torch.device) -> None:
        self._rungs, self._device = list(rungs), device
        self.left: list[Rung] = []  # ran out of memory on them, the first first

    @property
    def rung(self) -> Rung:
        """Where the model stands."""
        return self._rungs[0]

    def attempt(self, work: Callable[[Rung], T]) -> T:
        """Do ``work``, again on the next rung whenever memory runs out; on the last one the error is the caller's."""
        while True:
            try:
                return work(self.rung)
            except torch.OutOfMemoryError:
                if len(self._rungs) == 1:
                    raise
            # here, because the error holds on to the tensors of the work that it ended
            self.left.append(self._rungs.pop(0))
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a CUDA device, its share of it being respected."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    held = reserved - torch.cuda.memory_allocated(device)  # by the allocator, for whoever asks
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, share) + held


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """``PeakOf`` a CUDA device."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    sizes: tuple[int, int, int],
    step: Callable[[int], object],
    vae: Callable[[int], object],
    peak_of: PeakOf,
) -> Costs:
    """Costs of a model from its own peaks.

    sizes: bytes of all weights, the denoiser's and the VAE's. step(windows): one step of the networks; vae(side): the
    VAE on a square image of this side.
    """
    one, two = (peak_of(lambda n=n: step(n)) for n in (1, 2))  # type: ignore[misc]
    small, large = (peak_of(lambda n=n: vae(n)) for n in (256, 512))  # type: ignore[misc]
    window = max(0, two - one)
    pixel = max(0.0, (large - small) / (512**2 - 256**2))
    return Costs(*sizes, step=max(0, one - window), window=window, pixel=pixel)
