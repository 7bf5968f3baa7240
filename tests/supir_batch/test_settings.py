from __future__ import annotations

import json
from pathlib import Path

import pytest

from supir_batch.errors import ManifestError
from supir_batch.resolve import explain, resolve
from supir_model.config import MODELS
from tests.manifests import MINIMAL, SOURCE, load, model_folder, refusal


@pytest.mark.parametrize(
    ("naming", "message"),
    [
        ("{name}", "has no field {name}"),
        ("x", "must contain"),
        ("a/{stem}", "no slashes"),
        ("{", "is not a naming"),
        ("{stem:>9}", "must name its fields alone"),
    ],
)
def test_naming(tmp_path: Path, naming: str, message: str) -> None:
    assert message in refusal(tmp_path, f"inputs: p\noutput: {{uri: o, naming: '{naming}'}}\n")[0]


def test_the_other_samplers_keys_are_refused(tmp_path: Path) -> None:
    message = "m.yaml: engine.eta: is not used by sampler 'edm'; remove it or choose another sampler"
    assert refusal(tmp_path, f"{MINIMAL}engine: {{eta: 0.5}}\n") == [message]
    few_steps = f"{MINIMAL}engine: {{sampler: dpmpp_2m_sde, eta: 0.5, restoration_tau: 4, precision: bfloat16"
    assert "engine.churn: is not used by sampler 'dpmpp_2m_sde'" in refusal(tmp_path, f"{few_steps}, churn: 1}}\n")[0]
    manifest = load(tmp_path, f"{few_steps}}}\n")
    settings = resolve(manifest, SOURCE, "hash")
    assert (settings.sampler, settings.eta, settings.churn) == ("dpmpp_2m_sde", 0.5, 0.0)
    assert (settings.precision, settings.restoration_tau) == ("bfloat16", 4.0)
    origins = {key: origin for key, _, origin in explain(manifest)}
    assert origins["engine.churn"] == "not used by sampler dpmpp_2m_sde"
    assert origins["engine.precision"] == "manifest"


def test_a_restricted_model_needs_its_license_by_name(tmp_path: Path) -> None:
    engine = f"engine: {{weights: {model_folder(tmp_path, 'v0F')}"
    expected = "m.yaml: engine: weights 'v0F' may be used under the license 'supir-noncommercial' only"
    assert refusal(tmp_path, f"{MINIMAL}{engine}}}\n")[0].startswith(expected)
    assert refusal(tmp_path, f"{MINIMAL}{engine}, accept_license: mit}}\n")[0].startswith(expected)
    assert load(tmp_path, f"{MINIMAL}{engine}, accept_license: supir-noncommercial}}\n").engine.config == MODELS["v0F"]


@pytest.mark.parametrize(("key", "value"), [("window", '"x"'), ("license", "3"), ("surprise", "1")])
def test_a_damaged_description_of_a_model_is_said_with_its_key(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / model_folder(tmp_path, "v0Q") / "config.json"
    data = json.loads(path.read_text())
    data["model"][key] = json.loads(value)
    path.write_text(json.dumps(data))
    (line,) = refusal(tmp_path, f"{MINIMAL}engine: {{weights: v0Q}}\n")
    assert line.startswith("m.yaml: engine: weights 'v0Q': v0Q/config.json: model")
    assert key in line


def test_sidecars_are_known_always_hold_the_record_and_make_no_new_work(tmp_path: Path) -> None:
    plain = load(tmp_path, MINIMAL)
    assert plain.output.sidecars == ("json", "premis")
    alone = load(tmp_path, MINIMAL, {"output.sidecars": "json"})
    assert alone.output.sidecars == ("json",)
    assert resolve(plain, SOURCE, "hash") == resolve(alone, SOURCE, "hash")
    refused = {"premis": "must name json", "[json, json]": "nothing twice", "[json, xmp]": "'premis'"}
    for wrong, message in refused.items():
        with pytest.raises(ManifestError, match=message):
            load(tmp_path, MINIMAL, {"output.sidecars": wrong})


def test_the_small_model_refuses_the_format_that_it_overflows_in(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, MINIMAL + "engine: {precision: float16}\n")
    assert line.endswith("precision 'float16' overflows in weights 'tiny'; use bfloat16 or float32")
    assert load(tmp_path, MINIMAL + "engine: {precision: bfloat16}\n").engine.precision == "bfloat16"


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("mode: llava", "caption: mode 'llava' needs 'model'"),
        ("mode: llava, model: models", "caption.model: 'models' is neither a hub id (owner/name) nor a folder"),
        ("mode: llava, model: ./m, revision: main", "caption: 'revision' is only used with a model of the hub"),
        ("mode: llava, model: ./m, template: 'Say {question}'", "must contain {image} and {question} once each"),
        ("mode: llava, model: ./m, quantization: 2bit", "caption.quantization: must be 'none', '8bit' or '4bit'"),
    ],
)
def test_a_captioner_that_cannot_be_meant(tmp_path: Path, caption: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, f"{MINIMAL}caption: {{{caption}}}\n")
    assert message in str(caught.value)
