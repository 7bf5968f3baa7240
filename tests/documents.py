"""What documents show a reader: code blocks, and calls of supir-batch in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.core
import typer.main

from supir_batch.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> Iterator[list[str]]:
    """Every call of supir-batch in a file: in scripts and their headers, in YAML, in the code blocks of Markdown."""
    text = "\n".join(blocks(path, "sh")) if path.suffix == ".md" else path.read_text(encoding="utf-8")
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:#\s{2,}|\s*)(supir-batch .*?)( &)?$", line)
        if found is not None:
            yield shlex.split(found[1], comments=True)


def parse(words: list[str]) -> None:
    """Raise a usage error unless the command line has this command with these flags."""
    command: Any = typer.main.get_command(app)
    name, rest = words[0], words[1:]
    while isinstance(command, typer.core.TyperGroup):
        name, rest = rest[0], rest[1:]
        command = command.commands[name]
    rest = [word.replace('"$@"', "") for word in rest if word != "$@"]
    context = command.make_context(name, rest)
    if name == "submit":  # its other flags are those of run
        parse(["supir-batch", "run", "m.yaml", *context.args])
