"""Photographs on disk and random crops of them, with the captions that someone wrote for them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

from supir_model.errors import RequestError

# The factors by which a photograph may be shrunk before cropping, so that a crop shows detail at several scales.
DOWNSCALES = (Fraction(1), Fraction(2, 3), Fraction(1, 2))

# Modes whose conversion to RGB is well defined. Transparency, 16-bit gray and CMYK need decisions that a training set
# should not leave to a default of the imaging library.
_MODES = ("RGB", "L")
_READERS = 8  # files decoded at once


@dataclass(frozen=True)
class Batch:
    """Crops to train on. clean: [B, 3, H, W] float32 in [-1, 1]. captions: one for each, "" where none is known."""

    clean: Tensor
    captions: tuple[str, ...]


def find_photographs(source: Path) -> list[Path]:
    """Every file below a folder, sorted; or the files that a text file names, one per line, relative to it.

    Raises RequestError where there is no such folder or list, or where it names nothing.
    """
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if not path.is_dir())
    else:
        try:
            lines = source.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"'{source}' is neither a folder with photographs nor a text file that lists them ({error})"
            ) from error
        paths = [source.parent / line.strip() for line in lines if line.strip()]
    if not paths:
        raise RequestError(f"'{source}' holds no files; expected photographs")
    return paths


def read_captions(path: Path) -> dict[str, str]:
    """File name to caption from a TSV with two columns, file and caption, without a header.

    Raises RequestError for a line of another shape, or a file that is named twice.
    """
    captions: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as source:
            for number, row in enumerate(csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
                if len(row) != 2 or not row[0]:
                    raise RequestError(f"'{path}', line {number}: expected file, tab, caption; saw {row!r}")
                if row[0] in captions:
                    raise RequestError(f"'{path}', line {number}: '{row[0]}' already has a caption; remove one")
                captions[row[0]] = row[1].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"captions '{path}' cannot be read: {error}") from error
    return captions


def load_image(path: Path) -> npt.NDArray[np.uint8]:
    """A photograph as RGB [H, W, 3] uint8, turned upright by Exif. Raises RequestError for what is none."""
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise ValueError(f"mode is {image.mode}, expected one of {', '.join(_MODES)}")
            upright = ImageOps.exif_transpose(image)
            return np.array(upright.convert("RGB"), dtype=np.uint8)
    # Decoders report damaged files as any of these.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"'{path}' cannot be used as a training photograph: {error}; convert or remove it"
        ) from error


class PhotographCrops:
    """Random crops of photographs and of their downscaled copies.

    paths: at least one photograph. captions: by file name; a photograph without one gets "". in_memory: keep all pixels
    on ``device`` as uint8, with copies that need about 1.7 times the memory of the photographs; otherwise each crop
    reads its file anew. device: where the batches are made.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        captions: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        in_memory: bool = True,
    ) -> None:
        if not paths:
            raise RequestError("no photographs to crop from")
        self.device = torch.device(device)
        self._paths = list(paths)
        self._captions = [(captions or {}).get(path.name, "") for path in paths]
        self._readers = ThreadPoolExecutor(_READERS)
        self._held: list[list[Tensor]] | None = None
        if in_memory:
            self._held = [self._copies(image) for image in self._readers.map(load_image, self._paths)]

    def __len__(self) -> int:
        """The number of photographs."""
        return len(self._paths)

    def batch(self, generator: Generator, batch_size: int, crop: int) -> Batch:
        """Draw ``batch_size`` crops of ``crop`` pixels a side.

        Each crop draws a photograph, one of its copies that is large enough, a position and a horizontal flip; the same
        generator state gives the same batch. Raises RequestError where the crop is larger than a photograph.
        """
        if batch_size < 1 or crop < 1:
            raise RequestError(f"batch size and crop must be at least 1, got {batch_size} and {crop}")
        # float64, so that the product with a large extent still reaches every position.
        draws = torch.rand((batch_size, 5), generator=generator, device=generator.device, dtype=torch.float64)
        chosen = [int(u * len(self._paths)) for u in draws[:, 0].tolist()]
        crops = []
        for index, copies, (_, u_copy, u_top, u_left, _) in zip(chosen, self._of(chosen), draws.tolist(), strict=True):
            usable = [copy for copy in copies if min(copy.shape[:2]) >= crop]
            if not usable:
                height, width = copies[0].shape[:2]
                raise RequestError(
                    f"crop {crop}x{crop} is larger than '{self._paths[index].name}', "
                    f"which is {width}x{height} (width x height); crop smaller or remove it"
                )
            copy = usable[int(u_copy * len(usable))]
            top = int(u_top * (copy.shape[0] - crop + 1))
            left = int(u_left * (copy.shape[1] - crop + 1))
            crops.append(copy[top : top + crop, left : left + crop])
        pixels = torch.stack(crops).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        flipped = (draws[:, 4] < 0.5).to(self.device).view(-1, 1, 1, 1)
        clean = torch.where(flipped, pixels.flip(-1), pixels).contiguous()
        return Batch(clean, tuple(self._captions[index] for index in chosen))

    def _of(self, chosen: Sequence[int]) -> list[list[Tensor]]:
        """The copies of the chosen photographs, full size first."""
        if self._held is not None:
            return [self._held[index] for index in chosen]
        images = self._readers.map(load_image, [self._paths[index] for index in chosen])
        return [self._copies(image) for image in images]

    def _copies(self, image: npt.NDArray[np.uint8]) -> list[Tensor]:
        return [torch.tensor(copy, device=self.device) for copy in _downscaled(image)]


def _downscaled(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    height, width = image.shape[:2]
    copies = [image]
    for factor in DOWNSCALES[1:]:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        copies.append(np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8))
    return copies
