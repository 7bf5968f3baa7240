from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from skimage import data

from supir_model.errors import RequestError
from supir_model.training.datasets import PhotographCrops, find_photographs, load_image, read_captions


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Rows in red, columns in green: a pixel tells where it came from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def saved(folder: Path, *images: npt.NDArray[np.uint8]) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


class TestFindPhotographs:
    def test_a_folder_gives_all_in_sorted_order(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        for name in ("b/first.png", "a.png", "c.jpg"):
            (tmp_path / name).write_bytes(b"")
        assert [path.name for path in find_photographs(tmp_path)] == ["a.png", "first.png", "c.jpg"]

    def test_a_list_gives_its_own_order(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("z/2.png\n\n1.png\n")
        assert find_photographs(tmp_path / "list.txt") == [tmp_path / "z/2.png", tmp_path / "1.png"]

    def test_nothing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="holds no files"):
            find_photographs(tmp_path)
        with pytest.raises(RequestError, match="neither a folder"):
            find_photographs(tmp_path / "missing")


class TestReadCaptions:
    def test_reads_files_and_captions(self, tmp_path: Path) -> None:
        (tmp_path / "c.tsv").write_text('a.png\ta "boat", at sea\nb.png\t une église \n', "utf-8")
        assert read_captions(tmp_path / "c.tsv") == {"a.png": 'a "boat", at sea', "b.png": "une église"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [("a.png a boat\n", "line 1: expected file, tab"), ("a\tb\na\tc\n", "line 2: 'a' already has a caption")],
    )
    def test_other_shapes_are_errors(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "c.tsv").write_text(text)
        with pytest.raises(RequestError, match=message):
            read_captions(tmp_path / "c.tsv")
        with pytest.raises(RequestError, match="cannot be read"):
            read_captions(tmp_path / "none.tsv")


class TestLoadImage:
    def test_gray_and_color_become_rgb(self, tmp_path: Path) -> None:
        gray, color = saved(tmp_path, np.full((5, 6), 200, dtype=np.uint8), ramp(20, 30))
        assert load_image(gray).shape == (5, 6, 3)
        assert load_image(gray).dtype == np.uint8
        assert (load_image(gray) == 200).all()
        np.testing.assert_array_equal(load_image(color), ramp(20, 30))

    def test_turns_by_exif(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # Orientation: the first column of the scene is stored as the first row.
        Image.fromarray(ramp(20, 30)).save(tmp_path / "turned.png", exif=exif)
        np.testing.assert_array_equal(load_image(tmp_path / "turned.png"), np.rot90(ramp(20, 30), -1))

    def test_a_file_that_is_no_image_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(RequestError, match=r"notes\.txt' cannot be used as a training photograph"):
            load_image(tmp_path / "notes.txt")

    def test_a_truncated_file_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.jpg"
        Image.fromarray(data.astronaut()[:128, :128]).save(path)
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(RequestError, match=r"cut\.jpg' cannot be used"):
            load_image(path)

    def test_a_mode_without_a_plain_conversion_is_an_error(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(RequestError, match=r"deep\.png' cannot be used .* mode is I;16, expected one of RGB, L"):
            load_image(tmp_path / "deep.png")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> PhotographCrops:
    folder = tmp_path_factory.mktemp("photographs")
    return PhotographCrops(saved(folder, data.astronaut()[:200, :300], data.coffee()[:150, :160]))


class TestPhotographCrops:
    def test_shape_type_range(self, photographs: PhotographCrops) -> None:
        batch = photographs.batch(seeded(), 5, 64).clean
        assert batch.shape == (5, 3, 64, 64)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous()
        assert -1.0 <= float(batch.min()) < -0.5
        assert 0.5 < float(batch.max()) <= 1.0
        assert len(photographs) == 2

    def test_is_determined_by_the_generator(self, photographs: PhotographCrops) -> None:
        generator = seeded(1)
        first, second = (photographs.batch(generator, 4, 48).clean for _ in range(2))
        assert torch.equal(first, photographs.batch(seeded(1), 4, 48).clean)
        assert not torch.equal(first, second)

    def test_files_read_anew_give_the_same(self, tmp_path: Path) -> None:
        paths = saved(tmp_path, data.astronaut()[:200, :300], data.coffee()[:150, :160])
        captions = {"1.png": "coffee"}
        held, lazy = (PhotographCrops(paths, captions, in_memory=held) for held in (True, False))
        first, second = held.batch(seeded(2), 12, 48), lazy.batch(seeded(2), 12, 48)
        assert torch.equal(first.clean, second.clean)
        assert first.captions == second.captions
        assert set(first.captions) == {"", "coffee"}
        paths[0].unlink()
        assert torch.equal(held.batch(seeded(2), 12, 48).clean, first.clean)
        with pytest.raises(RequestError, match=r"0\.png' cannot be used"):
            lazy.batch(seeded(2), 12, 48)

    def test_crops_are_windows_at_all_places_flips_and_scales(self, tmp_path: Path) -> None:
        batch = PhotographCrops(saved(tmp_path, ramp(96, 128))).batch(seeded(), 300, 32).clean
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

    def test_a_copy_smaller_than_the_crop_is_not_used(self, tmp_path: Path) -> None:
        image = ramp(60, 60)
        batch = PhotographCrops(saved(tmp_path, image)).batch(seeded(), 20, 60).clean
        # Only the full size is large enough, so every crop is the photograph itself or its mirror image.
        expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1.0
        for crop in batch:
            assert torch.equal(crop, expected) or torch.equal(crop, expected.flip(-1))

    def test_a_crop_larger_than_a_photograph_is_an_error(self, photographs: PhotographCrops) -> None:
        with pytest.raises(RequestError, match=r"crop 151x151 is larger than '1.png', which is 160x150"):
            photographs.batch(seeded(), 9, 151)

    def test_empty_requests_are_errors(self, photographs: PhotographCrops) -> None:
        with pytest.raises(RequestError, match="no photographs"):
            PhotographCrops([])
        with pytest.raises(RequestError, match="at least 1, got 0 and 64"):
            photographs.batch(seeded(), 0, 64)
