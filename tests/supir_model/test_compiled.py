"""The compiled networks on the CPU: the same program, through another backend."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supir_model.attention import fuse_projections
from supir_model.compiled import CompiledNetworks
from supir_model.config import TINY
from supir_model.float8 import use_float8
from supir_model.memory import Rung
from supir_model.model import Request, Sampling, SupirModel
from supir_model.networks import Conditioning, Networks
from supir_model.sampler import EDMSettings

SAMPLING = Sampling(EDMSettings(2, restoration_tau=1.0, churn=2.0, window=16, stride=8), 1.5, 2.0, "wavelet")
CPU = torch.device("cpu")

# torch's own modules for compiling use what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def fused(networks: Networks) -> Networks:
    """As on CUDA."""
    fuse_projections(networks.control)
    fuse_projections(networks.unet)
    return networks


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [Request(torch.rand(3, 72, side, generator=generator) * 2 - 1, "p", "blurry", side) for side in (80, 40)]


def _kept(graphs: list[torch.fx.GraphModule], graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
    """A backend that runs programs as they are, and shows them."""
    graphs.append(graph)
    return graph.forward


def test_full_windows_run_compiled_in_one_program_and_give_the_same(fused: Networks) -> None:
    """One graph without a break, compiled once for all steps; the narrow image's windows run as they are."""
    graphs: list[torch.fx.GraphModule] = []
    plain = SupirModel(fused, TINY, CPU, rungs=[Rung(2)])
    model = SupirModel(fused, TINY, CPU, rungs=[Rung(2)], backend=partial(_kept, graphs))
    for ours, wanted in zip(model.restore(requests(), SAMPLING), plain.restore(requests(), SAMPLING), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert len(graphs) == 1
    assert model.execution == "window batch 2, compiled"
    with model.in_float32():
        model.restore(requests(), SAMPLING)
        assert model.execution == "window batch 2"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of diffusers, in bfloat16
def test_products_in_float8_are_a_part_of_the_program(fused: Networks) -> None:
    graphs: list[torch.fx.GraphModule] = []
    networks = copy.deepcopy(fused)
    for net in (networks.control, networks.unet):
        use_float8(net.bfloat16(), CPU)
    plain = SupirModel(networks, TINY, CPU, "float8", rungs=[Rung(2)])
    model = SupirModel(networks, TINY, CPU, "float8", rungs=[Rung(2)], backend=partial(_kept, graphs))
    for ours, wanted in zip(model.restore(requests(), SAMPLING), plain.restore(requests(), SAMPLING), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    (graph,) = graphs
    assert model.execution == "window batch 2, compiled"
    assert sum("scaled_mm" in str(node.target) for node in graph.graph.nodes) > 1


def test_what_cannot_be_compiled_runs_all_the_same_and_says_so(fused: Networks) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise RuntimeError("no C++ compiler found")

    model = SupirModel(fused, TINY, CPU, rungs=[Rung(2)], backend=broken)
    plain = SupirModel(fused, TINY, CPU, rungs=[Rung(2)])
    for ours, wanted in zip(model.restore(requests(), SAMPLING), plain.restore(requests(), SAMPLING), strict=True):
        assert torch.equal(ours, wanted)
    assert model.execution == "window batch 2, not compiled (RuntimeError: no C++ compiler found)"


def test_memory_that_runs_out_while_compiling_is_a_matter_of_the_ladder(fused: Networks) -> None:
    def greedy(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = torch.zeros(1, 8, 16, 16)
    told = Conditioning(torch.zeros(1, 48, 128), torch.zeros(1, 128), x)
    with pytest.raises(torch.OutOfMemoryError):
        CompiledNetworks(fused, greedy)(x, torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, 1, 1), told)


def test_what_is_compiled_is_kept_in_the_users_cache_or_where_torch_is_told(
    fused: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    CompiledNetworks(fused)
    assert cache_dir() == str(tmp_path / "supir-batch" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    CompiledNetworks(fused)
    assert cache_dir() == str(tmp_path / "shared")
