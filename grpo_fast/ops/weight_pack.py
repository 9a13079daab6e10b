"""Weights gathered into few contiguous buckets, cast and merged on the way, and back.

For weight W [R, C] of a slot, with LoRA factors A [r, C], B [R, r] and scale s where there are any:

    M = W + s * (B @ A)                                   float32, products added in the order of the rank
    float32, bfloat16    M, rounded once to nearest even; every NaN that rounding meets becomes the one quiet NaN
    float8_e4m3fn        scale_R = max_C |M| / 448 (1 where that is 0), codes = round(M / scale_R), at most 448

A slot starts on a multiple of 256 bytes; float8 codes are followed, from the next multiple of 16 on, by one float32 scale a
row, and a tensor of one dimension is one row. Each weight is read once and each bucket byte written once: the native kernels,
one launch a bucket (a launch for every 512 weights of it), are as fast as a copy, which a loop over hundreds of tensors is
not. Deterministic: no atomics, and host and device round alike.

Source: the bucketed sync of vLLM's packed weight transfer; float8 scales as its per-channel quantisation has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from grpo_fast.ops import native
from grpo_fast.ops.dispatch import Impl, Implementation, resolve

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
SOURCES = (torch.float32, torch.bfloat16)
MAX_FLOAT8 = 448.0
DEFAULT_BUCKET_BYTES = 1 << 30
_ALIGNMENT_BYTES = 256
_SCALE_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of a weight in its bucket."""

    weight: int
    """Index among the weights that were planned."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In the bucket."""
    offset_bytes: int

    @property
    def num_elements(self) -> int:
        """Values of the weight."""
        return torch.Size(self.shape).numel()

    @property
    def num_rows(self) -> int:
        """Scales of a float8 slot."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def num_columns(self) -> int:
        """Values of a row."""
        return self.num_elements // max(self.num_rows, 1)

    @property
    def scale_offset_bytes(self) -> int:
        """Where a float8 slot's scales begin."""
        return self.offset_bytes + _align(self.num_elements, _SCALE_ALIGNMENT_BYTES)

    @property
    def end_bytes(self) -> int:
        """The first byte after the slot."""
        if self.dtype == torch.float8_e4m3fn:
            return self.scale_offset_bytes + 4 * self.num_rows
        return self.offset_bytes + self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """The layout of one bucket."""

    slots: tuple[Slot, ...]
    num_bytes: int


class LoraFactors(NamedTuple):
    """The update of a LoRA adapter to a weight [R, C]: ``scale * (b @ a)``."""

    a: torch.Tensor
    """[r, C], float32 or bfloat16."""
    b: torch.Tensor
    """[R, r], of the same dtype."""
    scale: float


def plan_buckets(
    weights: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.bfloat16, bucket_bytes: int = DEFAULT_BUCKET_BYTES
) -> tuple[Bucket, ...]:
    """Lays weights out in buckets, in their order.

    Args:
        weights: any device; their shapes count.
        dtype: of the values in the buckets. With float8, tensors of one dimension (norms, biases) stay bfloat16.
        bucket_bytes: most bytes of a bucket. A weight that is larger has one of its own.

    Raises:
        ValueError: the dtype has no format here, or ``bucket_bytes`` is not positive.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype}; choose one of {', '.join(map(str, FORMATS))}")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes={bucket_bytes}; it must be positive, such as {DEFAULT_BUCKET_BYTES}")
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    for index, weight in enumerate(weights):
        own = torch.bfloat16 if dtype == torch.float8_e4m3fn and weight.dim() < 2 else dtype
        slot = Slot(index, tuple(weight.shape), own, _align(slots[-1].end_bytes, _ALIGNMENT_BYTES) if slots else 0)
        if slots and slot.end_bytes > bucket_bytes:
            buckets.append(Bucket(tuple(slots), _align(slots[-1].end_bytes, _ALIGNMENT_BYTES)))
            slots, slot = [], Slot(index, slot.shape, own, 0)
        slots.append(slot)
    if slots:
        buckets.append(Bucket(tuple(slots), _align(slots[-1].end_bytes, _ALIGNMENT_BYTES)))
    return tuple(buckets)


def slot_values(data: torch.Tensor, slot: Slot) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A slot's values as a view of its bucket, in the weight's shape, and its scales [R] where it is float8."""
    end = slot.offset_bytes + slot.num_elements * slot.dtype.itemsize
    values = data[slot.offset_bytes : end].view(slot.dtype).view(slot.shape)
    if slot.dtype != torch.float8_e4m3fn:
        return values, None
    return values, data[slot.scale_offset_bytes : slot.end_bytes].view(torch.float32)


