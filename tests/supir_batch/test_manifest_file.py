from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_batch.errors import ManifestError
from supir_batch.manifest_file import load_manifest, to_yaml
from supir_batch.resolve import explain
from tests.manifests import MINIMAL, load, refusal


def test_relative_paths_count_from_the_manifest(tmp_path: Path) -> None:
    manifest = load(tmp_path, "inputs: [photos, ../other, s3://b/k, /abs]\noutput: {uri: restored}\n")
    assert manifest.inputs == (str(tmp_path / "photos"), str(tmp_path.parent / "other"), "s3://b/k", "/abs")
    assert manifest.output.uri == str(tmp_path / "restored")


def test_paths_in_flags_count_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    manifest = load(tmp_path, MINIMAL, {"output.uri": "out"}, SUPIR_BATCH__INPUTS="in")
    assert manifest.output.uri == str(tmp_path / "here" / "out")
    assert manifest.inputs == (str(tmp_path / "here" / "in"),)


def test_a_manifest_for_another_machine_means_the_same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "inputs: [photos, s3://b/k]\noutput: {uri: out}\nname: '1e-3'\nengine: {steps: 7, restoration_tau: 'off'}\n"
    manifest = load(tmp_path, text, {"runtime.max_actors": "4"}, SUPIR_BATCH__ENGINE__UPSCALE="2")
    there = tmp_path / "elsewhere"
    there.mkdir()
    sent = to_yaml(manifest)
    assert load(there, sent).model_dump() == manifest.model_dump()
    assert manifest.engine.steps == 7
    assert manifest.name == "1e-3"
    assert "batch" not in sent, "what was left out stays so"


def test_a_folder_with_brackets_is_not_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "[1911]"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    assert load(folder, "inputs: '*.png'\noutput: {uri: out}\n").inputs == (f"{tmp_path}/[[]1911]/*.png",)
    assert load(tmp_path, "inputs: '[1911]'\noutput: {uri: out}\n").inputs == (str(folder),)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("engine: {stpes: 20}", "m.yaml: engine.stpes: unknown key; did you mean 'steps'?"),
        ("steps: 20", "m.yaml: steps: unknown key; did you mean 'engine.steps'?"),
        ("ouput: {}", "m.yaml: ouput: unknown key; did you mean 'output'?"),
        ("runtime: {zzz: 1}", "m.yaml: runtime.zzz: unknown key; known keys: actors, max_actors, cpus, gpus_per_actor"),
        ("runtime: {actors: 4, max_actors: 2}", "m.yaml: runtime: max_actors 2 is less than actors 4; raise it"),
        ("runtime: {max_caption_actors: 0}", "m.yaml: runtime.max_caption_actors: must be greater than or equal to 1"),
        ("engine: {steps: 0}", "m.yaml: engine.steps: must be greater than or equal to 1, saw 0"),
        ("engine: {steps: many}", "m.yaml: engine.steps: must be an integer, saw 'many'"),
        ("engine: {steps: true}", "m.yaml: engine.steps: must be an integer, saw True"),
        ("engine: {upscale: .nan}", "m.yaml: engine.upscale:"),
        ("engine: {weights: v0}", "m.yaml: engine: weights 'v0' name no model (v0/config.json: does not exist)"),
        ("engine: {weights: v0F}", "m.yaml: engine: weights 'v0F' are not in the package: convert their files"),
        ("caption: {material: photo}", "m.yaml: caption.material: must be 'photograph', 'painting', 'drawing'"),
        ("caption: {prompts: model}", "m.yaml: caption.prompts: must be 'material' or 'release', saw 'model'"),
        ("engine: {restoration_tau: x}", "m.yaml: engine.restoration_tau: must be a number or 'off', saw 'x'"),
        ("engine: 3", "m.yaml: engine: is a section; write 'key: value' lines below it, saw 3"),
        ("caption: {mode: fixed}", "m.yaml: caption: mode 'fixed' needs 'text'"),
        ("caption: {text: x}", "m.yaml: caption: 'text' is only used by mode 'fixed'"),
        ("tiling: {overlap: 1024}", "m.yaml: tiling: overlap 1024 is too large for tiles of 4194304 pixels"),
        ("tiling: {window: 64, stride: 96}", "m.yaml: tiling.stride: 96 exceeds the window of 64"),
        ("inputs: again", "m.yaml:3: key 'inputs' is already given on line 1"),
        ("engine: {seed: 1, seed: 2}", "m.yaml:3: key 'seed' is already given on line 3"),
        ("a: [", "m.yaml:"),
        ("engine: {steps: !!int x}", "m.yaml: is not valid YAML"),
        ("engine: {steps: !!python/name:os.system }", "m.yaml:3: could not determine a constructor for the tag"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, extra: str, message: str) -> None:
    lines = refusal(tmp_path, f"{MINIMAL}{extra}\n")
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "engine: {stpes: 20, cfg_end: 99}\n")
    assert len(lines) == 4
    assert "m.yaml: inputs: is required but missing" in lines


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "3"])
def test_a_file_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    assert "is no manifest" in refusal(tmp_path, text)[0]


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.yaml: no such manifest"):
        load_manifest(str(tmp_path / "none.yaml"), {}, {})


