"""Options of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

_BESIDE_REPOSITORY = Path(__file__).parents[2] / "shared" / "vectors"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("supir")
    group.addoption(
        "--vectors",
        type=Path,
        default=_BESIDE_REPOSITORY,
        metavar="DIR",
        help="numbers recorded from the released SUPIR program (default: shared/vectors beside the repository)",
    )
    group.addoption(
        "--parity-table", type=Path, metavar="FILE", help="write the largest measured differences as a Markdown table"
    )
