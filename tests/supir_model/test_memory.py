"""The ladder of memory on the real networks, with out-of-memory errors put into them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from supir_model.config import TINY
from supir_model.memory import LADDER, Costs, Ladder, Rung, choose, rungs_of
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Conditioning, Networks
from supir_model.placement import Placement
from supir_model.sampler import EDMSettings
from supir_model.vae_tiling import WHOLE, VAETiling

SAMPLING = Sampling(EDMSettings(2, restoration_tau=1.0, churn=2.0, window=16, stride=8), 1.5, 2.0, "wavelet")
GIB = 2**30
CPU = torch.device("cpu")


def requests(count: int = 3) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [Request(torch.rand(3, 72, 80, generator=generator) * 2 - 1, f"p {i}", "blurry", i) for i in range(count)]


@contextmanager
def out_of_memory(module: torch.nn.Module, too_much: Callable[[Tensor], bool]) -> Iterator[list[int]]:
    """The module runs out of memory on such inputs; how often is told."""
    times: list[int] = []

    def raising(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if too_much(inputs[0]):
            times.append(len(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = module.register_forward_pre_hook(raising)
    yield times
    hook.remove()


def test_too_many_windows_step_down_and_the_result_is_that_of_the_lower_rung(networks: Networks) -> None:
    rungs = [Rung(8), Rung(4), Rung(2), Rung(1)]
    model = SupirModel(networks, TINY, CPU, rungs=rungs)
    lower = SupirModel(networks, TINY, CPU, rungs=[Rung(2)])
    with out_of_memory(networks.unet, lambda x: len(x) > 2 * 2) as times:  # guidance doubles the windows
        restored = model.restore(requests(), SAMPLING)
    assert times == [16, 8]
    assert model.ladder.rung == Rung(2)
    assert model.execution == ("window batch 2; memory ran out with window batch 8; memory ran out with window batch 4")
    for ours, wanted in zip(restored, lower.restore(requests(), SAMPLING), strict=True):
        assert torch.equal(ours, wanted)
    model.restore(requests(1), SAMPLING)
    assert model.execution == "window batch 2"  # it stays there; only the first call was interrupted


def test_memory_that_runs_out_in_the_middle_begins_the_sampling_anew(networks: Networks) -> None:
    model = SupirModel(networks, TINY, CPU, rungs=[Rung(4), Rung(2)])
    calls = iter([False] * 5 + [True] + [False] * 1000)
    with out_of_memory(networks.control, lambda x: next(calls)):
        restored = model.restore(requests(), SAMPLING)
    lower = SupirModel(networks, TINY, CPU, rungs=[Rung(2)]).restore(requests(), SAMPLING)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(restored, lower, strict=True))


def test_a_vae_that_is_too_large_works_in_strips(networks: Networks) -> None:
    model = SupirModel(networks, TINY, CPU, rungs=[Rung(1), Rung(1, 64), Rung(1, 32)])
    (whole,) = model.restore(requests(1), SAMPLING)
    with out_of_memory(networks.vae.autoencoder.decoder, lambda z: True) as times:
        (restored,) = model.restore(requests(1), SAMPLING)
    assert len(times) == 1
    assert model.execution == "window batch 1, VAE tile 64; memory ran out with window batch 1"
    torch.testing.assert_close(restored, whole, rtol=0, atol=1e-3)


def test_the_last_rung_hands_the_error_on_and_the_next_image_is_fine(networks: Networks) -> None:
    model = SupirModel(networks, TINY, CPU, rungs=[Rung(2), Rung(1)])
    with out_of_memory(networks.unet, lambda x: True) as times, pytest.raises(torch.OutOfMemoryError):
        model.restore(requests(1), SAMPLING)
    assert times == [4, 2]
    assert model.restore(requests(1), SAMPLING)[0].isfinite().all()


def test_a_failed_attempt_holds_no_tensors() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def work(rung: Rung) -> int:
        if rung.window_batch > 1:
            large = torch.zeros(1000)
            kept.append(weakref.ref(large))
            raise torch.OutOfMemoryError
        return sum(one() is not None for one in kept)

    assert Ladder([Rung(4), Rung(2), Rung(1)], CPU).attempt(work) == 0
    assert len(kept) == 2


def test_offloaded_networks_come_and_go_and_compute_the_same(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = SupirModel(networks, TINY, CPU, rungs=[Rung(2)]).restore(requests(2), SAMPLING)
    model = SupirModel(networks, TINY, CPU, rungs=[Rung(2, offload=True)])
    working: list[set[str]] = []
    need = Placement.need

    def watched(self: Placement, *names: str, alone: bool) -> None:
        need(self, *names, alone=alone)
        working.append(set(self._here))

    monkeypatch.setattr(Placement, "need", watched)
    restored = model.restore(requests(2), SAMPLING)
    assert all(torch.equal(ours, one) for ours, one in zip(restored, wanted, strict=True))
    assert {frozenset(one) for one in working} == {
        frozenset({"vae"}),
        frozenset({"text"}),
        frozenset({"control", "unet"}),
    }


def test_a_vae_tiling_that_was_asked_for_is_kept_where_it_matters() -> None:
    released = VAETiling("released", 512)
    assert Rung(1, 256).tiling(released) == released  # another one would be another picture
    assert Rung(1).tiling(VAETiling("exact", 512)) == VAETiling("exact", 512)
    assert Rung(1, 256).tiling(VAETiling("exact", 512)) == VAETiling("exact", 256)
    assert Rung(1, 1024).tiling(VAETiling("exact", 512)) == VAETiling("exact", 512)
    assert Rung(1, 1024).tiling(WHOLE) == VAETiling("exact", 1024)


costs = st.builds(
    lambda denoiser, vae, text, step, window, pixel: Costs(denoiser + vae + text, denoiser, vae, step, window, pixel),
    st.integers(0, 20 * GIB),
    st.integers(0, 2 * GIB),
    st.integers(0, 4 * GIB),
    st.integers(0, 4 * GIB),
    st.integers(0, 4 * GIB),
    st.floats(0, 20_000),
)


@given(costs=costs, small=st.integers(0, 160), more=st.integers(0, 160), windows=st.integers(1, 16))
def test_more_memory_never_means_a_lower_rung(costs: Costs, small: int, more: int, windows: int) -> None:
    ladder = rungs_of(windows)
    chosen, higher = choose(ladder, costs, small * GIB), choose(ladder, costs, (small + more) * GIB)
    assert set(chosen) <= set(higher)
    assert costs.of(chosen[0]) <= small * GIB or chosen == ladder[-1:]
    assert all(rung.window_batch <= windows for rung in ladder)


def test_each_class_of_card_has_a_rung_of_its_own() -> None:
    """With costs as they could be: half-precision weights of an SDXL model, and a gigabyte or so for a window."""
    costs = Costs(10 * GIB, 8 * GIB, GIB // 4, GIB, int(1.2 * GIB), 2400.0)
    first = [choose(LADDER, costs, card * GIB)[0] for card in (12, 16, 24, 48, 80)]
    assert first == sorted(first, key=LADDER.index, reverse=True)
    assert len(set(first)) == len(first)
    assert first[0].offload
    assert not first[1].offload


class _Allocated(TorchDispatchMode):
    """Most bytes of tensors alive at once that were made in it: what CUDA counts for us, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in inside | self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def _peak(work: Callable[[], object]) -> int:
    gc.collect()
    with _Allocated() as allocated:
        work()
    return allocated.peak


def test_costs_are_measured_and_foretell_larger_batches(networks: Networks) -> None:
    model = SupirModel(networks, TINY, CPU)
    costs = model.costs(_peak)
    assert costs.weights == sum(4 * p.numel() for p in networks.parameters())
    assert 0 < costs.vae < costs.denoiser < costs.weights
    assert costs.window > 16 * TINY.window**2  # a window in and out at the least
    assert costs.pixel > 12

    x = torch.zeros(2 * 4, 8, TINY.window, TINY.window)
    told = Conditioning(torch.zeros(8, 48, 128), torch.zeros(8, 128), x)
    with torch.inference_mode():
        four = _peak(lambda: networks(x, torch.zeros(8, dtype=torch.int64), torch.ones(8, 1, 1, 1), told))
    assert four == pytest.approx(costs.step + 4 * costs.window, rel=0.1)
