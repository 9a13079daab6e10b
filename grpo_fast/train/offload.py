"""Activations that wait for the backward pass in the host's memory.

With every layer checkpointed, only each layer's input has to be kept. It is copied to the host while the next layers compute,
on a stream of its own, and fetched while the backward pass is at the layer after it. So the device holds the inputs of two
layers, whatever their number. Nothing is rounded: the same bits come back.

The host launches work long before the device does it. With ``record_stream`` the allocator would keep memory until the device
has got there, by which time the host has launched all layers and none of their inputs is freed. So a tensor is held here, and
released once the stream that made it, and that will use its memory next, has been told to wait for the copy.

PyTorch's ``torch.autograd.graph.save_on_cpu`` does the same with copies that the device waits for.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_LEAST_BYTES = 2**16
"""Smaller tensors stay on the device: a copy would cost more than the memory is worth."""
_LEAVING = 2
"""Tensors that may be in transit at a time; with more, the device waits for the first."""


@dataclass(eq=False, slots=True)
class _Waiting:
    """A tensor that is in the host's memory."""

    host: torch.Tensor
    before: _Waiting | None
    """The tensor that left before it, which the backward pass needs after it."""
    back: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        """Memory of a copy that came back unused is not reused before the copy is done."""
        if self.back is not None and self.arrived is not None:
            torch.cuda.current_stream(self.back.device).wait_event(self.arrived)


class HostActivations:
    """Keeps in the host's memory what autograd saves of forward passes that run in :meth:`keep`.

    Args:
        device: where the model computes. On a CPU everything is done at once, in plain copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Waiting | None = None
        self._leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def keep(self) -> Iterator[None]:
        """Context in which tensors that autograd saves wait in the host's memory, but for leaves (weights) and small ones."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._put, self._get):
                yield
        finally:
            self._last = None
            self._let_go(all_but=0)

    def _put(self, tensor: torch.Tensor) -> torch.Tensor | _Waiting:
        if tensor.is_leaf or tensor.nbytes < _LEAST_BYTES or tensor.device.type != self._device.type:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._copies is not None)
        if self._copies is None:
            host.copy_(tensor)
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copies):
                host.copy_(tensor.detach(), non_blocking=True)
            self._leaving.append((tensor.detach(), self._copies.record_event()))
            self._let_go(all_but=_LEAVING)
        self._last = _Waiting(host, self._last)
        return self._last

    def _get(self, kept: torch.Tensor | _Waiting) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self._fetch(kept)
        if kept.before is not None:
            self._fetch(kept.before)
        back, kept.back = kept.back, None
        assert back is not None
        if kept.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.arrived)
        return back

    def _fetch(self, kept: _Waiting) -> None:
        if kept.back is not None:
            return
        if self._copies is None:
            kept.back = kept.host.to(self._device, copy=True)
            return
        here = torch.cuda.current_stream(self._device)
        kept.back = torch.empty_like(kept.host, device=self._device)  # allocated on the stream that will release it
        self._copies.wait_stream(here)  # which may still be using what was there before
        with torch.cuda.stream(self._copies):
            kept.back.copy_(kept.host, non_blocking=True)
            kept.arrived = self._copies.record_event()

    def _let_go(self, *, all_but: int) -> None:
        """Releases the tensors that left first, once the device has been told to wait for their copies."""
        while len(self._leaving) > all_but:
            tensor, copied = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(copied)
