"""The VAE's convolutional networks in parts, for images whose activations do not fit into memory (specification
section 8). Off, they run as one; two ways of cutting:

* ``exact`` gives what the whole network gives, to rounding. The network is cut into segments, about one residual block
  each, and only the map between two segments is kept whole. A segment runs over strips of rows: every strip is computed
  from the rows that it really depends on, and zeros are padded at the image's border alone. Group-norm statistics are
  those of the whole image: one pass over the strips for each norm of a segment, recomputing what lies before it, then
  one for the result, which replaces the segment's input where it has its shape. Attention reads the whole latent.
  On an accelerator the whole maps stay in host memory.
  Cost: about twice the arithmetic. Memory: one map between segments (two where resolution or width change; 192 float32
  values per pixel in the SDXL decoder, 160 in its encoders, against about four times as much uncut), plus a strip of
  ``tile * tile`` pixels.
* ``released`` is the release's approximation: overlapping square tiles run side by side, zeros around each of them, the
  statistics of a norm are averages over tiles (the spread between tiles' means is left out, overlaps count twice),
  attention stays within its tile, and results are pasted without blending. It changes results, visibly where tiles
  differ; it is there to repeat what the release did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supir_model.config import VAETilingMode
from supir_model.errors import RequestError

_ENCODER_PAD, _DECODER_PAD = 32, 11  # of the released tiles: pixels, latent positions
_LEAST_ROWS = 8  # of a strip; thinner ones would mostly compute their neighbors' rows


@dataclass(frozen=True)
class VAETiling:
    """How encoders and decoder run. tile: side in pixels, a multiple of 32.

    ``exact``: a strip has as many pixels as a square of this side. ``released``: side of the encoder's tiles without
    their overlap; the decoder's have ``tile`` / factor latent positions. Raises RequestError for another tile.
    """

    mode: VAETilingMode = "off"
    tile: int = 512

    def __post_init__(self) -> None:
        if self.tile < 32 or self.tile % 32:
            raise RequestError(f"a VAE tile of {self.tile} pixels does not work; give a multiple of 32")


WHOLE = VAETiling()


def run_encoder(encoder: Any, image: Tensor, tiling: VAETiling, factor: int) -> Tensor:
    """What diffusers' ``Encoder`` makes of image [B, 3, H, W]: [B, 2C, H/factor, W/factor], before ``quant_conv``.

    H, W: multiples of factor, which is the encoder's.
    """
    height, width = image.shape[2:]
    if tiling.mode == "exact" and height * width > tiling.tile**2:
        return _run_exactly(_encoder_segments(encoder), image, tiling.tile**2 / (height * width))
    tiles = released_tiles(height, width, tiling.tile, _ENCODER_PAD) if tiling.mode == "released" else []
    if tiles:
        return _run_as_released(_encoder_segments(encoder), image, [tile.reduced(factor) for tile in tiles], tiles)
    whole: Tensor = encoder(image)
    return whole


def run_decoder(decoder: Any, z: Tensor, tiling: VAETiling, factor: int) -> Tensor:
    """What diffusers' ``Decoder`` makes of z [B, C, h, w] after ``post_quant_conv``: [B, 3, h*factor, w*factor]."""
    height, width = z.shape[2:]
    share = tiling.tile**2 / (height * width * factor**2)
    if tiling.mode == "exact" and share < 1:
        return _run_exactly(_decoder_segments(decoder), z, share)
    tiles = []
    if tiling.mode == "released":
        tiles = released_tiles(height, width, tiling.tile // factor, _DECODER_PAD)
    if tiles:
        return _run_as_released(_decoder_segments(decoder), z, [tile.enlarged(factor) for tile in tiles], tiles)
    whole: Tensor = decoder(z)
    return whole


# --- the networks as lists of operations -----------------------------------------------------------------------------


class _Rows(NamedTuple):
    start: int
    stop: int

    def within(self, height: int) -> _Rows:
        return _Rows(max(0, self.start), min(height, self.stop))


@dataclass(frozen=True)
class _Conv:
    """A 3x3 convolution; ``before`` and ``after``: zeros that it sees beyond the image, on both axes."""

    module: nn.Conv2d
    before: int = 1
    after: int = 1
    stride: int = 1

    def height(self, height: int) -> int:
        return (height + self.before + self.after - 3) // self.stride + 1

    def needs(self, rows: _Rows) -> _Rows:
        return _Rows(rows.start * self.stride - self.before, (rows.stop - 1) * self.stride - self.before + 3)

    def run(self, x: Tensor, above: int, below: int) -> Tensor:
        """Apply to rows that end ``above`` and ``below`` rows short of what is needed, because the image ends there."""
        columns = 0
        if self.before == self.after:
            columns = self.before
            if above or below:
                x = F.pad(x, (0, 0, above, below))
        else:
            x = F.pad(x, (self.before, self.after, above, below))
        return F.conv2d(x, self.module.weight, self.module.bias, self.stride, (0, columns))


@dataclass(frozen=True)
class _Double:
    """Nearest-neighbor enlargement by 2."""

    def height(self, height: int) -> int:
        return 2 * height

    def needs(self, rows: _Rows) -> _Rows:
        return _Rows(rows.start // 2, (rows.stop + 1) // 2)

    def run(self, x: Tensor, rows: _Rows) -> Tensor:
        first = rows.start % 2
        return F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, first : first + rows.stop - rows.start]


@dataclass(frozen=True)
class _InPlace:
    """What keeps rows where they are."""

    def height(self, height: int) -> int:
        return height

    def needs(self, rows: _Rows) -> _Rows:
        return rows


@dataclass(frozen=True)
class _Norm(_InPlace):
    """Group norm, then SiLU."""

    module: nn.GroupNorm


@dataclass(frozen=True)
class _Fork(_InPlace):
    """The value here is added at the next ``_Join``."""


@dataclass(frozen=True)
class _Join(_InPlace):
    shortcut: nn.Conv2d | None  # 1x1


@dataclass(frozen=True)
class _Attention(_InPlace):
    """Every position reads every other; a segment of its own."""

    module: Any


_Operation = _Conv | _Double | _Norm | _Fork | _Join | _Attention
_Segment = list[_Operation]


def _residual(block: Any) -> _Segment:
    """diffusers' ``ResnetBlock2D`` without time embedding."""
    return [
        _Fork(),
        _Norm(block.norm1),
        _Conv(block.conv1),
        _Norm(block.norm2),
        _Conv(block.conv2),
        _Join(block.conv_shortcut),
    ]


def _middle(block: Any, before: _Segment) -> list[_Segment]:
    """diffusers' ``UNetMidBlock2D``: residual blocks with attention between them, or none."""
    segments = [[*before, *_residual(block.resnets[0])]]
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            segments.append([_Attention(attention)])
        segments.append(_residual(resnet))
    return segments


def _encoder_segments(encoder: Any) -> list[_Segment]:
    """A downsampler belongs to the block before it: their map is as large as the level's, their result a quarter."""
    segments: list[_Segment] = []
    pending: _Segment = [_Conv(encoder.conv_in)]
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            segments.append([*pending, *_residual(resnet)])
            pending = []
        for sampler in block.downsamplers or ():
            segments[-1].append(_Conv(sampler.conv, before=0, after=1, stride=2))
    segments += _middle(encoder.mid_block, [])
    return [*segments, [_Norm(encoder.conv_norm_out), _Conv(encoder.conv_out)]]


def _decoder_segments(decoder: Any) -> list[_Segment]:
    """An upsampler belongs to the block after it: their map is the widest at its resolution and is never whole."""
    segments = _middle(decoder.mid_block, [_Conv(decoder.conv_in)])
    pending: _Segment = []
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            segments.append([*pending, *_residual(resnet)])
            pending = []
        for sampler in block.upsamplers or ():
            pending = [_Double(), _Conv(sampler.conv)]
    return [*segments, [_Norm(decoder.conv_norm_out), _Conv(decoder.conv_out)]]


# --- norms -----------------------------------------------------------------------------------------------------------


class _Statistics(NamedTuple):
    """Mean and biased variance of each group, [B, groups] float64."""

    mean: Tensor
    variance: Tensor


class _Pool:
    """Statistics of a whole from those of its parts; ``exact`` or, as released, without the spread between parts."""

    def __init__(self, norm: nn.GroupNorm, exact: bool) -> None:
        self._groups, self._exact = norm.num_groups, exact
        self._counts: list[int] = []
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        """One part [B, C, h, w]."""
        batch, channels, height, width = part.shape
        grouped = _wide(part).view(batch, self._groups, channels // self._groups, height, width)
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
        self._counts.append(part.shape[2] * part.shape[3])
        self._means.append(mean.double())
        self._variances.append(variance.double())

    def result(self) -> _Statistics:
        means, variances = torch.stack(self._means), torch.stack(self._variances)
        weight = torch.tensor(self._counts, dtype=torch.float64, device=means.device)[:, None, None]
        weight = weight / weight.sum()
        mean = (weight * means).sum(dim=0)
        if self._exact:
            variances = variances + (means - mean) ** 2
        return _Statistics(mean, (weight * variances).sum(dim=0))


def _normalize(x: Tensor, norm: nn.GroupNorm, statistics: _Statistics) -> Tensor:
    """Group norm of x [B, C, h, w] with these statistics, at least in float32 inside, as torch's own."""
    wide, width = _wide(x), x.shape[1] // norm.num_groups
    scale = (statistics.variance + norm.eps).rsqrt().repeat_interleave(width, dim=1) * norm.weight
    shift = norm.bias - statistics.mean.repeat_interleave(width, dim=1) * scale
    scale, shift = scale.to(wide.dtype)[:, :, None, None], shift.to(wide.dtype)[:, :, None, None]
    return torch.addcmul(shift, wide, scale).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- exact -----------------------------------------------------------------------------------------------------------


def _run_exactly(segments: Sequence[_Segment], x: Tensor, share: float) -> Tensor:
    """The whole network; share: of all rows of a map, how many one strip has."""
    device = x.device
    for index, segment in enumerate(segments):
        if isinstance(segment[0], _Attention):
            x = segment[0].module(x.to(device)).cpu()
        else:
            x = _run_segment(segment, x, share, device, reuse=index > 0)  # the caller's input is not ours to overwrite
    return x.to(device)


def _run_segment(segment: _Segment, x: Tensor, share: float, device: torch.device, reuse: bool) -> Tensor:
    """Map [B, C, H, W] in host memory to the next one; ``reuse``: the result may take the place of x."""
    heights = [x.shape[2]]
    for operation in segment:
        heights.append(operation.height(heights[-1]))
    known: dict[int, _Statistics] = {}
    for index, operation in enumerate(segment):
        if isinstance(operation, _Norm):
            pool = _Pool(operation.module, exact=True)
            for rows in _strips(heights[index], share):
                pool.add(_strip(segment[:index], heights, x, rows, known, device))
            known[index] = pool.result()

    out: Tensor | None = None
    overwritten = x[:, :, :0]  # rows of x right above the next strip that the result has replaced
    for rows in _strips(heights[-1], share):
        strip = _strip(segment, heights, x, rows, known, device, overwritten)
        if out is None:
            shape = (x.shape[0], strip.shape[1], heights[-1], strip.shape[3])
            out = x if reuse and x.shape == shape else _empty(shape, strip.dtype)
        if out is x:
            # the next strip reads rows above its own; a segment that keeps the resolution has at most one per operation
            overwritten = x[:, :, max(0, rows.stop - len(segment)) : rows.stop].clone()
        out[:, :, rows.start : rows.stop] = strip.to(out.device)
    assert out is not None, "a map has at least one row"
    return out


def _strip(
    operations: Sequence[_Operation],
    heights: Sequence[int],
    x: Tensor,
    rows: _Rows,
    known: Mapping[int, _Statistics],
    device: torch.device,
    overwritten: Tensor | None = None,
) -> Tensor:
    """Rows of what the operations make of x [B, C, H, W].

    heights: of the maps between operations. known: statistics of the norms, by place. overwritten: the former rows
    of x right above ``rows``, where x no longer has them.
    """
    reads = [rows]  # from the last operation's result back to the rows of x; not yet cut to the image
    for operation, height in zip(reversed(operations), reversed(heights[: len(operations)]), strict=True):
        reads.append(operation.needs(reads[-1].within(operation.height(height))))
    reads.reverse()
    read = reads[0].within(heights[0])
    part = x[:, :, read.start : read.stop]
    if overwritten is not None and (missing := min(rows.start - read.start, overwritten.shape[2])) > 0:
        part = torch.cat([overwritten[:, :, -missing:], part[:, :, missing:]], dim=2)
    value, at = part.to(device), read
    forks: list[tuple[Tensor, int]] = []
    for index, operation in enumerate(operations):
        needed, then = reads[index], reads[index + 1].within(heights[index + 1])
        if isinstance(operation, _Conv):
            value = operation.run(value, at.start - needed.start, needed.stop - at.stop)
        elif isinstance(operation, _Double):
            value = operation.run(value, then)
        elif isinstance(operation, _Norm):
            value = F.silu(_normalize(value, operation.module, known[index]), inplace=True)
        elif isinstance(operation, _Fork):
            forks.append((value, at.start))
        elif isinstance(operation, _Join):
            kept, start = forks.pop()
            value = _joined(value, kept[:, :, then.start - start : then.stop - start], operation.shortcut)
        at = then
    return value


def _joined(value: Tensor, kept: Tensor, shortcut: nn.Conv2d | None) -> Tensor:
    return value.add_(kept if shortcut is None else shortcut(kept))


def _strips(height: int, share: float) -> Iterator[_Rows]:
    step = max(_LEAST_ROWS, int(height * share))
    return (_Rows(start, min(start + step, height)) for start in range(0, height, step))


def _empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    # rows of a channels-last map are one piece of memory
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


# --- as released -----------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right``."""

    top: int
    bottom: int
    left: int
    right: int

    def crop(self, x: Tensor) -> Tensor:
        """The box's part of x [B, C, H, W], a view."""
        return x[:, :, self.top : self.bottom, self.left : self.right]


class ReleasedTile(NamedTuple):
    """One tile: what it reads, and the part of its result that is kept, both in positions of the network's input."""

    read: Box
    keep: Box

    def enlarged(self, factor: int) -> ReleasedTile:
        """In positions of a decoder's result."""
        return ReleasedTile(Box(*(n * factor for n in self.read)), Box(*(n * factor for n in self.keep)))

    def reduced(self, factor: int) -> ReleasedTile:
        """In positions of an encoder's result."""
        return ReleasedTile(Box(*(n // factor for n in self.read)), Box(*(n // factor for n in self.keep)))


def released_tiles(height: int, width: int, tile: int, pad: int) -> list[ReleasedTile]:
    """Tiles of the release, rows outer; none where its plain network runs (section 8)."""
    if max(height, width) <= tile + 2 * pad:
        return []
    return [
        ReleasedTile(Box(*rows.read, *columns.read), Box(*rows.keep, *columns.keep))
        for rows in _spans(height, tile, pad)
        for columns in _spans(width, tile, pad)
    ]


class _Span(NamedTuple):
    read: tuple[int, int]
    keep: tuple[int, int]


def _spans(length: int, tile: int, pad: int) -> list[_Span]:
    count = max(1, -(-(length - 2 * pad) // tile))
    real = _round_size(max(1, -(-(length - 2 * pad) // count)), tile)
    spans = []
    for j in range(count):
        start, stop = pad + j * real, min(pad + (j + 1) * real, length)
        keep = (0 if start <= pad else start, length if stop >= length - pad else stop)
        spans.append(_Span((max(0, start - pad), min(length, stop + pad)), keep))
    return spans


def _round_size(least: int, most: int) -> int:
    """The multiple of the highest power of two, from 32 on, that fits between both."""
    for divisor in (32, 16, 8, 4, 2):
        rounded = -(-least // divisor) * divisor
        if rounded == least or rounded <= most:
            return rounded
    return least


def _run_as_released(
    segments: Sequence[_Segment], x: Tensor, results: Sequence[ReleasedTile], tiles: Sequence[ReleasedTile]
) -> Tensor:
    """All tiles side by side, operation by operation; results: the tiles in positions of the network's result."""
    parts = [tile.read.crop(x) for tile in tiles]
    forks: list[list[Tensor]] = []
    for operation in (operation for segment in segments for operation in segment):
        if isinstance(operation, _Norm):
            statistics = _pooled_as_released(operation.module, parts)
            parts = [F.silu(_normalize(part, operation.module, statistics), inplace=True) for part in parts]
        elif isinstance(operation, _Fork):
            forks.append(parts)
        elif isinstance(operation, _Join):
            kept = forks.pop()
            parts = [_joined(part, kept[i], operation.shortcut) for i, part in enumerate(parts)]
        elif isinstance(operation, _Conv):
            parts = [operation.run(part, operation.before, operation.after) for part in parts]
        elif isinstance(operation, _Double):
            parts = [operation.run(part, _Rows(0, 2 * part.shape[2])) for part in parts]
        else:
            statistics = _pooled_as_released(operation.module.group_norm, parts)
            parts = [_attended(part, operation.module, statistics) for part in parts]

    height, width = max(tile.keep.bottom for tile in results), max(tile.keep.right for tile in results)
    out = parts[0].new_empty((x.shape[0], parts[0].shape[1], height, width))
    for part, tile in zip(parts, results, strict=True):
        top, left = tile.keep.top - tile.read.top, tile.keep.left - tile.read.left
        rows, columns = tile.keep.bottom - tile.keep.top, tile.keep.right - tile.keep.left
        tile.keep.crop(out).copy_(part[:, :, top : top + rows, left : left + columns])
    return out


def _pooled_as_released(norm: nn.GroupNorm, parts: Sequence[Tensor]) -> _Statistics:
    pool = _Pool(norm, exact=False)
    for part in parts:
        pool.add(part)
    return pool.result()


def _attended(x: Tensor, module: Any, statistics: _Statistics) -> Tensor:
    """diffusers' ``Attention`` with its residual on x [B, C, h, w], its norm's statistics given."""
    batch, channels, height, width = x.shape
    tokens = _normalize(x, module.group_norm, statistics).flatten(2).transpose(1, 2)
    query, key, value = (
        layer(tokens).reshape(batch, height * width, module.heads, -1).transpose(1, 2)
        for layer in (module.to_q, module.to_k, module.to_v)
    )
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    projected: Tensor = module.to_out[0](attended)
    return x + projected.transpose(1, 2).reshape(batch, channels, height, width)
