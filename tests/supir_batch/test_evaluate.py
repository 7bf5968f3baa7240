"""The evaluate command on small photographs, with the shipped model."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from supir_batch.cli import app
from supir_batch.evaluation_report import grid

QUICK = ["--set", "engine.steps=2", "--set", "engine.cfg_end=2"]


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
    methods = ["encode-decode", "stage 1", *sampled, "sampled, tau 4"]
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
        assert of_d1["encode-decode"]["psnr"] > of_d1["stage 1"]["psnr"]
    text = (tmp_path / "e/evaluation.md").read_text()
    assert result.stdout == f"{text}\n"
    assert "## D1: blur 1.2, noise 25, JPEG 40, 2 images" in text
    psnr = (rows["astronaut.png", "D2", "lanczos"]["psnr"] + rows["coffee.png", "D2", "lanczos"]["psnr"]) / 2
    assert f"| lanczos | {psnr:.2f} | " in text
    assert "(1 of 2)" in text
    assert "Unavailable: LPIPS, NIQE, MUSIQ, MANIQA, CLIP-IQA, because pyiqa" in text
    with Image.open(tmp_path / "e/grid-D1.jpg") as picture:
        assert picture.size == (4 * 260 - 4, 20 + 2 * 260 - 4)


def test_numbers_depend_on_the_photograph_alone(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/other-name.png").write_bytes((photographs / "coffee.png").read_bytes())
    for source, output in ((photographs, "both"), (tmp_path / "alone", "one")):
        result = evaluate(source, "--output", tmp_path / output, "--degradation", "D1", *QUICK)
        assert result.exit_code == 0, result.output
    both, one = rows_of(tmp_path / "both"), rows_of(tmp_path / "one")
    for method in ("input", "stage 1", "sampled"):
        assert both["coffee.png", "D1", method]["psnr"] == one["other-name.png", "D1", method]["psnr"]


def test_damaged_photographs_are_restored_as_they_are(photographs: Path, tmp_path: Path) -> None:
    result = evaluate(photographs, "--output", tmp_path / "e", "--degradation", "none", "--limit", 1, *QUICK)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "e")
    assert [method for _, _, method in rows] == ["input", "stage 1", "sampled"]
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


def test_a_grid_has_a_cell_for_every_crop() -> None:
    crops = [{"input": np.zeros((50, 60, 3), np.float32), "sampled": np.ones((50, 60, 3), np.float32)}]
    with Image.open(io.BytesIO(grid(crops))) as sheet:
        assert sheet.size == (516, 276)
        assert sheet.getpixel((10, 60)) == (0, 0, 0)
        assert sheet.getpixel((270, 60)) == (255, 255, 255)
