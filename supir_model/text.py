"""Text conditioning: prompts in, context [B, L, C] and vector [B, V] out (specification section 9)."""

from __future__ import annotations

import math
import re
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from supir_model.config import TextConfig, TowerConfig
from supir_model.errors import RequestError, WeightsError

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")

SIZE_CONDITIONING = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)
"""Original height and width, crop top and left, target height and width: fixed, whatever the image's size."""

Words = Callable[[str], list[int]]
"""Vocabulary ids of a prompt, any number of them, without start and end marks"""


class TextEncoder(nn.Module):
    """What the networks need of text, whatever the towers behind it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def towers(self) -> list[CLIPTextModel]:
        """The transformers inside."""

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B, length, C] and vector [B, V] of the prompts."""

    def fill_positions(self) -> None:
        """Compute what no state dict holds: token positions, after a construction on the meta device."""
        for tower in self.towers():
            tower.embeddings.register_buffer("position_ids", torch.arange(self.config.length)[None], persistent=False)


class HashedTextEncoder(TextEncoder):
    """One small CLIP text tower over hashed words: every word has an embedding without a vocabulary file.

    Token ids: 0 padding, 1 start, ``vocabulary - 1`` end; words hash (CRC-32) onto the rest. Prompts longer than
    ``length - 2`` words are cut.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        (tower,) = config.towers
        self.tower = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=tower.width,
                intermediate_size=2 * tower.width,
                projection_dim=tower.width,
                num_hidden_layers=tower.layers,
                num_attention_heads=tower.heads,
                max_position_embeddings=config.length,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=config.vocabulary - 1,
            )
        )

    def towers(self) -> list[CLIPTextModel]:
        """The one tower."""
        return [self.tower]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, length] int64."""
        end = self.config.vocabulary - 1
        rows = torch.zeros(len(prompts), self.config.length, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            words = _WORD.findall(prompt.lower())[: self.config.length - 2]
            ids = [1, *(2 + zlib.crc32(word.encode()) % (end - 2) for word in words), end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B, length, width] and pooled vector [B, width] of the prompts."""
        device = next(self.parameters()).device
        out = self.tower(input_ids=self.tokenize(prompts).to(device))
        return out.last_hidden_state, out.pooler_output


class SDXLTextEncoder(TextEncoder):
    """SDXL's conditioner: CLIP-L and OpenCLIP bigG side by side, bigG's pooled embedding, size embeddings.

    Both towers read one tokenization; CLIP-L's is padded with the end mark, bigG's with 0. ``words`` is None until a
    vocabulary is given (``read_words``): this package ships none.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        clip_l, bigg = config.towers
        self.clip_l = CLIPTextModel(_clip_config(config, clip_l, "quick_gelu"))
        # OpenCLIP's GELU is the exact one; some programs build this tower with the quick one and get other embeddings
        self.bigg = CLIPTextModelWithProjection(_clip_config(config, bigg, "gelu"))
        self.words: Words | None = None

    def towers(self) -> list[CLIPTextModel]:
        """CLIP-L, then bigG."""
        return [self.clip_l, self.bigg.text_model]

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, length] int64 for CLIP-L and for bigG. Raises RequestError without a vocabulary."""
        if self.words is None:
            raise RequestError(
                "no CLIP vocabulary: give the folder that holds vocab.json and merges.txt "
                "(the tokenizer folder of any SDXL model in diffusers layout)"
            )
        length, start, end = self.config.length, self.config.vocabulary - 2, self.config.vocabulary - 1
        rows = torch.full((len(prompts), length), end)
        padding = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, padded, prompt in zip(rows, padding, prompts, strict=True):
            ids = [start, *self.words(prompt)[: length - 2], end]
            row[: len(ids)] = torch.tensor(ids)
            padded[len(ids) :] = True
        return rows, rows.masked_fill(padding, 0)

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B, length, sum of widths] and vector [B, projection + 6 * size_embedding] of the prompts."""
        device = next(self.parameters()).device
        ids_l, ids_bigg = (ids.to(device) for ids in self.tokenize(prompts))
        out_l = self.clip_l(input_ids=ids_l, output_hidden_states=True)
        out_bigg = self.bigg(input_ids=ids_bigg, output_hidden_states=True)
        # penultimate layers, before any final norm
        context = torch.cat([out_l.hidden_states[-2], out_bigg.hidden_states[-2]], dim=-1)
        pooled: Tensor = out_bigg.text_embeds
        sizes = sinusoid(torch.tensor(SIZE_CONDITIONING, device=device), self.config.size_embedding).flatten()
        return context, torch.cat([pooled, sizes.to(pooled.dtype).expand(len(prompts), -1)], dim=1)


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder of this kind."""
    return HashedTextEncoder(config) if config.kind == "hashed" else SDXLTextEncoder(config)


def read_words(folder: Path, vocabulary: int) -> Words:
    """CLIP's byte-pair vocabulary from a folder with vocab.json and merges.txt.

    vocabulary: number of token embeddings, of which every id must be one. Raises WeightsError where the files are
    missing, damaged or of another model.
    """
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"CLIP vocabulary: {' and '.join(missing)} not found in '{folder.name}'; "
            "give the tokenizer folder of any SDXL model in diffusers layout"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # on damaged files the reader raises anything
        raise WeightsError(
            f"CLIP vocabulary in '{folder.name}' cannot be read ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if largest >= vocabulary:
        raise WeightsError(
            f"CLIP vocabulary in '{folder.name}' has ids up to {largest}, the text towers know {vocabulary} tokens; "
            "give the tokenizer folder of an SDXL model"
        )

    def words(prompt: str) -> list[int]:
        # verbose: prompts above 77 tokens are cut by the caller, no reason for a warning
        ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return words


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding [..., width] of numbers [...], cosines first (specification section 2)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _clip_config(config: TextConfig, tower: TowerConfig, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=config.vocabulary,
        hidden_size=tower.width,
        intermediate_size=4 * tower.width,
        projection_dim=tower.projection or tower.width,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        max_position_embeddings=config.length,
        hidden_act=activation,
        bos_token_id=config.vocabulary - 2,
        eos_token_id=config.vocabulary - 1,  # where the pooled embedding is read
        pad_token_id=config.vocabulary - 1,
    )
