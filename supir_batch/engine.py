"""Engines: what restores a tile. Loaded once per actor; torch is imported only when one is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from supir_batch import model_folder
from supir_batch.errors import ImageError
from supir_batch.types import FloatImage, ModelRef, Settings, TileTicket
from supir_model.config import SamplingDefaults

if TYPE_CHECKING:
    from supir_model.model import Request, Sampling, SupirModel

Device = Literal["auto", "cpu", "cuda"]


class Engine(Protocol):
    """Restores tiles. Results depend on each tile and its settings alone, never on the other tiles of a call."""

    device: str  # for the log
    execution: str = ""  # how the last call of ``restore`` worked, for the log

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        """Restored tiles [h, w, 3], same sizes and order; in [0, 1], or around it under geometry ``released``."""
        ...

    def restore_again(self, ticket: TileTicket, tile: FloatImage) -> FloatImage | None:
        """Another attempt at a tile that went wrong, with the ticket's new seed; None if it could not differ."""
        ...


LoadEngine = Callable[[ModelRef | None, Device], Engine]
"""Gets an engine ready to work, in the process and on the device that it will work on."""


class LanczosEngine:
    """The non-generative baseline: the decoder has already resampled the image, so nothing is left to do."""

    device = "cpu"
    execution = ""

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        """The tiles themselves."""
        return list(tiles)

    def restore_again(self, ticket: TileTicket, tile: FloatImage) -> FloatImage | None:
        """None: there is nothing to draw."""
        return None


class SupirEngine:
    """SUPIR: the model is loaded in the constructor and reused for every tile.

    window_batch: most windows that the networks see at once on a GPU. A CPU is not faster with several.
    """

    def __init__(self, model: ModelRef, device: Device, window_batch: int = 1) -> None:
        from supir_model.first_stage import device_of  # noqa: PLC0415
        from supir_model.model import SupirModel  # noqa: PLC0415

        fix_threads()
        target = device_of(None if device == "auto" else device)
        self.model: SupirModel = SupirModel.load(
            model_folder.local(model.uri), str(target), model.precision, window_batch if target.type == "cuda" else 1
        )
        self.device = str(self.model.device)
        self.execution = ""
        self._is_new = True

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        """Sample each tile with its own seed, prompt and place in the image."""
        restored: list[FloatImage | None] = [None] * len(tickets)
        ways: list[str] = []
        for sampling, members in self._by_sampling(tickets).items():
            requests = [self._request(tickets[i], tiles[i]) for i in members]
            for i, tensor in zip(members, self.model.restore(requests, sampling), strict=True):
                restored[i] = ((tensor + 1) / 2).permute(1, 2, 0).contiguous().numpy()
            ways.append(self.model.execution)
        if self._is_new and self.model.seconds_to_first_window is not None:
            ways.append(f"first window {self.model.seconds_to_first_window:.1f} s after loading began")
            self._is_new = False
        self.execution = "; ".join(dict.fromkeys(ways))
        return [tile for tile in restored if tile is not None]

    def restore_again(self, ticket: TileTicket, tile: FloatImage) -> FloatImage | None:
        """Sample once more, in float32."""
        with self.model.in_float32():
            return self.restore([ticket], [tile])[0]

    @staticmethod
    def _by_sampling(tickets: Sequence[TileTicket]) -> dict[Sampling, list[int]]:
        groups: dict[Sampling, list[int]] = {}
        for i, ticket in enumerate(tickets):
            groups.setdefault(sampling_of(ticket.job.settings), []).append(i)
        return groups

    @staticmethod
    def _request(ticket: TileTicket, tile: FloatImage) -> Request:
        from supir_model.model import Request  # noqa: PLC0415

        if ticket.box is None:
            raise ImageError("internal", f"{ticket.job.source.uri}: a tile without a place reached the engine")
        return Request(
            image=to_tensor(tile),
            prompt=ticket.prompt,
            negative_prompt=ticket.job.settings.negative_prompt,
            seed=ticket.seed,
            top=ticket.box.y,
            left=ticket.box.x,
        )


def load_engine(model: ModelRef | None, device: Device, window_batch: int = 1) -> Engine:
    """The engine with this model, ready to work; without one, the baseline."""
    return LanczosEngine() if model is None else SupirEngine(model, device, window_batch)


def alignment(model: ModelRef | None) -> int:
    """Tile origins must be multiples of this many pixels, so that tiles lie on the model's latent grid."""
    return 1 if model is None else model.config.alignment


def full_prompt(settings: Settings, caption: str) -> str:
    """Caption and positive prompt as the model reads them; no separator, as in specification section 9."""
    return caption + settings.positive_prompt


def sampling_of(settings: Settings) -> Sampling:
    """The model's view of the settings."""
    from supir_model.model import Sampling  # noqa: PLC0415
    from supir_model.vae_tiling import WHOLE, VAETiling  # noqa: PLC0415

    values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(SamplingDefaults)}
    return Sampling.of(
        SamplingDefaults(**values),
        settings.window,
        settings.stride,
        WHOLE if settings.vae_tiling == "off" else VAETiling(settings.vae_tiling, settings.vae_tile),
        clip=settings.geometry != "released",
        guided_sigmas=(settings.guidance_from, math.inf if settings.guidance_to is None else settings.guidance_to),
    )


def fix_threads() -> None:
    """One fixed number: sums over another number of threads round differently, and outputs would differ in bytes."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(os.cpu_count() or 1)


def to_tensor(image: FloatImage) -> torch.Tensor:
    """[h, w, 3] in [0, 1] to [3, h, w] in [-1, 1], as the model takes it."""
    import torch  # noqa: PLC0415

    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) * 2 - 1


if TYPE_CHECKING:
    import torch
