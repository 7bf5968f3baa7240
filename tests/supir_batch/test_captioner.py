"""Captioning as it runs: the actor's stage by itself, and the whole command in Ray on real images."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from PIL import Image

from supir_batch import captioner, captions, stages
from supir_batch.captioner import load_captioner
from supir_batch.decode import preview
from supir_batch.errors import EngineError
from supir_batch.isolation import Guards
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import make_plan
from supir_batch.types import FloatImage, Job, TileTicket

COMMAND = [sys.executable, "-m", "supir_batch"]


@pytest.fixture
def folder(tmp_path: Path, tiny_llava: Path) -> Path:
    """Three pictures, of which ``wide`` is cut into tiles, and a manifest that lets the tiny LLaVA caption them."""
    rng = np.random.default_rng(5)
    (tmp_path / "in/box").mkdir(parents=True)
    for name, size in {"a.png": (40, 30), "wide.png": (500, 200), "box/c.jpg": (64, 64)}.items():
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "in" / name)
    data = {
        "inputs": "in",
        "output": {"uri": "out"},
        "engine": {"steps": 1},
        "tiling": {"max_pixels": 65536, "overlap": 64},
        "caption": {"mode": "llava", "model": str(tiny_llava), "max_new_tokens": 12, "precision": "float32"},
        "runtime": {"caption_batch": 2},
    }
    (tmp_path / "m.yaml").write_text(json.dumps(data))  # JSON is YAML
    return tmp_path


def jobs_of(folder: Path, **overrides: str) -> list[Job]:
    uri = str(folder / "m.yaml")
    manifest = load_manifest(uri, {key.replace("__", "."): value for key, value in overrides.items()}, {})
    identity = captioner.identity(str(manifest.caption.model), None)
    return [todo.job for todo in make_plan(manifest, uri, "weights", identity).todo]


class Open:
    """Lets everything in."""

    def admit(self, images: Sequence[str]) -> bool:
        return True


def batch_of(jobs: Sequence[Job], guards: Guards) -> dict[str, Any]:
    """What Ray hands an actor: the rows of the preview stage."""
    images = stages.feed_stage({"jobs": [stages.pack(jobs)["jobs"]]}, Open())
    rows = list(stages.preview_stage(images, guards, restoring=True))
    return {"ticket": [row["ticket"][0] for row in rows], "preview": [row["preview"][0] for row in rows]}


def tickets_of(batch: dict[str, Any]) -> list[TileTicket]:
    return [pickle.loads(ticket) for ticket in batch["ticket"]]


def test_captions_do_not_depend_on_the_batch(folder: Path) -> None:
    jobs = jobs_of(folder)
    model = load_captioner(jobs[0], "cpu")
    seen = [preview(job) for job in jobs]
    together = model.caption([one.ticket for one in seen], [one.pixels for one in seen])
    assert together == [model.caption([one.ticket], [one.pixels])[0] for one in seen]
    assert len(set(together)) == 3


def test_what_is_kept_neither_loads_nor_asks_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, guards: Guards
) -> None:
    jobs = jobs_of(folder)
    first = tickets_of(stages.CaptionStage(guards, jobs[0], "cpu")(batch_of(jobs, guards)))
    assert all(ticket.caption and ticket.failure is None for ticket in first)
    assert [record.stage for record in first[0].records] == ["decode", "caption"]

    monkeypatch.setattr(stages, "load_captioner", None)  # calling it would raise
    jobs = jobs_of(folder, engine__steps="7")
    for job in jobs:  # another run has another ledger
        guards.ledger.book.retire(job.source.id)
    batch = batch_of(jobs, guards)
    assert all(pixels.size == 0 for pixels in batch["preview"])
    again = tickets_of(stages.CaptionStage(guards, jobs[0], "cpu")(batch))
    assert [ticket.caption for ticket in again] == [ticket.caption for ticket in first]


def test_the_attribute_captioner_goes_the_same_way(folder: Path, guards: Guards) -> None:
    jobs = jobs_of(folder, caption__mode="attributes")
    done = tickets_of(stages.CaptionStage(guards, jobs[0], "cpu")(batch_of(jobs, guards)))
    assert all("photograph" in ticket.caption for ticket in done)
    assert not (folder / "out").exists()


class _Picky:
    """A captioner that no batch with a certain image passes."""

    device = "cpu"

    def caption(self, tickets: Sequence[TileTicket], previews: Sequence[FloatImage]) -> list[str]:
        if any("wide" in ticket.job.source.id for ticket in tickets):
            raise RuntimeError("cannot")
        return ["fine"] * len(tickets)


def test_an_image_that_fails_does_not_take_others_along(
    folder: Path, monkeypatch: pytest.MonkeyPatch, guards: Guards
) -> None:
    monkeypatch.setattr(stages, "load_captioner", lambda job, device: _Picky())
    jobs = jobs_of(folder)
    done = tickets_of(stages.CaptionStage(guards, jobs[0], "cpu")(batch_of(jobs, guards)))
    failed = [ticket for ticket in done if ticket.failure is not None]
    assert [ticket.job.source.id for ticket in failed] == ["wide.png"]
    assert failed[0].failure is not None
    assert (failed[0].failure.stage, failed[0].failure.kind) == ("caption", "internal")
    assert {ticket.caption for ticket in done if ticket.failure is None} == {"fine"}
    assert captions.find(dataclasses.replace(failed[0], failure=None)) is None


def test_a_captioner_that_cannot_be_loaded_is_the_runs_failure(folder: Path, guards: Guards) -> None:
    jobs = [dataclasses.replace(job, captioner=str(folder / "nowhere")) for job in jobs_of(folder)]
    done = tickets_of(stages.CaptionStage(guards, jobs[0], "cpu")(batch_of(jobs, guards)))
    for ticket in done:  # the driver ends the run when it meets this kind
        assert ticket.failure is not None
        assert ticket.failure.kind == EngineError.kind
        assert "captioner 'nowhere' cannot be loaded" in ticket.failure.message


def test_the_attribute_captioner_names_the_material(folder: Path) -> None:
    job = jobs_of(folder, caption__mode="attributes")[0]
    drawn = dataclasses.replace(job, settings=dataclasses.replace(job.settings, material="drawing"))
    pixels = preview(job).pixels
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    captions_made = load_captioner(job, "cpu").caption([TileTicket(job), TileTicket(drawn)], [grey, grey])
    assert "photograph" in captions_made[0]
    assert "drawing" in captions_made[1]


def supir_batch(*arguments: str, cwd: Path) -> dict[str, Any]:
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, cwd=cwd, check=False)
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


@pytest.mark.slow
def test_caption_edit_and_restore(folder: Path) -> None:
    listed = supir_batch("caption", "m.yaml", "--output", "captions.csv", "--json", cwd=folder)
    assert (listed["captioned"], listed["failed"]) == (3, {})
    records = {path: path.stat().st_mtime_ns for path in (folder / "out/_captions").rglob("*.json")}
    assert len(records) == 3  # once per image, though one of them is cut
    assert not (folder / "out/_runs").exists()

    with (folder / "captions.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    made = {row["id"]: row["prompt"] for row in rows}
    edited = {**made, "a.png": 'eine Straße, "um 1900"\nmit Bäumen'}  # a person's words, over two lines
    with (folder / "captions.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        # the prompt of the cut image is left to the captioner again, which finds what it said before
        writer.writerows({**row, "prompt": (edited | {"wide.png": ""})[row["id"]]} for row in rows)

    assert supir_batch("run", "m.yaml", "--set", "inputs=captions.csv", "--json", cwd=folder)["done"] == 3
    assert {path: path.stat().st_mtime_ns for path in (folder / "out/_captions").rglob("*.json")} == records
    logged = log(folder)
    assert {id: row["caption"] for id, row in logged.items()} == edited
    sources = {id: row["prompt_source"] for id, row in logged.items()}
    assert sources == {"a.png": "manifest", "box/c.jpg": "manifest", "wide.png": "llava"}
    assert logged["wide.png"]["tiles"] > 1
    assert all((folder / "out" / name).is_file() for name in ("a.png", "wide.png", "box/c.jpg"))


def log(folder: Path) -> dict[str, dict[str, Any]]:
    """Newest row of the run log by id."""
    parts = sorted(str(path) for path in (folder / "out/_runs").rglob("*.parquet"))
    return {row["id"]: row for row in ds.dataset(parts).to_table().sort_by("finished_at").to_pylist()}
