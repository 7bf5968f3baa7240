from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from supir_batch import provenance
from supir_batch.decode import decode
from supir_batch.types import Job, TileTicket

GENERATIVE = {"engine": "supir", "engine_name": "SUPIR v0Q", "model_sha256": "ab" * 32, "weights": "v0Q"}


@pytest.fixture
def make_ticket(tmp_path: Path, make_job: Callable[..., Job]) -> Callable[..., TileTicket]:
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8)).save(path, dpi=(300, 300))
    return lambda **settings: next(decode(make_job(path, **settings), 16)).ticket


def test_a_generative_engine_is_called_one(make_ticket: Callable[..., TileTicket]) -> None:
    record = provenance.build_record(make_ticket(**GENERATIVE), "png", 8)
    assert record.generative
    assert record.digital_source_type.endswith("/compositeWithTrainedAlgorithmicMedia")
    assert record.system_version == f"supir-batch {record.tool_version}; weights sha256:{'ab' * 32}"
    assert record.software == f"supir-batch {record.tool_version} (SUPIR v0Q)"
    assert record.notice


def test_plain_enlargement_is_not_called_generative(make_ticket: Callable[..., TileTicket]) -> None:
    record = provenance.build_record(make_ticket(), "png", 8)
    assert not record.generative
    assert record.digital_source_type.endswith("/algorithmicallyEnhanced")
    assert record.notice == ""


def test_resolution_grows_with_the_image(make_ticket: Callable[..., TileTicket]) -> None:
    record = provenance.build_record(make_ticket(upscale=2.0), "png", 8)
    assert record.scale == (2.0, 2.0)
    assert record.dpi == (600.0, 600.0)


def test_identifiers_follow_the_work_alone(make_ticket: Callable[..., TileTicket]) -> None:
    first, again = (provenance.build_record(make_ticket(), "png", 8) for _ in range(2))
    assert first == again
    other = provenance.build_record(make_ticket(upscale=2.0), "png", 8)
    assert len({first.document_id, first.instance_id, other.document_id, other.instance_id}) == 4
    assert first.fallback_original_id == other.fallback_original_id  # the same source


def test_the_prompt_writer_is_named_only_where_a_person_wrote(make_ticket: Callable[..., TileTicket]) -> None:
    for source, writer in (("manifest", "Ada"), ("fixed", "Ada"), ("attributes", None), ("none", None)):
        ticket = make_ticket(**GENERATIVE, prompt_source=source, operator="Ada")
        assert provenance.build_record(ticket, "png", 8).prompt_writer == writer


def test_history_parameters_stay_below_one_kilobyte(make_ticket: Callable[..., TileTicket]) -> None:
    record = provenance.build_record(make_ticket(**GENERATIVE), "png", 8)
    assert json.loads(record.history_parameters)["engine"] == "supir"
    long = dataclasses.replace(record, engine="x" * 2000)
    assert len(long.history_parameters.encode()) <= 1000
    json.loads(long.history_parameters)


def test_json_holds_everything(make_ticket: Callable[..., TileTicket]) -> None:
    record = provenance.build_record(make_ticket(), "png", 8, notes=("a note",))
    written = json.loads(json.dumps(provenance.to_json(record)))
    assert written["record_version"] == provenance.RECORD_VERSION
    assert written["notes"] == ["a note"]
    assert written["settings"]["engine"] == "lanczos"


def test_a_ticket_without_facts_is_refused(make_ticket: Callable[..., TileTicket]) -> None:
    with pytest.raises(ValueError, match="facts"):
        provenance.build_record(dataclasses.replace(make_ticket(), facts=None), "png", 8)
