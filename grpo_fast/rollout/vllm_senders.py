"""The trainer's end of each transport between processes, opened through vLLM's weight transfer.

Source: ``vllm.distributed.weight_transfer`` of vLLM 0.28 and later.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from grpo_fast.rollout.ssh_tunnel import address_towards
from grpo_fast.rollout.vllm_environment import held_port
from grpo_fast.rollout.vllm_layerwise import PolicyWeights
from grpo_fast.rollout.vllm_sparse import SparseInit
from grpo_fast.rollout.vllm_transport import SharedMemoryInit, register

if hasattr(WeightSource, "iter_full"):

    class _Source(WeightSource):  # type: ignore[misc]
        """The weights as vLLM's own transports take them, since 0.33."""

        def __init__(self, weights: PolicyWeights) -> None:
            self._weights = weights

        @cached_property
        def metadata(self) -> list[ParamMeta]:
            return self._weights.metadata

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(self._weights)

else:

    class _Source(WeightSource):  # type: ignore[misc, no-redef]
        """The weights as vLLM's own transports take them, before 0.33."""

        def __init__(self, weights: PolicyWeights) -> None:
            self._weights = weights

        def metadata(self) -> list[ParamMeta]:
            return self._weights.metadata

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(self._weights)


class WeightSender:
    """Sends a policy's weights to engines of other processes.

    Args:
        transport: ``shared_memory``, ``sparse``, ``ipc`` or ``nccl``.
        client: vLLM's protocol of a weight sync client.
        source: the weights.
        bucket_bytes: weights on the way at a time; a single weight that is larger goes whole.
        num_workers: vLLM's worker processes, which NCCL counts.
        machine: what ``ssh`` calls the engine's machine, to which NCCL makes a connection; ``None`` for this one.

    Raises:
        OSError: shared memory has no room for the buckets.
    """

    def __init__(
        self,
        transport: str,
        *,
        client: Any,
        source: PolicyWeights,
        bucket_bytes: int,
        num_workers: int = 1,
        machine: str | None = None,
    ) -> None:
        register()
        self.client = client
        self._source = source
        self._transport = transport
        address = "127.0.0.1" if machine is None or transport != "nccl" else address_towards(machine)
        with held_port(address) as port:
            meeting = (address, port)
            info = init_info(transport, source, bucket_bytes=bucket_bytes, num_workers=num_workers, meeting=meeting)
            given = _Source(source) if transport in {"ipc", "nccl"} else source
            self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=given)

    def send_weights(self) -> int:
        """Sends all of them, from the update's start to the last weight; returns how many bytes went over."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # vLLM packs on a stream of its own, which knows of no step that another still writes
        with plain_segments() if self._transport == "ipc" else contextlib.nullcontext():
            self._engine.send_weights()
        return int(getattr(self._engine, "sent_bytes", self._source.num_bytes))

    def release(self) -> None:
        """Has torch take back what an engine held until the update was finished: the buffer of CUDA IPC."""
        if self._transport == "ipc":
            torch.cuda.ipc_collect()


def init_info(
    transport: str, source: PolicyWeights, *, bucket_bytes: int, num_workers: int, meeting: tuple[str, int]
) -> TrainerInitInfo:
    """What vLLM's factory opens a transport by; the trainer's first rank sends, and listens at ``meeting`` where NCCL begins.

    Of vLLM's own, IPC refuses a weight that is larger than its buffer, as the embedding of a real model is. NCCL gathers and
    packs in a stream for each buffer, so it has one: a second would read a sharded unit that the first still gathers, and what
    it reads would be freed, and written to, under it. Half a bucket, as what is packed lies beside its copy.
    """
    if transport == "ipc":
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=max(bucket_bytes, source.largest_bytes))
    if transport == "nccl":
        return NCCLTrainerInitInfo(
            rank=0,
            master_address=meeting[0],
            master_port=meeting[1],
            world_size=1 + num_workers,
            packed=True,
            packed_buffer_size_bytes=bucket_bytes // 2,
            packed_num_buffers=1,
        )
    kind = SparseInit if transport == "sparse" else SharedMemoryInit
    return kind(rank=0, bucket_bytes=bucket_bytes)


def json_safe(update_info: dict[str, Any]) -> dict[str, Any]:
    """An update as JSON can hold it: handles of CUDA IPC are pickled, as vLLM's server takes them."""
    if "ipc_handles" not in update_info:
        return update_info
    rest = {name: value for name, value in update_info.items() if name != "ipc_handles"}
    return rest | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()}


@contextlib.contextmanager
def plain_segments() -> Iterator[None]:
    """Has CUDA's allocator make no expandable segments inside: CUDA IPC cannot share their memory as it shares other.

    The allocator forgets what it is not told again, so the environment's other settings are told with it.
    """
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" not in settings:
        yield
        return
    torch.cuda.memory._set_allocator_settings(settings.replace("expandable_segments:True", "expandable_segments:False"))
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings(settings)
