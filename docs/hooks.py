"""Pages link to files of the repository, such as ``../jobs/slurm.sbatch``: the site gets a page for each of them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")
_LANGUAGES = {".sbatch": "bash", ".yml": "yaml", "": "text"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of all files that are linked."""
    linked = {target for page in files.documentation_pages() for target in _targets(page)}
    for target in sorted(linked):
        page = File.generated(config, _page(target), content=_shown(target), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let the links lead there."""
    folder = posixpath.dirname(page.file.src_uri)

    def local(link: re.Match[str]) -> str:
        target = _outside(folder, link[1])
        return link[0] if target is None else f"]({posixpath.relpath(_page(target), folder or '.')})"

    return markdown if page.file.src_uri.startswith("source/") else _LINK.sub(local, markdown)


def _targets(page: File) -> set[str]:
    folder = posixpath.dirname(page.src_uri)
    found = (_outside(folder, link) for link in _LINK.findall(page.content_string))
    return {target for target in found if target is not None}


def _outside(folder: str, link: str) -> str | None:
    """The path below the repository that a link leads to, None if it stays within docs/."""
    path = posixpath.normpath(posixpath.join("docs", folder, link))
    return None if path.startswith("docs/") else path


def _page(target: str) -> str:
    return f"source/{target}.md"


def _shown(target: str) -> str:
    path = ROOT / target
    if not path.exists() or not path.resolve().is_relative_to(ROOT):
        raise PluginError(f"a page links to {target}, which the repository does not have")
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    text = f"# {target}\n"
    for file in files:
        heading = "" if file == path else f"\n## {file.name}\n"
        language = _LANGUAGES.get(file.suffix, file.suffix.removeprefix("."))
        text += f"{heading}\n`````{language}\n{file.read_text(encoding='utf-8')}`````\n"
    return text
