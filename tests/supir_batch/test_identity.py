from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_batch.identity import fingerprint, item_seed, settings_hash
from supir_batch.resolve import resolve
from supir_batch.settings import MAX_SEED, Manifest
from supir_batch.types import Settings
from tests.manifests import MINIMAL, SOURCE, load


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


def test_limits_of_the_gate_identify_no_work(tmp_path: Path) -> None:
    close, free = (
        resolve(load(tmp_path, MINIMAL + f"gate: {{color_drift: {limit}}}\n"), SOURCE, "ab") for limit in (2.0, 9.0)
    )
    assert (close.gate.color_drift, free.gate.color_drift) == (2.0, 9.0)
    assert settings_hash(close) == settings_hash(free)


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
