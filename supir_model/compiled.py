"""The denoising networks as one compiled program of static shapes, replayed as a CUDA graph.

Compiling takes minutes, once: what it makes is kept on disk by torch, for the next process on the same machine. The
folder is that of the environment variable TORCHINDUCTOR_CACHE_DIR, else ``supir-batch/compiled`` in the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from supir_model.networks import Conditioning, Networks

CACHE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledNetworks:
    """``Networks`` for inputs of the shapes that it first meets; every other shape is compiled anew."""

    def __init__(self, networks: Networks, backend: str = "inductor") -> None:
        self._networks, self._failure = networks, ""
        os.environ.setdefault(CACHE, str(_user_cache() / "supir-batch" / "compiled"))
        graphs = backend == "inductor" and torch.cuda.is_available()
        self._forward = torch.compile(
            networks.forward,
            backend=backend,
            mode="reduce-overhead" if graphs else None,  # CUDA graphs
            dynamic=False,
            fullgraph=True,
        )

    def __call__(self, x: Tensor, timestep: Tensor, control_scale: Tensor, conditioning: Conditioning) -> Tensor:
        """``Networks.forward``; the result is the caller's, the next call does not overwrite it."""
        if not self._failure:
            torch.compiler.cudagraph_mark_step_begin()
            try:
                return self._forward(x, timestep, control_scale, conditioning).clone()
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from error
                self._failure = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
        return self._networks(x, timestep, control_scale, conditioning)

    @property
    def state(self) -> str:
        """For the log: networks that cannot be compiled on a machine are slower, and no reason to fail."""
        return f"not compiled ({self._failure})" if self._failure else "compiled"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
