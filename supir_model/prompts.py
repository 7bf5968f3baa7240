"""Prompts as the denoising networks read them, each read once: the negative prompt returns with every image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from supir_model.attention import KeysValues
from supir_model.networks import Conditioning, ProjectedText

_KEPT = 8  # prompts; in the SDXL networks one takes about 40 MB in half precision


@dataclass(frozen=True)
class Text:
    """One prompt: what the cross attentions read of it, one row each, and its vector [1, V]."""

    projected: ProjectedText
    vector: Tensor


class PromptReader:
    """Reads prompts one at a time, so that none depends on its company, and keeps the last few.

    encode: context [1, L, C] and vector [1, V] of a prompt; project: what the networks read of these.
    """

    def __init__(
        self, encode: Callable[[str], tuple[Tensor, Tensor]], project: Callable[[Tensor, Tensor], Text]
    ) -> None:
        self._encode, self._project = encode, project
        self._kept: OrderedDict[str, Text] = OrderedDict()

    def read(self, prompts: Sequence[str]) -> list[Text]:
        """Each prompt, read now or before."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        encoded = [self._encode(prompt) for prompt in new]  # all first: the networks of the next line may be elsewhere
        for prompt, (context, vector) in zip(new, encoded, strict=True):
            self._kept[prompt] = self._project(context, vector)
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        texts = [self._kept[prompt] for prompt in prompts]
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return texts

    def forget(self) -> None:
        """Give back the memory of what is kept."""
        self._kept.clear()


def conditioning(texts: list[Text], control_latent: Tensor) -> Conditioning:
    """Rows of a batch: a text for each of control_latent [B, C, h, w]."""

    def rows(parts: list[KeysValues]) -> KeysValues:
        return KeysValues(torch.cat([part.packed for part in parts]))

    projected = ProjectedText(rows([t.projected.control for t in texts]), rows([t.projected.unet for t in texts]))
    return Conditioning(projected, torch.cat([text.vector for text in texts]), control_latent)
