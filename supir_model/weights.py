"""Reading weights: released files, diffusers folders and converted models, checked strictly, held in memory once.

A weights file is untrusted input: safetensors hold tensors only, and a ``.ckpt`` is read by torch's restricted
unpickler, which runs nothing of it. Tensors are mapped, not read; each is copied at most once, to its dtype and device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from supir_model import folder
from supir_model.checkpoint_keys import from_released, origin
from supir_model.config import MODELS, TINY, TINY_WEIGHTS, ModelConfig
from supir_model.errors import WeightsError

DtypeOf = Callable[[str, Tensor], torch.dtype]
"""The number format in which a network holds a weight"""

TORCH_EXTENSIONS = (".ckpt", ".pt", ".pth")

# diffusers' folders -> where their networks are in ours
_COMPONENTS = {
    "unet": ("diffusion_pytorch_model", "unet.base."),
    "vae": ("diffusion_pytorch_model", "vae."),
    "text_encoder": ("model", "text.clip_l."),
    "text_encoder_2": ("model", "text.bigg."),
}
# names of a VAE's attention in folders written by early versions of diffusers
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Lora:
    """A LoRA for the base's UNet and text towers, in any naming diffusers reads; ``scale`` 1 is as trained."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A model in the files it is published in.

    base: SDXL or a fine-tune, one ``.safetensors`` or ``.ckpt`` file or a folder in diffusers layout. supir: the SUPIR
    file, ``.ckpt`` or ``.safetensors``. tokenizer: folder with vocab.json and merges.txt; None: the base folder's.
    config: which model this is (``config.V0Q``, ``config.V0F``).
    """

    config: ModelConfig
    base: Path
    supir: Path
    tokenizer: Path | None = None
    loras: tuple[Lora, ...] = ()

    @property
    def tokenizer_folder(self) -> Path:
        """Where CLIP's vocabulary is. Raises WeightsError where none is given and none can be inferred."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.base.is_dir():
            return self.base / folder.TOKENIZER
        raise WeightsError(
            f"base {self.base.name} is a single file and holds no CLIP vocabulary; give the tokenizer folder "
            "(vocab.json and merges.txt) of any SDXL model in diffusers layout"
        )


# --- what is meant -------------------------------------------------------------------------------------------------


def find(weights: str | Path) -> tuple[ModelConfig, Path]:
    """Configuration and safetensors file behind ``tiny`` or a converted model's folder. Raises WeightsError."""
    if weights == TINY.name:
        return TINY, TINY_WEIGHTS
    path = Path(weights)
    if not path.is_dir():
        hint = f"; '{weights}' is not in the package, its files must be converted" if str(weights) in MODELS else ""
        raise WeightsError(
            f"weights '{weights}': neither '{TINY.name}' nor a model folder made by 'supir-batch models convert'{hint}"
        )
    description, _ = folder.read_local(path)
    return description.model, path / folder.WEIGHTS


def sources(checkpoint: Checkpoint) -> tuple[folder.SourceFile, ...]:
    """Every file that shapes what the checkpoint gives, with its hash. Reads all of them. Raises WeightsError."""
    found = [_source("base", path, _below(path, checkpoint.base)) for path in _base_files(checkpoint.base)]
    found.append(_source("supir", checkpoint.supir, checkpoint.supir.name))
    found += [_source("tokenizer", checkpoint.tokenizer_folder / name, name) for name in folder.VOCABULARY]
    found += [_source("lora", lora.path, lora.path.name, lora.scale) for lora in checkpoint.loras]
    return tuple(found)


def identity(source: str | Path | Checkpoint) -> str:
    """SHA-256 (hex) over everything that shapes results: weights, LoRAs, vocabulary, configuration.

    A checkpoint's files are read whole; a converted folder's hashes are recorded in it.
    """
    if isinstance(source, Checkpoint):
        hashes = {f"{i} {s.role} {s.scale}": s.sha256 for i, s in enumerate(sources(source))}
        text = folder.to_text(folder.Description(folder.FORMAT, source.config, ()))
        return folder.combined(hashes | {"config": hashlib.sha256(text.encode()).hexdigest()})
    if source == TINY.name:
        return sha256(TINY_WEIGHTS)
    find(source)
    return folder.read_local(Path(source))[1].identity


def sha256(path: Path) -> str:
    """Hex digest of the file. Raises WeightsError if it cannot be read."""
    return folder.file_sum(path).sha256


def _source(role: folder.Role, path: Path, name: str, scale: float = 1.0) -> folder.SourceFile:
    found = folder.file_sum(path)
    return folder.SourceFile(role, name, found.bytes, found.sha256, scale)


def _below(path: Path, base: Path) -> str:
    return path.name if path == base else path.relative_to(base).as_posix()


