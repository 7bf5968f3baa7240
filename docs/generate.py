"""Writes what the pages say of the code: ``python docs/generate.py``, after a key, column, flag or example has changed.

What is made stands between two comments, ``<!-- generated: name -->`` and ``<!-- end -->``; all else of a page is
written by hand. Pages are committed, so that they can be read where the code is; a test sees that they are in step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from supir_batch import cli, columns, runlog
from supir_batch.manifest import ListRow
from supir_batch.settings import Manifest

DOCS = Path(__file__).parent


def manifest() -> str:
    """Every key of a manifest, a table for each section."""
    sections = Manifest.model_json_schema()["$defs"]
    fields = {name: field.annotation for name, field in Manifest.model_fields.items()}
    made = ["## At the top\n", _keys(Manifest, "", [name for name in fields if not _section(fields[name])])]
    for name, annotation in fields.items():
        if _section(annotation):
            made += [f"## {name}\n", f"{sections[annotation.__name__]['description']}\n", _keys(annotation, f"{name}.")]
    return "\n".join(made)


def list_row() -> str:
    """Every column of a list."""
    return _keys(ListRow, "")


def run_log() -> str:
    """Every column of the run log."""
    rows = ["| column | type | meaning |", "|---|---|---|"]
    for field in runlog.SCHEMA:
        kind = {"timestamp[us, tz=UTC]": "timestamp (UTC)"}.get(str(field.type), str(field.type))
        rows.append(f"| `{field.name}` | {_cell(kind)} | {columns.MEANINGS[field.name]} |")
    return "\n".join(rows)


def command_line() -> str:
    """Every command with its arguments and options."""
    command = typer.main.get_command(cli.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="supir-batch", indent=1)
    text = re.sub(r"Exit codes: .*\n\n", "", text)  # of the program, not of each command; the page has them once
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text).strip()  # cut off; what follows says it whole


def engine_example() -> str:
    """The engine of docs/examples, whole."""
    return f"```python\n{(DOCS / 'examples' / 'network_engine.py').read_text(encoding='utf-8')}```"


def recipe(name: str) -> Callable[[], str]:
    """A manifest of manifests/, whole."""
    file = DOCS.parent / "manifests" / f"{name}.yaml"
    return lambda: f"```yaml\n# manifests/{file.name}\n{file.read_text(encoding='utf-8')}```"


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "manifest.md": {"manifest": manifest, "list": list_row},
    "run-log.md": {"columns": run_log},
    "cli.md": {"commands": command_line},
    "extending.md": {"example": engine_example},
    "cook-book.md": {name: recipe(name) for name in ("prints", "glass-plates", "halftones", "documents", "overnight")},
    "operations.md": {"overnight": recipe("overnight")},
}
"""What is made in each page, by the name in its comment."""


def page(name: str) -> str:
    """A page as it should be. Raises ValueError if it has no place for what is to be made."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for part, make in PAGES[name].items():
        place = re.compile(rf"(<!-- generated: {part} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"docs/{name} has no '<!-- generated: {part} -->' with an '<!-- end -->' after it")
        made = make()
        text = place.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)
    return text


def _section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _keys(model: type[BaseModel], prefix: str, only: list[str] | None = None) -> str:
    schema = model.model_json_schema()
    required = schema.get("required", ())
    rows = ["| key | value | left out | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if only is None or name in only:
            default = "must be given" if name in required else _default(field.get("default"))
            rows.append(f"| `{prefix}{name}` | {_values(field)} | {default} | {_cell(field['description'])} |")
    return "\n".join(rows) + "\n"


def _default(value: object) -> str:
    return "" if value is None else _cell(f"`{json.dumps(value, ensure_ascii=False)}`")


def _values(field: Mapping[str, Any]) -> str:
    """What may be given, in words, from a property's JSON schema."""
    if "anyOf" in field:
        return ", ".join(_values(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{one}`" for one in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"one or a list of: {_values(field['items'])}"
    words = {"string": "text", "boolean": "`true`, `false`", "integer": "whole number", "number": "number"}
    limits = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "multipleOf": "a multiple of {}",
        "maxLength": "of {} characters at most",
        "pattern": "64 hexadecimal digits",  # the only pattern there is
    }
    said = [words[field["type"]], *(text.format(field[key]) for key, text in limits.items() if key in field)]
    return " ".join(said[1:] if "pattern" in field else said)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def main() -> None:
    """Write all pages."""
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
