"""How the engine worked is told of every image: on which rung of memory, and what ran out on the way."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image

from supir_batch.decode import decode
from supir_batch.engine import Engine, LanczosEngine, SupirEngine
from supir_batch.isolation import Guards
from supir_batch.stages import RestoreStage, write_stage
from supir_batch.types import FloatImage, Job, ModelRef, TileTicket
from supir_model.config import TINY
from supir_model.memory import Ladder, Rung

MakeJob = Callable[..., Job]

SUPIR = {"engine": "supir", "weights": "tiny", "sampler": "edm", "steps": 1, "window": 16, "stride": 8, "prompt": ""}


class _Falling(LanczosEngine):
    """An engine that works with less memory at every call."""

    def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        self.execution += "-"
        return super().restore(tickets, tiles)


def rows_of(job: Job, engine: Engine, guards: Guards) -> list[dict[str, Any]]:
    stage = RestoreStage(guards, None, "cpu")
    stage._loaded = engine
    rows: list[dict[str, Any]] = []
    for tile in decode(job, 16):
        batch = {"ticket": [pickle.dumps(tile.ticket)], "pixels": [tile.pixels], "carried": [tile.carried]}
        rows += write_stage(stage(batch), guards).to_pylist()
    return rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Image.fromarray(skimage.data.astronaut()[0:64, 100:180]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_memory_that_ran_out_is_logged_on_the_image(source: Path, make_job: MakeJob, guards: Guards) -> None:
    engine = SupirEngine(ModelRef("tiny", TINY), "cpu")
    engine.model.ladder = Ladder([Rung(4), Rung(2)], torch.device("cpu"))

    def too_much(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError

    engine.model.networks.unet.register_forward_pre_hook(too_much)
    job = make_job(source, **SUPIR, cfg_start=1.0, cfg_end=1.0)
    (row,) = rows_of(job, engine, guards)
    assert row["status"] == "done"
    assert row["execution"].startswith("window batch 2; memory ran out with window batch 4; first window ")
    assert json.loads(Path(f"{row['output_uri']}.json").read_text())["run"]["execution"] == row["execution"]


def test_a_cut_image_tells_of_all_its_tiles(source: Path, make_job: MakeJob, guards: Guards) -> None:
    (row,) = rows_of(make_job(source, max_pixels=3000, overlap=16), _Falling(), guards)
    assert row["tiles"] > 1
    assert row["execution"] == " | ".join("-" * (1 + tile) for tile in range(row["tiles"]))
