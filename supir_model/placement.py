"""Where networks are while they work, and how what they made gets to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Fetch = Callable[[], Tensor]
"""Waits until a result is in host memory, and returns it"""


class Placement:
    """Which parts of a module are on the device; the others wait in host memory."""

    def __init__(self, whole: nn.Module, device: torch.device) -> None:
        self._parts, self._device = dict(whole.named_children()), device
        self._here = {name for name, part in self._parts.items() if _device_of(part) == device.type}

    def need(self, *names: str, alone: bool) -> None:
        """Have these parts on the device: ``alone``, or with all others. Raises torch.OutOfMemoryError."""
        wanted = set(names) if alone else set(self._parts)
        with torch.inference_mode(False):  # weights outlive the call
            for name in sorted(self._here - wanted):
                self._parts[name].to("cpu")
                self._here.discard(name)
            for name in sorted(wanted - self._here):
                self._parts[name].to(self._device)
                self._here.add(name)


class Beside:
    """A second stream of work for a CUDA device, so that one result is finished while the next is begun.

    Elsewhere work is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], Tensor], *reads: Tensor) -> Fetch:
        """Begin ``work``, which uses the tensors ``reads`` of the main stream; the result is fetched when needed."""
        if self._stream is None:
            done = work().cpu()
            return lambda: done
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            made = work()
            host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
            host.copy_(made, non_blocking=True)
            finished = self._stream.record_event()
        for tensor in reads:
            tensor.record_stream(self._stream)  # its memory is free when this stream has read it

        def fetch() -> Tensor:
            finished.synchronize()
            return host

        return fetch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; CUDA copies it from page-locked memory while the host goes on."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _device_of(module: nn.Module) -> str:
    return next(module.parameters()).device.type
