"""Many tensors in pinned memory of the host, without the half of it that goes to waste.

PyTorch rounds each pinned allocation up to a power of two (``CachingHostAllocator``), 272 MiB to 512 for a matrix of a model of
7 billion weights. Here blocks are powers of two to begin with, and are filled with tensors of any sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_LEAST_BLOCK_BYTES = 2**20
_MOST_BLOCK_BYTES = 2**31
"""Larger tensors have a block of their own size."""
_ALIGNMENT = 64


@dataclass(slots=True)
class _Block:
    memory: torch.Tensor
    used: int = 0


class HostBlocks:
    """Memory for tensors that stay: none of it is given to another one later, and each keeps its whole block alive.

    Args:
        pinned: whether a GPU is to reach them while the host goes on.
        device: "meta" to count without taking any.
    """

    def __init__(self, *, pinned: bool, device: str = "cpu") -> None:
        self._pinned = pinned
        self._device = device
        self._blocks: list[_Block] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.memory.nbytes for block in self._blocks)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; a new block is about a quarter of all before it: few are needed, and little is unused."""
        size = shape.numel() * dtype.itemsize
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        block = next((block for block in self._blocks if block.used + taken <= block.memory.nbytes), None)
        if block is None:
            wanted = max(taken, _LEAST_BLOCK_BYTES, min(_MOST_BLOCK_BYTES, self.nbytes // 4))
            block = _Block(self._block(1 << (wanted - 1).bit_length()))
            self._blocks.append(block)
        found = block.memory[block.used : block.used + size].view(dtype).view(shape)
        block.used += taken
        return found

    def _block(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)


def by_itself(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same numbers without the memory around them: files store a tensor's whole memory.

    All of that memory lives on as long as the result does.

    Args:
        tensor: contiguous.
    """
    first = tensor.storage_offset() * tensor.itemsize
    own: Any = tensor.untyped_storage()[first : first + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())
