"""How well a model restores: photographs are degraded, restored as a run would, and compared with what they were.

The protocol of SUPIR (Yu et al. 2024, section 4): fixed degradations, several methods side by side, distances to the
original and quality without one. Noise, seeds and captions are functions of the photograph and the settings alone.
Captions, working size, tiles and tone are those of a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image

from supir_batch import color, commit, decode, encode, resample, stitch, store, tiles
from supir_batch.captioner import Captioner, load_captioner
from supir_batch.engine import Device, Engine, SupirEngine, alignment, full_prompt, to_tensor
from supir_batch.errors import ImageError, ManifestError, StoreError
from supir_batch.identity import item_seed, settings_hash
from supir_batch.types import FloatImage, Job, Settings, TileBox, TileTicket
from supir_model.metrics import Metrics
from supir_model.training.degradations import BENCHMARKS, Benchmark

NO_DEGRADATION = "none"
"""For photographs that are damaged already: they are restored as they are, and there is no original to compare with"""

INPUT, BICUBIC, LANCZOS, ENCODE_DECODE, STAGE_1, SAMPLED = METHODS = (
    "input",
    "bicubic",
    "lanczos",
    "encode-decode",
    "stage-1",
    "sampled",
)


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
    """All methods on one degraded photograph.

    ``given`` is the degraded image at the size of the results, enlarged if it was smaller. ``values``: method to metric
    to value; ``unavailable``: metric to the reason why some method has no value.
    """

    image: str
    degradation: str
    given: FloatImage
    original: FloatImage | None
    results: tuple[Result, ...]
    values: dict[str, dict[str, float]]
    unavailable: dict[str, str]


@dataclass(frozen=True)
class LeftOut:
    """A photograph that could not be read or restored, and why."""

    image: str
    degradation: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """What to compare: keys of ``BENCHMARKS`` or ``NO_DEGRADATION``, some of ``METHODS``, and what else to sample.

    Raises ManifestError for a name that is not known.
    """

    degradations: Sequence[str] = ("D1", "D2")
    methods: Sequence[str] = METHODS
    ablations: Ablations = Ablations()

    def __post_init__(self) -> None:
        _refuse_unknown("degradation", self.degradations, (*BENCHMARKS, NO_DEGRADATION))
        _refuse_unknown("method", self.methods, METHODS)


def compare(
    jobs: Sequence[Job], device: Device, asked: Asked, engines: Mapping[str, Engine] | None = None
) -> Iterator[Comparison | LeftOut]:
    """Every job's photograph under every degradation, at the photograph's own size.

    engines: others to compare with, by the name that their method shall have. Raises ManifestError for settings that
    cannot be evaluated, WeightsError for a model that cannot be loaded.
    """
    for job in jobs:
        if job.settings.geometry != "pad":
            raise ManifestError(f"engine.geometry: only 'pad' can be evaluated, saw '{job.settings.geometry}'")
    metrics = Metrics()
    model = _Model(jobs[0], device) if jobs and jobs[0].model else None
    for job in jobs:
        for name in asked.degradations:
            try:
                photograph = _Photograph.degraded_as(job, name)
                results = list(_results(photograph, asked, model, engines or {}))
            except (ImageError, StoreError) as error:
                yield LeftOut(job.source.id, name, f"{job.source.uri}: {error}")
                continue
            target = None if photograph.original is None else _planes(photograph.original)
            measured = {one.method: metrics.measure(_planes(one.pixels), target) for one in results}
            yield Comparison(
                image=job.source.id,
                degradation=name,
                given=photograph.given,
                original=photograph.original,
                results=tuple(results),
                values={method: one.values for method, one in measured.items()},
                unavailable={metric: why for one in measured.values() for metric, why in one.unavailable.items()},
            )


@dataclass(frozen=True)
class _Photograph:
    """One degraded photograph on its way through all methods; arrays are [h, w, 3] in [0, 1].

    ``given``: at the size of the results. ``working``: at the size at which a run would restore it.
    """

    job: Job
    digest: str  # SHA-256 of the file
    original: FloatImage | None
    degraded: FloatImage
    given: FloatImage
    working: FloatImage
    tone: color.Tone

    @classmethod
    def degraded_as(cls, job: Job, degradation: str) -> Self:
        with store.local_copy(job.source.uri) as path:
            pixels, digest = _read(path), commit.file_sha256(path)
        height, width = pixels.shape[:2]
        original: FloatImage | None = pixels
        if degradation == NO_DEGRADATION:
            width, height = tiles.output_size(width, height, job.settings.upscale)
            degraded, original = pixels, None
        else:
            degraded = _degrade(pixels, BENCHMARKS[degradation], digest)
        return cls(
            job=job,
            digest=digest,
            original=original,
            degraded=degraded,
            given=resample.resize(degraded, width, height),
            working=resample.resize(degraded, *tiles.work_size(width, height, job.settings.min_size)),
            tone=color.measure_tone(resample.reduce_to(degraded, color.TONE_SIZE)),
        )

    def in_tiles(self, pixels: FloatImage, work: Callable[[TileBox, FloatImage], FloatImage]) -> FloatImage:
        """``work`` done on the tiles of an image, cut and put together as in a run."""
        height, width = pixels.shape[:2]
        settings = self.job.settings
        boxes = tiles.plan_tiles(width, height, settings.max_pixels, settings.overlap, alignment(self.job.model))
        parts = []
        for box in boxes:
            tile = pixels[box.y : box.y + box.height, box.x : box.x + box.width]
            parts.append((box, work(box, np.ascontiguousarray(tile))))
        whole = stitch.stitch(parts, width, height, settings.overlap)
        if not np.isfinite(whole).all():
            raise ImageError("bad-output", "the result has values that are no numbers; use float32")
        return np.clip(whole, 0.0, 1.0)

    def fitted(self, working: FloatImage) -> FloatImage:
        """A result at working size brought to the size of the results."""
        return resample.resize(working, self.given.shape[1], self.given.shape[0])

    def restored(self, engine: Engine, settings: Settings, caption: str) -> FloatImage:
        """What a run with this engine and these settings would write."""
        ticket = TileTicket(
            dataclasses.replace(self.job, settings=settings, settings_sha256=settings_hash(settings)),
            seed=item_seed(settings, self.digest),
            caption=caption,
            prompt=full_prompt(settings, caption if settings.prompt is None else settings.prompt),
        )

        def restore(box: TileBox, tile: FloatImage) -> FloatImage:
            return engine.restore([dataclasses.replace(ticket, box=box)], [tile])[0]

        return color.apply_tone(self.fitted(self.in_tiles(self.working, restore)), self.tone)


class _Model:
    """The model of all jobs and its captioner; loaded once."""

    def __init__(self, job: Job, device: Device) -> None:
        if job.model is None:
            raise ValueError(f"the engine of {job.source.uri} has no model")
        self.engine = SupirEngine(job.model, device)
        self._captioner: Captioner = load_captioner(job, device)

    def encode_decode(self, _: TileBox, tile: FloatImage) -> FloatImage:
        """What the autoencoder keeps of a tile."""
        return _pixels(self.engine.model.encode_decode(to_tensor(tile)))

    def first_stage(self, _: TileBox, tile: FloatImage) -> FloatImage:
        """What the robust encoder sees behind a tile."""
        return _pixels(self.engine.model.first_stage(to_tensor(tile)))

    def caption(self, photograph: _Photograph) -> str:
        """The caption of a photograph that came without a prompt."""
        ticket = TileTicket(photograph.job, seed=item_seed(photograph.job.settings, photograph.digest))
        preview = np.ascontiguousarray(resample.reduce_to(photograph.degraded, decode.PREVIEW_SIZE))
        return self._captioner.caption([ticket], [preview])[0]


def _results(
    photograph: _Photograph, asked: Asked, model: _Model | None, engines: Mapping[str, Engine]
) -> Iterator[Result]:
    """What the methods make of one photograph; those that have nothing to do for it are left out."""
    degraded, given, original = photograph.degraded, photograph.given, photograph.original
    settings = photograph.job.settings
    height, width = given.shape[:2]
    if degraded is given:
        if INPUT in asked.methods:
            yield Result(INPUT, given)
    else:
        if BICUBIC in asked.methods:
            yield _timed(BICUBIC, lambda: _bicubic(degraded, width, height))
        if LANCZOS in asked.methods:
            yield _timed(LANCZOS, lambda: resample.resize(degraded, width, height))
    if model is not None:
        if ENCODE_DECODE in asked.methods and original is not None:
            yield _timed(ENCODE_DECODE, lambda: photograph.in_tiles(original, model.encode_decode))
        if STAGE_1 in asked.methods:
            yield _timed(STAGE_1, lambda: photograph.fitted(photograph.in_tiles(photograph.working, model.first_stage)))
        if SAMPLED in asked.methods:
            caption = model.caption(photograph) if settings.prompt is None else settings.prompt
            for method, changed in asked.ablations.variants(settings).items():
                result = _timed(method, lambda changed=changed: photograph.restored(model.engine, changed, caption))  # type: ignore[misc]
                yield result._replace(settings=changed)
    for name, engine in engines.items():
        yield _timed(name, lambda engine=engine: photograph.restored(engine, settings, settings.prompt or ""))  # type: ignore[misc]


def _refuse_unknown(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ManifestError(f"{what} '{name}' is unknown; choose from {', '.join(known)}")


def _read(path: Path) -> FloatImage:
    pixels, _ = decode.read_srgb(path)
    return np.ascontiguousarray(pixels)


def _degrade(original: FloatImage, benchmark: Benchmark, digest: str) -> FloatImage:
    """The degraded image as an 8-bit file would hold it."""
    generator = torch.Generator().manual_seed(int(digest[:15], 16))
    levels = encode.quantize(_pixels(benchmark.apply(to_tensor(original)[None], generator)[0]), 8)
    return levels.astype(np.float32) / np.float32(255)


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
