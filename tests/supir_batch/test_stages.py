"""What a restoring worker does with several tiles: some are measured while the next are restored."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import skimage.data
from PIL import Image

from supir_batch import gate, pipeline, stages
from supir_batch.decode import decode
from supir_batch.engine import Engine, LanczosEngine
from supir_batch.isolation import Guards
from supir_batch.settings import Runtime
from supir_batch.stages import RestoreStage
from supir_batch.types import FloatImage, GateScores, TileTicket

from .conftest import MakeJob


@pytest.fixture
def batch(tmp_path: Path, make_job: MakeJob) -> dict[str, Any]:
    """Three tiles of one image."""
    Image.fromarray(skimage.data.astronaut()[0:200, 100:380]).save(tmp_path / "a.png")
    tiles = list(decode(make_job(tmp_path / "a.png", max_pixels=160 * 160), 16))
    assert len(tiles) == 3
    return {"ticket": [pickle.dumps(tile.ticket) for tile in tiles], "pixels": [tile.pixels for tile in tiles]}


def restored(engine: Engine, batch: dict[str, Any], guards: Guards, together: int) -> list[TileTicket]:
    stage = RestoreStage(guards, None, "cpu", lambda model, device: engine, together)
    return [pickle.loads(ticket) for ticket in stage(batch)["ticket"]]


def test_tiles_are_measured_while_the_engine_has_the_next(
    batch: dict[str, Any], guards: Guards, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, measure = threading.Event(), gate.measure

    def measured(*given: Any) -> GateScores:
        begun.set()
        return measure(*given)

    class Waiting(LanczosEngine):
        """Does not go on with its second call before a tile of the first is being measured."""

        def __init__(self) -> None:
            self.calls: list[int] = []

        def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
            assert not self.calls or begun.wait(60)
            self.calls.append(len(tiles))
            return list(tiles)

    monkeypatch.setattr(stages.gate, "measure", measured)
    engine = Waiting()
    tickets = restored(engine, batch, guards, together=2)
    assert engine.calls == [2, 1]
    assert all(ticket.failure is None and ticket.scores is not None for ticket in tickets)


def test_an_engine_that_breaks_fails_the_tiles_it_had_and_no_others(batch: dict[str, Any], guards: Guards) -> None:
    class Breaking(LanczosEngine):
        def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
            if any(ticket.box is not None and ticket.box.index == 1 for ticket in tickets):
                raise MemoryError
            return list(tiles)

    first, second, third = restored(Breaking(), batch, guards, together=1)
    assert (first.failure, third.failure) == (None, None)
    assert second.failure is not None
    assert (second.failure.stage, second.failure.kind) == ("restore", "out-of-memory")


@pytest.mark.parametrize(
    ("runtime", "on_card", "wanted"),
    [
        ({"batch": 8}, False, 8),
        ({"batch": 8}, True, 32),
        ({"batch": 8, "actors": 4}, True, 8),  # 64 images on their way are two batches for each of four
        ({"batch": 8, "actors": 2}, True, 16),
        ({"batch": 8, "images_in_flight": 3}, True, 3),
        ({"batch": 8, "images_in_flight": 3}, False, 3),
        ({}, False, 1),
    ],
)
def test_a_worker_is_handed_no_more_than_can_be_on_its_way(runtime: dict[str, int], on_card: bool, wanted: int) -> None:
    assert pipeline._handed_over(Runtime(**runtime), on_card) == wanted
