"""Published files to one model folder: the same networks, in one safetensors file that says what it is."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from supir_model import folder, weights
from supir_model.errors import WeightsError
from supir_model.folder import Checksums, Description, SourceFile
from supir_model.loading import load_networks
from supir_model.networks import Networks
from supir_model.weights import Checkpoint

_ROLES = {
    "base": "SDXL base (its own license applies as well: see where it came from)",
    "supir": "SUPIR (its own license: **non-commercial use only**)",
    "tokenizer": "CLIP's vocabulary",
    "lora": "LoRA, fused (its own license applies as well)",
}


def convert(checkpoint: Checkpoint, target: Path, dtype: Literal["float32", "float16"] = "float32") -> Checksums:
    """Write the model folder ``target``, which must not exist; it appears whole or not at all.

    The same files give the same bytes. float32 keeps every value of its sources; float16 halves the file and rounds.
    Raises WeightsError when a source does not fit, or ``target`` exists.
    """
    _refuse_existing(target)
    made_of = weights.sources(checkpoint)
    networks, _ = load_networks(checkpoint, torch.device("cpu"))
    config = replace(checkpoint.config, display_name=_display_name(checkpoint))
    return write(networks, Description(folder.FORMAT, config, made_of), target, dtype, checkpoint.tokenizer_folder)


def write(
    networks: Networks,
    description: Description,
    target: Path,
    dtype: Literal["float32", "float16"],
    tokenizer: Path | None = None,
) -> Checksums:
    """Write networks on the CPU as model folder ``target``, which must not exist, with a vocabulary if they need one.

    Raises WeightsError when ``target`` exists.
    """
    _refuse_existing(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        kind = getattr(torch, dtype)
        state = {key: value.to(kind).contiguous() for key, value in networks.state_dict().items()}
        save_file(state, partial / folder.WEIGHTS, metadata={"format": "pt"})  # one entry: its order is not fixed
        if tokenizer is not None:
            (partial / folder.TOKENIZER).mkdir()
            for name in folder.VOCABULARY:
                shutil.copyfile(tokenizer / name, partial / folder.TOKENIZER / name)
        (partial / folder.CONFIG).write_text(folder.to_text(description), "utf-8")
        sums = {name: folder.file_sum(partial / name) for name in folder.needed_files(description.model)}
        checksums = Checksums(folder.FORMAT, sums)
        (partial / folder.CARD).write_text(card(description, checksums, dtype), "utf-8")
        (partial / folder.CHECKSUMS).write_text(folder.to_text(checksums), "utf-8")
        os.rename(partial, target)
    except BaseException:  # also an interrupt: no half folder is left behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return checksums


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise WeightsError(f"'{target}' exists and is not overwritten; choose another folder or remove it")


def card(description: Description, checksums: Checksums, dtype: str) -> str:
    """The model card (Markdown): what this is, what it was made from, who may use it, how."""
    config = description.model
    rows = [_row(source) for source in description.sources]
    accept = f"\n  accept_license: {config.license}" if config.license == "supir-noncommercial" else ""
    return "\n".join(
        [
            "---",
            "license: other",
            f"license_name: {config.license}",
            "library_name: supir-batch",
            "---",
            "",
            f"# {config.display_name}",
            "",
            f"A SUPIR model ({config.name}) for supir-batch, weights in {dtype}. Model hash: `{checksums.identity}`.",
            "",
            "It restores images by sampling: an output is a plausible reconstruction, never a recovered original.",
            "",
            "## Made from",
            "",
            "| what | file | SHA-256 |",
            "|---|---|---|",
            *rows,
            "",
            "## Use",
            "",
            "```yaml",
            "engine:",
            f"  weights: path/to/this/folder{accept}",
            "```",
            "",
            "`supir-batch models check path/to/this/folder` compares every file with its recorded hash.",
            "",
        ]
    )


def _row(source: SourceFile) -> str:
    scale = f", scale {source.scale:g}" if source.role == "lora" else ""
    return f"| {_ROLES[source.role]}{scale} | {source.name} | `{source.sha256}` |"


def _display_name(checkpoint: Checkpoint) -> str:
    loras = "".join(f" + {lora.path.stem} x {lora.scale:g}" for lora in checkpoint.loras)
    return f"{checkpoint.config.display_name} on {checkpoint.base.stem}{loras}"
