from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Generator, Tensor

from supir_model.errors import RequestError
from supir_model.training.degradations import (
    BENCHMARKS,
    RESIZE_MODES,
    Benchmark,
    Damage,
    Degradation,
    ResizeMode,
    Tone,
    add_gaussian_noise,
    add_poisson_noise,
    degrade,
    degrade_by_strength,
    dust,
    fade,
    gaussian_blur,
    grain,
    halftone,
    jpeg,
    resize,
    scratches,
    second_order,
    sepia,
    to_monochrome,
)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def to_tensor(image: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0


def psnr(a: Tensor, b: Tensor) -> float:
    # The range [-1, 1] has a peak-to-peak of 2.
    return float(10.0 * torch.log10(4.0 / (a - b).square().mean()))


def flat(value: float, batch: int = 1, size: int = 128) -> Tensor:
    return torch.full((batch, 3, size, size), value)


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return to_tensor(data.astronaut())


@pytest.fixture(scope="module")
def crops(photograph: Tensor) -> Tensor:
    """Eight different crops, [8, 3, 64, 64]."""
    return torch.cat(
        [photograph[..., 60 * i : 60 * i + 64, 40 * i : 40 * i + 64] for i in range(7)] + [flat(0.1, 1, 64)]
    )


class TestGaussianBlur:
    def test_conserves_constants(self) -> None:
        x = flat(0.37, 3)
        torch.testing.assert_close(gaussian_blur(x, torch.tensor([0.0, 0.7, 3.0])), x)

    def test_sigma_zero_is_the_identity(self, crops: Tensor) -> None:
        torch.testing.assert_close(gaussian_blur(crops, torch.zeros(8)), crops)

    def test_impulse_response_has_the_asked_variance(self) -> None:
        x = torch.zeros(2, 3, 41, 41)
        x[:, :, 20, 20] = 1.0
        sigma = torch.tensor([1.2, 2.0])
        response = gaussian_blur(x, sigma)[:, 0]
        offset = torch.arange(41.0) - 20.0
        variance = (response.sum(dim=1) * offset.square()).sum(dim=1)
        # Cutting at three sigma takes a few percent off the variance.
        torch.testing.assert_close(variance, sigma.square(), rtol=0.05, atol=0.0)
        torch.testing.assert_close(response.sum(dim=(1, 2)), torch.ones(2))

    def test_an_image_does_not_depend_on_its_batch(self, crops: Tensor) -> None:
        sigma = torch.linspace(0.0, 3.0, 8)
        together = gaussian_blur(crops, sigma)
        for i in range(8):
            torch.testing.assert_close(gaussian_blur(crops[i : i + 1], sigma[i : i + 1])[0], together[i])

    def test_runs_in_full_precision_under_autocast(self, crops: Tensor) -> None:
        sigma = torch.full((8,), 1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = gaussian_blur(crops, sigma)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, gaussian_blur(crops, sigma))


class TestNoise:
    def test_gaussian_has_the_asked_deviation(self) -> None:
        noisy = add_gaussian_noise(flat(0.0, 2), torch.tensor([5.0, 25.0]), seeded())
        levels = noisy * 127.5
        torch.testing.assert_close(levels.std(dim=(1, 2, 3)), torch.tensor([5.0, 25.0]), rtol=0.02, atol=0.0)
        torch.testing.assert_close(levels.mean(dim=(1, 2, 3)), torch.zeros(2), rtol=0.0, atol=0.5)

    def test_poisson_deviation_grows_with_the_root_of_the_signal(self) -> None:
        # Signals of a quarter, half and three quarters of the range.
        x = torch.cat([flat(-0.5), flat(0.0), flat(0.5)])
        levels = add_poisson_noise(x, torch.full((3,), 10.0), seeded()) * 127.5
        expected = 10.0 * torch.tensor([math.sqrt(0.5), 1.0, math.sqrt(1.5)])
        torch.testing.assert_close(levels.std(dim=(1, 2, 3)), expected, rtol=0.03, atol=0.0)
        torch.testing.assert_close((levels / 127.5).mean(dim=(1, 2, 3)), x[:, 0, 0, 0], rtol=0.0, atol=2e-3)

    def test_poisson_leaves_black_and_sigma_zero_alone(self, crops: Tensor) -> None:
        assert torch.equal(add_poisson_noise(flat(-1.0), torch.tensor([20.0]), seeded()), flat(-1.0))
        assert torch.equal(add_poisson_noise(crops, torch.zeros(8), seeded()), crops)


class TestJpeg:
    @pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
    @pytest.mark.parametrize("shape", [(256, 256), (149, 211)])
    def test_agrees_with_pillow(self, quality: int, shape: tuple[int, int]) -> None:
        image = data.astronaut()[: shape[0], 100 : 100 + shape[1]]
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        reference = to_tensor(np.array(Image.open(buffer)))
        ours = jpeg(to_tensor(image), torch.tensor([quality]))
        assert ours.shape == reference.shape
        assert psnr(ours, reference) >= 42.0
        # The agreement is of the artifacts, not only of the picture: both differ far more from the original.
        assert psnr(ours, to_tensor(image)) < psnr(ours, reference) - 5.0

    def test_quality_is_per_image(self, crops: Tensor) -> None:
        quality = torch.linspace(30.0, 95.0, 8)
        together = jpeg(crops, quality)
        for i in range(8):
            torch.testing.assert_close(
                jpeg(crops[i : i + 1], quality[i : i + 1])[0], together[i], rtol=0.0, atol=2.5 / 127.5
            )

    def test_is_on_the_8_bit_grid_and_keeps_gray(self) -> None:
        x = to_monochrome(to_tensor(data.coffee()[:120, :120]))
        y = jpeg(x, torch.tensor([60]))
        levels = (y + 1.0) * 127.5
        torch.testing.assert_close(levels, levels.round(), rtol=0.0, atol=1e-4)
        assert torch.equal(y[:, 0], y[:, 1])
        assert torch.equal(y[:, 0], y[:, 2])


class TestResize:
    @pytest.mark.parametrize("mode", RESIZE_MODES)
    def test_size_and_constants(self, mode: ResizeMode) -> None:
        y = resize(flat(0.25, 2, 48), (17, 96), mode)
        assert y.shape == (2, 3, 17, 96)
        torch.testing.assert_close(y, torch.full_like(y, 0.25))

    def test_stays_in_range(self) -> None:
        x = torch.where(torch.rand(1, 3, 32, 32, generator=seeded()) < 0.5, -1.0, 1.0)
        assert resize(x, (77, 77), "bicubic").abs().max() <= 1.0

    def test_unknown_mode_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"unknown resize mode 'nearest'; choose from area"):
            resize(flat(0.0), (8, 8), "nearest")  # type: ignore[arg-type]


