"""IIIF manifests: what the specification requires, with original and restored as a choice, and pictures to show."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from supir_batch import runlog
from supir_batch.cli import app
from supir_batch.errors import ManifestError, StoreError
from supir_batch.iiif import write_manifests
from supir_batch.runlog import RunLog
from supir_batch.types import Outcome
from supir_batch.verify import verify

Restore = Callable[..., Outcome]
BASE = "https://example.org/town archive".replace(" ", "/")
GENERATIVE = {"engine": "supir", "engine_name": "SUPIR v0Q", "model_sha256": "ab" * 32, "weights": "v0Q"}


@pytest.fixture
def output(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> Path:
    """Two images, one with a name that needs quoting and a prompt that looks like HTML."""
    with RunLog(str(tmp_path / "out"), "run") as log:
        for name in ("a.tif", "b #1?.png"):
            Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / name)
            outcome = restore(
                tmp_path / name, upscale=2.0, prompt="<b>a fair</b>", sidecars=("json", "premis"), **GENERATIVE
            )
            assert outcome.status == "done", outcome.ticket.failure
            log.append(runlog.to_row(outcome, "run"))
    return tmp_path / "out"


def published(output: Path, address: str) -> bytes:
    """What a web server that serves ``output`` at BASE answers."""
    assert address.startswith(f"{BASE}/")
    path, _, fragment = address.removeprefix(f"{BASE}/").partition("#")
    assert not fragment
    return (output / unquote(path)).read_bytes()


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def test_the_collection_leads_to_manifests_with_a_choice_of_original_and_restored(output: Path) -> None:
    assert write_manifests(str(output), BASE + "/") == 2
    collection = json.loads(published(output, f"{BASE}/_iiif/collection.json"))
    assert collection["type"] == "Collection"
    labels = []
    for entry in collection["items"]:
        manifest = json.loads(published(output, entry["id"]))
        assert manifest["@context"] == "http://iiif.io/api/presentation/3/context.json"
        assert (manifest["id"], manifest["type"], manifest["label"]) == (entry["id"], "Manifest", entry["label"])
        labels += manifest["label"]["none"]
        (canvas,) = manifest["items"]
        assert (canvas["width"], canvas["height"]) == (80, 60)
        (page,) = canvas["items"]
        (annotation,) = page["items"]
        assert (annotation["motivation"], annotation["target"]) == ("painting", canvas["id"])
        assert annotation["body"]["type"] == "Choice"
        original, restored = annotation["body"]["items"]
        assert original["label"] == {"en": ["Original"]}
        assert restored["label"] == {"en": ["Generative reconstruction (SUPIR v0Q)"]}
        for body, size in ((original, (40, 30)), (restored, (80, 60))):
            with Image.open(io.BytesIO(published(output, body["id"]))) as picture:
                assert (picture.format, picture.size) == ("JPEG", size) == ("JPEG", (body["width"], body["height"]))
        for link in (*manifest["rendering"], *manifest["seeAlso"]):
            assert published(output, link["id"])
        assert [link["label"]["en"] for link in manifest["seeAlso"]] == [["Record"], ["PREMIS"]]
        assert "AI-assisted" in manifest["requiredStatement"]["value"]["none"][0]
    assert labels == ["a.tif", "b #1?.png"]


def test_identifiers_are_unique_addresses_and_text_is_no_html(output: Path) -> None:
    write_manifests(str(output), BASE)
    for path in output.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        identifiers = [node["id"] for node in nodes(manifest) if "id" in node]
        assert len(set(identifiers)) == len(identifiers)
        assert all(identifier.startswith(f"{BASE}/") and " " not in identifier for identifier in identifiers)
        values = [pair["value"]["none"][0] for pair in manifest["metadata"]]
        assert "&lt;b&gt;a fair&lt;/b&gt;" in values


def test_verify_knows_the_folder(output: Path) -> None:
    write_manifests(str(output), BASE)
    assert [problem for checked in verify(str(output)) for problem in checked.problems] == []


def test_a_changed_source_is_not_shown_as_the_original(tmp_path: Path, output: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.tif")
    with pytest.raises(StoreError, match=r"a\.tif: is not the file the log speaks of"):
        write_manifests(str(output), BASE)
    assert not (output / "_iiif" / "collection.json").exists()


@pytest.mark.parametrize("address", ["example.org", "ftp://example.org", "https://example.org/?a=b", "https://a b"])
def test_an_address_must_be_one(output: Path, address: str) -> None:
    with pytest.raises(ManifestError, match="must be an address"):
        write_manifests(str(output), address)


def test_the_command(output: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(output), "--iiif", BASE])
    assert (result.exit_code, result.stdout) == (0, f"2 images in {output}/_iiif/collection.json\n")
