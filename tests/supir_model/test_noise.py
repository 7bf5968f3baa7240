from __future__ import annotations

import pytest
import torch

from supir_model.noise import latent_noise


@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 10, 10), (5, 7, 40, 33), (60, 63, 9, 2), (64, 128, 16, 16), (3, 130, 130, 61)],
)
def test_a_crop_is_a_part_of_the_whole(top: int, left: int, height: int, width: int) -> None:
    whole = latent_noise(7, 2, 4, 0, 0, 150, 200)
    crop = latent_noise(7, 2, 4, top, left, height, width)
    assert crop.shape == (4, height, width)
    assert crop.dtype == torch.float32
    assert torch.equal(crop, whole[:, top : top + height, left : left + width])


def test_it_is_unit_normal() -> None:
    noise = latent_noise(1, 0, 8, 10, 20, 200, 190).flatten()
    count = len(noise)
    assert abs(noise.mean().item()) < 5 / count**0.5
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.15)


def test_positions_draws_and_seeds_are_independent() -> None:
    wide = latent_noise(3, 1, 4, 0, 0, 64, 256)
    others = [
        latent_noise(3, 2, 4, 0, 0, 64, 64),  # another draw
        latent_noise(4, 1, 4, 0, 0, 64, 64),  # another seed
        wide[:, :, 64:128],  # another block
        latent_noise(3, 1, 4, 64, 0, 64, 64),
        wide[[1, 2, 3, 0], :, :64],  # another channel
    ]
    for other in others:
        correlation = (wide[:, :, :64] * other).mean().item()
        assert abs(correlation) < 5 / other.numel() ** 0.5


def test_it_is_the_same_every_time_even_for_the_largest_seed() -> None:
    seed = 2**63 - 1
    assert torch.equal(latent_noise(seed, 0, 1, 0, 0, 3, 3), latent_noise(seed, 0, 1, 0, 0, 3, 3))


def test_the_numbers_are_pinned() -> None:
    # a change here changes every restoration made with a recorded seed
    wanted = torch.tensor([[0.1075850, 0.1907691], [-0.7313151, -1.6659226]])
    torch.testing.assert_close(latent_noise(1234, 1, 1, 63, 63, 2, 2)[0], wanted, rtol=0, atol=1e-6)
