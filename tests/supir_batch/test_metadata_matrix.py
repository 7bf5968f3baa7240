"""What a source carries survives from every format into every format, as an independent reader (ExifTool) sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
from numpy.typing import NDArray
from PIL import Image

from supir_batch import encode, jpeg2000
from supir_batch.types import Outcome

pytestmark = pytest.mark.skipif(
    shutil.which("exiftool") is None, reason="needs exiftool; install Debian's libimage-exiftool-perl"
)

Restore = Callable[..., Outcome]
ICC = bytes(imagecodecs.cms_profile("srgb"))

# group:tag as ExifTool writes and reads it, and the value; AS_XMP: the property where the format has no such group
EXIF = {
    "IFD0:Artist": "Signe Brander",
    "IFD0:Copyright": "Helsinki City Museum",
    "IFD0:Make": "Voigtländer",
    "IFD0:DocumentName": "box 12",
    "ExifIFD:DateTimeOriginal": "1907:06:01 12:00:00",
    "ExifIFD:LensModel": "Heliar",
    "ExifIFD:FNumber": "4.5",
    "GPS:GPSLatitude": "60 deg 10' 12.00\"",
}
IPTC = {
    "IPTC:By-line": "Signe Brander",
    "IPTC:Keywords": ["market", "harbor"],
    "IPTC:City": "Helsinki",
    "IPTC:CopyrightNotice": "Helsinki City Museum",
}
XMP = {
    "XMP-dc:Title": "Market square",
    "XMP-dc:Creator": "Signe Brander",
    "XMP-dc:Rights": "CC BY 4.0",
    "XMP-iptcExt:PersonInImage": ["a fisherman", "a buyer"],
    "XMP-xmpMM:OriginalDocumentID": "uuid:original",
}
AS_XMP = {
    "IFD0:Artist": "XMP-dc:Creator",
    "IFD0:Make": "XMP-tiff:Make",
    "ExifIFD:FNumber": "XMP-exif:FNumber",
    "IPTC:Keywords": "XMP-dc:Subject",
    "IPTC:City": "XMP-photoshop:City",
}

SOURCES = ("tiff", "png", "jpeg", "webp", "jpeg2000")
TARGETS = ("tiff", "bigtiff", "png", "jpeg", "webp", "jpeg2000")


def exiftool(*arguments: str) -> str:
    done = subprocess.run(["exiftool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tags_of(path: Path) -> dict[str, Any]:
    """Every tag by group and name; a list stays one."""
    (found,) = json.loads(exiftool("-j", "-G1", "-charset", "iptc=utf8", "-api", "largefilesupport=1", str(path)))
    return dict(found)


def source_of(folder: Path, image_format: str, levels: NDArray[np.uint8]) -> Path:
    """An image with all three kinds of metadata and a profile, tagged by ExifTool."""
    suffix = {"jpeg2000": ".jp2", "tiff": ".tif"}.get(image_format, f".{image_format}")
    path = folder / f"a{suffix}"
    if image_format == "jpeg2000":
        path.write_bytes(jpeg2000.encode(levels, ICC, (300.0, 300.0), None))
    elif image_format == "tiff":
        tifffile.imwrite(
            path, levels, photometric="rgb", iccprofile=ICC, resolution=(300, 300), resolutionunit="INCH", metadata=None
        )
    else:
        Image.fromarray(levels).save(path, icc_profile=ICC, dpi=(300, 300), lossless=True)
    told = EXIF | XMP | ({} if image_format == "webp" else IPTC)
    flags = []
    for key, value in told.items():
        flags += [f"-{key}={one}" for one in (value if isinstance(value, list) else [value])]
    exiftool(
        "-overwrite_original",
        "-codedcharacterset=utf8",
        "-IFD0:Orientation#=1",
        "-GPS:GPSLatitudeRef=N",
        *flags,
        str(path),
    )
    return path


def restored(source: Path, target: str, restore: Restore, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    if target == "bigtiff":
        monkeypatch.setattr(encode, "BIGTIFF_BYTES", 1000)
    outcome = restore(source, format="tiff" if target == "bigtiff" else target, upscale=2.0)
    assert outcome.status == "done", outcome.ticket.failure
    return outcome


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("image_format", SOURCES)
def test_all_that_a_source_carries(
    image_format: str,
    target: str,
    tmp_path: Path,
    restore: Restore,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = source_of(tmp_path, image_format, rng.integers(0, 256, (40, 60, 3), np.uint8))
    before = tags_of(source)
    outcome = restored(source, target, restore, monkeypatch)
    after = tags_of(Path(outcome.output_uri))
    assert after["File:FileType" if "File:FileType" in after else "System:FileType"] in (
        "TIFF",
        "BTF",
        "PNG",
        "JPEG",
        "Extended WEBP",
        "JP2",
    )
    expected = dict(XMP)
    for kind, holds in ((EXIF, target != "bigtiff"), (IPTC, target not in ("bigtiff", "webp"))):
        for key, value in kind.items():
            if key in before:
                expected |= {key: value} if holds else ({AS_XMP[key]: value} if key in AS_XMP else {})
    missing = {key: (value, after.get(key)) for key, value in expected.items() if str(after.get(key)) != str(value)}
    assert not missing
    assert after["ICC-header:ProfileClass"] == before["ICC-header:ProfileClass"]
    assert {key for key in (EXIF | XMP) if key not in before} == set(), "the source must hold them in the first place"


@pytest.mark.parametrize("target", TARGETS)
def test_what_we_add(
    target: str, tmp_path: Path, restore: Restore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path, "tiff", rng.integers(0, 256, (40, 60, 3), np.uint8))
    after = tags_of(Path(restored(source, target, restore, monkeypatch).output_uri))
    assert after["XMP-iptcExt:DigitalSourceType"].endswith("/algorithmicallyEnhanced")
    assert after["XMP-xmpMM:DerivedFromFilePath"] == "a.tif"
    assert after["XMP-xmpMM:HistoryAction"] == "derived"
    assert after["XMP-xmp:CreatorTool"].startswith("supir-batch ")
    assert after["XMP-supirBatch:Scale"] == "2 2"
    if target not in ("webp", "jpeg2000", "bigtiff"):
        resolution = {"png": "PNG-pHYs:PixelsPerUnitX", "jpeg": "JFIF:XResolution"}.get(target, "IFD0:XResolution")
        assert after[resolution] in (600, 23622)
    if target != "bigtiff":
        assert after["IFD0:Software"].startswith("supir-batch ")
        assert after["IFD0:Orientation"] == "Horizontal (normal)"


def test_a_grey_16_bit_master_is_read_alike_by_everyone(
    tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    levels = rng.integers(0, 65536, (60, 80), np.uint16)
    icc = bytes(imagecodecs.cms_profile("gray", gamma=2.2))
    source = tmp_path / "plate.tif"
    tifffile.imwrite(source, levels, iccprofile=icc, resolution=(600, 600), resolutionunit="INCH", metadata=None)
    exiftool(
        "-overwrite_original", "-IFD0:Artist=Signe Brander", "-IPTC:City=Helsinki", "-XMP-dc:Title=Plate", str(source)
    )
    output = Path(restore(source, upscale=1.5).output_uri)
    tags = tags_of(output)
    assert (tags["IFD0:Artist"], tags["IPTC:City"], tags["XMP-dc:Title"]) == ("Signe Brander", "Helsinki", "Plate")
    assert (tags["IFD0:BitsPerSample"], tags["IFD0:XResolution"], tags["IFD0:ImageWidth"]) == (16, 900, 120)
    by_tifffile = tifffile.imread(output)
    by_vips = pyvips.Image.new_from_file(str(output), fail_on="error")
    assert (by_vips.format, by_vips.interpretation, bytes(by_vips.get("icc-profile-data"))) == ("ushort", "grey16", icc)
    np.testing.assert_array_equal(by_vips.numpy(), by_tifffile)
    with Image.open(output) as by_pillow:
        assert by_pillow.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(by_pillow), by_tifffile)
    assert by_tifffile.shape == (90, 120)
