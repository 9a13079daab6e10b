"""Sends only the weights that changed since the last sync, through shared memory, as a backend of vLLM's weight transfer.

Both ends keep the weights as they went over last, in host memory: a second copy at each. Of every bucket the trainer sends the
values whose bits changed, with their places, and a checksum of the bucket as it must be after them; where that would be more
than the bucket, the bucket. The worker changes its copy, checks it, and loads from there as from any other transport: vLLM
repacks weights, so it cannot change them in place.

The first update is whole, and so is the next after one that failed: a worker that was started again, or serves another trainer
since, has not opened this trainer's memory and says so; one whose copy is not what the trainer takes it for is found by the
checksum. vLLM's own ``sparse_nccl`` changes weights in place between GPUs; it can do so with no repacked layer, nor on a CPU.

Source: the interface is that of ``vllm.distributed.weight_transfer.base`` of vLLM 0.28 and later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from grpo_fast.ops.weight_delta import WeightDelta, apply_delta, weight_delta
from grpo_fast.rollout.vllm_layerwise import PolicyWeights
from grpo_fast.rollout.vllm_transport import (
    SPARSE_BACKEND,
    SharedMemoryInit,
    SharedMemoryReceiver,
    SharedMemorySender,
    UpdateInfo,
)


@dataclass
class SparseUpdate(UpdateInfo):
    """One bucket: what it is made of, and what of it lies in the file."""

    number: int = 0
    """Of the bucket in the model."""
    element: str = "int16"
    """In which elements the bucket is compared."""
    num_changed: int | None = None
    """Of them lie there, places (int32) first; ``None``: the whole bucket does."""
    checksum: int = 0
    """Of the bucket after this."""

    def delta(self, place: torch.Tensor) -> WeightDelta:
        """What lies in the file, as views of it."""
        element: torch.dtype = getattr(torch, self.element)
        if self.num_changed is None:
            return WeightDelta(None, place.view(element), self.checksum, len(place) // element.itemsize)
        middle = 4 * self.num_changed
        values = place[middle : middle + element.itemsize * self.num_changed]
        return WeightDelta(place[:middle].view(torch.int32), values.view(element), self.checksum, self.num_changed)


class SparseReceiver(SharedMemoryReceiver):
    """The worker's side."""

    update_info_cls = SparseUpdate

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Opens the trainer's file; copies of another trainer's weights are dropped."""
        super().init_transfer_engine(init_info)
        self._held: dict[int, torch.Tensor] = {}

    def receive_weights(self, update_info: SparseUpdate) -> None:
        """Changes the copy of one bucket and loads it from there.

        Raises:
            RuntimeError: there is no copy that could be changed.
            ValueError: the copy was not the one that the trainer compared with.
        """
        place = self.bucket(update_info)
        held = self._held.pop(update_info.number, None)
        delta = update_info.delta(place)
        if held is None:
            if update_info.num_changed is not None:
                raise RuntimeError(
                    f"received changes of bucket {update_info.number} before its first full copy; send the full bucket"
                )
            held = torch.empty_like(place)
        apply_delta(held.view(delta.values.dtype), delta)
        self._held[update_info.number] = held
        self.load((name, view.to(self.device)) for name, view in update_info.views(held))

    def shutdown(self) -> None:
        """Lets go of the file and of the copies."""
        super().shutdown()
        self._held = {}


@dataclass
class SparseInit(SharedMemoryInit):
    """Settings of the trainer's side."""

    backend: ClassVar[str] = SPARSE_BACKEND


class SparseSender(SharedMemorySender):
    """The trainer's side."""

    init_info_cls = SparseInit
    update_info_cls = SparseUpdate
    source: PolicyWeights

    def _plan(self, bucket_bytes: int) -> None:
        super()._plan(bucket_bytes)
        self._sent: dict[int, torch.Tensor] = {}
        self._next = torch.empty(max(bucket.num_bytes for bucket in self._buckets), dtype=torch.uint8)
        size = max(meta.dtype.itemsize for meta in self.source.metadata)
        for number, bucket in enumerate(self._buckets):
            bucket.number, bucket.element = number, {1: "uint8", 2: "int16"}.get(size, "int32")

    def send_weights(self) -> None:
        """Sends what changed; after an update that failed, everything."""
        try:
            super().send_weights()
        except BaseException:
            self._sent = {}
            raise

    def fill(self, bucket: SparseUpdate, place: torch.Tensor, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Brings what changed of the next weights to the bucket's place in the file."""
        data = self._next[: bucket.num_bytes].zero_()  # between weights too, where other buckets had theirs
        self.write(bucket, data, weights)
        new = data.view(getattr(torch, bucket.element))
        old = self._sent.get(bucket.number)
        delta = weight_delta(new if old is None else old, new)
        whole = old is None or delta.indices is None
        bucket.num_changed, bucket.checksum = None if whole else delta.num_changed, delta.checksum
        there = bucket.delta(place)
        there.values.copy_(new if whole else delta.values)
        if there.indices is not None and delta.indices is not None:
            there.indices.copy_(delta.indices)
        if old is None:
            self._sent[bucket.number] = new.clone()
        else:
            apply_delta(old, delta, verify=False)
        bucket.num_filled = there.num_bytes
        self.sent_bytes += there.num_bytes
