"""The evaluate command on small photographs, with the shipped model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from supir_batch.cli import app
from supir_batch.engine import SupirEngine
from supir_batch.evaluate import Asked, Comparison, compare
from supir_batch.evaluation_report import Evaluation, grid
from supir_batch.manifest_file import manifest_of_folder
from supir_batch.plan import make_plan
from supir_batch.types import FloatImage, TileTicket
from supir_model.config import TINY
from supir_model.convert import write
from supir_model.folder import FORMAT, Description
from supir_model.loading import load_networks

QUICK = ["--set", "engine.steps=3", "--set", "engine.cfg_end=2"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(skimage.data.astronaut()[0:176, 140:316]).save(folder / "astronaut.png")
    Image.fromarray(skimage.data.coffee()[80:160, 180:269]).save(folder / "coffee.png")
    return folder


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    rows = pq.read_table(folder / "evaluation.parquet").to_pylist()
    return {(row["image"], row["degradation"], row["method"]): row for row in rows}


def test_methods_degradations_and_ablations_side_by_side(photographs: Path, tmp_path: Path) -> None:
    result = evaluate(
        photographs, "--output", tmp_path / "e", "--no-text", "--no-negative", "--no-restoration", "--tau", 4, *QUICK
    )
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "e")
    sampled = ["sampled", "sampled, no text", "sampled, no negative prompt", "sampled, no restoration guidance"]
    methods = ["encode-decode", "stage-1", *sampled, "sampled, tau 4"]
    assert list(rows) == [
        (image, degradation, method)
        for image in ("astronaut.png", "coffee.png")
        for degradation, plain in (("D1", ["input"]), ("D2", ["bicubic", "lanczos"]))
        for method in [*plain, *methods]
    ]
    for row in rows.values():
        assert (row["settings_sha256"] is None) != row["method"].startswith("sampled")  # type: ignore[attr-defined]
        assert (row["ms_ssim"] is None) == (row["image"] == "coffee.png")  # too small for it
        assert row["lpips"] is None
    for image in ("astronaut.png", "coffee.png"):
        of_d1 = {
            method: row for (name, degradation, method), row in rows.items() if (name, degradation) == (image, "D1")
        }
        assert len({of_d1[method]["psnr"] for method in [*sampled, "sampled, tau 4"]}) == 5, "each ablation must matter"
        assert of_d1["encode-decode"]["psnr"] > of_d1["stage-1"]["psnr"]
    text = (tmp_path / "e/evaluation.md").read_text()
    assert result.stdout == f"{text}\n"
    assert "## D1: blur 1.2, noise 25, JPEG 40, 2 images" in text
    psnr = (rows["astronaut.png", "D2", "lanczos"]["psnr"] + rows["coffee.png", "D2", "lanczos"]["psnr"]) / 2
    assert f"| lanczos | {psnr:.2f} | " in text
    assert "(1 of 2)" in text
    assert "| LPIPS ↓ |" in text
    assert "| unavailable |" in text
    assert "Unavailable: LPIPS, NIQE, MUSIQ, MANIQA, CLIP-IQA, because pyiqa" in text
    assert "Unavailable: MS-SSIM, because it needs sides of at least 176 pixels, and some images are smaller." in text
    with Image.open(tmp_path / "e/grid-D1.jpg") as picture:  # whole, input, stage 1, sampled, 4 ablations, original
        assert picture.size == (9 * 326 + 6, 32 + 2 * (320 + 32))


def test_numbers_depend_on_the_photograph_alone(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/other-name.png").write_bytes((photographs / "coffee.png").read_bytes())
    for source, output in ((photographs, "both"), (tmp_path / "alone", "one")):
        result = evaluate(source, "--output", tmp_path / output, "--degradation", "D1", *QUICK)
        assert result.exit_code == 0, result.output
    both, one = rows_of(tmp_path / "both"), rows_of(tmp_path / "one")
    for method in ("input", "stage-1", "sampled"):
        assert both["coffee.png", "D1", method]["psnr"] == one["other-name.png", "D1", method]["psnr"]


def test_damaged_photographs_are_restored_as_they_are(photographs: Path, tmp_path: Path) -> None:
    result = evaluate(photographs, "--output", tmp_path / "e", "--degradation", "none", "--limit", 1, *QUICK)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "e")
    assert [method for _, _, method in rows] == ["input", "stage-1", "sampled"]
    assert all(row["psnr"] is None for row in rows.values())
    assert "## none: as they are, 1 image\n" in result.stdout
    assert (tmp_path / "e/grid-none.jpg").exists()


def test_a_manifest_gives_its_sources_prompts_and_engine(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"uri,prompt\n{photographs}/coffee.png,a cup of coffee\n")
    (tmp_path / "m.yaml").write_text("inputs: list.csv\noutput: {uri: restored}\nengine: {name: lanczos}\n")
    result = evaluate(tmp_path / "m.yaml", "--output", tmp_path / "e", "--degradation", "SRx4")
    assert result.exit_code == 0, result.output
    assert [method for _, _, method in rows_of(tmp_path / "e")] == ["bicubic", "lanczos"]
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{p}", "--method", "magic"], "error: method 'magic' is unknown; choose from input, bicubic, lanczos"),
        (["{p}", "--degradation", "D9"], "error: degradation 'D9' is unknown; choose from D1, D2, SRx4"),
        (["{t}/none.yaml"], "no such manifest"),
        (["{t}"], "holds no image"),
        (["{p}", "--set", "engine.stpes=2"], "unknown key; did you mean 'steps'?"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    photographs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(p=photographs, t=tmp_path) for argument in arguments]
    result = evaluate(*filled, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_only_the_methods_asked_for_run(photographs: Path, tmp_path: Path) -> None:
    asked = ["--degradation", "SRx4", "--method", "bicubic", "--method", "stage-1", "--limit", 1]
    result = evaluate(photographs, "--output", tmp_path / "e", *asked)
    assert result.exit_code == 0, result.output
    assert [method for _, _, method in rows_of(tmp_path / "e")] == ["bicubic", "stage-1"]


def test_a_model_that_training_exported_is_measured_by_its_folder(photographs: Path, tmp_path: Path) -> None:
    networks, _ = load_networks("tiny", torch.device("cpu"))
    with torch.no_grad():
        networks.vae.robust_encoder.shortcut.weight.mul_(0.5)
    identity = write(networks, Description(FORMAT, TINY, ()), tmp_path / "model", "float16").identity
    asked = ["--degradation", "D1", "--method", "stage-1", "--limit", 1]
    shipped = evaluate(photographs, "--output", tmp_path / "a", *asked)
    other = evaluate(photographs, "--output", tmp_path / "b", "--model", tmp_path / "model", *asked)
    assert other.exit_code == 0, other.output
    assert identity in other.stdout
    assert identity not in shipped.stdout
    row = ("astronaut.png", "D1", "stage-1")
    assert rows_of(tmp_path / "b")[row]["psnr"] < rows_of(tmp_path / "a")[row]["psnr"] - 1


def test_a_preset_can_be_chosen(photographs: Path, tmp_path: Path) -> None:
    asked = ["--degradation", "D1", "--method", "input", "--limit", 1, "--preset", "quality"]
    result = evaluate(photographs, "--output", tmp_path / "e", *asked)
    assert "- preset quality: " in result.stdout


def test_what_was_measured_before_a_stop_is_kept(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[object] = []

    def stop_at_the_second(self: Evaluation, found: Comparison) -> None:
        if first:
            raise KeyboardInterrupt
        first.append(found)
        add(self, found)

    add = Evaluation.add
    monkeypatch.setattr(Evaluation, "add", stop_at_the_second)
    result = evaluate(photographs, "--output", tmp_path / "e", "--degradation", "D1", "--method", "input")
    assert result.exit_code == 130
    assert [image for image, _, _ in rows_of(tmp_path / "e")] == ["astronaut.png"]
    assert ", 1 of 2 images\n" in (tmp_path / "e/evaluation.md").read_text()


def test_a_photograph_that_cannot_be_read_is_left_out(photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    whole = (photographs / "coffee.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "whole.png").write_bytes(whole)
    result = evaluate(folder, "--output", tmp_path / "e", "--degradation", "D1", "--method", "input")
    assert result.exit_code == 3, result.output
    assert [image for image, _, _ in rows_of(tmp_path / "e")] == ["whole.png"]
    text = (tmp_path / "e/evaluation.md").read_text()
    assert "Left out (D1): " in text
    assert "broken.png: " in text
    assert "empty.png is 0 bytes" in text or "empty.png" in text.partition("Left out (all): ")[2]
    assert "left out: " in result.stderr


def test_sizes_and_tiles_are_those_of_a_run(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    restore = SupirEngine.restore

    def watched(self: SupirEngine, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
        seen.extend(
            (ticket.box.count, *tile.shape[:2]) for ticket, tile in zip(tickets, tiles, strict=True) if ticket.box
        )
        return restore(self, tickets, tiles)

    monkeypatch.setattr(SupirEngine, "restore", watched)
    asked = ["--degradation", "D1", "--method", "sampled", "--set", "engine.steps=1", "--limit", 1]
    larger = ["--set", "engine.min_size=320"]
    cut = ["--set", "tiling.max_pixels=65536", "--set", "tiling.overlap=32"]
    result = evaluate(photographs, "--output", tmp_path / "e", *asked, *larger, *cut)
    assert result.exit_code == 0, result.output
    assert {count for count, _, _ in seen} == {len(seen)}
    assert len(seen) > 1, "320 x 320 pixels are cut"
    assert max(height * width for _, height, width in seen) <= 65536
    assert [row["width"] for row in rows_of(tmp_path / "e").values()] == [176], "results have the photograph's size"


def test_a_black_and_white_photograph_stays_so(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with Image.open(photographs / "coffee.png") as picture:
        picture.convert("L").save(tmp_path / "in/grey.png")
    manifest = manifest_of_folder(str(tmp_path / "in"), str(tmp_path / "e"), {"engine.steps": "1"}, {})
    jobs = [todo.job for todo in make_plan(manifest, "in", "0" * 64).todo]
    (found,) = compare(jobs, "cpu", Asked(("none",), ("sampled",)))
    assert isinstance(found, Comparison)
    sampled = found.results[0].pixels
    assert np.ptp(sampled, axis=2).max() == 0
    assert sampled.std() > 0.05


def test_other_engines_are_compared_in_the_same_way(photographs: Path, tmp_path: Path) -> None:
    class Darker:
        device = "cpu"

        def restore(self, tickets: Sequence[TileTicket], tiles: Sequence[FloatImage]) -> list[FloatImage]:
            return [tile / 2 for tile in tiles]

    manifest = manifest_of_folder(str(photographs), str(tmp_path), {"engine.name": "lanczos"}, {})
    jobs = [todo.job for todo in make_plan(manifest, "in", "").todo][:1]
    (found,) = compare(jobs, "cpu", Asked(("SRx4",), ("lanczos",)), {"darker": Darker()})
    assert isinstance(found, Comparison)
    lanczos, darker = found.results
    assert (lanczos.method, darker.method) == ("lanczos", "darker")
    np.testing.assert_allclose(darker.pixels, lanczos.pixels / 2, atol=1e-6)
    assert found.values["darker"]["psnr"] < found.values["lanczos"]["psnr"]


def test_what_evaluation_cannot_follow_is_refused(photographs: Path, tmp_path: Path) -> None:
    result = evaluate(photographs, "--output", tmp_path / "e", "--set", "engine.geometry=released")
    assert result.exit_code == 2
    assert "engine.geometry: only 'pad' can be evaluated, saw 'released'" in result.stderr


def test_a_grid_has_a_cell_for_every_picture() -> None:
    black, white = (Image.new("RGB", (320, 320), color) for color in ("black", "white"))
    with Image.open(io.BytesIO(grid({"a": {"input": black, "sampled": white}, "b": {"sampled": black}}))) as sheet:
        assert sheet.size == (2 * 326 + 6, 32 + 2 * (320 + 32))
        shades = [[sheet.getpixel((left, top)) for left in (160, 480)] for top in (160, 520)]
    assert shades == [[(0, 0, 0), (255, 255, 255)], [(255, 255, 255), (0, 0, 0)]]


def test_the_grid_shows_photographs_from_all_over_and_never_too_many() -> None:
    evaluation = Evaluation(100)
    pixels = np.zeros((20, 30, 3), np.float32)
    for index in range(100):
        evaluation.add(Comparison(str(index), "D1", pixels, pixels, (), {}, {}))
    shown = [int(name) for name in evaluation.pictures["D1"]]
    assert len(shown) == 16
    assert shown[0] == 0
    assert shown[-1] > 90
    assert max(np.diff(shown)) <= 7
