"""A finished output is sound; whatever is done to it afterwards is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from supir_batch import probe, runlog
from supir_batch.cli import app
from supir_batch.errors import ImageError
from supir_batch.inspect import inspect
from supir_batch.runlog import RunLog
from supir_batch.types import Outcome
from supir_batch.verify import verify

Restore = Callable[..., Outcome]
FORMATS = {"a.png": "png", "b.jpg": "jpeg", "c.tif": "tiff"}


@pytest.fixture
def output(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> Path:
    """Three restored images in three formats with their log, a kept manifest and a report."""
    with RunLog(str(tmp_path / "out"), "run") as log:
        for name in FORMATS:
            Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / name, dpi=(300, 300))
            options = {"upscale": 1.5, "engine": "supir", "engine_name": "SUPIR", "sidecars": ("json", "premis")}
            outcome = restore(tmp_path / name, prompt="a fair", **options)
            assert outcome.status == "done", outcome.ticket.failure
            log.append(runlog.to_row(outcome, "run"))
    out = tmp_path / "out"
    (out / "_runs" / "run" / "manifest.yaml").write_text("inputs: x")
    (out / "report").mkdir()
    (out / "report" / "index.html").write_text("<p>")
    return out


def problems(output: Path) -> list[tuple[str, str]]:
    found = [problem for checked in verify(str(output)) for problem in checked.problems]
    return [(problem.uri.removeprefix(f"{output}/"), problem.kind) for problem in found]


def test_a_finished_output_is_sound(output: Path) -> None:
    assert [Path(checked.uri).name for checked in verify(str(output))] == list(FORMATS)
    assert problems(output) == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_one_changed_byte_is_named(output: Path, name: str, place: float) -> None:
    data = bytearray((output / name).read_bytes())
    data[int(len(data) * place)] ^= 1
    (output / name).write_bytes(data)
    assert (name, "changed") in problems(output)


@pytest.mark.parametrize("name", FORMATS)
def test_stripped_tags_are_named(output: Path, name: str) -> None:
    with Image.open(output / name) as image:
        pixels = np.asarray(image)
    Image.fromarray(pixels).save(output / name)
    found = problems(output)
    assert found.count((name, "stripped")) == 6
    assert found.count((name, "changed")) == 1


def test_a_single_changed_tag_is_named(output: Path) -> None:
    data = (output / "b.jpg").read_bytes()
    assert data.count(b"compositeWithTrainedAlgorithmicMedia") == 1
    (output / "b.jpg").write_bytes(
        data.replace(b"compositeWithTrainedAlgorithmicMedia", b"trainedAlgorithmicMedia" + b" " * 13)
    )
    assert problems(output) == [("b.jpg", "changed"), ("b.jpg", "stripped")]


def test_missing_foreign_and_unfinished_files_are_named(output: Path) -> None:
    (output / "a.png").unlink()
    (output / "b.jpg.json").unlink()
    (output / "sub").mkdir()
    (output / "sub" / "d.png").write_bytes(b"x")
    (output / "e.tif.json").write_text("{}")
    assert problems(output) == [
        ("a.png", "missing"),
        ("b.jpg.json", "missing"),
        ("e.tif.json", "foreign"),
        ("sub/d.png", "foreign"),
    ]


def _rewrite_log(output: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [change(row) for row in runlog.read_log(str(output)).to_pylist()]
    shutil.rmtree(output / "_runs")
    with RunLog(str(output), "run") as log:
        for row in rows:
            log.append(row)


def test_a_superseded_output_may_be_there_or_gone(tmp_path: Path, output: Path, restore: Restore) -> None:
    with RunLog(str(output), "second") as log:
        log.append(runlog.to_row(restore(tmp_path / "a.png", format="tiff"), "second"))
    assert problems(output) == []
    for path in output.glob("a.png*"):
        path.unlink()
    assert problems(output) == []
    (output / "a.tif").unlink()
    assert problems(output) == [("a.tif", "missing")]


def test_a_log_that_is_older_than_the_hashes_of_records(output: Path) -> None:
    _rewrite_log(output, lambda row: row | {"record_sha256": None})
    assert problems(output) == []


def test_an_output_that_was_moved_is_still_sound(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.rename(output.parent / "elsewhere")
    monkeypatch.chdir(output.parent)
    result = CliRunner().invoke(app, ["verify", "elsewhere"])
    assert (result.exit_code, result.stdout) == (0, "3 files verified, 0 problems\n")


def test_a_white_page_is_no_bomb(tmp_path: Path, restore: Restore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deflate packs it as tightly as a bomb; the log's hash vouches for it, and to inspect it nothing is decoded."""
    Image.new("I;16", (600, 500), 65535).save(tmp_path / "a.tif")
    with RunLog(str(tmp_path / "out"), "run") as log:
        outcome = restore(tmp_path / "a.tif", upscale=2.0)
        assert outcome.status == "done", outcome.ticket.failure
        log.append(runlog.to_row(outcome, "run"))
    output = Path(outcome.output_uri)
    monkeypatch.setattr(probe, "EXPANSION_FREE_BYTES", 2**20)
    monkeypatch.setattr(probe, "MAX_EXPANSION", 60)
    with pytest.raises(ImageError, match="decompression bomb"):
        probe.probe(output)
    assert problems(tmp_path / "out") == []
    assert dict(inspect(str(output)))["image"].startswith("tiff, 1200 x 1000 pixels, 16 bits")
    with output.open("ab") as stream:
        stream.write(b"more")
    assert problems(tmp_path / "out") == [("a.tif", "changed"), ("a.tif", "changed")]


