"""Cross attention whose keys and values are projected once per prompt, not at every step for every window.

The text of a prompt stays what it is while its image is sampled, so what the cross attentions of a network make of it
does, too. ``project_text`` computes it for all of them; each then reads its own part of the one tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F


class KeysValues(NamedTuple):
    """Keys and values of every cross attention of one network side by side, in the order of ``modules()``.

    packed: [B, L, 2 * sum of their widths].
    """

    packed: Tensor


class CrossAttention:
    """diffusers' attention processor for a cross attention that reads ``KeysValues``, or the context itself."""

    def __init__(self, start: int, width: int) -> None:
        self._start, self._width = start, width
        self._of_context = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        attention_mask: None = None,
    ) -> Tensor:
        """Tokens [B, T, width] after attention to the text of their row."""
        if not isinstance(encoder_hidden_states, KeysValues):
            attended: Tensor = self._of_context(attn, hidden_states, encoder_hidden_states, attention_mask)
            return attended
        start, middle, end = self._start, self._start + self._width, self._start + 2 * self._width
        packed = encoder_hidden_states.packed
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = _heads(packed[..., start:middle], attn.heads), _heads(packed[..., middle:end], attn.heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](attended)
        return out


def read_text_once(net: nn.Module) -> None:
    """Let the cross attentions of diffusers' UNet, or of a part of it, take ``KeysValues`` for their context."""
    start = 0
    for attention in _cross_attentions(net):
        width = attention.to_k.out_features
        attention.set_processor(CrossAttention(start, width))
        start += 2 * width


def project_text(net: nn.Module, context: Tensor) -> KeysValues:
    """What the cross attentions of ``net`` read of context [B, L, context_dim]."""
    layers = [layer for attention in _cross_attentions(net) for layer in (attention.to_k, attention.to_v)]
    return KeysValues(torch.cat([layer(context) for layer in layers], dim=-1))


@torch.no_grad()
def fuse_projections(net: nn.Module) -> None:
    """Let every self attention project queries, keys and values in one product.

    The three layers it had are gone afterwards, so that the weights are held once: the network computes as before, but
    its state dict has other keys.
    """
    for attention in (block.attn1 for block in net.modules() if isinstance(block, BasicTransformerBlock)):
        attention.fuse_projections()
        attention.set_processor(FusedAttnProcessor2_0())
        del attention.to_q, attention.to_k, attention.to_v
        attention.requires_grad_(False)


def _cross_attentions(net: nn.Module) -> list[Attention]:
    return [block.attn2 for block in net.modules() if isinstance(block, BasicTransformerBlock)]


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, T, C] to [B, heads, T, C / heads]."""
    batch, length, _ = tokens.shape
    return tokens.view(batch, length, heads, -1).transpose(1, 2)
