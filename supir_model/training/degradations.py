"""Synthetic degradations for training: a clean crop in, a (low quality, target) pair out.

Everything works on a batch, on the device of its input, and draws all its randomness from one ``torch.Generator``: the
same generator state gives the same pair. Images are RGB, [B, 3, H, W] float32 in [-1, 1], in and out. Noise levels are
standard deviations in 8-bit levels (0 to 255), the unit in which the restoration literature quotes them.

Sources: the second-order chain follows Real-ESRGAN (Wang et al. 2021, section 3.2), which SUPIR (Yu et al. 2024) trains
with; JPEG is ITU-T T.81 with the quality scaling of the Independent JPEG Group.

Tensors of a wrong shape or type raise ValueError, settings out of range RequestError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn import functional

from supir_model.errors import RequestError

ResizeMode = Literal["area", "bilinear", "bicubic"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

# BT.601 luma, the weights JPEG uses.
LUMA_WEIGHTS = (0.299, 0.587, 0.114)

# Images of one group share the resize factors, the filters and the kind of noise of the second-order chain; blur, noise
# level and JPEG quality differ per image. A bounded number of groups bounds the kernel launches on a GPU whatever the
# batch.
MAX_RESIZE_GROUPS = 8

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance), in raster order.
LUMINANCE_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.float32:
        raise ValueError(f"expected images [B, 3, H, W] float32, got {list(x.shape)} {x.dtype}")


def _per_image(value: Tensor, x: Tensor, name: str) -> Tensor:
    """A parameter [B] as float32 [B, 1, 1, 1] on the device of the images."""
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} must hold one value per image, [{x.shape[0]}], got {list(value.shape)}")
    return value.to(device=x.device, dtype=torch.float32).view(-1, 1, 1, 1)


# A generator on the CPU serves images on any device: draw where the generator is, then move.
def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator, device: torch.device) -> Tensor:
    return (torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low).to(device)


def _normal(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def _full_precision(x: Tensor) -> torch.autocast:
    """Keep a trainer's autocast from running the filters and transforms here in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def _luma(x: Tensor) -> Tensor:
    """BT.601 luma, [B, 1, H, W], same range as the input."""
    r, g, b = x.unbind(dim=1)
    return (LUMA_WEIGHTS[0] * r + LUMA_WEIGHTS[1] * g + LUMA_WEIGHTS[2] * b).unsqueeze(1)


def _gaussian_weights(sigma: Tensor) -> Tensor:
    """Normalized 1-D Gaussian kernels [B, 2 * radius + 1], with the radius of the widest one.

    Each kernel is cut at its own three sigma, so that the result of an image does not depend on the rest of its batch.
    """
    radius = max(1, math.ceil(3.0 * float(sigma.max())))
    offset = torch.arange(-radius, radius + 1, device=sigma.device, dtype=torch.float32)
    width = sigma.view(-1, 1)
    weights = torch.exp(-0.5 * (offset / width.clamp_min(1e-3)).square())
    weights = weights * (offset.abs() <= torch.ceil(3.0 * width))
    return weights / weights.sum(dim=1, keepdim=True)


def _separable_filter(x: Tensor, weights: Tensor) -> Tensor:
    """Filter rows and columns of image b with weights[b]; x: [B, C, H, W], weights: [B, K], K odd; edges replicated."""
    batch, channels, height, width = x.shape
    taps = weights.shape[1]
    radius = taps // 2
    kernel = weights.repeat_interleave(channels, dim=0)
    planes = x.reshape(1, batch * channels, height, width)
    with _full_precision(x):
        planes = functional.pad(planes, (radius, radius, 0, 0), mode="replicate")
        planes = functional.conv2d(planes, kernel.view(-1, 1, 1, taps), groups=batch * channels)
        planes = functional.pad(planes, (0, 0, radius, radius), mode="replicate")
        planes = functional.conv2d(planes, kernel.view(-1, 1, taps, 1), groups=batch * channels)
    return planes.view(batch, channels, height, width)


