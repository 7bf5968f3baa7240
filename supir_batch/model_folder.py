"""The model that a manifest names: the one in the package, or a converted model's folder behind a path or URI.

Reads only small files, so that planning needs neither torch nor gigabytes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supir_batch import store
from supir_batch.errors import ManifestError, StoreError
from supir_model import folder
from supir_model.config import MODELS, TINY, TINY_WEIGHTS, ModelConfig
from supir_model.errors import WeightsError


def is_shipped(weights: str) -> bool:
    """Whether ``weights`` names the model in the package."""
    return weights == TINY.name


def describe(weights: str) -> folder.Description:
    """What the model is and what it was made from; one small file is read. Raises ManifestError."""
    if is_shipped(weights):
        return folder.Description(folder.FORMAT, TINY, ())
    uri = store.join(weights, folder.CONFIG)
    try:
        text = store.read_text(uri)
    except StoreError as error:
        if error.retryable:
            raise
        raise ManifestError(_no_model(weights, str(error))) from error
    try:
        return folder.read_description(text, uri)
    except WeightsError as error:
        raise ManifestError(f"weights '{weights}': {error}") from error


def config(weights: str) -> ModelConfig:
    """The configuration of the model that ``weights`` names. Raises ManifestError."""
    return describe(weights).model


def checksums(weights: str) -> folder.Checksums:
    """The recorded hashes of a converted model's folder. Raises ManifestError."""
    uri = store.join(weights, folder.CHECKSUMS)
    try:
        return folder.read_checksums(store.read_text(uri), uri)
    except (StoreError, WeightsError) as error:
        if getattr(error, "retryable", False):
            raise
        raise ManifestError(f"weights '{weights}': {error}") from error


def problems(weights: str, whole: bool) -> list[str]:
    """How a converted model's folder differs from its checksums; empty when it does not.

    ``whole``: hash every file; otherwise large ones are compared by size alone.
    """
    recorded = checksums(weights)
    found = list(folder.coverage(describe(weights), recorded))
    for name, one in recorded.files.items():
        uri = store.join(weights, name)
        info = store.find(uri)
        problem = folder.difference(name, one, None if info is None else info.size)
        if problem is None and (whole or one.is_small) and (digest := store.sha256(uri)) != one.sha256:
            problem = f"{name} has SHA-256 {digest}, recorded is {one.sha256}"
        if problem is not None:
            found.append(problem)
    return found


def model_sha256(weights: str) -> str:
    """The hash that stands for the model in every fingerprint.

    Hashes of large files are those recorded at conversion (``supir-batch models check`` verifies them). Raises
    ManifestError when a file is missing or was changed.
    """
    if is_shipped(weights):
        return folder.file_sum(TINY_WEIGHTS).sha256
    found = problems(weights, whole=False)
    if found:
        raise ManifestError(f"weights '{weights}': {'; '.join(found)}; copy or convert the model again")
    return checksums(weights).identity


def local(weights: str, cache: Path | None = None) -> str:
    """What to give to the model's loader: ``weights`` itself, or the local copy of a remote folder.

    The copy lies below ``cache`` (default: ``supir-batch/models`` in the user's cache folder), is made once per machine
    and hash, and is verified while it is made. Raises StoreError.
    """
    if is_shipped(weights) or store.is_local(weights):
        return weights
    recorded = checksums(weights)
    target = (cache or _cache()) / recorded.identity
    with _lock(target):
        for name, one in recorded.files.items():
            store.download(store.join(weights, name), target / name, one.sha256)
        store.write_atomic(str(target / folder.CHECKSUMS), folder.to_text(recorded).encode())
    return str(target)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supir-batch" / "models"


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process at a time: actors that start together on one machine share the copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _no_model(weights: str, reason: str) -> str:
    if weights in MODELS:
        return (
            f"weights '{weights}' are not in the package: convert their files with 'supir-batch models convert' "
            "and give the folder that it makes"
        )
    return (
        f"weights '{weights}' name no model ({reason}); "
        f"give '{TINY.name}' or a folder made by 'supir-batch models convert'"
    )
