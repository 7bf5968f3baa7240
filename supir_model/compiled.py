"""The denoising networks as one compiled program of static shapes, replayed as a CUDA graph.

Compiling takes minutes, once: what it makes is kept on disk by torch, for the next process on the same machine. The
folder is that of the environment variable TORCHINDUCTOR_CACHE_DIR, else ``supir-batch/compiled`` in the user's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supir_model.networks import Conditioning, Networks

CACHE = "TORCHINDUCTOR_CACHE_DIR"

Backend = str | Callable[..., Any]


class CompiledNetworks:
    """``Networks`` for inputs of the shapes that it first meets; every other shape is compiled anew.

    backend: of torch.compile. Its ``inductor`` needs a C++ compiler, and on CUDA Triton, which comes with torch.
    """

    def __init__(self, networks: Networks, backend: Backend = "inductor") -> None:
        os.environ.setdefault(CACHE, str(_user_cache() / "supir-batch" / "compiled"))
        self._networks, self._failure = networks, ""
        self._graphs = backend == "inductor" and torch.cuda.is_available()
        mode = "reduce-overhead" if self._graphs else None  # CUDA graphs
        self._forward = torch.compile(networks.forward, backend=backend, mode=mode, dynamic=False, fullgraph=True)

    def __call__(self, x: Tensor, timestep: Tensor, control_scale: Tensor, conditioning: Conditioning) -> Tensor:
        """``Networks.forward``; the result is the caller's, the next call does not overwrite it.

        Raises torch.OutOfMemoryError, also where memory ran out while compiling.
        """
        if not self._failure:
            try:
                if self._graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                return self._forward(x, timestep, control_scale, conditioning).clone()
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from error
                self._failure = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
        plain: Tensor = self._networks(x, timestep, control_scale, conditioning)
        return plain

    @property
    def state(self) -> str:
        """For the log: networks that cannot be compiled on a machine are slower, and no reason to fail."""
        return f"not compiled ({self._failure})" if self._failure else "compiled"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
