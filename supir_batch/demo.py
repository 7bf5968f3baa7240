"""A small archive of damaged photographs to try the pipeline on, and how well it was restored.

    python -m supir_batch.demo build DIR    DIR/archive (damaged), DIR/reference (clean), DIR/list.csv
    python -m supir_batch.demo score DIR    PSNR and SSIM of DIR/archive and DIR/restored against DIR/reference

The photographs come with scikit-image, each free of rights: astronaut (NASA, public domain), camera (L. Varshney, CC0),
chelsea (S. van der Walt, CC0), coffee (R. Michetti, CC0), coins (no known restrictions), rocket (SpaceX, public
domain). The same call makes the same files.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supir_batch import color, decode, encode, resample
from supir_batch.types import FloatImage

if TYPE_CHECKING:
    from torch import Tensor

_NO_ALPHA = np.zeros((0, 0), np.float32)
_SEED = 1911


@dataclass(frozen=True)
class Score:
    """Fidelity of one image before and after: PSNR in dB, SSIM in [-1, 1], over RGB in [0, 1].

    ``restored_psnr`` and ``restored_ssim`` are None where there is no restored file.
    """

    name: str
    input_psnr: float
    restored_psnr: float | None
    input_ssim: float
    restored_ssim: float | None


@dataclass(frozen=True)
class _Item:
    """One image of the archive; ``save`` writes damaged sRGB [h, w, 3] (and the path) in the item's own way."""

    name: str
    material: str
    clean: Callable[[], FloatImage]
    damage: Callable[[Tensor, int], Tensor]
    save: Callable[[FloatImage, Path], None]


def build(folder: Path) -> list[Path]:
    """Write the archive, its references and its list below ``folder``; returns the damaged files. Needs torch."""
    import torch  # noqa: PLC0415

    written = []
    rows = io.StringIO(newline="")
    lines = csv.writer(rows, lineterminator="\n")
    lines.writerow(["uri", "id", "material"])
    for index, item in enumerate(_items()):
        clean = item.clean()
        path, reference = folder / "archive" / item.name, folder / "reference" / f"{Path(item.name).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        reference.parent.mkdir(parents=True, exist_ok=True)
        encode.encode(clean, _NO_ALPHA, reference, encode.FileSpec("png", 16))
        image = torch.from_numpy(clean.transpose(2, 0, 1).copy())[None] * 2 - 1
        with torch.no_grad():
            damaged = item.damage(image, _SEED + index)
        pixels = ((damaged[0].clamp(-1, 1) + 1) / 2).numpy().transpose(1, 2, 0)
        item.save(np.ascontiguousarray(pixels, dtype=np.float32), path)
        lines.writerow([f"archive/{item.name}", Path(item.name).stem, item.material])
        written.append(path)
    (folder / "list.csv").write_text(rows.getvalue(), encoding="utf-8")
    return written