class TestArchiveDamage:
    def test_grain_is_gray_and_strongest_in_the_middle_tones(self) -> None:
        x = torch.cat([flat(0.0), flat(0.9)])
        added = (grain(x, torch.full((2,), 10.0), seeded()) - x) * 127.5
        torch.testing.assert_close(added[:, 0], added[:, 1], rtol=0.0, atol=1e-4)
        deviation = added.std(dim=(1, 2, 3))
        assert deviation[0] == pytest.approx(10.0, rel=0.05)
        assert deviation[1] < 0.6 * deviation[0]

    def test_scratches_follow_the_count(self) -> None:
        x = flat(0.0, 3)
        touched = (scratches(x, torch.tensor([0.0, 1.0, 4.0]), seeded(3)) != x).float().mean(dim=(1, 2, 3))
        assert touched[0] == 0.0
        # Lines: they touch few pixels.
        assert 0.0 < touched[1] < 0.08
        assert touched[1] < touched[2] < 0.3

    def test_dust_follows_the_density(self) -> None:
        x = flat(0.0, 3)
        touched = (dust(x, torch.tensor([0.0, 2e-4, 2e-3]), seeded()).abs() > 0.2).float().mean(dim=(1, 2, 3))
        assert touched[0] == 0.0
        assert 0.0 < touched[1] < touched[2] < 0.2

    def test_fade_maps_black_and_white(self) -> None:
        x = torch.cat([flat(-1.0), flat(1.0)])
        y = fade(x, torch.full((2,), 0.5), torch.full((2,), 0.2))
        # On [0, 1]: black to 0.2, white to 0.2 + 0.8 * 0.5 = 0.6.
        torch.testing.assert_close(y[:, 0, 0, 0], torch.tensor([0.2, 0.6]) * 2.0 - 1.0)
        torch.testing.assert_close(fade(x, torch.ones(2), torch.zeros(2)), x)

    @pytest.mark.parametrize("value", [-0.5, 0.0, 0.5])
    def test_halftone_keeps_the_mean_and_prints_two_tones(self, value: float) -> None:
        y = halftone(flat(value), torch.tensor([6.0]), torch.tensor([0.4]))
        assert float(y.mean()) == pytest.approx(value, abs=0.02)
        assert float((y.abs() > 0.95).float().mean()) > 0.5

    def test_halftone_is_periodic_along_the_rotated_screen(self) -> None:
        y = halftone(flat(-0.2), torch.tensor([8.0]), torch.tensor([math.pi / 2]))
        torch.testing.assert_close(y[..., 8:, :], y[..., :-8, :], rtol=0.0, atol=1e-3)
        assert (y[..., 4:, :] - y[..., :-4, :]).abs().max() > 0.5


