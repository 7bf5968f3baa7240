from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from skimage import data

from supir_model.errors import RequestError
from supir_model.training.datasets import PhotographCrops, load_images


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Rows in red, columns in green: a pixel tells where it came from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


class TestLoadImages:
    def test_reads_all_in_sorted_order_as_rgb(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        Image.fromarray(ramp(20, 30)).save(tmp_path / "b" / "first.png")
        Image.fromarray(np.full((5, 6), 200, dtype=np.uint8)).save(tmp_path / "a.png")
        gray, color = load_images(tmp_path)
        assert gray.shape == (5, 6, 3)
        assert gray.dtype == np.uint8
        assert (gray == 200).all()
        np.testing.assert_array_equal(color, ramp(20, 30))

    def test_turns_by_exif(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # Orientation: the first column of the scene is stored as the first row.
        Image.fromarray(ramp(20, 30)).save(tmp_path / "turned.png", exif=exif)
        (image,) = load_images(tmp_path)
        np.testing.assert_array_equal(image, np.rot90(ramp(20, 30), -1))

    def test_a_file_that_is_no_image_is_an_error(self, tmp_path: Path) -> None:
        Image.fromarray(ramp(8, 8)).save(tmp_path / "good.png")
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(RequestError, match=r"notes\.txt' cannot be used as a training photograph"):
            load_images(tmp_path)

    def test_a_truncated_file_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.jpg"
        Image.fromarray(data.astronaut()[:128, :128]).save(path)
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(RequestError, match=r"cut\.jpg' cannot be used"):
            load_images(tmp_path)

    def test_a_mode_without_a_plain_conversion_is_an_error(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(RequestError, match=r"deep\.png' cannot be used .* mode is I;16, expected one of RGB, L"):
            load_images(tmp_path)

    def test_an_empty_or_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="holds no files"):
            load_images(tmp_path)
        with pytest.raises(RequestError, match="is not a folder"):
            load_images(tmp_path / "missing")


@pytest.fixture(scope="module")
def photographs() -> PhotographCrops:
    return PhotographCrops([data.astronaut()[:200, :300], data.coffee()[:150, :160]])


class TestPhotographCrops:
    def test_shape_type_range(self, photographs: PhotographCrops) -> None:
        batch = photographs.batch(seeded(), 5, 64)
        assert batch.shape == (5, 3, 64, 64)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous()
        assert -1.0 <= float(batch.min()) < -0.5
        assert 0.5 < float(batch.max()) <= 1.0
        assert len(photographs) == 2

    def test_is_determined_by_the_generator(self, photographs: PhotographCrops) -> None:
        generator = seeded(1)
        first, second = photographs.batch(generator, 4, 48), photographs.batch(generator, 4, 48)
        assert torch.equal(first, photographs.batch(seeded(1), 4, 48))
        assert not torch.equal(first, second)

    def test_crops_are_windows_at_all_places_flips_and_scales(self) -> None:
        batch = PhotographCrops([ramp(96, 128)]).batch(seeded(), 300, 32)
        levels = (batch + 1.0) * 127.5
        torch.testing.assert_close(levels[:, 2], torch.full((300, 32, 32), 7.0), rtol=0.0, atol=1e-3)
        # Steps of the ramp between neighbors: its sign is the flip, its size the factor of the downscale.
        steps = (levels[:, 1, 16, 24] - levels[:, 1, 16, 8]) / 16.0
        flipped = float((steps < 0).float().mean())
        assert 0.4 < flipped < 0.6
        sizes = steps.abs()
        for factor in (1.0, 1.5, 2.0):
            share = float(((sizes - factor).abs() < 0.1).float().mean())
            assert 0.23 < share < 0.44, factor
        full = levels[(sizes - 1.0).abs() < 0.01]
        tops = full[:, 0, 0, 0].round()
        lefts = full[:, 1, 0].amin(dim=1).round()
        assert int(tops.min()) <= 3
        assert int(tops.max()) >= 96 - 32 - 3
        assert int(lefts.min()) <= 3
        assert int(lefts.max()) >= 128 - 32 - 3

    def test_a_copy_smaller_than_the_crop_is_not_used(self) -> None:
        image = ramp(60, 60)
        batch = PhotographCrops([image]).batch(seeded(), 20, 60)
        # Only the full size is large enough, so every crop is the photograph itself or its mirror image.
        expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1.0
        for crop in batch:
            assert torch.equal(crop, expected) or torch.equal(crop, expected.flip(-1))

    def test_a_crop_larger_than_a_photograph_is_an_error(self, photographs: PhotographCrops) -> None:
        with pytest.raises(RequestError, match=r"crop 151x151 is larger than photograph 1, which is 160x150"):
            photographs.batch(seeded(), 1, 151)

    def test_empty_requests_are_errors(self, photographs: PhotographCrops) -> None:
        with pytest.raises(RequestError, match="no photographs"):
            PhotographCrops([])
        with pytest.raises(RequestError, match="at least 1, got 0 and 64"):
            photographs.batch(seeded(), 0, 64)

    def test_arrays_of_another_layout_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"photograph 1 must be \[H, W, 3\] uint8, got \[4, 4\] float64"):
            PhotographCrops([ramp(4, 4), np.zeros((4, 4))])  # type: ignore[list-item]
