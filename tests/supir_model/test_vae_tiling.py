from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from supir_model.config import VAEConfig
from supir_model.errors import RequestError
from supir_model.vae import RobustVAE
from supir_model.vae_tiling import VAETiling, released_tiles, run_decoder, run_encoder

CONFIGS = {
    "sdxl": VAEConfig((16, 32, 64, 64), 2, 4, 8, mid_attention=True, scale=0.13025),
    "tiny": VAEConfig((8, 16, 24), 1, 8, 4, mid_attention=False, scale=1.0, pixel_shortcut=True),
}


@cache
def vae(name: str) -> RobustVAE:
    """In float64, with weights that let no part of the network die down and biases that norms must remove."""
    torch.manual_seed(0)
    model = RobustVAE(CONFIGS[name]).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.5 * torch.randn_like(parameter))
        else:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    """Noise on a slope, so that means differ between parts of the image."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator)
    return noise * 0.3 + torch.linspace(-1, 1, height, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("name", list(CONFIGS))
@hypothesis_settings(deadline=None, max_examples=10)
@given(rows=st.integers(1, 26), columns=st.integers(1, 12), tile=st.sampled_from([32, 64, 96]))
@torch.inference_mode()
def test_exact_tiles_change_nothing(name: str, rows: int, columns: int, tile: int) -> None:
    model, factor = vae(name), CONFIGS[name].factor
    image, tiling = picture(rows * factor, columns * factor, batch=2), VAETiling("exact", tile)
    original = image.clone()
    for encode in (model.encode_robust, lambda x, *t: model.encode(x, None, *t)):
        torch.testing.assert_close(encode(image, tiling), encode(image), rtol=1e-9, atol=1e-9)
    latent = model.encode(image)
    kept = latent.clone()
    torch.testing.assert_close(model.decode(latent, tiling), model.decode(latent), rtol=1e-9, atol=1e-9)
    assert torch.equal(image, original)
    assert torch.equal(latent, kept)


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.inference_mode()
def test_exact_tiles_in_float32_and_bfloat16(name: str) -> None:
    model, factor = RobustVAE(CONFIGS[name]).eval(), CONFIGS[name].factor
    model.load_state_dict({key: value.float() for key, value in vae(name).state_dict().items()})
    image, tiling = picture(21 * factor, 13 * factor).float(), VAETiling("exact", 32)
    latent = model.encode(image)
    torch.testing.assert_close(model.encode(image, None, tiling), latent, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.decode(latent, tiling), model.decode(latent), rtol=1e-5, atol=1e-4)
    model.bfloat16()
    tiled, whole = model.decode(latent.bfloat16(), tiling), model.decode(latent.bfloat16())
    assert tiled.dtype == torch.bfloat16
    assert (tiled - whole).float().abs().mean() < 0.02 * whole.float().std()


@torch.inference_mode()
def test_released_tiles_do_change_results() -> None:
    model, tiling = vae("sdxl"), VAETiling("released", 32)
    image = picture(160, 224)
    latent = model.encode(image)
    released = model.encode(image, None, tiling)
    assert released.shape == latent.shape
    assert (released - latent).abs().max() > 1e-3
    decoded, tiled = model.decode(latent), model.decode(latent, tiling)
    assert tiled.shape == decoded.shape
    assert (tiled - decoded).abs().max() > 1e-3


@torch.inference_mode()
def test_an_image_of_one_tile_runs_as_one() -> None:
    model, image = vae("sdxl"), picture(96, 96)
    for mode in ("exact", "released"):
        whole = run_encoder(model.encoder, image, VAETiling(), 8)
        assert torch.equal(run_encoder(model.encoder, image, VAETiling(mode, 96), 8), whole)
        z = whole[:, :4]
        decoder = model.autoencoder.decoder
        assert torch.equal(run_decoder(decoder, z, VAETiling(mode, 96), 8), run_decoder(decoder, z, VAETiling(), 8))


@hypothesis_settings(deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    tile=st.integers(1, 16).map(lambda n: 8 * n),
    pad=st.sampled_from([11, 32]),
)
def test_released_tiles_cover_every_position_once(height: int, width: int, tile: int, pad: int) -> None:
    tiles = released_tiles(height, width, tile, pad)
    assert bool(tiles) == (max(height, width) > tile + 2 * pad)
    covered = torch.zeros(1, 1, height, width)
    for read, keep in tiles:
        assert read.top <= keep.top < keep.bottom <= read.bottom
        assert read.left <= keep.left < keep.right <= read.right
        keep.crop(covered).add_(1)
    assert not tiles or bool((covered == 1).all())


@pytest.mark.parametrize("tile", [0, -32, 31, 100])
def test_a_tile_that_does_not_work_is_refused(tile: int) -> None:
    with pytest.raises(RequestError, match=f"VAE tile of {tile} pixels does not work; give a multiple of 32"):
        VAETiling("exact", tile)


_MEASURE = """
import resource, torch
from pathlib import Path
from supir_model.config import VAEConfig
from supir_model.vae import RobustVAE
from supir_model.vae_tiling import VAETiling

def peak():  # in KiB; what getrusage says begins, on Linux, at the peak of the process that started this one
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
vae = RobustVAE(VAEConfig((32, 64, 64), 1, 4, 8, mid_attention=False, scale=1.0)).eval()
with torch.inference_mode():
    for side, tiling in ((64, VAETiling("off")), (512, VAETiling("exact", 128)), (512, VAETiling("off"))):
        vae.decode(torch.randn(1, 4, side // 4, side // 4), tiling)
        print(peak())
"""


def test_exact_tiles_need_less_memory() -> None:
    """A process's peak can only rise: libraries, then exact tiles, then the whole image at once."""
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, cwd=root)
    libraries, tiled, whole = (int(line) for line in ran.stdout.split())
    assert whole - libraries > 2 * (tiled - libraries)
