from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from supir_batch import captions
from supir_batch.decode import preview
from supir_batch.errors import StoreError
from supir_batch.types import Job, TileTicket

MakeJob = Callable[..., Job]
ASKED = {
    "prompt": None, "prompt_source": "llava", "captioner": "tiny-llava", "captioner_identity": "sha256:1",
    "caption_question": "What?", "caption_max_new_tokens": 16, "caption_precision": "float32",
    "caption_quantization": "none",
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, make_job: MakeJob) -> Callable[..., TileTicket]:
    """The ticket that comes of the preview of a small image, whose captions are kept."""

    def ticket(color: str = "teal", **changed: object) -> TileTicket:
        path = tmp_path / f"{color}.png"
        Image.new("RGB", (40, 30), color).save(path)
        job = make_job(path, **(ASKED | changed))  # type: ignore[arg-type]
        return preview(job).ticket

    return ticket


def test_what_is_kept_is_found_and_spares_the_decoding(make: Callable[..., TileTicket], tmp_path: Path) -> None:
    ticket = make()
    assert captions.find(ticket) is None
    assert preview(ticket.job).pixels.shape == (30, 40, 3)
    captions.keep(dataclasses.replace(ticket, caption="ein Schiff, größer"))
    assert captions.find(ticket) == "ein Schiff, größer"
    again = preview(ticket.job)
    assert again.ticket.caption == "ein Schiff, größer"
    assert again.pixels.size == 0
    assert [path.suffix for path in tmp_path.glob("out/_captions/*/*")] == [".json"]


@pytest.mark.parametrize("changed", [{"steps": 99}, {"upscale": 2.0}, {"positive_prompt": "x"}, {"run_seed": 3}])
def test_what_only_restoring_reads_does_not_caption_again(
    make: Callable[..., TileTicket], changed: dict[str, object]
) -> None:
    captions.keep(dataclasses.replace(make(), caption="a ship"))
    assert make(**changed).fingerprint != make().fingerprint
    assert captions.find(make(**changed)) == "a ship"


@pytest.mark.parametrize(
    "changed",
    [
        {"color": "navy"},
        {"captioner_identity": "sha256:2"},
        {"caption_question": "Why?"},
        {"caption_template": "{image}{question}"},
        {"caption_max_new_tokens": 17},
        {"caption_temperature": 0.2},
        {"caption_precision": "bfloat16"},
        {"caption_quantization": "4bit"},
        {"model_sha256": "another robust encoder"},
    ],
)
def test_what_decides_a_caption_does(make: Callable[..., TileTicket], changed: dict[str, object]) -> None:
    captions.keep(dataclasses.replace(make(), caption="a ship"))
    assert captions.find(make(**changed)) is None


def test_a_drawn_caption_belongs_to_its_seed(make: Callable[..., TileTicket]) -> None:
    captions.keep(dataclasses.replace(make(caption_temperature=0.2), caption="a ship"))
    assert captions.find(make(caption_temperature=0.2)) == "a ship"
    assert captions.find(make(caption_temperature=0.2, run_seed=3)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"caption": 3, "deciding": {}}', '{"caption": "x", "deciding": {}}'])
def test_a_record_that_is_none_is_made_anew(make: Callable[..., TileTicket], tmp_path: Path, text: str) -> None:
    ticket = dataclasses.replace(make(), caption="a ship")
    captions.keep(ticket)
    (record,) = tmp_path.glob("out/_captions/*/*.json")
    record.write_text(text)
    assert captions.find(ticket) is None
    captions.keep(ticket)
    assert captions.find(ticket) == "a ship"


def test_workers_that_race_leave_one_whole_record(make: Callable[..., TileTicket], tmp_path: Path) -> None:
    ticket = dataclasses.replace(make(), caption="a ship " * 1000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(captions.keep, [ticket] * 40))
    (record,) = tmp_path.glob("out/_captions/*/*")
    assert json.loads(record.read_text())["caption"] == ticket.caption
    assert captions.find(ticket) == ticket.caption


def test_captions_that_cost_nothing_are_not_kept(make: Callable[..., TileTicket], tmp_path: Path) -> None:
    ticket = make(prompt_source="attributes")
    captions.keep(dataclasses.replace(ticket, caption="a color photograph"))
    assert captions.find(ticket) is None
    assert not (tmp_path / "out/_captions").exists()


def test_a_place_that_cannot_be_written_is_said(make: Callable[..., TileTicket], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_captions").write_text("a file in the way")
    with pytest.raises(StoreError, match="_captions"):
        captions.keep(dataclasses.replace(make(), caption="a ship"))
