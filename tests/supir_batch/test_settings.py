from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_batch.errors import ManifestError
from supir_batch.settings import (
    MAX_SEED,
    Manifest,
    explain,
    fingerprint,
    item_seed,
    load_manifest,
    resolve,
    settings_hash,
    to_yaml,
)
from supir_batch.types import Settings, Source
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


def test_explain_tells_what_resolve_uses(tmp_path: Path) -> None:
    manifest = load(tmp_path, f"{MINIMAL}engine: {{preset: quality, steps: 3}}\n")
    settings = resolve(manifest, SOURCE, "hash")
    for key, value, _ in explain(manifest):
        section, _, name = key.partition(".")
        if section in ("engine", "tiling") and name in {field.name for field in dataclasses.fields(Settings)} - {
            "seed",
            "name",
        }:
            assert getattr(settings, name) == value, key


@pytest.mark.parametrize("weights", list(MODELS))
@pytest.mark.parametrize("preset", ["fidelity", "quality", "fidelity-lightning"])
def test_presets_fill_what_is_left_open(tmp_path: Path, weights: str, preset: str) -> None:
    if preset not in MODELS[weights].presets:
        with pytest.raises(ManifestError, match="have no preset 'fidelity-lightning'; choose one of fidelity, quality"):
            resolve(load(tmp_path, f"{MINIMAL}engine: {{preset: {preset}}}\n"), SOURCE, "hash")
        return
    named = model_folder(tmp_path, weights)
    text = f"{MINIMAL}engine: {{weights: {named}, preset: {preset}, accept_license: supir-noncommercial}}\n"
    settings = resolve(load(tmp_path, text), SOURCE, "hash")
    assert settings.weights == weights
    for key, value in dataclasses.asdict(MODELS[weights].presets[preset]).items():
        unused = key == ("churn" if settings.sampler == "dpmpp_2m_sde" else "eta")
        assert getattr(settings, key) == (0.0 if unused else value), key
    assert settings.precision == MODELS[weights].precision
    assert settings.accepted_license == (None if weights == "tiny" else "supir-noncommercial")
    assert settings.negative_prompt == MODELS[weights].prompts_for("photograph").negative


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


def test_where_a_model_lies_is_not_part_of_the_settings(tmp_path: Path) -> None:
    found = set()
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        model_folder(tmp_path / place, "v0Q")
        (tmp_path / place / "in").mkdir()
        text = f"{MINIMAL}engine: {{weights: v0Q, accept_license: supir-noncommercial}}\n"
        manifest = load(tmp_path / place, text)
        assert manifest.engine.weights == str(tmp_path / place / "v0Q")
        found.add(resolve(manifest, SOURCE, "hash"))
    assert len(found) == 1


