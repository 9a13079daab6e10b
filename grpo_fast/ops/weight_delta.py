"""The changes between two versions of a bucket, bit by bit: ordered indices, values, and a checksum of the new one.

    indices   {i : bits(new_i) != bits(old_i)}, ascending, int32
    values    new[indices]
    checksum  Σ_j (word_j ^ word_j >> 32) * (2 j + 1) * 0x9e3779b97f4a7c15  mod 2^64, over the 8-byte words of new and zeros

Comparing bits, not numbers, finds -0 where 0 was and leaves a NaN that stayed alone. A changed element costs 4 bytes and its
own size; where they would be more than the whole bucket, the delta holds the bucket instead. The checksum's factors are odd and
its fold has an inverse, so that no single word can change without it. Both versions are read once; no atomics but the
checksum's sum of integers, so the result is the same on every device and number of threads.

Source: verl's ``delta_sharded`` and vLLM's ``sparse_nccl`` transfer, whose patches :func:`split_delta` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from grpo_fast.ops import native
from grpo_fast.ops.dispatch import Impl, Implementation, resolve
from grpo_fast.ops.weight_pack import Bucket

CHECKSUM_PRIME = 0x9E3779B97F4A7C15
_INDEX_BYTES = 4
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """How to make the new version of a bucket from the old one."""

    indices: torch.Tensor | None
    """int32 [C], ascending; ``None`` where the whole bucket is smaller."""
    values: torch.Tensor
    """[C], or the whole new bucket."""
    checksum: int
    """Checksum of the new bucket."""
    num_changed: int
    """C, also where the whole bucket is sent."""

    @property
    def num_bytes(self) -> int:
        """Bytes to send."""
        return self.values.nbytes + (0 if self.indices is None else self.indices.nbytes)


class SlotPatch(NamedTuple):
    """The part of a delta that belongs to one weight, in the weight's own flat indices."""

    weight: int
    """Index of the weight, as in its slot."""
    indices: torch.Tensor
    """int64, ascending."""
    values: torch.Tensor
    full_shape: tuple[int, ...]


def checksum_reference(bucket: torch.Tensor) -> int:
    """The checksum of a bucket, in plain PyTorch."""
    data = bucket.view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    odd = 2 * torch.arange(len(words), dtype=torch.int64, device=words.device) + 1
    folded = words ^ ((words >> 32) & 0xFFFFFFFF)
    return int((folded * odd * (CHECKSUM_PRIME - 2**64)).sum())


def weight_delta_reference(old: torch.Tensor, new: torch.Tensor, capacity: int) -> WeightDelta:
    """The specification of :func:`weight_delta`, in plain PyTorch."""
    bits = _BITS[new.element_size()]
    changed = (old.view(bits) != new.view(bits)).nonzero()[:, 0]
    checksum = checksum_reference(new)
    if len(changed) > capacity:
        return WeightDelta(None, new, checksum, len(changed))
    return WeightDelta(changed.int(), new.view(bits)[changed].view(new.dtype), checksum, len(changed))


def _delta_native(old: torch.Tensor, new: torch.Tensor, capacity: int) -> WeightDelta:
    bits = _BITS[new.element_size()]
    indices, values, count, checksum = native.call("weight_delta", old.view(bits), new.view(bits), capacity)
    num_changed, total = torch.cat((count, checksum)).tolist()
    if num_changed > capacity:
        return WeightDelta(None, new, total, num_changed)
    return WeightDelta(indices[:num_changed], values[:num_changed].view(new.dtype), total, num_changed)


_DELTA = {"native": native.native_kernels(_delta_native), "torch": Implementation(weight_delta_reference)}


@torch.no_grad()
def weight_delta(old: torch.Tensor, new: torch.Tensor, *, impl: Impl = "auto") -> WeightDelta:
    """Finds what changed; waits for the device once, to know how much that is.

    Args:
        old: [n] the bucket as it was sent last, contiguous; elements of 1, 2 or 4 bytes (view bytes as ``torch.bfloat16``).
        new: [n] the bucket as it is now, of the same dtype and on the same device.
        impl: ``native``, ``torch`` or ``auto``.

    Returns:
        The delta. Where the whole bucket is smaller, ``values`` is ``new`` itself, not a copy.

    Raises:
        TypeError: dtypes differ, or elements have another size.
        ValueError: shapes or devices differ, a bucket is not a contiguous vector, or it has more than 2^31 - 1 elements.
    """
    _check(old, new)
    size = new.element_size()
    capacity = new.nbytes // (size + _INDEX_BYTES)
    return resolve("weight_delta", _DELTA, impl=impl, like=new)(old, new, capacity)


