"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., tuple[dict[str, Any], str, int]]


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