@pytest.mark.parametrize(("key", "value"), [("window", '"x"'), ("license", "3"), ("surprise", "1")])
def test_a_damaged_description_of_a_model_is_said_with_its_key(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / model_folder(tmp_path, "v0Q") / "config.json"
    data = json.loads(path.read_text())
    data["model"][key] = json.loads(value)
    path.write_text(json.dumps(data))
    (line,) = refusal(tmp_path, f"{MINIMAL}engine: {{weights: v0Q}}\n")
    assert line.startswith("m.yaml: engine: weights 'v0Q': v0Q/config.json: model")
    assert key in line


# --- prompts per material ------------------------------------------------------------------------------------------

MATERIALS = ("photograph", "painting", "drawing", "document", "map")


def prompts(tmp_path: Path, caption: str, **row: str) -> tuple[str, str, str]:
    """Material, positive suffix and negative prompt that would be used and logged."""
    engine = f"engine: {{weights: {model_folder(tmp_path, 'v0Q')}, accept_license: supir-noncommercial}}"
    manifest = load(tmp_path, f"{MINIMAL}{engine}\ncaption: {{{caption}}}\n")
    settings = resolve(manifest, dataclasses.replace(SOURCE, **row), "hash")  # type: ignore[arg-type]
    return settings.material, settings.positive_prompt, settings.negative_prompt


def test_every_material_has_prompts_of_its_own_which_do_not_fight_it(tmp_path: Path) -> None:
    found = {material: prompts(tmp_path, f"material: {material}") for material in MATERIALS}
    assert {used for used, _, _ in found.values()} == set(MATERIALS)
    assert len({positive for _, positive, _ in found.values()}) == len(MATERIALS)
    for material, (_, positive, negative) in found.items():
        assert material in positive
        assert material not in negative
        for word in ("frame", "signature", "watermark", "sketch", "art,"):  # what belongs to an original
            assert word not in negative


def test_the_default_is_photograph_and_a_row_wins(tmp_path: Path) -> None:
    assert prompts(tmp_path, "") == prompts(tmp_path, "material: photograph")
    assert prompts(tmp_path, "", material="map") == prompts(tmp_path, "material: map")
    assert prompts(tmp_path, "material: map", material="drawing") == prompts(tmp_path, "material: drawing")


def test_the_prompts_of_the_release_by_name(tmp_path: Path) -> None:
    for material in MATERIALS:
        used, positive, negative = prompts(tmp_path, f"prompts: release, material: {material}")
        assert used == material
        assert (positive, negative) == (MODELS["v0Q"].positive_prompt, MODELS["v0Q"].negative_prompt)


def test_a_written_prompt_wins_over_both(tmp_path: Path) -> None:
    assert prompts(tmp_path, "positive_prompt: p, prompts: release, material: map")[1] == "p"
    assert prompts(tmp_path, "negative_prompt: n, material: map")[1:] == (prompts(tmp_path, "material: map")[1], "n")
    assert prompts(tmp_path, "negative_prompt: n", negative_prompt="row")[2] == "row"


def test_a_model_without_prompts_for_materials_keeps_its_own(tmp_path: Path) -> None:
    settings = resolve(load(tmp_path, f"{MINIMAL}caption: {{material: painting}}\n"), SOURCE, "hash")
    assert (settings.positive_prompt, settings.negative_prompt) == dataclasses.astuple(MODELS["tiny"].release_prompts)


def test_explain_says_where_prompts_are_from(tmp_path: Path) -> None:
    engine = f"engine: {{weights: {model_folder(tmp_path, 'v0Q')}, accept_license: supir-noncommercial}}"
    origins = {
        caption: {e.key: e for e in explain(load(tmp_path, f"{MINIMAL}{engine}\ncaption: {{{caption}}}\n"))}
        for caption in ("material: map", "prompts: release")
    }
    by_material = origins["material: map"]["caption.negative_prompt"]
    assert (by_material.value, by_material.origin) == (prompts(tmp_path, "material: map")[2], "prompts for map of v0Q")
    assert origins["prompts: release"]["caption.negative_prompt"].origin == "prompts of the release of v0Q"


def test_a_row_wins_over_the_manifest(tmp_path: Path) -> None:
    manifest = load(tmp_path, f"{MINIMAL}caption: {{mode: fixed, text: all, negative_prompt: less}}\n")
    row = dataclasses.replace(SOURCE, prompt="one", negative_prompt="no", upscale=2.0, seed=7, material="map")
    settings = resolve(manifest, row, "")
    assert (settings.prompt, settings.prompt_source, settings.negative_prompt) == ("one", "manifest", "no")
    assert (settings.upscale, settings.seed, settings.material) == (2.0, 7, "map")
    settings = resolve(manifest, SOURCE, "")
    assert (settings.prompt, settings.prompt_source, settings.negative_prompt) == ("all", "fixed", "less")


@pytest.mark.parametrize(
    ("mode", "sidecar", "prompt"),
    [("attributes", None, None), ("none", None, ""), ("sidecar", " a boat\n", "a boat")],
)
def test_caption_modes(tmp_path: Path, mode: str, sidecar: str | None, prompt: str | None) -> None:
    settings = resolve(load(tmp_path, f"{MINIMAL}caption: {{mode: {mode}}}\n"), SOURCE, "", sidecar)
    assert (settings.prompt, settings.prompt_source) == (prompt, mode)


@pytest.mark.parametrize("mode", ["manifest", "sidecar"])
def test_a_caption_that_is_not_there(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ManifestError, match=r"a\.tif' has no prompt"):
        resolve(load(tmp_path, f"{MINIMAL}caption: {{mode: {mode}}}\n"), SOURCE, "")


def test_lanczos_ignores_what_it_does_not_use(tmp_path: Path) -> None:
    plain = resolve(load(tmp_path, f"{MINIMAL}engine: {{name: lanczos}}\n"), SOURCE, "")
    busy = load(tmp_path, f"{MINIMAL}engine: {{name: lanczos, steps: 9, weights: v0Q, seed: 3}}\n")
    assert resolve(busy, dataclasses.replace(SOURCE, prompt="x", seed=4), "hash") == plain
    assert (plain.steps, plain.model_sha256, plain.prompt, plain.min_size) == (0, "", "", 0)
    assert ("engine.steps", None, "not used by lanczos") in explain(busy)


def test_the_audit_is_on_and_samples_are_for_what_generates(tmp_path: Path) -> None:
    def audit(sections: str) -> tuple[bool, int]:
        resolved = resolve(load(tmp_path, MINIMAL + sections), SOURCE, "hash")
        return resolved.audit_enabled, resolved.audit_samples

    assert audit("") == (True, 1)
    assert audit("audit: {samples: 5}\n") == (True, 5)
    assert audit("audit: {samples: 5}\nengine: {name: lanczos}\n") == (True, 0)
    assert audit("audit: {enabled: false}\n") == (False, 0)
    with pytest.raises(ManifestError, match="samples are part of the audit"):
        load(tmp_path, f"{MINIMAL}audit: {{enabled: false, samples: 2}}\n")
    plain = load(tmp_path, f"{MINIMAL}engine: {{name: lanczos}}\n")
    assert ("audit.samples", 0, "not used by lanczos") in explain(plain)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return resolve(load(tmp_path, MINIMAL), SOURCE, "hash")


def test_every_setting_but_those_of_gate_and_audit_is_part_of_the_hash(settings: Settings) -> None:
    settings = dataclasses.replace(settings, guidance_to=1.0)
    hashes = {settings_hash(settings)}
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        changed = value + 1 if isinstance(value, int | float) else f"{value}x"
        hashes.add(settings_hash(dataclasses.replace(settings, **{field.name: changed})))  # type: ignore[arg-type]
    judging = [field for field in dataclasses.fields(Settings) if field.name.startswith(("gate_", "audit_"))]
    assert len(judging) == 6
    assert len(hashes) == 1 + len(dataclasses.fields(Settings)) - len(judging)


def test_the_hash_does_not_depend_on_how_a_number_is_written(settings: Settings) -> None:
    assert settings_hash(dataclasses.replace(settings, upscale=2)) == settings_hash(
        dataclasses.replace(settings, upscale=2.0)
    )


def test_the_hash_stays_what_it_was() -> None:
    """A changed hash makes every archive redo its work: change this on purpose only."""
    fixed = Settings(
        engine="supir", engine_name="supir-tiny", model_sha256="ab", weights="tiny", precision="float32",
        preset="fidelity", sampler="edm", steps=10,
        cfg_start=1.0, cfg_end=1.5, guidance_from=0.0, guidance_to=None,
        control_scale=1.0, restoration_tau=None, restoration_to_end=False,
        churn=0.0, eta=0.0, noise=1.003,
        color_fix="wavelet", upscale=2.0, min_size=0, window=128, stride=96, max_pixels=4194304, overlap=128,
        geometry="pad", vae_tiling="off", vae_tile=0,
        caption_mode="none", prompt="é", prompt_source="none", positive_prompt="", negative_prompt="",
        captioner="", captioner_identity="", caption_question="", caption_template="",
        caption_max_new_tokens=0, caption_temperature=0.0, caption_top_p=0.0, caption_precision="",
        caption_quantization="", material="",
        run_seed=0, seed=None, page=1, few_levels="expand",
        format="source", bit_depth=None, compression="deflate", tiled=False, pyramid=False,
        quality=None, gate_color_drift=5.0, gate_similarity=0.85, gate_dead=0.02, gate_seam=0.05,
        audit_enabled=True, audit_samples=1,
        notice="n", operator=None, organization=None, accepted_license=None, signed=False,
    )  # fmt: skip
    assert settings_hash(fixed) == "513659a9c4172574a10435fc108af3e2686c9657f7fa6fea5438c746a76222e7"


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


def test_noise_levels_of_guidance_are_settings_of_a_model(tmp_path: Path) -> None:
    narrow = "approximate: {guidance_from: 0.3, guidance_to: 5}\n"
    found = resolve(load(tmp_path, MINIMAL + narrow), SOURCE, "hash")
    assert (found.guidance_from, found.guidance_to) == (0.3, 5.0)
    unused = resolve(load(tmp_path, MINIMAL + narrow + "engine: {name: lanczos}\n"), SOURCE, "")
    assert (unused.guidance_from, unused.guidance_to) == (0.0, None)
    (line,) = refusal(tmp_path, MINIMAL + "approximate: {guidance_from: 5, guidance_to: 0.3}\n")
    assert "guidance_to 0.3 is smaller than guidance_from 5" in line


def test_limits_of_the_gate_identify_no_work(tmp_path: Path) -> None:
    close, free = (
        resolve(load(tmp_path, MINIMAL + f"gate: {{color_drift: {limit}}}\n"), SOURCE, "ab") for limit in (2.0, 9.0)
    )
    assert (close.gate.color_drift, free.gate.color_drift) == (2.0, 9.0)
    assert settings_hash(close) == settings_hash(free)


def test_what_only_a_tiff_has_is_neutral_elsewhere(tmp_path: Path) -> None:
    def settings(output: str) -> Settings:
        return resolve(load(tmp_path, f"inputs: photos\noutput: {{uri: restored, {output}}}\n"), SOURCE, "ab")

    assert settings_hash(settings("format: png, compression: lzw")) == settings_hash(settings("format: png"))
    assert settings("format: tiff, pyramid: true").tiled
    shown = explain(load(tmp_path, "inputs: photos\noutput: {uri: restored, pyramid: true}\n"))
    assert ("output.tiled", True, "with output.pyramid") in shown
    shown = explain(load(tmp_path, "inputs: photos\noutput: {uri: restored, format: png}\n"))
    assert ("output.compression", None, "not used by format png") in shown


def test_fingerprint_depends_on_both() -> None:
    assert len({fingerprint(a, b) for a in ("1", "2") for b in ("1", "2")}) == 4


@hypothesis_settings(deadline=None)
@given(run_seed=st.integers(0, MAX_SEED), source=st.text("0123456789abcdef", min_size=64, max_size=64))
def test_item_seed_is_in_range_and_a_pure_function(run_seed: int, source: str) -> None:
    manifest = Manifest.model_validate({"inputs": ["/p"], "output": {"uri": "/o"}, "engine": {"seed": run_seed}})
    settings = resolve(manifest, SOURCE, "")
    seed = item_seed(settings, source)
    assert 0 <= seed <= MAX_SEED
    assert seed == item_seed(settings, source)
    assert item_seed(dataclasses.replace(settings, seed=5), source) == 5


@hypothesis_settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_manifest_or_a_manifest_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    with contextlib.suppress(ManifestError):
        load_manifest(str(path), {}, {})


LLAVA = f"{MINIMAL}caption: {{mode: llava, model: ./models/tiny-llava}}\n"


def test_all_that_shapes_a_caption_is_in_the_settings(tmp_path: Path) -> None:
    settings = resolve(load(tmp_path, LLAVA), SOURCE, "hash", None, "sha256:1")
    assert (settings.prompt, settings.prompt_source) == (None, "llava")
    assert (settings.captioner, settings.captioner_identity) == ("tiny-llava", "sha256:1")
    assert "this photograph" in settings.caption_question
    assert (
        "this map" in resolve(load(tmp_path, LLAVA), dataclasses.replace(SOURCE, material="map"), "").caption_question
    )
    paintings = load(tmp_path, LLAVA, {"caption.material": "painting"})
    assert "this painting" in resolve(paintings, SOURCE, "").caption_question
    hashes = {settings_hash(settings), settings_hash(resolve(load(tmp_path, LLAVA), SOURCE, "hash", None, "sha256:2"))}
    for key, value in {
        "question": "Why?", "template": "{image} {question}", "max_new_tokens": 9, "temperature": 0.2,
        "precision": "float32", "quantization": "8bit",
    }.items():  # fmt: skip
        changed = load(tmp_path, LLAVA, {f"caption.{key}": str(value)})
        hashes.add(settings_hash(resolve(changed, SOURCE, "hash", None, "sha256:1")))
    assert len(hashes) == 8


def test_an_image_with_a_prompt_does_not_depend_on_the_captioner(tmp_path: Path) -> None:
    row = dataclasses.replace(SOURCE, prompt="a boat")
    hashes = {settings_hash(resolve(load(tmp_path, LLAVA), row, "", None, identity)) for identity in ("1", "2")}
    assert len(hashes) == 1


def test_a_captioners_folder_counts_from_the_manifest(tmp_path: Path) -> None:
    assert load(tmp_path, LLAVA).caption.model == str(tmp_path / "models/tiny-llava")
    hub = load(tmp_path, f"{MINIMAL}caption: {{mode: llava, model: llava-hf/llava-1.5-7b-hf, revision: main}}\n")
    assert hub.caption.model == "llava-hf/llava-1.5-7b-hf"


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


def test_explain_says_who_uses_the_captioners_keys(tmp_path: Path) -> None:
    assert ("caption.question", None, "only used by caption.mode llava") in explain(load(tmp_path, MINIMAL))
    assert ("caption.max_new_tokens", 128, "default") in explain(load(tmp_path, LLAVA))