class TestTone:
    def test_monochrome(self, photograph: Tensor) -> None:
        y = to_monochrome(photograph)
        assert torch.equal(y[:, 0], y[:, 2])
        torch.testing.assert_close(to_monochrome(y), y)

    def test_sepia_is_warm_and_keeps_black_and_white(self, photograph: Tensor) -> None:
        red, green, blue = sepia(photograph).mean(dim=(0, 2, 3)).tolist()
        assert red > green + 0.05 > blue + 0.1
        torch.testing.assert_close(sepia(flat(1.0)), flat(1.0))
        torch.testing.assert_close(sepia(flat(-1.0)), flat(-1.0))

    def test_sepia_amount_zero_is_monochrome(self, crops: Tensor) -> None:
        torch.testing.assert_close(sepia(crops, torch.zeros(8)), to_monochrome(crops), rtol=0.0, atol=1e-5)


class TestSecondOrder:
    def test_strength_makes_it_worse(self, crops: Tensor) -> None:
        quality = [psnr(second_order(crops, seeded(), strength), crops) for strength in (0.0, 0.5, 1.0)]
        assert quality[0] > quality[1] + 1.0 > quality[2] + 2.0

    def test_images_keep_their_place(self, crops: Tensor) -> None:
        result = second_order(crops, seeded(), 0.0)
        distance = (result[:, None] - crops[None]).square().mean(dim=(2, 3, 4))
        assert distance.argmin(dim=1).tolist() == list(range(8))

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_any_batch_and_odd_sizes(self, photograph: Tensor, batch: int) -> None:
        x = photograph[..., :37, :51].repeat(batch, 1, 1, 1)
        y = second_order(x, seeded(), 1.0)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()

    def test_strength_out_of_range_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"strength must be in \[0, 1\], got 1.5"):
            second_order(flat(0.0), seeded(), 1.5)


