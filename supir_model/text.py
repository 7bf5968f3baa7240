"""Text conditioning: prompts in, context [B, L, C] and vector [B, V] out (specification section 9)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from supir_model.config import TextConfig

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


class HashedTextEncoder(nn.Module):
    """One small CLIP text tower over hashed words: every word has an embedding without a vocabulary file.

    Token ids: 0 padding, 1 start, ``vocabulary - 1`` end; words hash (CRC-32) onto the rest. Prompts longer than
    ``length - 2`` words are cut.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=2 * config.width,
                projection_dim=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.length,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=config.vocabulary - 1,
            )
        )

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
