"""Manifests for tests, as a user writes them, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from supir_batch.errors import ManifestError
from supir_batch.manifest_file import load_manifest
from supir_batch.settings import Manifest
from supir_batch.types import Source
from supir_model.config import MODELS
from supir_model.folder import Description, to_text

MINIMAL = "inputs: photos\noutput: {uri: restored}\n"
SOURCE = Source(id="a.tif", uri="/p/a.tif", origin="/p", relative="a.tif", version="1-1", size=1)


def load(tmp_path: Path, text: str, overrides: dict[str, str] | None = None, **environ: str) -> Manifest:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return load_manifest(str(path), overrides, environ)


def model_folder(tmp_path: Path, name: str) -> str:
    """What planning reads of a converted model: a folder with its description; its name beside the manifest."""
    if name == "tiny":
        return name
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "config.json").write_text(to_text(Description(1, MODELS[name], ())))
    return name


def refusal(tmp_path: Path, text: str, overrides: dict[str, str] | None = None, **environ: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, text, overrides, **environ)
    return [line.replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]
