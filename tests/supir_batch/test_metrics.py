"""What the ledger and the rows of a run give to whoever watches; tests/jobs/test_cluster.py reads it in Prometheus."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from supir_batch import metrics, pipeline
from supir_batch.isolation import Worker
from supir_batch.metrics import Metric
from supir_batch.runlog import STAGES


class Recorder(pipeline._Meters):
    """Keeps what is recorded."""

    def __init__(self) -> None:
        super().__init__("run")
        self.seen: list[tuple[Metric, float, dict[str, str]]] = []

    def record(self, metric: Metric, value: float, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        assert set(tags) == set(metric.tags), metric.name
        self.seen.append((metric, value, dict(tags)))

    def of(self, metric: Metric) -> list[float]:
        return [value for one, value, _ in self.seen if one == metric]


def ledger(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> pipeline._LedgerActor:
    monkeypatch.setattr(pipeline, "_is_lost", lambda node: node == "lost")
    return pipeline._LedgerActor(2, 3, recorder)


def test_images_on_their_way_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()

    async def work() -> None:
        actor = ledger(monkeypatch, recorder)
        assert await actor.admit(["a"])
        assert await actor.admit(["b"])
        assert await actor.admit(["b"]), "a task that was lost asks again"
        await actor.retire("a")
        assert await actor.admit(["c"])
        await actor.retire("b")
        await actor.retire("c")

    asyncio.run(work())
    assert recorder.of(metrics.IN_FLIGHT)[0] == 1
    assert max(recorder.of(metrics.IN_FLIGHT)) == 2
    assert recorder.of(metrics.IN_FLIGHT)[-1] == 0
    assert recorder.of(metrics.WAITING)[0] == 2
    assert recorder.of(metrics.WAITING)[-1] == 0


def test_a_death_is_counted_once_and_a_lost_node_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    a, b, c = ("a", 0), ("b", 0), ("c", 0)

    async def work() -> None:
        actor = ledger(monkeypatch, recorder)
        await actor.begin("restore", [a, b], Worker("here", 1))  # dies with both
        await actor.begin("restore", [a, b], Worker("here", 2))  # is told to take them alone
        for item in (a, b):
            await actor.begin("restore", [item], Worker("here", 2))
            await actor.end("restore", [item])
        await actor.begin("decode", [c], Worker("lost", 3))
        await actor.begin("decode", [c], Worker("here", 4))

    asyncio.run(work())
    assert sum(recorder.of(metrics.DEATHS)) == 1
    retries = [(value, tags["stage"]) for metric, value, tags in recorder.seen if metric == metrics.RETRIES]
    assert retries == [(2, "restore"), (1, "decode")]


def row(**values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(["failure_kind", "output_width", "output_height", *(f"seconds_{stage}" for stage in STAGES)])
    return {**empty, "recovered": False, "status": "done", **values}


def test_an_image_is_counted_as_what_it_ended_as() -> None:
    recorder = Recorder()
    pipeline._count(row(output_width=2000, output_height=1000, seconds_decode=0.5, seconds_write=2.0), recorder)
    pipeline._count(row(recovered=True, output_width=2000, output_height=1000), recorder)
    pipeline._count(row(status="failed", failure_kind="truncated"), recorder)
    assert [tags for metric, _, tags in recorder.seen if metric == metrics.IMAGES] == [
        {"status": "done", "cause": ""},
        {"status": "recovered", "cause": ""},
        {"status": "failed", "cause": "truncated"},
    ]
    assert recorder.of(metrics.MEGAPIXELS) == [2.0]
    assert recorder.of(metrics.STAGE_SECONDS) == [0.5, 2.0]


def test_meters_go_to_other_processes_empty() -> None:
    meters = pipeline._Meters("run")
    meters._made[metrics.IMAGES] = object()
    assert pickle.loads(pickle.dumps(meters))._made == {}


def test_names_are_ours_and_unique() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("supir_batch_") for name in names)
    declared = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert set(declared) == set(metrics.METRICS)
