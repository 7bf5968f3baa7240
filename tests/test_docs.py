"""The documentation: it builds, it is in step with the code, and what it shows works."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import pyvips
import tifffile
import yaml

from supir_batch import store
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import Plan, make_plan
from supir_batch.settings import Manifest
from tests.documents import PAGES, ROOT, blocks, commands, parse
from tests.runs import log_rows, photograph
from tests.supir_batch.test_settings import model_folder

DOCS = ROOT / "docs"
MANIFESTS = ROOT / "manifests"


# --- the site ------------------------------------------------------------------------------------------------------


class _Loaded(HTMLParser):
    """Collects what a browser loads by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href") or "")
        elif tag != "a":
            self.found += [given.get(key) or "" for key in ("src", "srcset", "data", "poster")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material builds the site")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr  # --strict: a broken link or anchor ends it
    return folder


def test_the_site_builds_without_a_broken_link(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html")
        assert (site / name.with_name(name.name.replace("README", "index"))).exists(), page


def test_the_site_asks_nothing_of_the_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert any(loaded.found)
        assert not [one for one in loaded.found if re.match(r"(?:https?:)?//", one)], page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8")  # the theme would ask a CDN for its program
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


# --- what is generated ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_in_step_with_the_code(generate: ModuleType) -> None:
    for name in generate.PAGES:
        assert generate.page(name) == (DOCS / name).read_text(encoding="utf-8"), "run python docs/generate.py"


def test_every_key_of_a_manifest_is_described(generate: ModuleType) -> None:
    def keys(model: Any, prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            yield from [f"{prefix}{name}"] if inner is None else keys(field.annotation, f"{name}.")

    described = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| [^|]* \| [^|]+ \|$", generate.manifest(), re.MULTILINE)
    assert described == list(keys(Manifest))


def test_a_page_without_a_place_for_what_is_generated_is_an_error(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    (tmp_path / "cli.md").write_text("# Command line\n")
    with pytest.raises(ValueError, match=r"docs/cli\.md has no '<!-- generated: commands -->'"):
        generate.page("cli.md")


# --- what pages show -----------------------------------------------------------------------------------------------


def test_every_command_shown_is_one_that_there_is() -> None:
    shown = [words for page in PAGES for words in commands(page)]
    assert len(shown) > 40
    for words in shown:
        parse(words)


def test_every_manifest_shown_has_keys_that_there_are() -> None:
    shown = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            for name, section in yaml.safe_load(block).items():
                shown += 1
                assert name in Manifest.model_fields, (page.name, name)
                if isinstance(section, dict):
                    known = getattr(Manifest.model_fields[name].annotation, "model_fields", {})
                    assert set(section) <= set(known), (page.name, name)
    assert shown > 30


def test_every_command_of_start_here_runs(tmp_path: Path) -> None:
    """What is shown, word for word, in an empty folder that has the repository's files; setting up is done already.

    Half a minute and no slow test: whoever changes anything should know that the first ten minutes of a reader work.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "manifests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    for one in Path(sys.prefix).iterdir():
        if one.name != ".installed":
            (tmp_path / ".venv" / one.name).symlink_to(one)
    (tmp_path / ".venv" / ".installed").touch()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SUPIR_BATCH__ENGINE__STEPS": "2",
    }  # not the ten of the preset
    script = "set -euo pipefail\n" + "\n".join(blocks(DOCS / "start-here.md", "sh"))
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 problems" in ran.stdout
    assert "GENERATIVE RECONSTRUCTION" in ran.stdout
    for named in re.findall(r"`((?:demo|mine)/[^`<>]*)`", (DOCS / "start-here.md").read_text(encoding="utf-8")):
        assert (tmp_path / named).exists(), named
    assert [row["status"] for row in log_rows(tmp_path / "demo/restored")] == ["done"] * 7
    assert (tmp_path / "mine/restored/coins-halftone.png").exists()


def test_the_readme_begins_as_start_here_does() -> None:
    first = {page: blocks(page, "sh")[0] for page in (ROOT / "README.md", DOCS / "start-here.md")}
    assert all(block.startswith("make demo") for block in first.values())
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets is not None
    for block in first.values():
        assert set(re.findall(r"^make (\w+)", block, re.MULTILINE)) <= set(targets[1].split())


# --- recipes -------------------------------------------------------------------------------------------------------


def planned(folder: Path, name: str) -> tuple[Manifest, Plan]:
    shutil.copy(MANIFESTS / name, folder)
    uri = str(folder / name)
    manifest = load_manifest(uri, environ={})
    return manifest, make_plan(manifest, uri, "model")


def test_every_manifest_is_in_the_cook_book(generate: ModuleType) -> None:
    shown = {f"{name}.yaml" for name in generate.PAGES["cook-book.md"]}
    assert {path.name for path in MANIFESTS.iterdir()} == {"demo.yaml", *shown}


@pytest.mark.parametrize("name", ["prints.yaml", "halftones.yaml"])
def test_recipes_for_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / "scans/box").mkdir(parents=True)
    photograph(tmp_path / "scans/box/a.png", 40, 30, 1)
    manifest, plan = planned(tmp_path, name)
    (todo,) = plan.todo
    assert todo.job.output_stem == str(tmp_path / "restored/box/a")
    assert todo.job.settings.upscale == (0.5 if name == "halftones.yaml" else 1.0)
    assert manifest.engine.preset == todo.job.settings.preset == "fidelity"


def test_the_recipe_for_glass_plates(tmp_path: Path) -> None:
    for name in ("scans/a.tif", "scans/box/deep/b.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / name, np.zeros((30, 40), np.uint16))
    (tmp_path / "scans/notes.txt").write_text("left alone")
    _, plan = planned(tmp_path, "glass-plates.yaml")
    assert [todo.job.output_stem for todo in plan.todo] == [
        str(tmp_path / "restored" / name) for name in ("a", "box/deep/b")
    ]
    settings = plan.todo[0].job.settings
    assert (settings.format, settings.bit_depth, settings.pyramid, settings.overlap) == ("tiff", 16, True, 256)
    assert (settings.prompt or "").startswith("a black and white photograph")


def test_the_recipe_for_documents_with_the_list_that_is_shown(tmp_path: Path) -> None:
    (tmp_path / "documents.csv").write_text(blocks(DOCS / "cook-book.md", "csv")[0])
    (tmp_path / "scans").mkdir()
    pages = np.zeros((2, 30, 40), np.uint8)
    tifffile.imwrite(tmp_path / "scans/letter.tif", pages, photometric="minisblack")
    _, plan = planned(tmp_path, "documents.yaml")
    stems = [Path(todo.job.output_stem).relative_to(tmp_path).as_posix() for todo in plan.todo]
    assert stems == ["enlarged/scans/letter-p001", "enlarged/scans/letter-p002"]
    for stem in stems:
        assert re.search(rf"`(?:enlarged/scans/)?{Path(stem).name}\.tif`", (DOCS / "cook-book.md").read_text())
    assert {todo.job.settings.engine for todo in plan.todo} == {"lanczos"}


def test_the_recipe_for_a_night_with_the_list_that_is_made(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real object store, with buckets of the manifest's names; the list is made as the page says."""
    remote = fsspec.filesystem("s3", skip_instance_cache=True)
    for bucket in ("masters", "derivatives", "models"):
        remote.mkdir(bucket)
    model_folder(tmp_path, "v0Q")
    for path in (tmp_path / "v0Q").iterdir():
        store.write_atomic(f"s3://models/v0Q/{path.name}", path)
    (tmp_path / "checksums.txt").write_text("".join(f"{i:064x}  box 1/scan-{i}.tif\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    (make_list,) = [block for block in blocks(DOCS / "cook-book.md", "python") if "checksums.txt" in block]
    subprocess.run([sys.executable, "-c", make_list], check=True)
    assert pq.read_schema("list.parquet").names == ["sha256", "uri"]
    store.write_atomic("s3://masters/list.parquet", tmp_path / "list.parquet")
    store.write_atomic("s3://derivatives/overnight.yaml", MANIFESTS / "overnight.yaml")

    manifest = load_manifest("s3://derivatives/overnight.yaml", environ={})
    plan = make_plan(manifest, "s3://derivatives/overnight.yaml", "model")
    assert (len(plan.todo), len(plan.refused)) == (300, 0)
    job = plan.todo[7].job
    assert (job.source.uri, job.source.sha256) == ("s3://masters/box 1/scan-7.tif", f"{7:064x}")
    assert job.output_stem == "s3://derivatives/archive/box 1/scan-7"
    assert job.settings.accepted_license == "supir-noncommercial"
    for bucket in ("masters", "derivatives", "models"):
        remote.rm(bucket, recursive=True)


# --- the example of an engine --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_an_engine_restores(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "scans"
    folder.mkdir()
    for seed in (1, 2):
        photograph(folder / f"{seed}.png", 70 + seed, 50, seed)
    blur = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect", groups=3, bias=False)
    with torch.no_grad():
        blur.weight.fill_(1 / 9)
    sides = {2: torch.export.Dim("h", min=8, max=4096), 3: torch.export.Dim("w", min=8, max=4096)}
    torch.export.save(
        torch.export.export(blur, (torch.rand(1, 3, 64, 64),), dynamic_shapes=(sides,)), str(tmp_path / "blur.pt2")
    )
    (tmp_path / "manifest.yaml").write_text("inputs: scans\noutput: {uri: restored}\nruntime: {cpus: 2}\n")
    ran = subprocess.run(
        [sys.executable, str(DOCS / "examples/network_engine.py"), "manifest.yaml", "blur.pt2"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "2 done, {} failed\n"
    for seed in (1, 2):
        source, restored = (
            pyvips.Image.new_from_file(str(tmp_path / name / f"{seed}.png")).numpy().astype(np.float32)
            for name in ("scans", "restored")
        )
        expected = blur(torch.from_numpy(source).permute(2, 0, 1)[None])[0].permute(1, 2, 0).detach().numpy()
        assert np.abs(restored - expected).max() <= 0.51
        record = json.loads((tmp_path / f"restored/{seed}.png.json").read_text())
        assert (record["engine"], record["engine_name"], record["generative"]) == ("network", "blur.pt2", True)
        assert record["model_sha256"] == store.sha256(str(tmp_path / "blur.pt2"))
    assert {row["setting_engine"] for row in log_rows(tmp_path / "restored")} == {"network"}
