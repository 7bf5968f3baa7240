"""Reading weights files: hash, strict key check, no code execution (safetensors only hold tensors)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from supir_model.config import MODELS, TINY, TINY_WEIGHTS, ModelConfig
from supir_model.errors import WeightsError


def find(weights: str) -> tuple[ModelConfig, Path]:
    """Configuration and file behind a weights name. Raises WeightsError for a name this version does not ship."""
    if weights == TINY.name:
        return TINY, TINY_WEIGHTS
    raise WeightsError(f"weights '{weights}' are not available here; choose one of: {', '.join(MODELS)}")


def sha256(path: Path) -> str:
    """Hex digest of the file. Raises WeightsError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"weights file {path.name}: {error.strerror}; reinstall the package") from error


def load_into(network: nn.Module, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Load a safetensors file strictly into a network built on the meta device; memory is held about once.

    Raises WeightsError naming the first ten keys that are missing, unexpected or of another shape.
    """
    try:
        state = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"weights file {path.name} cannot be read ({error}); fetch it again") from error
    check(network.state_dict(), state, path.name)
    network.load_state_dict({key: value.to(dtype) for key, value in state.items()}, strict=True, assign=True)


def check(wanted: dict[str, Tensor], found: dict[str, Tensor], name: str) -> None:
    """Compare keys and shapes. Raises WeightsError with the first ten differences of each kind."""
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(k for k in wanted.keys() & found.keys() if wanted[k].shape != found[k].shape),
    }
    lines = [f"{len(keys)} {kind}: {', '.join(keys[:10])}" for kind, keys in problems.items() if keys]
    if lines:
        raise WeightsError(f"weights file {name} does not fit the network; {'; '.join(lines)}")
