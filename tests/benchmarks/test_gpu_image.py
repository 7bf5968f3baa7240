from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu
import gpu_image
import pytest
import torch
from PIL import Image

from supir_model.config import V0F
from tests.benchmarks.conftest import Run


def test_images_stages_and_stream_are_measured(run: Run, tmp_path: Path) -> None:
    options = ("--folder", str(tmp_path), "--sizes", "512", "--steps", "2", "--together", "1", "2", "--stream", "5")
    measured, printed, code = run("gpu_image", *options)
    assert code == 0
    assert [one["together"] for one in measured["load"]] == [1, 2]
    assert all(one["first window s"] > one["load s"] > 0 for one in measured["load"])
    assert [row["how"] for row in measured["images"]] == ["window batch 1", "window batch 2"]
    assert [(row["side"], row["steps"], row["together"]) for row in measured["images"]] == [(64, 2, 1), (64, 2, 2)]
    for row in measured["images"]:
        assert row["images per hour"] == pytest.approx(3600 / row["s per image"], rel=0.01)
    (stages,) = measured["stages"]
    assert all(stages[f"{stage} s"] > 0 for stage in ("text", "encode", "decode", "transfer"))
    assert "sample 2 s" in stages
    (stream,) = measured["streams"]
    assert stream["images"] == 5
    assert 0 < stream["busy"] <= 1
    assert "not judged here" in printed
    sizes = [(128, 128), (192, 128), (128, 160), (256, 192), (128, 128)]
    written = sorted((tmp_path / "out").iterdir())
    for path, size in zip(written, sizes, strict=True):
        with Image.open(path) as image:
            assert image.size == size


def test_every_image_is_read_once_and_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 3), (i, 0, 255)).save(path)
    with ThreadPoolExecutor(2) as threads:
        groups = list(gpu_image._read_ahead(threads, paths, 2))
    assert [path for group, _ in groups for path in group] == paths
    for i, image in enumerate(image for _, images in groups for image in images):
        assert image.shape == (3, 3, 4)
        assert torch.equal(image[:, 0, 0], torch.tensor([i, 0, 255]) / 127.5 - 1)


@pytest.mark.parametrize(("seconds", "busy", "held"), [(2.4, 0.97, [True, True]), (2.5, 0.9, [False, False])])
def test_on_a_card_the_targets_are_judged(seconds: float, busy: float, held: list[bool]) -> None:
    images = [{"side": 1024, "steps": 50, "s per image": s} for s in (seconds, 9.0)]
    measured = {"machine": {"device": "NVIDIA H200"}, "images": images, "streams": [{"busy": busy}]}
    setup = gpu.Setup(V0F, torch.device("cuda"), "bfloat16")
    assert setup.judged
    assert [one for _, one in gpu_image._targets(measured, setup)] == held
    measured["machine"] = {"device": "another card"}  # which has seconds of its own
    assert [one for _, one in gpu_image._targets(measured, setup)] == held[1:]