def pack_weights_reference(
    weights: Sequence[torch.Tensor], bucket: Bucket, out: torch.Tensor, lora: Mapping[int, LoraFactors]
) -> torch.Tensor:
    """The specification of :func:`pack_weights`, in plain PyTorch: a loop over the weights."""
    for slot in bucket.slots:
        values, scales = slot_values(out, slot)
        weight = weights[slot.weight]
        if slot.weight in lora:
            a, b, scale = lora[slot.weight]
            weight = weight.float() + scale * (b.float() @ a.float())
        if scales is not None:
            rows = weight.float().view(slot.num_rows, slot.num_columns)
            largest = rows.abs().nan_to_num(nan=0.0, posinf=float("inf"))
            least = largest.new_zeros(slot.num_rows, 1)  # of a row without columns
            steps = torch.cat((largest, least), 1).amax(1) / MAX_FLOAT8
            scales.copy_(steps.masked_fill(steps == 0, 1.0))
            weight = (rows / scales[:, None]).clamp(-MAX_FLOAT8, MAX_FLOAT8).view(slot.shape)
        values.copy_(weight)
        if slot.dtype == torch.bfloat16 and weight.dtype == torch.float32:
            values.masked_fill_(weight.isnan(), float("nan"))
    return out


def unpack_weights_reference(data: torch.Tensor, bucket: Bucket, weights: Sequence[torch.Tensor]) -> None:
    """The specification of :func:`unpack_weights`, in plain PyTorch."""
    for slot in bucket.slots:
        values, scales = slot_values(data, slot)
        if scales is not None:
            values = (values.float().view(slot.num_rows, slot.num_columns) * scales[:, None]).view(slot.shape)
        weights[slot.weight].copy_(values)


def _pack_native(
    weights: Sequence[torch.Tensor], bucket: Bucket, out: torch.Tensor, lora: Mapping[int, LoraFactors]
) -> torch.Tensor:
    chosen = [weights[slot.weight].detach() for slot in bucket.slots]
    none = LoraFactors(out.new_empty(0, dtype=torch.float32), out.new_empty(0, dtype=torch.float32), 0.0)
    factors = [lora.get(slot.weight, none) for slot in bucket.slots] if lora else []
    a, b, scales = [x.a.detach() for x in factors], [x.b.detach() for x in factors], [float(x.scale) for x in factors]
    native.call("pack_weights", chosen, out, *_places(bucket), a, b, scales)
    return out


def _unpack_native(data: torch.Tensor, bucket: Bucket, weights: Sequence[torch.Tensor]) -> None:
    native.call("unpack_weights", data, [weights[slot.weight].detach() for slot in bucket.slots], *_places(bucket))


_PACK = {"native": native.native_kernels(_pack_native), "torch": Implementation(pack_weights_reference)}
_UNPACK = {"native": native.native_kernels(_unpack_native), "torch": Implementation(unpack_weights_reference)}