class TestDegrade:
    def test_is_determined_by_the_generator(self, crops: Tensor) -> None:
        mix = Degradation(archive=0.4, halftone=0.2)
        first, again = degrade(crops, mix, seeded(5)), degrade(crops, mix, seeded(5))
        other = degrade(crops, mix, seeded(6))
        assert torch.equal(first.lq, again.lq)
        assert torch.equal(first.target, again.target)
        assert torch.equal(first.damage, again.damage)
        assert torch.equal(first.tone, again.tone)
        assert not torch.equal(first.lq, other.lq)

    def test_ignores_the_global_generator(self, crops: Tensor) -> None:
        torch.manual_seed(1)
        first = degrade(crops, Degradation(), seeded())
        torch.manual_seed(2)
        assert torch.equal(first.lq, degrade(crops, Degradation(), seeded()).lq)

    @pytest.mark.parametrize("strength", [0.0, 1.0])
    def test_types_ranges_and_clean_input(self, crops: Tensor, strength: float) -> None:
        clean = crops.clone()
        mix = Degradation(untouched=0.1, archive=0.4, halftone=0.3, monochrome=0.3, sepia=0.3, strength=strength)
        batch = degrade(clean, mix, seeded())
        assert torch.equal(clean, crops), "the clean crops must not be changed in place"
        for images in (batch.lq, batch.target):
            assert images.shape == crops.shape
            assert images.dtype == torch.float32
            assert images.abs().max() <= 1.0 + 1e-6

    def test_untouched_images_are_their_target(self, crops: Tensor) -> None:
        batch = degrade(crops, Degradation(untouched=1.0, archive=0.0, halftone=0.0, monochrome=0.5), seeded())
        assert (batch.damage == Damage.UNTOUCHED).all()
        assert torch.equal(batch.lq, batch.target)

    @pytest.mark.parametrize(
        ("mix", "damage"),
        [
            (Degradation(untouched=0.0, archive=0.0, halftone=0.0), Damage.SECOND_ORDER),
            (Degradation(untouched=0.0, archive=1.0, halftone=0.0), Damage.ARCHIVE),
            (Degradation(untouched=0.0, archive=0.0, halftone=1.0), Damage.HALFTONE),
        ],
    )
    def test_damage_is_on_every_input_of_its_kind(self, crops: Tensor, mix: Degradation, damage: Damage) -> None:
        batch = degrade(crops, mix, seeded())
        assert (batch.damage == damage).all()
        assert ((batch.lq - batch.target).abs().amax(dim=(1, 2, 3)) > 0.02).all()

    def test_tone_is_kept_in_the_target(self, crops: Tensor) -> None:
        batch = degrade(crops, Degradation(untouched=0.5, archive=0.2, monochrome=0.4, sepia=0.4), seeded(2))
        assert set(batch.tone.tolist()) == {Tone.ORIGINAL, Tone.MONOCHROME, Tone.SEPIA}
        original, monochrome = batch.tone == Tone.ORIGINAL, batch.tone == Tone.MONOCHROME
        assert torch.equal(batch.target[original], crops[original])
        torch.testing.assert_close(batch.target[monochrome], to_monochrome(crops)[monochrome])
        toned = batch.target[batch.tone == Tone.SEPIA].mean(dim=(2, 3))
        assert (toned[:, 0] > toned[:, 2]).all()

    def test_shares_of_the_mix(self) -> None:
        # Tiny images: the shares need many draws, the pictures do not matter.
        batch = degrade(torch.zeros(2000, 3, 8, 8), Degradation(strength=0.0), seeded())
        damage = torch.bincount(batch.damage, minlength=4) / 2000
        tone = torch.bincount(batch.tone, minlength=3) / 2000
        torch.testing.assert_close(damage, torch.tensor([0.10, 0.60, 0.25, 0.05]), rtol=0.0, atol=0.03)
        torch.testing.assert_close(tone, torch.tensor([0.85, 0.10, 0.05]), rtol=0.0, atol=0.03)

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ({"archive": -0.1}, r"archive must be in \[0, 1\], got -0.1"),
            ({"strength": 2.0}, r"strength must be in \[0, 1\], got 2.0"),
            ({"untouched": 0.8}, r"untouched 0.8 \+ archive 0.25 \+ halftone 0.05 exceed 1"),
            ({"monochrome": 0.7, "sepia": 0.7}, r"monochrome 0.7 \+ sepia 0.7 exceed 1"),
        ],
    )
    def test_impossible_mixes_are_refused(self, shares: dict[str, float], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            Degradation(**shares)


class TestByStrength:
    def test_every_group_has_a_strength_of_its_own(self) -> None:
        mix = Degradation(untouched=0.0, archive=0.0, halftone=0.0, monochrome=0.0, sepia=0.0)
        clean = torch.zeros(64, 3, 32, 32)
        batch = degrade_by_strength(clean, mix, seeded(1))
        assert torch.equal(batch.target, clean)
        of_group = batch.lq.square().mean(dim=(1, 2, 3)).view(16, 4).mean(dim=1)
        assert of_group.max() > 10 * of_group.min()
        assert torch.equal(batch.lq, degrade_by_strength(clean, mix, seeded(1)).lq)

    def test_a_batch_that_is_no_multiple_keeps_its_size(self, crops: Tensor) -> None:
        batch = degrade_by_strength(crops[:3], Degradation(), seeded())
        assert batch.lq.shape == batch.target.shape == crops[:3].shape
        assert len(batch.damage) == len(batch.tone) == 3


class TestBenchmarks:
    def test_d1_of_a_photograph(self, photograph: Tensor) -> None:
        y = BENCHMARKS["D1"].apply(photograph, seeded())
        assert 20.0 < psnr(y, photograph) < 25.0
        assert torch.equal(y, BENCHMARKS["D1"].apply(photograph, seeded()))

    def test_d2_agrees_with_pillow(self, photograph: Tensor) -> None:
        small = Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.BICUBIC)
        # What remains is Pillow's rounding to 8 bits.
        assert psnr(BENCHMARKS["D2"].apply(photograph, seeded()), to_tensor(np.array(small))) > 50.0

    @pytest.mark.parametrize(("name", "side"), [("SRx4", 9), ("SRx8", 5), ("blur-SRx4-noise-JPEG", 9)])
    def test_sizes(self, photograph: Tensor, name: str, side: int) -> None:
        assert BENCHMARKS[name].apply(photograph[..., :37, :1], seeded()).shape == (1, 3, side, 1)

    def test_every_part_is_applied_and_said(self, photograph: Tensor) -> None:
        whole = Benchmark(blur=2.0, factor=2, noise=20.0, quality=50)
        results = [whole, *(replace(whole, **{part: off}) for part, off in (("blur", 0.0), ("noise", 0.0)))]
        results += [replace(whole, quality=None), replace(whole, factor=1)]
        images = [one.apply(photograph, seeded()) for one in results]
        assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in itertools.combinations(images, 2))
        assert len({str(one) for one in results}) == len(results)
        assert str(whole) == "blur 2, 1/2 of the size, noise 20, JPEG 50"
        assert torch.equal(Benchmark().apply(photograph, seeded()), photograph)


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8).double()])
def test_wrong_images_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\] float32, got"):
        jpeg(x, torch.tensor([50]))


def test_a_parameter_of_the_wrong_length_is_refused(crops: Tensor) -> None:
    with pytest.raises(ValueError, match=r"sigma must hold one value per image, \[8\], got \[2\]"):
        gaussian_blur(crops, torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("generator_device", ["cpu", "cuda"])
def test_images_on_a_gpu(crops: Tensor, generator_device: str) -> None:
    mix = Degradation(archive=0.4, halftone=0.2, monochrome=0.3, sepia=0.3)
    first, again = (degrade(crops.cuda(), mix, torch.Generator(generator_device).manual_seed(3)) for _ in range(2))
    assert first.lq.is_cuda
    assert torch.isfinite(first.lq).all()
    assert torch.equal(first.damage, again.damage)
    torch.testing.assert_close(first.target, again.target)
    # JPEG on the GPU must make the same artifacts as on the CPU, up to single rounding decisions.
    quality = torch.linspace(30.0, 95.0, 8)
    assert psnr(jpeg(crops.cuda(), quality).cpu(), jpeg(crops, quality)) > 45.0
