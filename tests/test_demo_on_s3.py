"""The demo with everything in an object store: manifest, originals, outputs, log; then resume, and what follows."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import bagit
import pytest
import yaml

from supir_batch import demo, store

pytest.importorskip("skimage", reason="the demo's photographs come with scikit-image")


@pytest.fixture(scope="module")
def local_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.build(folder)
    return folder


@pytest.fixture
def ray_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray keeps its own logs during the test."""
    folder = Path("/tmp") / f"ray-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return folder


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supir_batch", *words],
        capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=900,
    )  # fmt: skip


def upload(folder: Path, uri: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write_atomic(store.join(uri, path.relative_to(folder).as_posix()), path)


def hashes(uri: str) -> dict[str, str]:
    return {found.uri.removeprefix(uri): store.sha256(found.uri) for found in store.list_tree(uri)}


def ours(output: str) -> dict[str, str]:
    """What must not depend on when and how often it ran: the images."""
    endings = (".jpg", ".png", ".tif")
    return {name: digest for name, digest in hashes(output).items() if name.endswith(endings) and "/_" not in name}


def manifest(engine: str) -> bytes:
    settings = {"name": engine, "upscale": 1.0} | ({"weights": "tiny"} if engine == "supir" else {})
    caption = {"mode": "attributes" if engine == "supir" else "none"}
    settings = {"inputs": "archive", "output": {"uri": "restored"}, "engine": settings, "caption": caption}
    return yaml.safe_dump(settings).encode()


@pytest.mark.parametrize("engine", ["lanczos", pytest.param("supir", marks=pytest.mark.slow)])
def test_the_demo_runs_on_s3(s3: str, local_demo: Path, tmp_path: Path, engine: str) -> None:
    home = f"{s3}/demo"
    upload(local_demo / "archive", f"{home}/archive")
    store.write_atomic(f"{home}/demo.yaml", manifest(engine))
    originals = hashes(f"{home}/archive")
    first = command("run", f"{home}/demo.yaml", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["done"] == 7
    written = hashes(f"{home}/restored")

    second = command("run", f"{home}/demo.yaml", "--json")
    assert second.returncode == 0, second.stderr
    assert (json.loads(second.stdout)["done"], json.loads(second.stdout)["skipped"]) == (0, 7)
    assert hashes(f"{home}/restored") == written
    assert hashes(f"{home}/archive") == originals

    here = tmp_path / "here"
    upload(local_demo / "archive", str(here / "archive"))
    (here / "demo.yaml").write_bytes(manifest(engine))
    assert command("run", str(here / "demo.yaml")).returncode == 0
    assert ours(f"{home}/restored") == ours(str(here / "restored"))

    for words in (["status"], ["verify"], ["report"]):
        ran = command(*words, f"{home}/restored")
        assert ran.returncode == 0, (words, ran.stdout, ran.stderr)
    assert store.exists(f"{home}/restored/report/index.html")
    folders = ["--bagit", str(tmp_path / "bag"), "--archivematica", str(tmp_path / "transfer")]
    ran = command("export", f"{home}/restored", *folders, "--iiif", "https://example.org/restored")
    assert ran.returncode == 0, ran.stderr
    bagit.Bag(str(tmp_path / "bag")).validate()
    assert store.exists(f"{home}/restored/_iiif/collection.json")

    store.delete(next(found.uri for found in store.list_tree(f"{home}/restored") if found.uri.endswith(".png")))
    assert command("verify", f"{home}/restored").returncode == 6
    third = command("run", f"{home}/demo.yaml", "--json")
    assert json.loads(third.stdout)["done"] == 1
    assert ours(f"{home}/restored") == ours(str(here / "restored"))