def test_a_changed_record_is_named(output: Path) -> None:
    record = json.loads((output / "c.tif.json").read_text())
    record["prompt"] = "another"
    (output / "c.tif.json").write_text(json.dumps(record))
    assert problems(output) == [("c.tif.json", "changed")]


def test_premis_sidecars_count(output: Path) -> None:
    (output / "a.png.premis.xml").unlink()
    changed = bytearray((output / "b.jpg.premis.xml").read_bytes())
    changed[700] ^= 1
    (output / "b.jpg.premis.xml").write_bytes(changed)
    (output / "d.png.premis.xml").write_text("<premis/>")
    assert problems(output) == [
        ("a.png.premis.xml", "missing"),
        ("b.jpg.premis.xml", "changed"),
        ("d.png.premis.xml", "foreign"),
    ]


def test_another_size_is_named(output: Path) -> None:
    with Image.open(output / "a.png") as image:
        image.resize((40, 30)).save(output / "a.png")
    assert ("a.png", "geometry") in problems(output)


def test_exit_code_and_words_of_the_command(output: Path) -> None:
    sound = CliRunner().invoke(app, ["verify", str(output)])
    assert (sound.exit_code, sound.stdout) == (0, "3 files verified, 0 problems\n")
    (output / "a.png").write_bytes(b"no image")
    broken = CliRunner().invoke(app, ["verify", str(output)])
    assert broken.exit_code == 6
    assert "changed    " in broken.stdout
    assert broken.stdout.endswith("3 files verified, 2 problems\n")
    data = json.loads(CliRunner().invoke(app, ["verify", "--json", str(output)]).stdout)
    assert {problem["kind"] for problem in data["problems"]} == {"changed"}
    nothing = CliRunner().invoke(app, ["verify", str(output / "nothing")])
    assert (nothing.exit_code, "holds no run log" in nothing.stderr) == (2, True)


# --- inspect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_output_claims(output: Path, name: str) -> None:
    said = dict(inspect(str(output / name)))
    assert said["image"].startswith(f"{FORMATS[name]}, 120 x 90 pixels, 8 bits")
    assert said["is"].startswith("a GENERATIVE RECONSTRUCTION made by supir-batch")
    assert said["restored by"] == "SUPIR"
    assert "positive: a fair" in said["prompts"]
    assert said["record"].endswith("belongs to these bytes")
    assert said["source"].endswith(f"{name}, 80 x 60 pixels")
    assert said["seed"].isdigit()
    assert said["  upscale"] == "1.5"


def test_what_a_changed_output_claims(output: Path) -> None:
    data = bytearray((output / "c.tif").read_bytes())
    data[len(data) // 2] ^= 1
    (output / "c.tif").write_bytes(data)
    assert "OTHER bytes" in dict(inspect(str(output / "c.tif")))["record"]


def test_a_file_that_claims_nothing(tmp_path: Path, output: Path) -> None:
    said = dict(inspect(str(tmp_path / "a.png")))
    assert said["is"].startswith("not made by supir-batch, or its marks are gone; it says nothing")
    assert said["record"] == "there is none beside it"
    (tmp_path / "a.png.json").write_text("[]")
    assert dict(inspect(str(tmp_path / "a.png")))["record"].endswith("is none of supir-batch")


def test_a_derivative_without_a_model(tmp_path: Path, restore: Restore) -> None:
    Image.new("RGB", (30, 20), "gray").save(tmp_path / "plain.png")
    said = dict(inspect(restore(tmp_path / "plain.png").output_uri))
    assert said["is"].startswith("a derivative made by supir-batch without a generative model")


def test_the_command_says_it_in_lines(tmp_path: Path, output: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(output / "a.png")])
    assert result.exit_code == 0
    assert "GENERATIVE RECONSTRUCTION" in result.stdout
    assert len(json.loads(CliRunner().invoke(app, ["inspect", "--json", str(output / "a.png")]).stdout)) > 10
    (tmp_path / "text.png").write_text("no image")
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "text.png")])
    assert (refused.exit_code, refused.stderr.startswith("error: ")) == (2, True)
