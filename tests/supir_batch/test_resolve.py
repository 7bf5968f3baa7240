from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from supir_batch.errors import ManifestError
from supir_batch.identity import settings_hash
from supir_batch.resolve import explain, resolve
from supir_batch.types import Settings
from supir_model.config import MODELS
from tests.manifests import MINIMAL, SOURCE, load, model_folder, refusal


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


def test_noise_levels_of_guidance_are_settings_of_a_model(tmp_path: Path) -> None:
    narrow = "approximate: {guidance_from: 0.3, guidance_to: 5}\n"
    found = resolve(load(tmp_path, MINIMAL + narrow), SOURCE, "hash")
    assert (found.guidance_from, found.guidance_to) == (0.3, 5.0)
    unused = resolve(load(tmp_path, MINIMAL + narrow + "engine: {name: lanczos}\n"), SOURCE, "")
    assert (unused.guidance_from, unused.guidance_to) == (0.0, None)
    (line,) = refusal(tmp_path, MINIMAL + "approximate: {guidance_from: 5, guidance_to: 0.3}\n")
    assert "guidance_to 0.3 is smaller than guidance_from 5" in line


def test_what_only_a_tiff_has_is_neutral_elsewhere(tmp_path: Path) -> None:
    def settings(output: str) -> Settings:
        return resolve(load(tmp_path, f"inputs: photos\noutput: {{uri: restored, {output}}}\n"), SOURCE, "ab")

    assert settings_hash(settings("format: png, compression: lzw")) == settings_hash(settings("format: png"))
    assert settings("format: tiff, pyramid: true").tiled
    shown = explain(load(tmp_path, "inputs: photos\noutput: {uri: restored, pyramid: true}\n"))
    assert ("output.tiled", True, "with output.pyramid") in shown
    shown = explain(load(tmp_path, "inputs: photos\noutput: {uri: restored, format: png}\n"))
    assert ("output.compression", None, "not used by format png") in shown


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


def test_explain_says_who_uses_the_captioners_keys(tmp_path: Path) -> None:
    assert ("caption.question", None, "only used by caption.mode llava") in explain(load(tmp_path, MINIMAL))
    assert ("caption.max_new_tokens", 128, "default") in explain(load(tmp_path, LLAVA))
