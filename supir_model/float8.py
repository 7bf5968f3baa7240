"""Products of the transformers in 8-bit floats: half the bytes of bfloat16, and on recent cards twice its rate.

Only the linear layers of the transformers change, which hold most of the arithmetic: weights are rounded once, inputs
at every call, each row with a scale of its own (e4m3; Micikevicius et al. 2022, "FP8 formats for deep learning").
What they add up to is bfloat16. Everything else stays as it is in precision ``bfloat16``.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from supir_model.errors import RequestError

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max
_LEAST_SCALE = 1e-12  # of a row of zeros
_MULTIPLE = 16  # of both sides of a matrix, for a card's kernels
_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


class Float8Linear(nn.Module):
    """A linear layer in 8-bit floats.

    weight: [out, in] e4m3; scale: [out, 1] float32, what a row's weights are to be multiplied by. Widened to another
    format, as ``module.float()`` does, it computes in that format with the same rounded weights.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight, scale = _rounded(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], bfloat16."""
        if self.weight.dtype != _FORMAT:
            return F.linear(x, self.weight * self.scale, self.bias)
        rows, scale = _rounded(x.reshape(-1, self.in_features))
        out = F.scaled_mm(
            rows,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale.t(),
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
        )
        out = out if self.bias is None else out + self.bias.to(out)
        return out.reshape(*x.shape[:-1], self.out_features)


def use_float8(net: nn.Module, device: torch.device) -> None:
    """Let the transformers of ``net`` multiply in 8-bit floats; their weights are held so, and no longer otherwise.

    The projections of the text are left alone: they are computed once for all steps. Raises RequestError if ``device``,
    on which the net will work, is a card that cannot do it.
    """
    _refuse_old_cards(device)
    for block in (module for module in net.modules() if isinstance(module, BasicTransformerBlock)):
        of_text = (block.attn2.to_k, block.attn2.to_v)
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear) or layer in of_text:
                continue
            if layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0:
                block.set_submodule(name, Float8Linear(layer))


def _refuse_old_cards(device: torch.device) -> None:
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        needed, here = (".".join(map(str, version)) for version in (_CAPABILITY, found))
        name = torch.cuda.get_device_name(device)
        raise RequestError(
            f"precision float8 needs compute capability {needed} or later, {name} has {here}; choose bfloat16"
        )


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] as 8-bit floats, and the scales [N, 1] float32 that bring them back."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=_LEAST_SCALE) / _LARGEST
    return (rows.float() / scale).to(_FORMAT), scale
