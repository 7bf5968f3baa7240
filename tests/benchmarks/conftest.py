"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Run = Callable[..., tuple[dict[str, Any], str, int]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are small: threads would only wait for each other, long where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark at reduced width on the CPU: its JSON, all that it printed, its exit code."""

    def call(name: str, *arguments: str) -> tuple[dict[str, Any], str, int]:
        given = [f"benchmarks/{name}.py", "--width", "reduced", "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(name).main()
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[0]), printed, int(ended.value.code or 0)

    return call
