"""The identity of a piece of work, and the seeds that follow from it: from content alone, so that no order matters."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import get_args, get_type_hints

from supir_batch.types import Settings

_FLOAT_FIELDS = {key for key, hint in get_type_hints(Settings).items() if hint is float or float in get_args(hint)}


IDENTIFYING = tuple(
    field.name for field in dataclasses.fields(Settings) if not field.name.startswith(("gate_", "audit_"))
)
"""The settings that make an output another one, and so are part of its identity.

The limits of the output gate are not: who allows more for a few images does not want all others made anew. Nor is the
audit, which changes no output.
"""


_ADDED: dict[str, object] = {"guidance_from": 0.0, "guidance_to": None}
"""Settings that came later, with what all work before them did: at that they are no part of the hash, which stays."""


@functools.lru_cache(maxsize=4096)  # most images of a run share their settings
def settings_hash(settings: Settings) -> str:
    """SHA-256 (hex) of the canonical JSON of what is ``IDENTIFYING``: sorted keys, no spaces, floats by their shortest
    exact form."""
    values = {name: getattr(settings, name) for name in IDENTIFYING}
    values = {name: value for name, value in values.items() if name not in _ADDED or value != _ADDED[name]}
    for key in _FLOAT_FIELDS & values.keys():
        if values[key] is not None:
            values[key] = float(values[key])  # 1 and 1.0 are the same setting
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def fingerprint(source_sha256: str, settings_sha256: str) -> str:
    """The identity of one piece of work: SHA-256 (hex) over both hashes."""
    return hashlib.sha256(f"{source_sha256}:{settings_sha256}".encode("ascii")).hexdigest()


def item_seed(settings: Settings, source_sha256: str) -> int:
    """The seed of one image, in [0, 2**63): as given, else a hash of run seed and source, so no order matters."""
    if settings.seed is not None:
        return settings.seed
    digest = hashlib.sha256(f"{settings.run_seed}:{source_sha256}".encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def second_seed(seed: int) -> int:
    """The seed of another attempt at a tile that went wrong with ``seed``, in [0, 2**63)."""
    return _derived_seed(seed, "again")


def sample_seeds(seed: int, count: int) -> list[int]:
    """Seeds of ``count`` restorations that are only compared with that of ``seed``, each in [0, 2**63)."""
    return [_derived_seed(seed, f"sample {i + 1}") for i in range(count)]


def _derived_seed(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode("ascii")).digest()[:8], "big") >> 1