@torch.no_grad()
def apply_delta(bucket: torch.Tensor, delta: WeightDelta, *, verify: bool = True, impl: Impl = "auto") -> None:
    """Makes the new version of a bucket, in place.

    Args:
        bucket: [n] the old version.
        delta: from :func:`weight_delta`.
        verify: compare the result's checksum, which reads the bucket once.
        impl: what computes that checksum.

    Raises:
        TypeError: dtypes differ.
        ValueError: the delta does not fit the bucket, or the checksum differs: the bucket was not the version that the delta
            was made from, or something was lost on the way. The bucket is then of no version; send it whole.
    """
    if delta.values.dtype != bucket.dtype:
        raise TypeError(f"the delta is {delta.values.dtype}, the bucket {bucket.dtype}; view both as the same type")
    bits = _BITS[bucket.element_size()]
    if delta.indices is None:
        if delta.values.shape != bucket.shape:
            raise ValueError(f"a whole bucket {tuple(delta.values.shape)} for one of {tuple(bucket.shape)}")
        bucket.copy_(delta.values)
    elif len(delta.indices):
        if int(delta.indices[-1]) >= len(bucket):
            raise ValueError(f"the delta changes element {int(delta.indices[-1])} of a bucket of {len(bucket)}")
        bucket.view(bits)[delta.indices.long()] = delta.values.view(bits)
    if verify:
        found = weight_delta(bucket, bucket, impl=impl).checksum
        if found != delta.checksum:
            raise ValueError(f"checksum {found} after the delta, not {delta.checksum}: send the whole bucket")


def split_delta(delta: WeightDelta, bucket: Bucket) -> list[SlotPatch]:
    """Cuts a delta into patches of single weights, as vLLM's sparse transfer takes them.

    Args:
        delta: of a bucket whose slots all have the delta's dtype.
        bucket: its layout.

    Returns:
        One patch for each weight that changed, in the order of the slots.

    Raises:
        ValueError: the delta holds the whole bucket, another dtype than a slot, or an index between slots.
    """
    if delta.indices is None:
        raise ValueError("the delta holds the whole bucket; send it as a full update")
    size, indices = delta.values.element_size(), delta.indices.long()
    wrong = next((slot for slot in bucket.slots if slot.dtype != delta.values.dtype), None)
    if wrong is not None:
        raise ValueError(f"weights[{wrong.weight}] is {wrong.dtype} in the bucket, the delta {delta.values.dtype}")
    starts = [slot.offset_bytes // size for slot in bucket.slots]
    ends = [start + slot.num_elements for start, slot in zip(starts, bucket.slots, strict=True)]
    bounds = torch.tensor([starts, ends], device=indices.device)
    first, last = torch.searchsorted(indices, bounds).tolist()
    patches = [
        SlotPatch(slot.weight, indices[low:high] - start, delta.values[low:high], slot.shape)
        for slot, start, low, high in zip(bucket.slots, starts, first, last, strict=True)
        if high > low
    ]
    if sum(len(patch.indices) for patch in patches) != len(indices):
        raise ValueError(
            "the delta changes bytes between slots: both buckets must have been new, or packed into the same memory"
        )
    return patches


def _check(old: torch.Tensor, new: torch.Tensor) -> None:
    if old.dtype != new.dtype:
        raise TypeError(f"old is {old.dtype}, new is {new.dtype}; view both as the same type")
    if new.element_size() not in _BITS:
        raise TypeError(f"elements of {new.dtype} have {new.element_size()} bytes; view the buckets as 1, 2 or 4 byte elements")
    if old.shape != new.shape or new.dim() != 1:
        raise ValueError(f"old has shape {tuple(old.shape)}, new {tuple(new.shape)}; give two vectors of the same length")
    if old.device != new.device:
        raise ValueError(f"old is on {old.device}, new on {new.device}; put both on one device")
    for name, bucket in (("old", old), ("new", new)):
        if not bucket.is_contiguous():
            raise ValueError(f"{name} is not contiguous (stride {bucket.stride()}); call .contiguous()")
    if new.numel() >= 2**31:
        raise ValueError(f"{new.numel()} elements; indices are int32, so cut buckets of fewer than 2^31")
