"""Models on this machine: what is known, what is there and whole, how files come here and become one folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from supir_batch import model_folder, store
from supir_batch.errors import ManifestError, StoreError, TransientStoreError
from supir_model import folder
from supir_model.config import MODELS, TINY, TINY_WEIGHTS

HUB = "hf://"  # hf://owner/name/path, or hf://owner/name for a whole repository

_BY_HAND = "fetch the files on another machine and give their folder"
_WEIGHT_FILES = {".safetensors", ".ckpt", ".pt", ".pth"}
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_TOKENIZER = "tokenizer: vocab.json and merges.txt, the tokenizer folder of any SDXL model in diffusers layout"
_BASE = "base: SDXL 1.0 with the 0.9 VAE, or a fine-tune; one safetensors file, or a folder in diffusers layout"

Dtype = Literal["float32", "float16"]
Report = Callable[[str], None]


class Known(NamedTuple):
    """A model this version can run, and what it takes to have it."""

    name: str
    display_name: str
    license: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """Something below a folder of models: a converted model, or a file of weights not yet converted.

    ``name`` is a converted model's (``v0Q``), ``state`` is ``ready``, ``damaged: ...`` or ``not converted``.
    """

    uri: str
    kind: Literal["model", "file"]
    name: str
    bytes: int
    state: str


class Fetched(NamedTuple):
    """One file that is here now, and its SHA-256 (hex)."""

    path: Path
    sha256: str


def known() -> tuple[Known, ...]:
    """Every model by name, with the files it is made of."""
    return tuple(
        Known(
            name,
            config.display_name,
            config.license,
            () if name == TINY.name else (_BASE, f"supir: SUPIR-{name}, ckpt or safetensors", _TOKENIZER),
        )
        for name, config in MODELS.items()
    )


def present(where: str) -> list[Found]:
    """Converted models and weights files directly or one level below the folder or prefix ``where``."""
    listed = list(store.list_tree(where))
    models = {store.parent(one.uri) for one in listed if store.name(one.uri) == folder.CONFIG}
    converted = sorted(uri for uri in models if store.exists(store.join(uri, folder.CHECKSUMS)))
    found = [_describe(uri) for uri in converted]
    for one in listed:
        inside = any(store.relative_to(one.uri, uri) is not None for uri in converted)
        if not inside and PurePosixPath(store.name(one.uri)).suffix.lower() in _WEIGHT_FILES:
            found.append(Found(one.uri, "file", "", one.size, "not converted"))
    return found


def _describe(uri: str) -> Found:
    try:
        name = model_folder.config(uri).name
        size = sum(one.bytes for one in model_folder.checksums(uri).files.values())
        problems = model_folder.problems(uri, whole=False)
    except ManifestError as error:
        return Found(uri, "model", "", 0, f"damaged: {error}")
    return Found(uri, "model", name, size, f"damaged: {'; '.join(problems)}" if problems else "ready")


# --- check ---------------------------------------------------------------------------------------------------------


def check(weights: str) -> list[str]:
    """Everything that is wrong with a model: files, hashes, names and shapes of its weights. Empty: nothing.

    Reads every byte. Raises ManifestError when there is no model, StoreError when it cannot be reached.
    """
    description = model_folder.describe(weights)
    if model_folder.is_shipped(weights):
        return _key_problems(TINY_WEIGHTS, description)
    problems = model_folder.problems(weights, whole=True)
    if problems:
        return problems  # a file that is not the recorded one need not be understood
    with store.local_copy(store.join(weights, folder.WEIGHTS)) as path:
        return _key_problems(path, description) + _vocabulary_problems(weights, description)


def _key_problems(path: Path, description: folder.Description) -> list[str]:
    from supir_model import weights as files  # noqa: PLC0415
    from supir_model.errors import WeightsError  # noqa: PLC0415
    from supir_model.networks import build_on_meta  # noqa: PLC0415

    try:
        files.check(build_on_meta(description.model).state_dict(), files.read_tensors(path), path.name)
    except WeightsError as error:
        return [str(error)]
    return []


def _vocabulary_problems(weights: str, description: folder.Description) -> list[str]:
    from supir_model.errors import WeightsError  # noqa: PLC0415
    from supir_model.text import read_words  # noqa: PLC0415

    if description.model.text.kind != "sdxl":
        return []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary) / folder.TOKENIZER
        here.mkdir()
        for name in folder.VOCABULARY:
            (here / name).write_bytes(store.read_bytes(store.join(weights, folder.TOKENIZER, name)))
        try:
            read_words(here, description.model.text.vocabulary)
        except WeightsError as error:
            return [str(error)]
    return []


# --- convert -------------------------------------------------------------------------------------------------------


def convert(
    name: str, base: str, supir: str, tokenizer: str | None, loras: list[str], target: str, dtype: Dtype
) -> folder.Checksums:
    """Published files, all local, to the model folder ``target``, which must not exist.

    ``loras``: ``path`` or ``path=scale``. Raises WeightsError or ManifestError.
    """
    from supir_model import convert as converting  # noqa: PLC0415
    from supir_model import weights as files  # noqa: PLC0415

    if name not in MODELS or name == TINY.name:
        raise ManifestError(
            f"'{name}' is not a model made of files; choose one of {', '.join(n for n in MODELS if n != TINY.name)}"
        )
    checkpoint = files.Checkpoint(
        MODELS[name],
        _local("base", base),
        _local("supir", supir),
        None if tokenizer is None else _local("tokenizer", tokenizer),
        tuple(files.Lora(_local("lora", path), scale) for path, scale in map(_lora, loras)),
    )
    return converting.convert(checkpoint, _target(target), dtype)


def _lora(text: str) -> tuple[str, float]:
    path, equals, scale = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError as error:
        raise ManifestError(f"--lora {text}: '{scale}' is not a number; write path or path=scale") from error


def _local(what: str, uri: str) -> Path:
    if not store.is_local(uri):
        raise ManifestError(f"--{what} {uri}: is not on this machine; bring it here with 'supir-batch models fetch'")
    path = store.local_path(uri)
    if not path.exists():
        raise ManifestError(f"--{what} {uri}: does not exist")
    return path


def _target(uri: str) -> Path:
    if not store.is_local(uri):
        raise ManifestError(f"{uri}: a model is converted to a folder on this machine; copy it elsewhere afterwards")
    return store.local_path(uri)


# --- fetch ---------------------------------------------------------------------------------------------------------


def fetch(source: str, target: str, sha256: str | None, revision: str | None, report: Report) -> list[Fetched]:
    """Bring a file, or every file below a folder, into the local folder ``target``; interrupted copies are continued.

    ``source``: ``hf://owner/name[/path]`` (``revision``: branch, tag or commit) or any URI. Hashes: ``sha256`` for one
    file, else what the hub or a converted model's checksums record; files without either are hashed and reported.
    ``report`` gets a line before each file. Raises StoreError, ManifestError.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ManifestError(f"--sha256 {sha256}: must be 64 hexadecimal digits")
    where = _target(target)
    if source.startswith(HUB):
        return _fetch_hub(source, where, sha256, revision, report)
    if revision is not None:
        raise ManifestError(f"--revision is for {HUB} sources, not for {source}")
    files = list(_files(source, sha256))
    fetched = []
    for uri, name, wanted in files:
        report(f"{uri} ({store.info(uri).size:,} bytes)")
        place = Path(store.join(str(where), name))  # a key of an object store may hold ".."
        fetched.append(Fetched(place, store.download(uri, place, wanted)))
    return fetched


