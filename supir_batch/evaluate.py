"""How well a model restores: photographs are degraded, restored as a run would, and compared with what they were.

The protocol of SUPIR (Yu et al. 2024, section 4): fixed degradations, several methods side by side, distances to the
original and quality without one. Noise, seeds and captions are functions of the photograph and the settings alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from supir_batch import decode, resample, store
from supir_batch.captioner import Captioner, load_captioner
from supir_batch.engine import Device, SupirEngine, full_prompt, to_tensor
from supir_batch.errors import ManifestError
from supir_batch.settings import item_seed, settings_hash
from supir_batch.types import FloatImage, Job, Settings, TileBox, TileTicket
from supir_model.metrics import Metrics
from supir_model.training.degradations import BENCHMARKS, Benchmark

NO_DEGRADATION = "none"
"""For photographs that are damaged already: they are restored as they are, and there is no original to compare with"""

SAMPLED, STAGE_1, ENCODE_DECODE = "sampled", "stage 1", "encode-decode"


@dataclass(frozen=True)
class Ablations:
    """What is left out in further sampled results (the paper's figures 8 and 13)."""

    no_text: bool = False
    no_negative: bool = False
    no_restoration: bool = False
    taus: tuple[float, ...] = ()

    def variants(self, settings: Settings) -> dict[str, Settings]:
        """Method to its settings, the unchanged ones first."""
        found = {SAMPLED: settings}
        if self.no_text:
            found["sampled, no text"] = dataclasses.replace(settings, prompt="", positive_prompt="")
        if self.no_negative:
            found["sampled, no negative prompt"] = dataclasses.replace(settings, negative_prompt="")
        if self.no_restoration:
            found["sampled, no restoration guidance"] = dataclasses.replace(settings, restoration_tau=None)
        for tau in self.taus:
            found[f"sampled, tau {tau:g}"] = dataclasses.replace(settings, restoration_tau=tau)
        return found


class Result(NamedTuple):
    """One image as one method gives it. ``settings``: of sampled methods; ``seconds``: of the method itself."""

    method: str
    pixels: FloatImage
    seconds: float = 0.0
    settings: Settings | None = None


@dataclass(frozen=True)
class Comparison:
    """All methods on one degraded photograph. ``values``: method to metric to value, None where it has none."""

    image: str
    degradation: str
    original: FloatImage | None
    results: tuple[Result, ...]
    values: dict[str, dict[str, float | None]]
    unavailable: dict[str, str]  # metric to the reason why nothing has it


def compare(
    jobs: Sequence[Job], device: Device, degradations: Sequence[str], ablations: Ablations
) -> Iterator[Comparison]:
    """Every job's photograph under every degradation, all at the photograph's own size.

    degradations: keys of ``BENCHMARKS`` or ``NO_DEGRADATION``. Raises ManifestError, StoreError or ImageError.
    """
    unknown = [name for name in degradations if name not in (*BENCHMARKS, NO_DEGRADATION)]
    if unknown:
        raise ManifestError(
            f"degradation '{unknown[0]}' is unknown; choose from {', '.join((*BENCHMARKS, NO_DEGRADATION))}"
        )
    metrics = Metrics()
    methods = _Methods(jobs[0], device) if jobs and jobs[0].model else None
    for job in jobs:
        with store.local_copy(job.source.uri) as path:
            original, digest = _read(path), store.sha256(job.source.uri)
        for name in degradations:
            if name == NO_DEGRADATION:
                results, reference = [Result("input", original)], None
                given = original
            else:
                degraded = _degrade(original, BENCHMARKS[name], digest)
                given, results = _enlarge(degraded, original.shape[1], original.shape[0])
                reference = original
            if methods is not None:
                results += methods.results(job, digest, given, reference, ablations)
            target = None if reference is None else _planes(reference)
            values = {one.method: metrics.measure(_planes(one.pixels), target) for one in results}
            yield Comparison(job.source.id, name, reference, tuple(results), values, metrics.unavailable)


class _Methods:
    """The model of all jobs and what it makes of a degraded image; loaded once."""

    def __init__(self, job: Job, device: Device) -> None:
        assert job.model is not None
        self._engine = SupirEngine(job.model, device)
        self._captioner: Captioner = load_captioner(job, device)

    def results(
        self, job: Job, digest: str, given: FloatImage, reference: FloatImage | None, ablations: Ablations
    ) -> Iterator[Result]:
        """What the autoencoder keeps of the original, what the robust encoder sees, what sampling gives."""
        model = self._engine.model
        if reference is not None:
            yield _timed(ENCODE_DECODE, lambda: _pixels(model.encode_decode(to_tensor(reference))))
        yield _timed(STAGE_1, lambda: _pixels(model.first_stage(to_tensor(given))))
        height, width = given.shape[:2]
        box = TileBox(0, 1, 0, 0, width, height)
        caption = job.settings.prompt
        if caption is None:
            ticket = TileTicket(job, box=box, seed=item_seed(job.settings, digest))
            preview = np.ascontiguousarray(resample.reduce_to(given, decode.PREVIEW_SIZE))
            caption = self._captioner.caption([ticket], [preview])[0]
        for method, settings in ablations.variants(job.settings).items():
            changed = dataclasses.replace(job, settings=settings, settings_sha256=settings_hash(settings))
            prompt = full_prompt(settings, caption if settings.prompt is None else settings.prompt)
            ticket = TileTicket(changed, box=box, seed=item_seed(settings, digest), prompt=prompt)
            result = _timed(method, lambda ticket=ticket: self._engine.restore([ticket], [given])[0])  # type: ignore[misc]
            yield result._replace(settings=settings)


def _read(path: Path) -> FloatImage:
    pixels, _ = decode.read_srgb(path)
    return np.ascontiguousarray(pixels)


def _degrade(original: FloatImage, benchmark: Benchmark, digest: str) -> FloatImage:
    generator = torch.Generator().manual_seed(int(digest[:15], 16))
    return _pixels(benchmark.apply(to_tensor(original)[None], generator)[0])


def _enlarge(degraded: FloatImage, width: int, height: int) -> tuple[FloatImage, list[Result]]:
    """The image as the engine is given it, enlarged as in a run, and the methods that are no more than that."""
    if degraded.shape[:2] == (height, width):
        return degraded, [Result("input", degraded)]
    lanczos = _timed("lanczos", lambda: resample.resize(degraded, width, height))
    return lanczos.pixels, [_timed("bicubic", lambda: _bicubic(degraded, width, height)), lanczos]


def _bicubic(pixels: FloatImage, width: int, height: int) -> FloatImage:
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in pixels.transpose(2, 0, 1)]
    resized = [np.asarray(band.resize((width, height), Image.Resampling.BICUBIC)) for band in bands]
    enlarged: FloatImage = np.clip(np.stack(resized, axis=2), 0.0, 1.0)
    return enlarged


def _timed(method: str, make: Callable[[], FloatImage]) -> Result:
    started = time.perf_counter()
    pixels = make()
    return Result(method, pixels, time.perf_counter() - started)


def _pixels(tensor: torch.Tensor) -> FloatImage:
    """[3, H, W] in [-1, 1] to [H, W, 3] in [0, 1]."""
    pixels: FloatImage = ((tensor + 1) / 2).clamp(0, 1).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def _planes(pixels: FloatImage) -> torch.Tensor:
    """[H, W, 3] to [3, H, W], both in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
