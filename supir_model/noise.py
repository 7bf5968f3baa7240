"""Gaussian noise as a function of (seed, draw, absolute latent position), not of call order or crop.

Overlapping tiles of one image therefore start from the same noise where they overlap, and a restoration does not depend
on the batch, the worker or the tiling it happened in.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 64  # latent positions along one side of a block with a generator of its own


def latent_noise(seed: int, draw: int, channels: int, top: int, left: int, height: int, width: int) -> Tensor:
    """Unit normal noise [channels, height, width] float32 at latent rows top.. and columns left.. of the whole image.

    seed: [0, 2^63); draw: which of the run's independent noise tensors. Philox counters (Salmon et al. 2011) through
    numpy, whose streams are stable across platforms.
    """
    first_row, first_column = top // _BLOCK, left // _BLOCK
    rows = range(first_row, (top + height - 1) // _BLOCK + 1)
    columns = range(first_column, (left + width - 1) // _BLOCK + 1)
    canvas = np.block([[[_block(seed, draw, channels, row, column) for column in columns] for row in rows]])
    y, x = top - first_row * _BLOCK, left - first_column * _BLOCK
    return torch.from_numpy(np.ascontiguousarray(canvas[:, y : y + height, x : x + width]))


def _block(seed: int, draw: int, channels: int, row: int, column: int) -> NDArray[np.float32]:
    # the counter's high words name the block; its low word counts the numbers inside it
    bits = np.random.Philox(key=[seed, draw], counter=[0, 0, row, column])
    return np.random.Generator(bits).standard_normal((channels, _BLOCK, _BLOCK), dtype=np.float32)
