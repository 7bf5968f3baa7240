from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from supir_batch.bookkeeping import Stopwatch, failure_of
from supir_batch.errors import EngineError, ImageError, StoreError, TransientStoreError
from supir_batch.types import Job, Source, TileTicket

MakeJob = Callable[..., Job]

SOURCE = Source("a", "s3://archive/a.tif", "list.csv:12", "a.tif", "v1", 10)


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (ImageError("truncated", "ends early"), "truncated", False),
        (StoreError("denied"), "store", False),
        (TransientStoreError("slow down"), "store", True),
        (EngineError("no weights"), "engine", False),
        (MemoryError(), "out-of-memory", False),
        (torch.OutOfMemoryError("CUDA out of memory."), "out-of-memory", False),
        (ZeroDivisionError("division by zero"), "internal", False),
    ],
)
def test_a_failure_names_row_image_kind_and_whether_to_retry(error: Exception, kind: str, retryable: bool) -> None:
    failure = failure_of("decode", SOURCE, error)
    assert (failure.stage, failure.kind, failure.retryable) == ("decode", kind, retryable)
    assert failure.message.startswith("list.csv:12: s3://archive/a.tif: ")


def test_an_unexpected_error_says_its_type_and_a_known_uri_is_not_said_twice() -> None:
    assert "ZeroDivisionError: by zero" in failure_of("write", SOURCE, ZeroDivisionError("by zero")).message
    told = failure_of("write", SOURCE, StoreError("s3://archive/a.tif: access denied"))
    assert told.message == "list.csv:12: s3://archive/a.tif: access denied"


def test_a_stopwatch_shares_its_time(make_job: MakeJob, tmp_path: Path) -> None:
    watch = Stopwatch("restore", "cuda:0")
    time.sleep(0.02)
    ticket = watch.record(TileTicket(make_job(tmp_path / "a.png")), share=2)
    (record,) = ticket.records
    assert (record.stage, record.device) == ("restore", "cuda:0")
    assert 0.01 <= record.seconds < 5
    assert record.peak_memory_bytes > 1_000_000


def test_the_peak_is_that_of_the_stage_alone(make_job: MakeJob, tmp_path: Path) -> None:
    ticket = TileTicket(make_job(tmp_path / "a.png"))
    block = bytearray(80 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    watch = Stopwatch("decode")
    held = watch.record(ticket).records[0].peak_memory_bytes
    del block
    after = Stopwatch("decode").record(ticket).records[0].peak_memory_bytes
    assert held - after > 60 * 2**20


def test_a_system_that_does_not_tell_the_peak_gives_that_of_the_process(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "Name: python\nVmRSS: 10 kB\n")
    peak = Stopwatch("decode").record(TileTicket(make_job(tmp_path / "a.png"))).records[0].peak_memory_bytes
    assert peak > 10 * 2**20
