"""Mutated files of every format: each ends as an image or as an ImageError, within time and memory."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

_ROOT = Path(__file__).parents[2]
_MUTATIONS = 2000  # of each format; all together take less than a minute
_MOST_CRASHES = 10  # after which a format is given up


def _pattern(bands: int, depth: int = 8) -> np.ndarray:
    y, x = np.mgrid[:40, :48]
    planes = [(x * 5 * (band + 1) + y * 3) % 256 for band in range(bands)]
    levels = np.stack(planes, -1).astype(np.uint16)
    return levels * 257 if depth == 16 else levels.astype(np.uint8)


def _tiffs() -> Iterator[bytes]:
    icc = bytes(imagecodecs.cms_profile("adobergb"))
    grey, rgb = _pattern(1)[..., 0], _pattern(3)
    variants: list[tuple[np.ndarray, dict[str, Any]]] = [
        (rgb, {"photometric": "rgb", "compression": "lzw", "predictor": True, "iccprofile": icc}),
        (_pattern(3, 16), {"photometric": "rgb", "compression": "deflate", "tile": (16, 16)}),
        (rgb, {"photometric": "rgb", "compression": "jpeg"}),
        (rgb, {"photometric": "rgb", "compression": "zstd", "bigtiff": True}),
        (grey, {"compression": "lzma"}),
        (grey, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256)}),
        (_pattern(3) / np.float32(255), {"photometric": "rgb", "compression": "deflate", "predictor": True}),
        (rgb, {"photometric": "cielab", "byteorder": ">"}),
        (_pattern(4), {"photometric": "separated", "compression": "packbits"}),
        (np.moveaxis(_pattern(4, 16), 2, 0), {"photometric": "rgb", "planarconfig": "separate"}),
        (_pattern(1, 16)[..., 0] >> 4, {"bitspersample": 12}),
    ]
    for samples, options in variants:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, samples, metadata=None, **options)
        yield buffer.getvalue()
    for compression in ("group4", "group3"):
        yield _pillow(Image.fromarray(grey > 127), "TIFF", compression=compression)


def _pillow(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def _jpegs() -> Iterator[bytes]:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a view", 6
    rgb = Image.fromarray(_pattern(3))
    yield _pillow(rgb, "JPEG", exif=exif, icc_profile=bytes(imagecodecs.cms_profile("srgb")), dpi=(300, 300))
    yield _pillow(rgb, "JPEG", progressive=True)
    yield _pillow(Image.fromarray(_pattern(1)[..., 0]), "JPEG")
    yield _pillow(rgb.convert("CMYK"), "JPEG")


def _pngs() -> Iterator[bytes]:
    rgb = Image.fromarray(_pattern(3))
    yield _pillow(rgb, "PNG", icc_profile=bytes(imagecodecs.cms_profile("srgb")), dpi=(300, 300))
    yield _pillow(rgb.quantize(16), "PNG", transparency=1)
    yield _pillow(Image.fromarray(_pattern(1)[..., 0] > 127), "PNG")
    yield bytes(imagecodecs.png_encode(_pattern(4, 16)))


def _webps() -> Iterator[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 3
    yield _pillow(Image.fromarray(_pattern(3)), "WEBP", exif=exif)
    yield _pillow(Image.fromarray(_pattern(4)), "WEBP", lossless=True)
    yield _pillow(Image.fromarray(_pattern(4)), "WEBP", icc_profile=bytes(imagecodecs.cms_profile("srgb")))


def _avifs() -> Iterator[bytes]:
    yield _pillow(Image.fromarray(_pattern(3)), "AVIF", icc_profile=bytes(imagecodecs.cms_profile("srgb")))
    yield _pillow(Image.fromarray(_pattern(4)), "AVIF")
    yield bytes(imagecodecs.avif_encode(_pattern(3, 16) >> 6, bitspersample=10))


def _jpeg2000s() -> Iterator[bytes]:
    yield bytes(imagecodecs.jpeg2k_encode(_pattern(3), codecformat="jp2", level=0))
    yield bytes(imagecodecs.jpeg2k_encode(_pattern(1, 16)[..., 0], codecformat="jp2", level=0))
    yield bytes(imagecodecs.jpeg2k_encode(_pattern(3), codecformat="j2k", level=30))


def _heics() -> Iterator[bytes]:
    import pillow_heif

    for mode, levels in (("RGB", _pattern(3)), ("RGBA", _pattern(4)), ("RGB;16", _pattern(3, 16))):
        buffer = io.BytesIO()
        pillow_heif.encode(mode, (48, 40), levels.tobytes(), buffer, quality=80)
        yield buffer.getvalue()


_SOUND: dict[str, Callable[[], Iterator[bytes]]] = {
    "tiff": _tiffs,
    "jpeg": _jpegs,
    "png": _pngs,
    "webp": _webps,
    "avif": _avifs,
    "jpeg2000": _jpeg2000s,
    "heic": _heics,
}


@pytest.mark.parametrize("name", _SOUND)
def test_mutations_are_read_or_refused(tmp_path: Path, name: str) -> None:
    if name == "heic" and importlib.util.find_spec("pillow_heif") is None:
        pytest.skip("needs pillow-heif")
    folder = tmp_path / name
    folder.mkdir()
    for number, data in enumerate(_SOUND[name]()):
        (folder / f"{number:02d}.sound").write_bytes(data)
    first, crashes, read, refused = 0, [], 0, 0
    while first < _MUTATIONS and len(crashes) < _MOST_CRASHES:
        ran = _child(folder, first, _MUTATIONS)
        if ran.returncode == 0:
            read, refused = (int(number) for number in ran.stdout.split())
            break
        seed = int((folder / "current").read_text())
        last_words = ran.stderr.strip().splitlines()[-1:] or [""]
        crashes.append(f"{name} mutation {seed} ended the process with {ran.returncode}: {last_words[0]}")
        first = seed + 1
    assert not crashes, "\n".join(crashes)
    assert read > 0, "no mutation was readable: the fuzzer does not reach the decoders"
    assert refused > 0, "no mutation was refused: the fuzzer changes nothing that matters"


def _child(folder: Path, first: int, last: int) -> subprocess.CompletedProcess[str]:
    # one arena and one thread each: address space of threads would count against the limit
    alone = {"MALLOC_ARENA_MAX": "1", "VIPS_CONCURRENCY": "1", "OMP_NUM_THREADS": "1", "TIFFFILE_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz.py")), str(folder), str(first), str(last)],
        env={**os.environ, **alone, "PYTHONPATH": str(_ROOT)},
        capture_output=True, text=True, errors="replace", check=False, timeout=600,
    )  # fmt: skip