# ---------------------------------------------------------------------------
# Optics, sensor, resampling, compression
# ---------------------------------------------------------------------------


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur image b with a Gaussian of sigma[b] pixels; 0 leaves the image as it is. Replicate padding."""
    _check_images(x)
    _per_image(sigma, x, "sigma")
    return _separable_filter(x, _gaussian_weights(sigma.to(device=x.device, dtype=torch.float32)))


def add_gaussian_noise(x: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise, independent per pixel and channel; sigma: [B] in 8-bit levels; clamped to [-1, 1]."""
    _check_images(x)
    # One 8-bit level is 2 / 255 of the range [-1, 1].
    amplitude = _per_image(sigma, x, "sigma") * (2.0 / 255.0)
    return (x + amplitude * _normal(tuple(x.shape), generator, x.device)).clamp(-1.0, 1.0)


def add_poisson_noise(x: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
    """Add photon noise, whose variance is proportional to the signal; clamped to [-1, 1].

    sigma: [B], the deviation at middle gray in 8-bit levels; 0 leaves the image as it is.
    """
    _check_images(x)
    deviation = _per_image(sigma, x, "sigma") / 255.0
    # A signal s counted as Poisson(s * photons) / photons has variance s / photons: choose photons so that s = 0.5
    # gives the deviation.
    photons = 0.5 / deviation.clamp_min(1e-4).square()
    rate = (x * 0.5 + 0.5).clamp(0.0, 1.0) * photons
    counts = torch.poisson(rate.to(generator.device), generator=generator).to(x.device)
    noisy = (counts / photons * 2.0 - 1.0).clamp(-1.0, 1.0)
    return torch.where(deviation > 0.0, noisy, x)


def resize(x: Tensor, size: tuple[int, int], mode: ResizeMode) -> Tensor:
    """Resample to size (height, width), clamped to [-1, 1]; bilinear and bicubic are antialiased when they shrink."""
    _check_images(x)
    if mode not in RESIZE_MODES:
        raise ValueError(f"unknown resize mode {mode!r}; choose from {', '.join(RESIZE_MODES)}")
    if tuple(x.shape[-2:]) == size:
        return x
    if mode == "area":
        return functional.interpolate(x, size=size, mode="area")
    return functional.interpolate(x, size=size, mode=mode, align_corners=False, antialias=True).clamp(-1.0, 1.0)


def _dct_blocks(device: torch.device) -> Tensor:
    """The orthonormal 8x8 type-II DCT as one matrix [64, 64]: coefficients = matrix @ block.flatten()."""
    n = torch.arange(8, dtype=torch.float64)
    dct = 0.5 * torch.cos((2.0 * n.view(1, 8) + 1.0) * n.view(8, 1) * math.pi / 16.0)
    dct[0] *= math.sqrt(0.5)
    return torch.kron(dct, dct).to(device=device, dtype=torch.float32)


def _quantize_plane(plane: Tensor, table: Tensor, dct: Tensor) -> Tensor:
    """Transform, quantize and transform back; plane: [B, C, H, W], H and W multiples of 8; table: [B, 64]."""
    batch, channels, height, width = plane.shape
    blocks = plane.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4).reshape(batch, -1, 64)
    step = table.unsqueeze(1)
    coefficients = torch.round(blocks @ dct.T / step) * step
    blocks = coefficients @ dct
    return (
        blocks.view(batch, channels, height // 8, width // 8, 8, 8)
        .transpose(3, 4)
        .reshape(batch, channels, height, width)
    )


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """Encode and decode as baseline JPEG with 4:2:0 chroma.

    quality: [B], 1 to 100 as in the IJG codec, rounded to whole numbers. The entropy coding is lossless and left out. A
    size that is not a multiple of 16 is padded by replication, as encoders do. Rounding has no useful gradient: this is
    for making data, not for training through it. The result is on the 8-bit grid of [-1, 1].
    """
    _check_images(x)
    height, width = x.shape[-2:]
    q = _per_image(quality, x, "quality").view(-1, 1).round().clamp(1.0, 100.0)
    scale = torch.where(q < 50.0, torch.floor(5000.0 / q), 200.0 - 2.0 * q)
    base_luma = torch.tensor(LUMINANCE_TABLE, dtype=torch.float32, device=x.device).view(1, 64)
    base_chroma = torch.tensor(CHROMINANCE_TABLE, dtype=torch.float32, device=x.device).view(1, 64)
    table_luma = torch.floor((base_luma * scale + 50.0) / 100.0).clamp(1.0, 255.0)
    table_chroma = torch.floor((base_chroma * scale + 50.0) / 100.0).clamp(1.0, 255.0)

    pixels = torch.round((x.clamp(-1.0, 1.0) + 1.0) * 127.5)
    pixels = functional.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    r, g, b = pixels.unbind(dim=1)
    y = torch.round(_luma(pixels)) - 128.0
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b
    chroma = torch.round(functional.avg_pool2d(torch.stack([cb, cr], dim=1), 2))

    dct = _dct_blocks(x.device)
    with _full_precision(x):
        y = _quantize_plane(y, table_luma, dct)
        chroma = _quantize_plane(chroma, table_chroma, dct)
    y = torch.round(y).clamp(-128.0, 127.0) + 128.0
    chroma = torch.round(chroma).clamp(-128.0, 127.0)
    # Decoders interpolate chroma with weights 3/4 and 1/4, which is bilinear resampling by two.
    chroma = functional.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)

    cb, cr = chroma[:, :1], chroma[:, 1:]
    decoded = torch.cat([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], dim=1)
    decoded = torch.round(decoded).clamp(0.0, 255.0)[..., :height, :width]
    return decoded / 127.5 - 1.0


