"""Photographs in memory and random crops of them, for training runs whose data set fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
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


def load_images(folder: Path) -> list[npt.NDArray[np.uint8]]:
    """Read every file below a folder, in sorted order, as RGB arrays [H, W, 3] uint8, turned upright by Exif.

    Nothing is skipped: a file that is no readable 8-bit RGB or gray image raises RequestError with its path, and so
    does a folder without files. A folder that does not exist raises it too.
    """
    if not folder.is_dir():
        raise RequestError(f"'{folder}' is not a folder; expected one with photographs")
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    if not paths:
        raise RequestError(f"'{folder}' holds no files; expected photographs")
    return [_load_image(path) for path in paths]


def _load_image(path: Path) -> npt.NDArray[np.uint8]:
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
    """Random crops of photographs that are all held in memory as uint8, together with their downscaled copies.

    images: RGB arrays [H, W, 3] uint8, at least one. device: where the pixels are kept and the batches are made; on a
    GPU no transfer remains in the training loop. The copies need about 1.7 times the memory of the photographs.
    """

    def __init__(self, images: Sequence[npt.NDArray[np.uint8]], device: torch.device | str = "cpu") -> None:
        if not images:
            raise RequestError("no photographs to crop from")
        self.device = torch.device(device)
        # One entry per photograph: its copies [H, W, 3] uint8, the full size first.
        self._copies: list[list[Tensor]] = []
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"photograph {index} must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")
            self._copies.append([torch.tensor(copy, device=self.device) for copy in _downscaled(image)])
        # The photograph that limits the crop size.
        self._smallest = min(range(len(images)), key=lambda i: min(images[i].shape[:2]))

    def __len__(self) -> int:
        """The number of photographs."""
        return len(self._copies)

    def batch(self, generator: Generator, batch_size: int, crop: int) -> Tensor:
        """Draw crops [batch_size, 3, crop, crop] float32 in [-1, 1], on the device of the photographs.

        Each crop draws a photograph, one of its copies that is large enough, a position and a horizontal flip; the same
        generator state gives the same batch. Raises RequestError where the crop is larger than some photograph.
        """
        if batch_size < 1 or crop < 1:
            raise RequestError(f"batch size and crop must be at least 1, got {batch_size} and {crop}")
        height, width = self._copies[self._smallest][0].shape[:2]
        if crop > min(height, width):
            raise RequestError(
                f"crop {crop}x{crop} is larger than photograph {self._smallest}, "
                f"which is {width}x{height} (width x height); crop smaller or remove it"
            )
        # float64, so that the product with a large extent still reaches every position.
        draws = torch.rand((batch_size, 5), generator=generator, device=generator.device, dtype=torch.float64)
        crops = []
        for u_photograph, u_copy, u_top, u_left, _ in draws.tolist():
            copies = self._copies[int(u_photograph * len(self._copies))]
            usable = [copy for copy in copies if min(copy.shape[:2]) >= crop]
            copy = usable[int(u_copy * len(usable))]
            top = int(u_top * (copy.shape[0] - crop + 1))
            left = int(u_left * (copy.shape[1] - crop + 1))
            crops.append(copy[top : top + crop, left : left + crop])
        pixels = torch.stack(crops).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        flipped = (draws[:, 4] < 0.5).to(self.device).view(-1, 1, 1, 1)
        return torch.where(flipped, pixels.flip(-1), pixels).contiguous()


def _downscaled(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    height, width = image.shape[:2]
    copies = [image]
    for factor in DOWNSCALES[1:]:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        copies.append(np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8))
    return copies
