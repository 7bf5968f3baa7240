"""The PREMIS sidecar: valid against the schema, says what the record says, and is committed with the image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lxml import etree
from PIL import Image

from supir_batch import commit, premis, probe
from supir_batch.provenance import MEDIA_TYPES
from supir_batch.types import Outcome, OutputFormat

Restore = Callable[..., Outcome]
SCHEMA = Path(__file__).parents[1] / "data/premis/premis-v3-0.xsd"
NS = {"p": premis.NAMESPACE}
GENERATIVE = {"engine": "supir", "engine_name": "SUPIR v0Q", "model_sha256": "ab" * 32, "weights": "v0Q"}


@pytest.fixture(scope="session")
def schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(SCHEMA))


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def restore(restore: Restore) -> Restore:
    """As everywhere, with the sidecars of a manifest that says nothing about them."""
    return lambda path, **options: restore(path, **{"sidecars": ("json", "premis"), **options})


def texts(tree: Any, path: str) -> list[str]:
    return [str(element.text) for element in tree.iterfind(path, NS)]


def read(outcome: Outcome) -> tuple[dict[str, Any], Any]:
    uri = outcome.output_uri
    record = json.loads(Path(commit.record_uri(uri)).read_text())
    return record, etree.parse(commit.premis_uri(uri)).getroot()


@pytest.mark.parametrize(
    "options",
    [{}, GENERATIVE, {**GENERATIVE, "operator": "Ada", "organization": "Town archive"}],
    ids=["lanczos", "generative", "people"],
)
def test_the_sidecar_is_valid(source: Path, restore: Restore, schema: etree.XMLSchema, options: dict[str, str]) -> None:
    outcome = restore(source, upscale=2.0, prompt="a fair", **options)
    _, tree = read(outcome)
    schema.assertValid(tree)


def test_it_says_what_the_record_says(source: Path, restore: Restore) -> None:
    outcome = restore(source, upscale=2.0, prompt="a fair", operator="Ada", organization="Town archive", **GENERATIVE)
    record, tree = read(outcome)
    objects = tree.findall("p:object", NS)
    digests = [texts(one, ".//p:messageDigest")[0] for one in objects]
    assert digests == [outcome.output_sha256, record["source_sha256"]]
    assert texts(tree, ".//p:size") == [str(outcome.output_bytes), str(source.stat().st_size)]
    assert texts(tree, ".//p:originalName") == ["photo.png", "photo.png"]
    assert texts(tree, ".//p:relationshipType") + texts(tree, ".//p:relationshipSubType") == [
        "derivation",
        "has source",
    ]
    assert texts(tree, ".//p:relatedObjectIdentifierValue") == [record["source_sha256"]]
    assert texts(tree, "p:event/p:eventType") == [
        "message digest calculation",
        "creation",
        "metadata modification",
        "message digest calculation",
    ]
    creation = tree.findall("p:event", NS)[1]
    (detail,) = texts(creation, ".//p:eventDetail")
    told = json.loads(detail.partition(": ")[2])
    assert detail.startswith("generative reconstruction: ")
    assert (told["prompt"], told["seed"]) == ("a fair", record["seed"])
    assert told["settings"] == record["settings"]
    assert record["notice"] in texts(creation, ".//p:eventOutcomeDetailNote")
    agents = list(zip(texts(tree, "p:agent/p:agentType"), texts(tree, "p:agent/p:agentName"), strict=True))
    assert agents == [
        ("software", "supir-batch"),
        ("software", "SUPIR v0Q"),
        ("person", "Ada"),
        ("organization", "Town archive"),
    ]
    assert f"sha256:{'ab' * 32}" in texts(tree, "p:agent/p:agentVersion")


def test_a_given_hash_makes_a_fixity_check(source: Path, restore: Restore) -> None:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    _, tree = read(restore(source, sha256=digest))
    first = tree.find("p:event", NS)
    assert texts(first, "p:eventType") + texts(first, ".//p:eventOutcome") == ["fixity check", "pass"]


def test_every_link_leads_somewhere_and_no_event_means_decryption(source: Path, restore: Restore) -> None:
    _, tree = read(restore(source, operator="Ada", **GENERATIVE))
    known = {kind: set(texts(tree, f"p:{kind}//p:{kind}IdentifierValue")) for kind in ("object", "event", "agent")}
    assert known["event"] == set(texts(tree, "p:event/p:eventIdentifier/p:eventIdentifierValue"))
    for kind, found in known.items():
        linked = set(texts(tree, f".//p:linking{kind.title()}IdentifierValue"))
        assert linked <= found
        assert linked, kind
    assert set(texts(tree, ".//p:relatedEventIdentifierValue")) <= known["event"]
    codes = {element.get("valueURI").rpartition("/")[2] for element in tree.iterfind(".//p:eventType", NS)}
    assert codes == {"mes", "cre", "mem"}


@pytest.fixture(scope="session")
def record() -> dict[str, Any]:
    return {
        "fingerprint": "f", "tool": "supir-batch", "tool_version": "1", "generative": True, "digital_source_type": "d",
        "engine_name": "SUPIR", "model_sha256": "m", "source_name": "a.tif", "source_sha256": "s",
        "source_format": "tiff", "output_format": "tiff", "output_size": [2, 3], "output_bit_depth": 16, "seed": 1,
        "prompt": "", "negative_prompt": "", "caption_source": "none", "notice": "", "settings": {}, "notes": [],
        "settings_sha256": "c", "instance_id": "i", "run": {"finished_at": "2026-01-31T23:59:59+00:00"},
        "output": {"name": "a.tif", "sha256": "o", "bytes": 9},
    }  # fmt: skip


@hypothesis_settings(deadline=None)
@given(text=st.text())
def test_any_text_makes_valid_xml(schema: etree.XMLSchema, record: dict[str, Any], text: str) -> None:
    people = {"operator": text, "organization": text}
    told = record | {"prompt": text, "notice": text, "source_name": text, "notes": [text], "settings": people}
    schema.assertValid(etree.fromstring(premis.document(told)))
    assert premis.document(told) == premis.document(told)


def test_a_run_without_premis_leaves_none_and_takes_away_an_old_one(source: Path, restore: Restore) -> None:
    with_it = restore(source, upscale=2.0)
    beside = Path(commit.premis_uri(with_it.output_uri))
    assert with_it.premis_sha256 == hashlib.sha256(beside.read_bytes()).hexdigest()
    without = restore(source, sidecars=("json",))
    assert (without.status, without.output_uri, without.premis_sha256) == ("done", with_it.output_uri, "")
    assert not beside.exists()


def test_a_recovered_output_knows_its_sidecar(source: Path, restore: Restore) -> None:
    first, again = restore(source), restore(source)
    assert again.ticket.recovered
    assert again.premis_sha256 == first.premis_sha256 != ""


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_kill_between_the_writes_leaves_no_output_that_counts(
    source: Path, restore: Restore, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    from supir_batch import store

    put, written = store.write_atomic, []

    def die(uri: str, data: bytes | Path) -> None:
        if len(written) == survives:
            raise Killed
        written.append(uri)
        put(uri, data)

    monkeypatch.setattr("supir_batch.store.write_atomic", die)
    with pytest.raises(Killed):
        restore(source)
    monkeypatch.setattr("supir_batch.store.write_atomic", put)
    order = ["photo.png.json", "photo.png.premis.xml", "photo.png"]
    assert [Path(uri).name for uri in written] == order[:survives]
    again = restore(source)
    assert (again.status, again.ticket.recovered) == ("done", False)
    _, tree = read(again)
    assert texts(tree, ".//p:messageDigest")[0] == again.output_sha256


def test_every_format_that_is_read_has_a_media_type() -> None:
    assert set(get_args(probe.ImageFormat)) | set(get_args(OutputFormat)) == set(MEDIA_TYPES)