def score(folder: Path) -> list[Score]:
    """Compare the archive and what was restored from it with the references, in order of name.

    A restored image of another size (upscale above 1) is reduced to its reference's. Raises ImageError for files that
    cannot be read.
    """
    scores = []
    for path in sorted((folder / "archive").rglob("*.*")):
        reference = decode.read_srgb(folder / "reference" / f"{path.stem}.png")[0]
        relative = path.relative_to(folder / "archive")
        found = sorted((folder / "restored" / relative.parent).glob(f"{path.stem}.*"))
        restored = [file for file in found if file.suffix in encode.EXTENSIONS.values()]
        before = _fidelity(decode.read_srgb(path)[0], reference)
        after = _fidelity(decode.read_srgb(restored[0])[0], reference) if restored else (None, None)
        scores.append(Score(str(relative), before[0], after[0], before[1], after[1]))
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 3 if a restored image is missing."""
    parser = argparse.ArgumentParser(prog="python -m supir_batch.demo", description="A demo archive, and its score.")
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="write the damaged archive and its references")
    scoring = commands.add_parser("score", help="compare DIR/restored with the references")
    for command in (building, scoring):
        command.add_argument("folder", type=Path, metavar="DIR")
    scoring.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        files = build(chosen.folder)
        print(f"{len(files)} damaged photographs in {chosen.folder / 'archive'}", file=sys.stderr)
        return 0
    if not (chosen.folder / "archive").is_dir():
        parser.error(f"{chosen.folder / 'archive'} does not exist; run 'python -m supir_batch.demo build DIR' first")
    scores = score(chosen.folder)
    complete = [s for s in scores if s.restored_psnr is not None]
    means = {
        key: _mean([getattr(s, key) for s in complete])
        for key in ("input_psnr", "restored_psnr", "input_ssim", "restored_ssim")
    }
    if chosen.json:
        print(json.dumps({"images": [asdict(s) for s in scores], "mean": means}, indent=2))
    else:
        print(_table(scores, means))
    for missing in (s.name for s in scores if s.restored_psnr is None):
        print(f"{missing}: there is no restored image; see the run's messages", file=sys.stderr)
    return 0 if len(complete) == len(scores) else 3


# ----------------------------------------------------------------------------------------------------- the archive


def _items() -> tuple[_Item, ...]:
    return (
        _Item("negatives/cameraman.tif", "photograph", lambda: _photo("camera", 512, 512), _soft_grain, _save_grey16),
        _Item("prints/launch-sepia.jpg", "photograph", _sepia_rocket, _faded_print, _save_turned_jpeg),
        _Item("prints/cat-scratched.png", "photograph", lambda: _photo("chelsea", 448, 298), _scratched, _save_png),
        _Item("press/coins-halftone.png", "photograph", lambda: _photo("coins", 384, 303), _printed, _save_png),
        _Item("prints/portrait-oval.png", "photograph", _portrait, _soft_noise, _save_oval),
        _Item("digital/coffee.jpg", "photograph", lambda: _photo("coffee", 480, 320), _camera_phone, _save_jpeg),
        _Item("albums/page.jpg", "photograph", _album_page, _faded_page, _save_jpeg),
    )


def _load(name: str) -> FloatImage:
    from skimage import data  # noqa: PLC0415 - photographs that only building the demo needs

    pixels: NDArray[np.uint8] = getattr(data, name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return pixels[..., :3].astype(np.float32) / np.float32(255)


def _photo(name: str, width: int, height: int) -> FloatImage:
    """A photograph, cropped around its center to the proportions wanted, then resized."""
    pixels = _load(name)
    high, wide = pixels.shape[:2]
    crop_wide, crop_high = min(wide, round(high * width / height)), min(high, round(wide * height / width))
    x, y = (wide - crop_wide) // 2, (high - crop_high) // 2
    return resample.resize(pixels[y : y + crop_high, x : x + crop_wide], width, height)


def _portrait() -> FloatImage:
    return np.ascontiguousarray(_load("astronaut")[0:320, 96:352])


def _sepia_rocket() -> FloatImage:
    import torch  # noqa: PLC0415

    from supir_model.training import degradations  # noqa: PLC0415

    image = torch.from_numpy(_photo("rocket", 480, 320).transpose(2, 0, 1).copy())[None] * 2 - 1
    toned = (degradations.sepia(image)[0].clamp(-1, 1) + 1) / 2
    return np.ascontiguousarray(toned.numpy().transpose(1, 2, 0), dtype=np.float32)


def _album_page() -> FloatImage:
    """Four prints with white borders on cream paper, 1056 x 976 pixels: more than one latent window."""
    page = np.empty((976, 1056, 3), np.float32)
    page[:] = np.array([0.86, 0.82, 0.74], np.float32)
    places = {"astronaut": (36, 36), "coffee": (540, 36), "chelsea": (36, 500), "rocket": (540, 500)}
    for name, (x, y) in places.items():
        page[y : y + 440, x : x + 480] = 0.96
        page[y + 12 : y + 428, x + 12 : x + 468] = _photo(name, 456, 416)
    return page


# ------------------------------------------------------------------------------------------------------ the damage


def _soft_grain(image: Tensor, seed: int) -> Tensor:
    return _damage(image, seed, blur=1.3, grain=14.0, dust=1e-4)


def _faded_print(image: Tensor, seed: int) -> Tensor:
    return _damage(image, seed, blur=1.0, fade=(0.85, 0.05), grain=8.0, dust=1e-4, jpeg=55.0)


def _scratched(image: Tensor, seed: int) -> Tensor:
    return _damage(image, seed, blur=0.8, scratches=6.0, dust=3e-4, noise=6.0)


def _soft_noise(image: Tensor, seed: int) -> Tensor:
    return _damage(image, seed, blur=1.2, noise=14.0)


def _camera_phone(image: Tensor, seed: int) -> Tensor:
    return _damage(image, seed, blur=1.2, noise=25.0, jpeg=40.0)


def _faded_page(image: Tensor, seed: int) -> Tensor:
    return _damage(image, seed, blur=1.1, fade=(0.9, 0.03), noise=9.0, dust=5e-5, jpeg=60.0)


def _printed(image: Tensor, seed: int) -> Tensor:
    """A press screen of 4 pixels, not quite resolved by the scanner."""
    import torch  # noqa: PLC0415

    from supir_model.training import degradations  # noqa: PLC0415

    screened = degradations.halftone(image, torch.tensor([4.0]), torch.tensor([math.pi / 4]))
    return degradations.gaussian_blur(torch.lerp(image, screened, 0.6), torch.tensor([0.6]))


def _damage(
    image: Tensor,
    seed: int,
    *,
    blur: float,
    fade: tuple[float, float] | None = None,
    grain: float = 0.0,
    noise: float = 0.0,
    scratches: float = 0.0,
    dust: float = 0.0,
    jpeg: float | None = None,
) -> Tensor:
    """Damage [1, 3, H, W] in [-1, 1] step by step in the order in which an archive does; units as in degradations."""
    import torch  # noqa: PLC0415

    from supir_model.training import degradations  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)
    image = degradations.gaussian_blur(image, torch.tensor([blur]))
    if fade is not None:
        image = degradations.fade(image, torch.tensor([fade[0]]), torch.tensor([fade[1]]))
    if grain:
        image = degradations.grain(image, torch.tensor([grain]), generator)
    if scratches:
        image = degradations.scratches(image, torch.tensor([scratches]), generator)
    if dust:
        image = degradations.dust(image, torch.tensor([dust]), generator)
    if noise:
        image = degradations.add_gaussian_noise(image, torch.tensor([noise]), generator)
    return image if jpeg is None else degradations.jpeg(image, torch.tensor([jpeg]))


# -------------------------------------------------------------------------------------------------------- the files


def _save_png(pixels: FloatImage, path: Path) -> None:
    encode.encode(pixels, _NO_ALPHA, path, encode.FileSpec("png", 8))


def _save_jpeg(pixels: FloatImage, path: Path) -> None:
    encode.encode(pixels, _NO_ALPHA, path, encode.FileSpec("jpeg", 8, dpi=(150.0, 150.0)))


def _save_oval(pixels: FloatImage, path: Path) -> None:
    """An oval cut-out with a soft edge: an alpha channel."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    radius = np.hypot(x / width * 2 - 1, y / height * 2 - 1)
    alpha = np.clip((1.0 - radius) * 40.0, 0.0, 1.0).astype(np.float32)
    encode.encode(pixels, alpha, path, encode.FileSpec("png", 8))


