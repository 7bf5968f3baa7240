"""Windows of many images share batches of one fixed size: what a window becomes does not depend on its company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_model import sampler
from supir_model.config import TINY
from supir_model.memory import Ladder, Rung
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Networks
from supir_model.sampler import EDMSettings, Window, windows_of

SAMPLING = Sampling(EDMSettings(2, restoration_tau=1.0, churn=2.0, window=16, stride=8), 1.5, 2.0, "wavelet")
ROUNDING = 2e-4  # between batch sizes, of a range of 2; measured on these weights: below 3e-5


@pytest.fixture(scope="module")
def supir(networks: Networks) -> SupirModel:
    return SupirModel(networks, TINY, torch.device("cpu"))


@contextmanager
def window_batch(model: SupirModel, size: int) -> Iterator[None]:
    before, model.ladder = model.ladder, Ladder([Rung(size)], model.device)
    yield
    model.ladder = before


def request(height: int, width: int, seed: int) -> Request:
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Request(image, f"picture {seed}", "blurry", seed)


sides = st.integers(1, 90)


@hypothesis_settings(deadline=None, max_examples=6)
@given(sizes=st.lists(st.tuples(sides, sides), min_size=2, max_size=4), size=st.integers(2, 5))
def test_company_and_order_do_not_change_a_bit(supir: SupirModel, sizes: list[tuple[int, int]], size: int) -> None:
    requests = [request(*one, seed) for seed, one in enumerate(sizes)]
    with window_batch(supir, size):
        together = supir.restore(requests, SAMPLING)
        backwards = supir.restore(requests[::-1], SAMPLING)[::-1]
        alone = [supir.restore([one], SAMPLING)[0] for one in requests]
    for one, batched, reversed_ in zip(alone, together, backwards, strict=True):
        assert torch.equal(batched, one)
        assert torch.equal(reversed_, one)


def test_another_window_batch_changes_rounding_only(supir: SupirModel) -> None:
    one = request(70, 93, 0)
    with window_batch(supir, 1):
        (single,) = supir.restore([one], SAMPLING)
    for size in (2, 3, 8):
        with window_batch(supir, size):
            (batched,) = supir.restore([one], SAMPLING)
        torch.testing.assert_close(batched, single, rtol=0, atol=ROUNDING)


def test_networks_meet_one_batch_size(supir: SupirModel) -> None:
    seen: set[tuple[int, ...]] = set()
    watch = supir.networks.register_forward_pre_hook(lambda module, inputs: seen.add(tuple(inputs[0].shape)))
    with window_batch(supir, 3):
        supir.restore([request(64, 64, 0), request(70, 93, 1), request(64, 40, 2)], SAMPLING)
    watch.remove()
    assert seen == {(6, 8, 16, 16), (6, 8, 16, 12)}  # both halves of the guidance, and the shape of a narrow image


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    size=st.integers(1, 7),
)
def test_every_window_counts_once_and_every_batch_is_full(sizes: list[tuple[int, int]], size: int) -> None:
    batches: list[Sequence[Window]] = []

    def guided(x: torch.Tensor, sigma: torch.Tensor, scale: torch.Tensor, batch: Sequence[Window]) -> torch.Tensor:
        assert len(x) == len(sigma) == len(scale) == len(batch) == size
        assert {(w.height, w.width) for w in batch} == {tuple(x.shape[2:])}
        batches.append(batch)
        places = [w.item + 0.1 * w.index for w in batch]
        return torch.zeros_like(x) + torch.tensor(places)[:, None, None, None]

    centers = [torch.zeros(1, *one) for one in sizes]
    settings = EDMSettings(1, window=16, stride=8)
    latents = sampler.sample(guided, centers, lambda item, draw: torch.zeros(1, *sizes[item]), settings, size)
    wanted = [window for item, one in enumerate(sizes) for window in windows_of(item, *one, 16, 8)]
    shapes = {(window.height, window.width) for window in wanted}
    assert {window for batch in batches for window in batch} == set(wanted)
    counts = [sum((w.height, w.width) == shape for w in wanted) for shape in shapes]
    assert len(batches) == sum(-(-count // size) for count in counts)

    # the mean that windows of these values have at each place, were each of them added once
    for item, latent in enumerate(latents):
        total, weight = torch.zeros_like(latent), torch.zeros_like(latent)
        for window in (w for w in wanted if w.item == item):
            share = sampler.window_weights(window.height, window.width).float()
            window.crop(total).add_(share * (item + 0.1 * window.index))
            window.crop(weight).add_(share)
        torch.testing.assert_close(latent, total / weight, rtol=0, atol=1e-5)


def test_rounds_end_where_batches_are_full(supir: SupirModel) -> None:
    """So that decoding can begin, and filling is never computed for it."""
    steps = []
    watch = supir.networks.register_forward_pre_hook(lambda module, inputs: steps.append(len(inputs[0])))
    with window_batch(supir, 2):
        rounds = supir._rounds([request(64, side, 0) for side in (64, 40, 64, 40, 64, 64, 64)], SAMPLING.sampler)
        assert [len(together) for together in rounds] == [4, 2, 1]
        supir.restore([request(64, 64, seed) for seed in range(5)], SAMPLING)
    watch.remove()
    assert len(steps) == SAMPLING.sampler.steps * 3
