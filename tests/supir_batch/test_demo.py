from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tifffile
from PIL import Image

from supir_batch import demo

pytest.importorskip("skimage", reason="the demo's photographs come with scikit-image")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.build(folder)
    return folder


def test_the_archive_holds_what_it_promises(archive: Path) -> None:
    files = {path.name: path for path in (archive / "archive").rglob("*.*")}
    assert len(files) == 7
    with tifffile.TiffFile(files["cameraman.tif"]) as tif:
        page = tif.pages.first
        assert (page.dtype, page.samplesperpixel) == ("uint16", 1)
        assert page.iccprofile[16:20] == b"GRAY"
    with Image.open(files["launch-sepia.jpg"]) as image:
        assert image.getexif()[0x0112] == 6
        assert image.getexif()[0x013B] == "Unknown photographer"
    with Image.open(files["portrait-oval.png"]) as image:
        assert image.mode == "RGBA"
    with Image.open(files["page.jpg"]) as image:
        assert min(image.size) > 900
    assert len((archive / "list.csv").read_text().splitlines()) == 8


def test_the_same_call_makes_the_same_files(archive: Path, tmp_path: Path) -> None:
    demo.build(tmp_path)

    def hashes(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and "restored" not in p.parts)
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert hashes(archive) == hashes(tmp_path)


def test_score(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(archive, tmp_path / "d")
    assert demo.main(["score", str(tmp_path / "d")]) == 3  # nothing is restored yet
    assert "no restored image" in capsys.readouterr().err
    for path in (archive / "archive").rglob("*.*"):
        target = tmp_path / "d" / "restored" / path.relative_to(archive / "archive")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(archive / "reference" / f"{path.stem}.png", target.with_suffix(".png"))
    assert demo.main(["score", str(tmp_path / "d"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["images"]) == 7
    assert result["mean"]["restored_ssim"] == 1.0
    assert result["mean"]["input_psnr"] < 30


def test_scoring_nothing_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["score", str(tmp_path)])
    assert caught.value.code == 2
