from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supir_model.config import MODELS, V0Q
from supir_model.errors import WeightsError
from supir_model.folder import (
    Checksums,
    Description,
    FileSum,
    SourceFile,
    combined,
    file_sum,
    read_checksums,
    read_description,
    to_text,
)

SOURCES = (SourceFile("base", "sdxl.safetensors", 3, "ab" * 32), SourceFile("lora", "l.safetensors", 2, "cd" * 32, 0.5))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_configuration_is_read_as_it_was_written(name: str) -> None:
    description = Description(1, MODELS[name], SOURCES)
    assert read_description(to_text(description), "config.json") == description
    assert to_text(read_description(to_text(description), "config.json")) == to_text(description)


def changed(**values: Any) -> str:
    data = json.loads(to_text(Description(1, V0Q, SOURCES)))
    for dotted, value in values.items():
        inside = data
        *path, last = dotted.split("__")
        for key in path:
            inside = inside[int(key) if key.isdigit() else key]
        if value is ...:
            del inside[last]
        else:
            inside[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(format=2), "has format 2, this version reads 1"),
        ("[]", "has format None"),
        ("{", "is not JSON"),
        (changed(extra=1), "the file: unknown keys: extra; missing keys: none"),
        (changed(model__window=...), "model: unknown keys: none; missing keys: window"),
        (changed(model__window="128"), "model.window must be int, saw '128'"),
        (changed(model__window=True), "model.window must be int, saw True"),
        (changed(model__prediction="x"), "model.prediction must be one of epsilon, v, residual, saw 'x'"),
        (changed(model__unet=3), "model.unet must be an object, saw 3"),
        (changed(model__vae__channels=8), "model.vae.channels must be a list, saw 8"),
        (changed(model__vae__channels=[8, "x"]), r"model.vae.channels\[1\] must be int, saw 'x'"),
        (changed(model__presets=[]), r"model.presets must be an object, saw \[\]"),
        (changed(sources__0__role="x"), r"sources\[0\].role must be one of base, supir, tokenizer, lora"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(text: str, message: str) -> None:
    with pytest.raises(WeightsError, match=f"^m/config.json: .*{message}"):
        read_description(text, "m/config.json")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b"])
def test_checksums_cannot_lead_out_of_the_folder(name: str) -> None:
    text = to_text(Checksums(1, {name: FileSum(1, "ab" * 32)}))
    with pytest.raises(WeightsError, match="is no file of this folder"):
        read_checksums(text, "m/checksums.json")


def test_the_identity_depends_on_every_name_and_hash() -> None:
    one, two = FileSum(1, "ab" * 32), FileSum(1, "cd" * 32)
    found = [Checksums(1, files).identity for files in ({"a": one, "b": two}, {"a": two, "b": one}, {"a": one})]
    assert len(set(found)) == 3
    assert Checksums(1, {"b": two, "a": one}).identity == found[0]
    assert found[0] == combined({"a": one.sha256, "b": two.sha256})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.bin: cannot be read"):
        file_sum(tmp_path / "x.bin")