# --- reading -------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint (flat, or in ``state_dict``), mapped, on the CPU.

    Raises WeightsError for what is missing, truncated, of another kind, or holds anything but tensors.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"weights file {path.name} cannot be read ({_line(error)}); fetch it again") from error
    if suffix not in TORCH_EXTENSIONS:
        known = ", ".join((".safetensors", *TORCH_EXTENSIONS))
        raise WeightsError(f"weights file {path.name} has an unknown extension; known are {known}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on a damaged or hostile file torch's reader raises anything
        raise WeightsError(
            f"weights file {path.name} cannot be read as tensors only, and nothing else in it is run "
            f"({type(error).__name__}: {_line(error)}); fetch it again, or use a safetensors version"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise WeightsError(f"weights file {path.name} holds {type(loaded).__name__}, expected tensors by name")
    others = [key for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(f"weights file {path.name} holds more than tensors: {', '.join(others[:10])}")
    return loaded


def read_checkpoint(checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``Networks`` out of published files, mapped; LoRAs are not in it.

    ``wanted``: state dict of the network to fill, on the meta device. Raises WeightsError with the first ten keys that
    are missing, unexpected or of another shape, named as in the files.
    """
    released = read_tensors(checkpoint.supir)
    state: dict[str, Tensor] = {}
    label = _released_name(checkpoint.config)
    if checkpoint.base.is_dir():
        state = read_diffusers(checkpoint.base)
        label = str
    else:
        base = read_tensors(checkpoint.base)
        both = sorted(released.keys() & base.keys())
        if both:
            raise WeightsError(
                f"{checkpoint.base.name} and {checkpoint.supir.name} both hold {len(both)} weights: "
                f"{', '.join(both[:10])}; give an SDXL file without SUPIR's weights"
            )
        released |= base
    state |= from_released(released, wanted, checkpoint.config)
    check(wanted, state, f"{checkpoint.base.name} with {checkpoint.supir.name}", label)
    return state


def _base_files(base: Path) -> list[Path]:
    if not base.is_dir():
        return [base]
    return [path for component in _COMPONENTS for path in _component_files(base, component)]


def _component_files(base: Path, component: str) -> list[Path]:
    """A component's safetensors files: full precision before half precision, whole before sharded."""
    inside, (stem, _) = base / component, _COMPONENTS[component]
    for variant in ("", ".fp16"):
        single = inside / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = inside / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise WeightsError(f"{component}/{index.name} is no list of shards; fetch it again") from error
            if any(Path(name).name != name for name in names):
                raise WeightsError(f"{component}/{index.name} names shards outside its folder; fetch it again")
            return [inside / name for name in names]
    raise WeightsError(
        f"base folder {base.name}: {component}/{stem}.safetensors not found; an SDXL folder in diffusers layout has "
        f"{', '.join(_COMPONENTS)} and tokenizer (pickled .bin weights are not read)"
    )


def read_diffusers(base: Path) -> dict[str, Tensor]:
    """Weights of a diffusers folder under our names; what has no place keeps a name that shows where it is from."""
    state: dict[str, Tensor] = {}
    for component, (_, prefix) in _COMPONENTS.items():
        for path in _component_files(base, component):
            for key, value in read_tensors(path).items():
                name = key
                if component == "vae":
                    name = key if key.startswith("encoder.") else f"autoencoder.{key}"
                    for old, new in _OLD_ATTENTION.items():
                        name = name.replace(old, new)
                elif component == "text_encoder":
                    name = key.removeprefix("text_model.")  # a level that transformers has dropped
                if not name.endswith("embeddings.position_ids"):
                    # early versions held the VAE's attention as 1x1 convolutions
                    pointwise = component == "vae" and ".attentions." in name and value.ndim == 4
                    state[prefix + name] = value[:, :, 0, 0] if pointwise else value
    return state


# --- checking and filling ------------------------------------------------------------------------------------------


def load_into(network: nn.Module, path: Path, dtype: DtypeOf, device: torch.device) -> None:
    """Load a file with the network's own names strictly into it; it must be on the meta device.

    Raises WeightsError naming the first ten keys that are missing, unexpected or of another shape.
    """
    state = read_tensors(path)
    check(network.state_dict(), state, path.name)
    assign(network, state, dtype, device)


def assign(network: nn.Module, state: dict[str, Tensor], dtype: DtypeOf, device: torch.device) -> None:
    """Make ``state``, which is emptied, the network's weights; each tensor is copied only to change dtype or device."""
    moved = {}
    for key in list(state):
        value = state.pop(key)
        moved[key] = value.to(device).to(dtype(key, value))  # converted there: a GPU is faster at it
    network.load_state_dict(moved, strict=True, assign=True)


def check(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str, label: Callable[[str], str] = str
) -> None:
    """Compare keys and shapes. Raises WeightsError with the first ten differences of each kind, named by ``label``."""

    def labels(keys: set[str]) -> list[str]:
        return sorted({label(key) if key in wanted else key for key in keys})

    problems = {
        "missing": labels(wanted.keys() - found.keys()),
        "unexpected": labels(found.keys() - wanted.keys()),
        "of another shape": labels({k for k in wanted.keys() & found.keys() if wanted[k].shape != found[k].shape}),
    }
    lines = [f"{len(keys)} {kind}: {', '.join(keys[:10])}" for kind, keys in problems.items() if keys]
    if lines:
        raise WeightsError(f"weights file {name} does not fit the network; {'; '.join(lines)}")


def _released_name(config: ModelConfig) -> Callable[[str], str]:
    return lambda key: origin(key, config).key


def _line(error: Exception) -> str:
    """The first line of a message: torch's run over many."""
    return (str(error).strip().splitlines() or ["no message"])[0]
