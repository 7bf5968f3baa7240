"""A converted model: one folder that says what it is. Nothing here imports torch.

``model.safetensors`` (all networks, named as in ``networks.Networks``), ``config.json`` (the configuration and the
files it was made from), ``tokenizer/`` (CLIP's vocabulary, for models that read one), ``checksums.json`` (size and
SHA-256 of all these), ``README.md`` (for people).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from supir_model.config import ModelConfig
from supir_model.errors import WeightsError

FORMAT = 1
WEIGHTS, CONFIG, CHECKSUMS, CARD = "model.safetensors", "config.json", "checksums.json", "README.md"
TOKENIZER = "tokenizer"
VOCABULARY = ("vocab.json", "merges.txt")

Role = Literal["base", "supir", "tokenizer", "lora"]

_SMALL = 64 * 1024 * 1024  # bytes; smaller files are hashed again whenever the folder is used


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str

    @property
    def is_small(self) -> bool:
        """Whether hashing it again costs next to nothing."""
        return self.bytes <= _SMALL


@dataclass(frozen=True)
class SourceFile:
    """One file a model was made from; ``scale`` is a LoRA's strength, 1 for all others."""

    role: Role
    name: str
    bytes: int
    sha256: str
    scale: float = 1.0


@dataclass(frozen=True)
class Description:
    """What config.json says."""

    format: int
    model: ModelConfig
    sources: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Checksums:
    """What checksums.json says; names are relative, with forward slashes."""

    format: int
    files: dict[str, FileSum]

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over names and hashes of all files that shape results: the hash of the model."""
        return combined({name: one.sha256 for name, one in self.files.items()})


def combined(hashes: Mapping[str, str]) -> str:
    """One SHA-256 (hex) for several named files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_sum(path: Path) -> FileSum:
    """Size and hash of a file. Raises WeightsError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return FileSum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise WeightsError(f"weights file {path.name}: cannot be read ({error.strerror}); give another") from error


def needed_files(config: ModelConfig) -> tuple[str, ...]:
    """Every file of such a model's folder that shapes results."""
    tokenizer = [f"{TOKENIZER}/{name}" for name in VOCABULARY] if config.text.kind == "sdxl" else []
    return (CONFIG, WEIGHTS, *tokenizer)


def to_text(value: Description | Checksums) -> str:
    """The JSON of config.json or checksums.json; the same value gives the same bytes."""
    return json.dumps(dataclasses.asdict(value), indent=2, ensure_ascii=False) + "\n"


def read_description(text: str, place: str) -> Description:
    """The inverse of ``to_text``. Raises WeightsError naming ``place`` and the key that is wrong."""
    found: Description = _read(Description, text, place)
    return found


def read_checksums(text: str, place: str) -> Checksums:
    """The inverse of ``to_text``. Raises WeightsError for what is malformed, or names files outside the folder."""
    found: Checksums = _read(Checksums, text, place)
    for name, one in found.files.items():
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or len(one.sha256) != 64:
            raise WeightsError(f"{place}: files.{name}: is no file of this folder with a SHA-256; convert again")
    return found


def read_local(path: Path) -> tuple[Description, Checksums]:
    """Both files of a folder, and whether all files are there in their recorded size. Raises WeightsError."""
    try:
        description = read_description((path / CONFIG).read_text("utf-8"), f"{path.name}/{CONFIG}")
        checksums = read_checksums((path / CHECKSUMS).read_text("utf-8"), f"{path.name}/{CHECKSUMS}")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"'{path.name}' is no model folder ({error}); give 'tiny' or a folder made by 'supir-batch models convert'"
        ) from error
    problems = list(coverage(description, checksums))
    for name, recorded in checksums.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if (problem := difference(name, recorded, size)) is not None:
            problems.append(problem)
    if problems:
        raise WeightsError(f"model folder {path.name}: {'; '.join(problems)}; copy or convert it again")
    return description, checksums


def coverage(description: Description, checksums: Checksums) -> Sequence[str]:
    """What the checksums leave out though it shapes results."""
    return [f"{name} is not in {CHECKSUMS}" for name in needed_files(description.model) if name not in checksums.files]


def difference(name: str, recorded: FileSum, size: int | None) -> str | None:
    """How a file of ``size`` bytes (None: absent) differs from its record; None if it does not."""
    if size is None:
        return f"{name} is missing"
    return None if size == recorded.bytes else f"{name} has {size} bytes, recorded are {recorded.bytes}"


# --- JSON to frozen dataclasses, nothing left out and nothing unknown ----------------------------------------------


def _read(kind: type[Any], text: str, place: str) -> Any:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{place}: is not JSON ({error}); copy or convert the model again") from error
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT:
        raise WeightsError(f"{place}: has format {version!r}, this version reads {FORMAT}; convert the model again")
    return _build(kind, data, place, "")


def _build(kind: Any, value: object, place: str, key: str) -> Any:
    """``value`` as the type hint ``kind`` says. Raises WeightsError with the dotted key."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # only "X | None" occurs
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _build(kind, value, place, key)
    if origin in (tuple, dict, Literal):
        return _build_generic(origin, arguments, value, place, key)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, place, key)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _wrong(place, key, kind.__name__, value)
    return value


def _build_generic(origin: Any, arguments: tuple[Any, ...], value: object, place: str, key: str) -> Any:
    if origin is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], one, place, f"{key}[{i}]") for i, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _build(arguments[1], one, place, _dotted(key, name)) for name, one in value.items()}
    if origin is Literal and value in arguments:
        return value
    names = {tuple: "a list", dict: "an object"}
    raise _wrong(place, key, names.get(origin, f"one of {', '.join(map(str, arguments))}"), value)


def _build_dataclass(kind: Any, value: object, place: str, key: str) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict):
        raise _wrong(place, key, "an object", value)
    unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - value.keys())
    if unknown or missing:
        found = f"unknown keys: {', '.join(unknown) or 'none'}; missing keys: {', '.join(missing) or 'none'}"
        raise WeightsError(f"{place}: {key or 'the file'}: {found}; convert the model with this version")
    return kind(**{name: _build(hint, value[name], place, _dotted(key, name)) for name, hint in hints.items()})


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _wrong(place: str, key: str, wanted: str, value: object) -> WeightsError:
    return WeightsError(f"{place}: {key or 'the file'} must be {wanted}, saw {value!r}; convert the model again")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
