from __future__ import annotations

import io

import pytest
import torch

from grpo_fast.train.host_memory import HostBlocks, by_itself

MIB = 2**20


def test_tensors_of_any_sizes_fill_blocks() -> None:
    blocks = HostBlocks(pinned=False)
    sizes = [torch.Size(shape) for shape in ((1,), (300, 257), (0,), (7, 3), (2000, 400), (33,), (1000, 1000), (5, 5, 5))]
    tensors = [
        blocks.empty(size, dtype).fill_(number)
        for number, (size, dtype) in enumerate(zip(sizes, [torch.float32] * 8, strict=True))
    ]
    assert [tensor.shape for tensor in tensors] == sizes
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in tensors)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors)), "none lies in another"
    assert blocks.nbytes == (1 + 4 + 4) * MIB, "one for what is small, 3.1 MiB, 3.8 MiB"


def test_blocks_are_powers_of_two_and_little_is_left_of_them() -> None:
    blocks = HostBlocks(pinned=False)
    layer = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864), (896,), (896,)]
    shapes = [(30_000, 896), *(24 * layer), (896,)]
    tensors = [blocks.empty(torch.Size(shape), torch.float32) for shape in shapes]
    needed = sum(tensor.nbytes for tensor in tensors)
    rounded = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors)
    assert all(block.memory.nbytes.bit_count() == 1 for block in blocks._blocks)
    assert needed <= blocks.nbytes < 1.2 * needed < rounded


def test_one_is_saved_without_its_neighbours() -> None:
    blocks = HostBlocks(pinned=False)
    tensors = [blocks.empty(torch.Size((100, 10)), torch.float32).fill_(number) for number in range(3)]
    file = io.BytesIO()
    torch.save(by_itself(tensors[1]), file)
    assert len(file.getvalue()) < 8000
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), torch.ones(100, 10))
    tensors[1].mul_(5)
    alone = by_itself(tensors[1])
    assert torch.equal(alone, torch.full((100, 10), 5.0)), "it is the same memory"
    del blocks, tensors
    assert torch.equal(alone, torch.full((100, 10), 5.0)), "which it keeps"


@pytest.mark.gpu
def test_a_gpu_reaches_them() -> None:
    blocks = HostBlocks(pinned=True)
    tensor = blocks.empty(torch.Size((1000, 1000)), torch.float32)
    assert tensor.is_pinned()
    tensor.copy_(torch.full((1000, 1000), 3.0, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert (tensor == 3.0).all()