def test_words_and_numbers_are_read_as_written(tmp_path: Path) -> None:
    manifest = load(
        tmp_path, f"{MINIMAL}engine: {{restoration_tau: off, churn: 1e-3, seed: 010}}\n".replace("010", "10")
    )
    assert manifest.engine.restoration_tau == "off"
    assert manifest.engine.churn == 0.001
    assert load(tmp_path, f"{MINIMAL}name: no\n").name == "no"


def test_layers_and_origins(tmp_path: Path) -> None:
    manifest = load(
        tmp_path,
        f"{MINIMAL}engine: {{cfg_end: 2, churn: 1, noise: 1.1}}\n",
        {"engine.churn": "3", "name": "1911"},
        SUPIR_BATCH__ENGINE__CHURN="2",
        SUPIR_BATCH__ENGINE__NOISE="1.2",
        OTHER="x",
    )
    origins = {key: (value, origin) for key, value, origin in explain(manifest)}
    assert origins["engine.cfg_end"] == (2, "manifest")
    assert origins["engine.noise"] == (1.2, "environment")
    assert origins["engine.churn"] == (3, "flag")
    assert origins["name"] == ("1911", "flag")
    assert origins["engine.steps"] == (10, "preset fidelity of tiny")
    assert origins["tiling.window"] == (128, "model tiny")
    assert origins["engine.seed"] == (0, "default")


def test_a_wrong_flag_or_variable_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, MINIMAL, {"engine.stpes": "2"}) == [
        "m.yaml: engine.stpes (from --set): unknown key; did you mean 'steps'?"
    ]
    assert "(from the environment)" in refusal(tmp_path, MINIMAL, SUPIR_BATCH__ENGINE__STEPS="0")[0]
    assert "not a key" in refusal(tmp_path, MINIMAL, {"engine.": "2"})[0]


@hypothesis_settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_manifest_or_a_manifest_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    with contextlib.suppress(ManifestError):
        load_manifest(str(path), {}, {})


def test_a_captioners_folder_counts_from_the_manifest(tmp_path: Path) -> None:
    llava = f"{MINIMAL}caption: {{mode: llava, model: ./models/tiny-llava}}\n"
    assert load(tmp_path, llava).caption.model == str(tmp_path / "models/tiny-llava")
    hub = load(tmp_path, f"{MINIMAL}caption: {{mode: llava, model: llava-hf/llava-1.5-7b-hf, revision: main}}\n")
    assert hub.caption.model == "llava-hf/llava-1.5-7b-hf"