def _save_grey16(pixels: FloatImage, path: Path) -> None:
    """A scanner's master: 16-bit grey in a grey profile, 600 pixels per inch."""
    icc = _grey_profile()
    grey = color.from_srgb(pixels, icc, 1)
    encode.encode(grey, _NO_ALPHA, path, encode.FileSpec("tiff", 16, icc=icc, dpi=(600.0, 600.0)))


def _save_turned_jpeg(pixels: FloatImage, path: Path) -> None:
    """Stored lying on its side, with the EXIF tag that turns it upright, and a caption and date to be kept."""
    stored = np.rot90(encode.quantize(pixels, 8), k=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise to show
    exif[0x010E] = "Launch, print from an album"  # ImageDescription
    exif[0x013B] = "Unknown photographer"  # Artist
    exif[0x8298] = "Public domain"  # Copyright
    exif.get_ifd(0x8769)[0x9003] = "2014:11:18 12:00:00"  # DateTimeOriginal
    Image.fromarray(np.ascontiguousarray(stored)).save(
        path, quality=92, subsampling=0, exif=exif, dpi=(300, 300), icc_profile=None
    )


def _grey_profile() -> bytes:
    """A grey ICC profile with gamma 2.2; Little CMS stamps the time of day into it, which would vary."""
    made = bytes(imagecodecs.cms_profile("gray", gamma=2.2))
    stamp = b"".join(number.to_bytes(2, "big") for number in (2020, 1, 1, 0, 0, 0))
    return made[:24] + stamp + made[36:]


# ------------------------------------------------------------------------------------------------------- the scores


def _fidelity(pixels: FloatImage, reference: FloatImage) -> tuple[float, float]:
    from skimage import metrics  # noqa: PLC0415 - likewise

    pixels = resample.resize(pixels, reference.shape[1], reference.shape[0])
    error = float(np.mean(np.square(pixels.astype(np.float64) - reference)))
    psnr = -10 * math.log10(max(error, 1e-10))  # at most 100 dB: equal images have no finite one
    ssim: Any = metrics.structural_similarity(reference, pixels, channel_axis=2, data_range=1.0)
    return round(psnr, 3), round(float(ssim), 4)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _table(scores: Sequence[Score], means: dict[str, float | None]) -> str:
    def cell(value: float | None, digits: int) -> str:
        return f"{'-' if value is None else format(value, f'.{digits}f'):>9}"

    def line(name: str, values: Sequence[float | None]) -> str:
        return f"{name:<28}" + "".join(cell(v, d) for v, d in zip(values, (2, 2, 4, 4), strict=True))

    head = f"{'':<28}{'PSNR in':>9}{'out':>9}{'SSIM in':>9}{'out':>9}"
    body = [line(s.name, (s.input_psnr, s.restored_psnr, s.input_ssim, s.restored_ssim)) for s in scores]
    return "\n".join([head, *body, line("mean", list(means.values()))])


if __name__ == "__main__":
    sys.exit(main())