# ---------------------------------------------------------------------------
# Damage of prints and negatives
# ---------------------------------------------------------------------------


def grain(x: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Add film grain: slightly blurred noise, the same in all channels, strongest in the middle tones.

    strength: [B], the standard deviation at middle gray in 8-bit levels; a quarter of it remains in black and white.
    The result is clamped to [-1, 1].
    """
    _check_images(x)
    batch, _, height, width = x.shape
    amplitude = _per_image(strength, x, "strength") * (2.0 / 255.0)
    weights = _gaussian_weights(torch.full((1,), 0.6, device=x.device))
    # Filtering divides the deviation of white noise by a known factor; undo it, so that strength keeps its unit.
    weights = weights / weights.square().sum().sqrt()
    noise = _separable_filter(_normal((batch, 1, height, width), generator, x.device), weights.expand(batch, -1))
    tone = 1.0 - 0.75 * _luma(x).square()
    return (x + amplitude * tone * noise).clamp(-1.0, 1.0)


def scratches(x: Tensor, count: Tensor, generator: Generator) -> Tensor:
    """Draw count[b] bright or dark scratches on image b, slightly wavy, most of them close to vertical.

    count: [B] whole numbers from 0. A film transport makes the vertical ones, handling the others.
    """
    _check_images(x)
    batch, _, height, width = x.shape
    remaining = _per_image(count, x, "count")
    rows = torch.arange(height, device=x.device, dtype=torch.float32).view(1, 1, -1, 1)
    columns = torch.arange(width, device=x.device, dtype=torch.float32).view(1, 1, 1, -1)
    for index in range(int(count.max())):
        u = _uniform((batch, 9), 0.0, 1.0, generator, x.device).view(batch, 9, 1, 1, 1).unbind(dim=1)
        center_x, center_y = u[0] * width, u[1] * height
        # One scratch in four has any direction, the rest lie within about ten degrees of the vertical.
        angle = torch.where(u[2] < 0.25, u[3] * math.pi, (u[3] - 0.5) * 0.35)
        half_length = (0.1 + 0.9 * u[4]) * 0.5 * max(height, width)
        half_width = 0.3 + 0.9 * u[5]
        opacity = 0.4 + 0.6 * u[6]
        value = torch.where(u[7] < 0.7, torch.ones_like(angle), -torch.ones_like(angle))
        dx, dy = columns - center_x, rows - center_y
        along = dy * torch.cos(angle) - dx * torch.sin(angle)
        across = dx * torch.cos(angle) + dy * torch.sin(angle)
        across = across + (1.0 + u[8]) * torch.sin(along * (0.02 + 0.06 * u[8]) + 2.0 * math.pi * u[6])
        mask = (half_width + 0.5 - across.abs()).clamp(0.0, 1.0) * ((half_length - along.abs()) / 4.0).clamp(0.0, 1.0)
        mask = mask * opacity * (remaining > index)
        x = torch.lerp(x, value.expand_as(x), mask.expand_as(x))
    return x


def dust(x: Tensor, density: Tensor, generator: Generator) -> Tensor:
    """Strew dust, soft specks a few pixels wide, white or black per image.

    density: [B], the expected number of specks per pixel; 1e-4 is sparse.
    """
    _check_images(x)
    batch, _, height, width = x.shape
    threshold = _per_image(density, x, "density")
    specks = (_uniform((batch, 1, height, width), 0.0, 1.0, generator, x.device) < threshold).to(torch.float32)
    u = _uniform((batch, 2), 0.0, 1.0, generator, x.device)
    weights = _gaussian_weights(0.5 + u[:, 0])
    # Scale the peak of a single speck to 1.5 and cut at 1: a flat core with a soft edge.
    weights = weights / weights.amax(dim=1, keepdim=True) * math.sqrt(1.5)
    mask = _separable_filter(specks, weights).clamp(0.0, 1.0)
    value = torch.where(u[:, 1] < 0.6, 1.0, -1.0).view(-1, 1, 1, 1)
    return torch.lerp(x, value.expand_as(x), (0.9 * mask).expand_as(x))


def fade(x: Tensor, contrast: Tensor, lift: Tensor) -> Tensor:
    """Fade: blacks rise and the range shrinks, without a change of hue.

    contrast: [B] in [0, 1], the share of the remaining range that is kept; lift: [B] in [0, 1], where black ends up. On
    [0, 1] the output is lift + (1 - lift) * contrast * input, so contrast 1 and lift 0 leave the image as it is.
    """
    _check_images(x)
    gain = _per_image(contrast, x, "contrast")
    black = _per_image(lift, x, "lift")
    return (black + (1.0 - black) * gain * (x * 0.5 + 0.5)) * 2.0 - 1.0


def halftone(x: Tensor, period: Tensor, angle: Tensor) -> Tensor:
    """Print the luma with a rotated clustered-dot screen; color differences stay as far as the range allows.

    period: [B] in pixels, the distance of neighboring dots (at least 2); angle: [B] in radians. Dots are
    diamond-shaped, with edges one pixel soft. The screen is equalized: the mean of a flat area stays what it was.
    """
    _check_images(x)
    height, width = x.shape[-2:]
    p = _per_image(period, x, "period")
    a = _per_image(angle, x, "angle")
    rows = torch.arange(height, device=x.device, dtype=torch.float32).view(1, 1, -1, 1)
    columns = torch.arange(width, device=x.device, dtype=torch.float32).view(1, 1, 1, -1)
    u = (columns * torch.cos(a) + rows * torch.sin(a)) / p
    v = (rows * torch.cos(a) - columns * torch.sin(a)) / p
    # Each triangle wave is uniform on [0, 1]; their mean t has a triangular density, whose distribution function
    # equalizes the screen.
    t = (2.0 * (u - u.round()).abs() + 2.0 * (v - v.round()).abs()) * 0.5
    screen = torch.where(t < 0.5, 2.0 * t.square(), 1.0 - 2.0 * (1.0 - t).square())
    luma = _luma(x)
    # The mean of the two waves changes by about 2 / p per pixel: this slope makes an edge one pixel wide.
    printed = ((luma * 0.5 + 0.5 - screen) * (p * 0.5) + 0.5).clamp(0.0, 1.0) * 2.0 - 1.0
    return (x + printed - luma).clamp(-1.0, 1.0)


# ---------------------------------------------------------------------------
# Tone of the photograph
# ---------------------------------------------------------------------------


def to_monochrome(x: Tensor) -> Tensor:
    """The luma in all three channels."""
    _check_images(x)
    return _luma(x).expand_as(x).contiguous()


def sepia(x: Tensor, amount: Tensor | None = None) -> Tensor:
    """Tone the luma warm, with black and white left neutral; amount: [B] in [0, 1], 0 is monochrome; None is 1."""
    _check_images(x)
    depth = torch.ones(x.shape[0]) if amount is None else amount
    # Toning acts like a different gamma per channel: red lighter, blue darker.
    gamma = torch.tensor([-0.30, 0.0, 0.45], device=x.device).view(1, 3, 1, 1) * _per_image(depth, x, "amount")
    luma = (_luma(x) * 0.5 + 0.5).clamp(0.0, 1.0)
    return luma.pow(1.0 + gamma) * 2.0 - 1.0


# ---------------------------------------------------------------------------
# Chains
# ---------------------------------------------------------------------------


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise RequestError(f"{name} must be in [0, 1], got {value}")


@torch.no_grad()
def second_order(x: Tensor, generator: Generator, strength: float) -> Tensor:
    """Two rounds of blur, resize, noise and JPEG, then back to the input size (Real-ESRGAN, section 3.2).

    strength in [0, 1] moves the worst case of each step linearly, so that a curriculum can begin mild:

    ===========================  ==========  ==========
    drawn uniformly              strength 0  strength 1
    ===========================  ==========  ==========
    blur sigma, pixels           0 to 0.6    0 to 2.5
    overall scale                0.8 to 1    0.25 to 1
    noise sigma, 8-bit levels    1 to 5      1 to 30
    JPEG quality                 80 to 95    30 to 95
    ===========================  ==========  ==========

    The overall scale is split at random between the two rounds; the second blur acts at the scale of the first round.
    Raises RequestError for a strength outside [0, 1].
    """
    _check_images(x)
    _check_share("strength", strength)
    batch, _, height, width = x.shape
    if batch == 0:
        return x
    max_sigma = 0.6 + 1.9 * strength
    min_scale = 0.8 - 0.55 * strength
    max_noise = 5.0 + 25.0 * strength
    min_quality = 80.0 - 50.0 * strength

    # Two images per group where the batch allows it. A random order decides who shares a group.
    groups = min(MAX_RESIZE_GROUPS, (batch + 1) // 2)
    order = torch.randperm(batch, generator=generator, device=generator.device).to(x.device)
    draws = torch.rand((groups, 6), generator=generator, device=generator.device).tolist()
    restored = []
    for members, (u_scale, u_split, *u_rounds) in zip(x[order].tensor_split(groups), draws, strict=True):
        overall = min_scale + (1.0 - min_scale) * u_scale
        image = members
        n = (members.shape[0],)
        for scale, u_mode, u_noise in ((overall**u_split, *u_rounds[:2]), (overall, *u_rounds[2:])):
            image = gaussian_blur(image, _uniform(n, 0.0, max_sigma, generator, x.device))
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            image = resize(image, size, RESIZE_MODES[int(u_mode * len(RESIZE_MODES))])
            sigma = _uniform(n, 1.0, max_noise, generator, x.device)
            add_noise = add_gaussian_noise if u_noise < 0.5 else add_poisson_noise
            image = add_noise(image, sigma, generator)
            image = jpeg(image, _uniform(n, min_quality, 95.0, generator, x.device))
        restored.append(resize(image, (height, width), "bicubic"))
    # order[i] is where image i of the shuffled batch came from.
    result = torch.empty_like(x)
    result[order] = torch.cat(restored)
    return result


class Damage(IntEnum):
    """What was done to the input of an image; the code in ``DegradedBatch.damage``."""

    UNTOUCHED = 0
    SECOND_ORDER = 1
    ARCHIVE = 2
    HALFTONE = 3


class Tone(IntEnum):
    """The tone of the photograph, the same in input and target; the code in ``DegradedBatch.tone``."""

    ORIGINAL = 0
    MONOCHROME = 1
    SEPIA = 2


@dataclass(frozen=True)
class Degradation:
    """The mix of degradations; each image of a batch is drawn on its own.

    untouched, archive and halftone are shares of the images and exclude each other; the rest gets the second-order
    chain alone. Archive damage and halftone are followed by the second-order chain at half strength, which stands for
    the scan. monochrome and sepia are shares too, drawn independently of the damage. strength in [0, 1] sets how strong
    all damage is. Raises RequestError where a share is outside [0, 1] or shares that exclude each other exceed 1.
    """

    untouched: float = 0.10
    archive: float = 0.25
    halftone: float = 0.05
    monochrome: float = 0.10
    sepia: float = 0.05
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("untouched", "archive", "halftone", "monochrome", "sepia", "strength"):
            _check_share(name, getattr(self, name))
        # A hair above 1, because shares such as 0.7 + 0.2 + 0.1 need not add up exactly.
        if self.untouched + self.archive + self.halftone > 1.0 + 1e-9:
            raise RequestError(
                f"untouched {self.untouched} + archive {self.archive} + halftone {self.halftone} exceed 1; lower one"
            )
        if self.monochrome + self.sepia > 1.0 + 1e-9:
            raise RequestError(f"monochrome {self.monochrome} + sepia {self.sepia} exceed 1; lower one")


@dataclass(frozen=True)
class DegradedBatch:
    """A training pair: ``lq`` is what the model sees, ``target`` what it should give back."""

    lq: Tensor  # [B, 3, H, W] float32 in [-1, 1]
    target: Tensor  # [B, 3, H, W] float32 in [-1, 1]
    damage: Tensor  # [B] int64, codes of Damage
    tone: Tensor  # [B] int64, codes of Tone


def _archive(x: Tensor, generator: Generator, strength: float) -> Tensor:
    """An old print: grainy, scratched and dusty, each to a degree of its own; two in five are faded too.

    Few, because fading cannot be told from a soft original: a model that sees much of it changes tones at large.
    """
    n = (x.shape[0],)
    u = _uniform((7, *n), 0.0, 1.0, generator, x.device)
    # Even the mild end shows visible damage, else there is nothing to learn from it.
    level = 0.3 + 0.7 * strength
    faded = level * (u[6] < 0.4)
    x = fade(x, contrast=1.0 - 0.4 * faded * u[0], lift=0.25 * faded * u[1])
    x = grain(x, 20.0 * level * u[2], generator)
    x = scratches(x, torch.floor(5.0 * u[3]), generator)
    return dust(x, 8e-4 * level * u[4] * (u[5] < 0.7), generator)


def _print_screen(x: Tensor, generator: Generator, strength: float) -> Tensor:
    """A reproduction in print: halftone dots, never quite black on white, softened by paper and scanner."""
    u = _uniform((4, x.shape[0]), 0.0, 1.0, generator, x.device)
    screened = halftone(x, period=3.0 + 3.0 * u[0], angle=math.pi * u[1])
    ink = ((0.3 + 0.5 * strength) * (0.5 + 0.5 * u[2])).view(-1, 1, 1, 1)
    return gaussian_blur(torch.lerp(x, screened, ink.expand_as(x)), 0.4 + 0.4 * u[3])


@torch.no_grad()
def degrade(clean: Tensor, mix: Degradation, generator: Generator) -> DegradedBatch:
    """Make training pairs from clean crops, [B, 3, H, W] float32 in [-1, 1].

    Monochrome and sepia are properties of a photograph that a restoration keeps: they are applied to target and input
    alike. Everything else is damage on the input only.
    """
    _check_images(clean)
    batch = clean.shape[0]
    u = torch.rand((3, batch), generator=generator, device=generator.device).to(clean.device)

    edges = torch.tensor(
        [mix.untouched, mix.untouched + mix.archive, mix.untouched + mix.archive + mix.halftone], device=u.device
    )
    drawn = torch.tensor([Damage.UNTOUCHED, Damage.ARCHIVE, Damage.HALFTONE, Damage.SECOND_ORDER], device=u.device)
    damage = drawn[torch.bucketize(u[0], edges, right=True)]
    edges = torch.tensor([mix.monochrome, mix.monochrome + mix.sepia], device=u.device)
    drawn = torch.tensor([Tone.MONOCHROME, Tone.SEPIA, Tone.ORIGINAL], device=u.device)
    tone = drawn[torch.bucketize(u[1], edges, right=True)]

    target = clean.clone()
    monochrome = (tone == Tone.MONOCHROME).nonzero().flatten()
    target[monochrome] = to_monochrome(clean[monochrome])
    toned = (tone == Tone.SEPIA).nonzero().flatten()
    target[toned] = sepia(clean[toned], 0.3 + 0.7 * u[2, toned])

    lq = target.clone()
    plain = (damage == Damage.SECOND_ORDER).nonzero().flatten()
    if len(plain) > 0:
        lq[plain] = second_order(target[plain], generator, mix.strength)
    archive = (damage == Damage.ARCHIVE).nonzero().flatten()
    if len(archive) > 0:
        lq[archive] = _archive(target[archive], generator, mix.strength)
    screened = (damage == Damage.HALFTONE).nonzero().flatten()
    if len(screened) > 0:
        lq[screened] = _print_screen(target[screened], generator, mix.strength)
    scanned = torch.cat([archive, screened])
    if len(scanned) > 0:
        lq[scanned] = second_order(lq[scanned], generator, 0.5 * mix.strength)
    return DegradedBatch(lq=lq, target=target, damage=damage, tone=tone)


@torch.no_grad()
def degrade_by_strength(clean: Tensor, mix: Degradation, generator: Generator) -> DegradedBatch:
    """As ``degrade``, with a strength of its own for every four crops, 5% to 100% of the mix's.

    A model that only saw heavy damage treats a nearly clean image as damaged.
    """
    groups = torch.split(clean, 4)
    shares = torch.rand(len(groups), generator=generator, device=generator.device).tolist()
    parts = [
        degrade(group, replace(mix, strength=mix.strength * (0.05 + 0.95 * share)), generator)
        for group, share in zip(groups, shares, strict=True)
    ]
    return DegradedBatch(
        lq=torch.cat([part.lq for part in parts]),
        target=torch.cat([part.target for part in parts]),
        damage=torch.cat([part.damage for part in parts]),
        tone=torch.cat([part.tone for part in parts]),
    )


# ---------------------------------------------------------------------------
# Fixed degradations for evaluation
# ---------------------------------------------------------------------------


def shrink(x: Tensor, factor: int) -> Tensor:
    """Reduce both sides by ``factor``, antialiased bicubic, at least to 1 pixel."""
    height, width = x.shape[-2:]
    return resize(x, (max(1, round(height / factor)), max(1, round(width / factor))), "bicubic")


@dataclass(frozen=True)
class Benchmark:
    """One fixed degradation; the result may be smaller than the image. Values in pixels, 8-bit levels, JPEG quality."""

    blur: float = 0.0
    factor: int = 1
    noise: float = 0.0
    quality: int | None = None

    @torch.no_grad()
    def apply(self, x: Tensor, generator: Generator) -> Tensor:
        """Degrade [B, 3, H, W] in [-1, 1]: blur, shrink, noise, JPEG, in this order."""
        ones = torch.ones(x.shape[0], device=x.device)
        if self.blur > 0:
            x = gaussian_blur(x, self.blur * ones)
        x = shrink(x, self.factor)
        if self.noise > 0:
            x = add_gaussian_noise(x, self.noise * ones, generator)
        return x if self.quality is None else jpeg(x, self.quality * ones)

    def __str__(self) -> str:
        parts = [
            f"blur {self.blur:g}" if self.blur else "",
            f"1/{self.factor} of the size" if self.factor > 1 else "",
            f"noise {self.noise:g}" if self.noise else "",
            f"JPEG {self.quality}" if self.quality else "",
        ]
        return ", ".join(part for part in parts if part) or "as it is"


# D1 and D2 are this project's; the other five are those of SUPIR (Yu et al. 2024), table 1
BENCHMARKS: dict[str, Benchmark] = {
    "D1": Benchmark(blur=1.2, noise=25, quality=40),
    "D2": Benchmark(factor=2),
    "SRx4": Benchmark(factor=4),
    "SRx8": Benchmark(factor=8),
    "blur-SRx4": Benchmark(blur=2, factor=4),
    "SRx4-noise": Benchmark(factor=4, noise=40),
    "blur-SRx4-noise-JPEG": Benchmark(blur=2, factor=4, noise=20, quality=50),
}
