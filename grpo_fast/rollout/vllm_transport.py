"""Shared memory between a trainer and vLLM's workers on one machine, as a backend of vLLM's own weight transfer.

The trainer writes buckets of weights into one shared file, workers load each bucket from there. It is registered with vLLM by
this package's ``vllm.general_plugins`` entry point, which vLLM calls in every process of its own, so it works in the trainer's
process, in worker processes and with a server on the same machine. The file has no name any more once every worker has opened
it: nothing is left behind, however a process ends.

Source: the interface is that of ``vllm.distributed.weight_transfer.base`` of vLLM 0.28 and later.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "grpo_fast_shm"
_ALIGNMENT = 64
_SHARED_MEMORY = Path("/dev/shm")


@functools.cache
def register() -> None:
    """Makes the backend known to vLLM in this process; the entry point of ``vllm.general_plugins``."""
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryReceiver)
    WeightTransferTrainerFactory.register_engine(BACKEND, SharedMemorySender)


class PolicyWeights(WeightSource):  # type: ignore[misc]
    """The parameters of a model, one by one, in the type that the engine computes in.

    Sharded parameters are gathered when their turn comes, so no second copy of the model exists.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        """Name, type and whole shape of what iteration yields."""
        return [ParamMeta(name, self._wire(weight), tuple(weight.shape)) for name, weight in self._model.named_parameters()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._model.named_parameters():
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            yield name, whole.detach().to(self._wire(weight))

    def _wire(self, weight: torch.Tensor) -> torch.dtype:
        return self._dtype if weight.is_floating_point() else weight.dtype


@dataclass
class _InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    path: str
    num_bytes: int


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: what lies where in the file."""

    path: str
    """Which file: a worker that opened another trainer's since must not read from that."""
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryReceiver(WeightTransferEngine[_InitInfo, _UpdateInfo]):  # type: ignore[misc]
    """The worker's side: loads buckets layer by layer, so that what vLLM makes of a weight is made anew."""

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo
    _buffer: torch.Tensor | None = None
    _path = ""
    _begun = False

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Opens the trainer's file."""
        self._buffer = _map(init_info.path, init_info.num_bytes)
        self._path = init_info.path

    def start_weight_update(self) -> None:
        """Prepares all layers; what an update before this one left half-done is dropped."""
        if self._begun:
            finalize_layerwise_reload(self.model, self.model_config)
        every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied = every - {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        self._begun = True
        self._missing = {name for name, _ in self.model.named_parameters()} - tied
        self._names_known = True

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        """Loads one bucket; tensors are copied, because layers keep theirs until they are complete."""
        if self._buffer is None:
            raise RuntimeError("weights came before the trainer's shared memory was opened")
        if update_info.path != self._path:
            raise RuntimeError("the shared memory of another trainer was opened since; both would have to share this engine")
        weights = []
        for name, dtype_name, shape, offset in zip(
            update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets, strict=True
        ):
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            weights.append((name, self._buffer[offset : offset + size].view(dtype).view(shape).clone()))
        loaded = self.model.load_weights(weights)
        if loaded is None:
            self._names_known = False
        else:
            self._missing -= set(loaded)

    def finish_weight_update(self) -> None:
        """Puts the weights in force.

        Raises:
            RuntimeError: parameters of the engine's model did not come; they are named.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        self._begun = False
        self._repack_tied_heads()
        if self._names_known and self._missing:
            names = sorted(self._missing)
            raise RuntimeError(f"{len(names)} parameters of the engine's model did not come: {', '.join(names[:5])}")

    def _repack_tied_heads(self) -> None:
        """On a CPU a head that is tied to the embedding multiplies with a packed copy, which layer-wise loading passes over."""
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        """Lets go of the file."""
        self._buffer = None


@dataclass
class SharedMemoryInit(TrainerInitInfo):  # type: ignore[misc]
    """What the trainer decides."""

    backend: ClassVar[str] = BACKEND
    bucket_bytes: int = 256 * 2**20
    """Size of the shared file; a larger single tensor makes it larger."""


class SharedMemorySender(TrainerWeightTransferEngine[SharedMemoryInit]):  # type: ignore[misc]
    """The trainer's side."""

    init_info_cls = SharedMemoryInit

    @classmethod
    def trainer_init(cls, init_info: SharedMemoryInit, *, client: Any, source: WeightSource | None = None) -> Self:
        """Makes the file and has every worker open it.

        Raises:
            ValueError: there is no source of weights.
            OSError: shared memory has no room for a bucket.
        """
        if source is None:
            raise ValueError("shared memory sends whole models; give a source of weights")
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        sender._plan(init_info.bucket_bytes)
        if init_info.is_sender:
            sender._open()
        return sender

    def _plan(self, bucket_bytes: int) -> None:
        """Cuts the model into buckets."""
        self._buckets: list[_UpdateInfo] = []
        self.num_bytes = 0
        """Bytes of the whole model on the way."""
        self._buffer_bytes = end = 0
        for meta in self.source.metadata():
            size = torch.Size(meta.shape).numel() * meta.dtype.itemsize
            if not self._buckets or end + size > bucket_bytes:
                self._buckets.append(_UpdateInfo("", [], [], [], []))
                end = 0
            bucket = self._buckets[-1]
            bucket.names.append(meta.name)
            bucket.dtype_names.append(str(meta.dtype).removeprefix("torch."))
            bucket.shapes.append(list(meta.shape))
            bucket.offsets.append(end)
            self.num_bytes += size
            self._buffer_bytes = max(self._buffer_bytes, end + size)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT

    def _open(self) -> None:
        handle, path = tempfile.mkstemp(prefix="grpo_fast-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
        try:
            try:
                # Reserves the pages: writing to a sparse file where memory has run out would kill the process.
                os.posix_fallocate(handle, 0, self._buffer_bytes)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{Path(path).parent} has no room for a bucket of {self._buffer_bytes / 2**20:.0f} MiB; lower bucket_bytes "
                    "or give more shared memory (docker: --shm-size)",
                ) from error
            self._buffer = _map(path, self._buffer_bytes)
            for bucket in self._buckets:
                bucket.path = path
            self.client.init_weight_transfer_engine({"path": path, "num_bytes": self._buffer_bytes})
        finally:
            os.close(handle)
            Path(path).unlink()

    def send_weights(self) -> None:
        """Sends the model, bucket by bucket."""
        if self.is_sender:
            self.client.start_weight_update()
        weights = iter(self.source)
        for bucket in self._buckets:
            for name, offset in zip(bucket.names, bucket.offsets, strict=True):
                found, weight = next(weights)
                if found != name:
                    raise RuntimeError(
                        f"the policy gave its weight {found} where {name} was announced; its parameters have changed"
                    )
                if self.is_sender:
                    flat = weight.contiguous().view(-1).view(torch.uint8)
                    self._buffer[offset : offset + flat.numel()].copy_(flat)
            if self.is_sender:
                self.client.update_weights(asdict(bucket))
        if self.is_sender:
            self.client.finish_weight_update()


def _map(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