def _files(source: str, sha256: str | None) -> Iterator[tuple[str, str, str | None]]:
    """URI, name below the target and known hash of each file."""
    if store.exists(source):
        yield source, store.name(source), sha256.lower() if sha256 else None
        return
    listed = list(store.list_tree(source))
    if not listed:
        raise StoreError(f"{source}: does not exist")
    if sha256 is not None:
        raise ManifestError(f"--sha256 is for one file, but {source} is a folder of {len(listed)}")
    below = store.name(source)
    recorded = {}
    if store.exists(store.join(source, folder.CHECKSUMS)):
        recorded = model_folder.checksums(source).files
    for one in listed:
        name = store.relative_to(one.uri, source)
        if name is not None and not store.is_partial(name):
            yield one.uri, f"{below}/{name}", recorded[name].sha256 if name in recorded else None


def _fetch_hub(source: str, where: Path, sha256: str | None, revision: str | None, report: Report) -> list[Fetched]:
    """Through huggingface_hub, which continues interrupted downloads itself; large files' hashes are the hub's."""
    import huggingface_hub as hub  # noqa: PLC0415

    owner, name, path = ([*source.removeprefix(HUB).strip("/").split("/", 2), "", ""])[:3]
    if not owner or not name:
        raise ManifestError(f"{source}: write {HUB}owner/name or {HUB}owner/name/path/of/file")
    repository = f"{owner}/{name}"
    with _hub_errors(source):
        facts = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    wanted = [
        one
        for one in facts.siblings or []
        if not path or one.rfilename == path or one.rfilename.startswith(f"{path.rstrip('/')}/")
    ]
    if not wanted:
        raise StoreError(f"{source}: the repository has no such file or folder")
    if sha256 is not None and len(wanted) > 1:
        raise ManifestError(f"--sha256 is for one file, but {source} names {len(wanted)}")
    fetched = []
    for one in wanted:
        report(f"{HUB}{repository}/{one.rfilename} ({one.size or 0:,} bytes)")
        with _hub_errors(source):
            # the commit that was listed, so that a push in between cannot mix two versions
            local = hub.hf_hub_download(repository, one.rfilename, revision=facts.sha, local_dir=where / name)
        found = store.sha256(str(local))
        expected = sha256.lower() if sha256 else (one.lfs.sha256 if one.lfs else None)
        if expected is not None and found != expected:
            Path(local).unlink()
            raise StoreError(f"{source}: {one.rfilename} arrived with SHA-256 {found}, expected {expected}")
        fetched.append(Fetched(Path(local), found))
    return fetched


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into our errors, with the source in front."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError as error:
        message = "asks for its terms to be accepted on its page first; then log in with 'hf auth login'"
        raise StoreError(f"{source}: {message}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        message = "the hub has no such repository or revision, or it is private: log in with 'hf auth login'"
        raise StoreError(f"{source}: {message}") from error
    except errors.OfflineModeIsEnabled as error:
        message = "the hub is switched off by HF_HUB_OFFLINE; unset it, or"
        raise StoreError(f"{source}: {message} {_BY_HAND}") from error
    except Exception as error:  # the client lets through whatever its network library raises
        message = f"cannot reach the hub ({type(error).__name__}); check the network, or"
        raise TransientStoreError(f"{source}: {message} {_BY_HAND}") from error


# --- data for people and programs ----------------------------------------------------------------------------------


def listing(where: str) -> dict[str, object]:
    """What ``supir-batch models list --json`` prints."""
    return {
        "known": [one._asdict() for one in known()],
        "folder": where,
        "present": [asdict(one) for one in present(where)],
    }