@torch.no_grad()
def pack_weights(
    weights: Sequence[torch.Tensor],
    bucket: Bucket,
    *,
    out: torch.Tensor | None = None,
    lora: Mapping[int, LoraFactors] | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Gathers the weights of one bucket.

    Args:
        weights: all that were planned; float32 or bfloat16, contiguous, on one device.
        bucket: a layout from :func:`plan_buckets`.
        out: uint8 [``bucket.num_bytes``], to be used again; gaps between slots are left as they are. A new one has zeros there.
        lora: what to merge, by index of the weight; factors contiguous and on the weights' device.
        impl: ``native``, ``torch`` or ``auto``.

    Returns:
        The bucket's bytes; :func:`slot_values` gives views of them.

    Raises:
        TypeError: a weight or factor is neither float32 nor bfloat16, or ``out`` is not uint8.
        ValueError: a shape, device or layout does not fit, a tensor is too large, or memory is shared with ``out``; the message
            names the tensor.
    """
    factors = lora or {}
    if not bucket.slots:
        raise ValueError("the bucket has no slots; plan it with plan_buckets")
    device = _chosen(weights, bucket.slots[0]).device
    if out is None:
        out = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=device)
    _check(weights, bucket, out)
    for index, update in factors.items():
        _check_lora(index, update, weights, out)
    return resolve("pack_weights", _PACK, impl=impl, like=out)(weights, bucket, out, factors)


@torch.no_grad()
def unpack_weights(data: torch.Tensor, bucket: Bucket, weights: Sequence[torch.Tensor], *, impl: Impl = "auto") -> None:
    """Writes a bucket's values into weights: :func:`pack_weights` backwards, float8 multiplied by its scales.

    Args:
        data: uint8 [``bucket.num_bytes``] from :func:`pack_weights`.
        bucket: its layout.
        weights: all that were planned; those of this bucket are overwritten.
        impl: ``native``, ``torch`` or ``auto``.

    Raises:
        TypeError: a weight is neither float32 nor bfloat16, or ``data`` is not uint8.
        ValueError: a shape, device or layout does not fit, or memory is shared.
    """
    _check(weights, bucket, data)
    resolve("unpack_weights", _UNPACK, impl=impl, like=data)(data, bucket, weights)


def _check(weights: Sequence[torch.Tensor], bucket: Bucket, data: torch.Tensor) -> None:
    if data.dtype != torch.uint8:
        raise TypeError(f"a bucket holds bytes, not {data.dtype}; view it as torch.uint8")
    if data.shape != (bucket.num_bytes,) or not data.is_contiguous():
        raise ValueError(f"a bucket of shape {tuple(data.shape)} for a layout of {bucket.num_bytes} contiguous bytes")
    for slot in bucket.slots:
        name, weight = f"weights[{slot.weight}]", _chosen(weights, slot)
        if tuple(weight.shape) != slot.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, but {slot.shape} was planned")
        _check_tensor(name, weight, data)


def _chosen(weights: Sequence[torch.Tensor], slot: Slot) -> torch.Tensor:
    if slot.weight >= len(weights):
        raise ValueError(f"the bucket holds weights[{slot.weight}], but there are {len(weights)}; give all that were planned")
    return weights[slot.weight]


def _check_lora(index: int, update: LoraFactors, weights: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    if not 0 <= index < len(weights):
        raise ValueError(f"lora[{index}] belongs to no weight; there are {len(weights)}")
    for name, factor in (("a", update.a), ("b", update.b)):
        _check_tensor(f"lora[{index}].{name}", factor, out)
    shape, (a, b) = tuple(weights[index].shape), (tuple(update.a.shape), tuple(update.b.shape))
    if len(shape) != 2 or len(a) != 2 or b != (shape[0], a[0]) or a[1] != shape[1] or a[0] < 1:
        raise ValueError(f"lora[{index}] has a {a} and b {b} for a weight {shape}; they must be [r, C] and [R, r] of [R, C]")
    if update.a.dtype != update.b.dtype:
        raise TypeError(f"lora[{index}] has a in {update.a.dtype} and b in {update.b.dtype}; give both the same dtype")


def _check_tensor(name: str, tensor: torch.Tensor, data: torch.Tensor) -> None:
    if tensor.dtype not in SOURCES:
        raise TypeError(f"{name} is {tensor.dtype}; float32 and bfloat16 can be packed, so convert it first")
    if tensor.device != data.device:
        raise ValueError(f"{name} is on {tensor.device}, the bucket on {data.device}; put both on one device")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); call .contiguous()")
    if tensor.numel() >= 2**31:
        raise ValueError(f"{name} has {tensor.numel()} elements; a slot takes fewer than 2^31, so split it")
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if begin < data.data_ptr() + data.nbytes and data.data_ptr() < end:
        raise ValueError(f"{name} shares memory with the bucket; allocate the bucket separately")


def _places(bucket: Bucket) -> tuple[list[int], list[int]]:
    return [slot.offset_bytes for slot in bucket.slots], [FORMATS[slot.dtype] for slot in bucket.slots]


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
