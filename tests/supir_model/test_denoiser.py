from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supir_model.config import Prediction
from supir_model.denoiser import (
    SIGMA_MAX,
    Origin,
    denoise,
    guide,
    karras_sigmas,
    legacy_sigmas,
    linear_cfg,
    nearest_timestep,
    sigma_table,
)


def test_table_has_sdxls_ends() -> None:
    table = sigma_table()
    assert len(table) == 1000
    assert (table.diff() > 0).all()
    torch.testing.assert_close(table[[0, -1]], torch.tensor([0.0291672, 14.6146412]), rtol=3e-6, atol=0)


@pytest.mark.parametrize(
    ("steps", "last_timestep", "last_sigma"), [(50, 19, 0.13445), (100, 9, 0.09357), (8, 124, None), (1, 999, None)]
)
def test_schedule_descends_to_zero(steps: int, last_timestep: int, last_sigma: float | None) -> None:
    sigmas = legacy_sigmas(steps)
    assert len(sigmas) == steps + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert nearest_timestep(sigmas[:-1])[-1] == last_timestep
    if last_sigma is not None:
        assert sigmas[-2].item() == pytest.approx(last_sigma, abs=1e-5)


def test_schedule_where_a_timestep_lands_on_an_integer() -> None:
    # 99 steps: other roundings of the same formula truncate some entries to the integer below
    assert nearest_timestep(legacy_sigmas(99)[:-1]).diff().abs().unique().tolist() == [10, 11]


def test_karras_schedule_has_the_known_values() -> None:
    wanted = torch.tensor([14.6146, 9.6560, 6.2155, 3.8842, 2.3465, 1.3632, 0.7565, 0.3977, 0.0])
    torch.testing.assert_close(karras_sigmas(8), wanted, rtol=0, atol=1e-4)
    assert karras_sigmas(1).tolist() == legacy_sigmas(1).tolist()


def test_sigma_beyond_the_table_maps_to_its_ends() -> None:
    assert nearest_timestep(torch.tensor([100.0, 0.0, -1.0])).tolist() == [999, 0, 0]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "residual"])
def test_a_perfect_network_gives_the_clean_latent(prediction: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, eps, control = torch.randn((3, 3, 4, 5, 6), generator=generator)
    scale = torch.tensor([1.0, 0.5, 0.0])
    center, std = torch.zeros_like(clean), torch.ones(())
    if prediction == "residual":
        center = scale[:, None, None, None] * control
        std = torch.tensor([0.1, 0.5, 1.0, 2.0])[None, :, None, None] ** scale[:, None, None, None]
    sigma = sigma_table()[[10, 500, 999]]
    q = sigma[:, None, None, None]

    def network(x_in: Tensor, timestep: Tensor, control_scale: Tensor) -> Tensor:
        assert timestep.tolist() == [10, 500, 999]
        assert control_scale.shape == (3, 1, 1, 1)
        torch.testing.assert_close(x_in.std(), torch.tensor(1.0), rtol=0.2, atol=0)  # the network sees unit variance
        return (
            eps
            if prediction == "epsilon"
            else (std**2 * eps - q * (clean - center)) / (std * torch.sqrt(q**2 + std**2))
        )

    out = denoise(network, prediction, clean + q * eps, sigma, scale, Origin(control, (0.1, 0.5, 1.0, 2.0)))
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-4)


def test_a_silent_residual_network_weighs_noisy_and_control_latent_by_their_noise() -> None:
    x, control = torch.randn((2, 1, 2, 5, 6), generator=torch.Generator().manual_seed(1))
    sigma = sigma_table()[[700]]
    origin = Origin(control, (0.1, float(sigma)))
    out = denoise(lambda x_in, t, s: torch.zeros_like(x_in), "residual", x, sigma, torch.ones(1), origin)
    torch.testing.assert_close(out[:, 1], (x[:, 1] + control[:, 1]) / 2)
    torch.testing.assert_close(out[:, 0], control[:, 0], rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="origin"):
        denoise(lambda x_in, t, s: x_in, "residual", x, sigma, torch.ones(1))


def test_guidance_scale_is_linear_between_its_ends() -> None:
    scale = linear_cfg(4.0, 7.5, torch.tensor([0.0, SIGMA_MAX / 2, SIGMA_MAX, 2 * SIGMA_MAX]))
    torch.testing.assert_close(scale, torch.tensor([7.5, 5.75, 4.0, 0.5]))


def test_guidance_at_one_is_the_conditional_and_at_zero_the_unconditional() -> None:
    uncond, cond = torch.randn((2, 2, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    both = torch.cat([uncond, cond])
    torch.testing.assert_close(guide(both, torch.ones(2)), cond)
    torch.testing.assert_close(guide(both, torch.tensor([0.0, 1.0])), torch.stack([uncond[0], cond[1]]))
