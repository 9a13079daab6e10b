"""Shared memory between a trainer and vLLM's workers on one machine, as a backend of vLLM's own weight transfer.

The trainer writes buckets of weights into one shared file, workers load each bucket from there; while they load one, the next
is written beside it. It is registered with vLLM by this package's ``vllm.general_plugins`` entry point, which vLLM calls in
every process of its own, so it works in the trainer's process, in worker processes and with a server on the same machine. The
file has no name any more once every worker has opened it: nothing is left behind, however a process ends.

Source: the interface is that of ``vllm.distributed.weight_transfer.base`` of vLLM 0.28 and later.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import psutil
import torch
from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo

from grpo_fast.rollout import vllm_direct
from grpo_fast.rollout.held_directory import HeldDirectory
from grpo_fast.rollout.shared_memory import reserve, reserve_queues
from grpo_fast.rollout.vllm_environment import OWNER, SERVER
from grpo_fast.rollout.vllm_layerwise import LayerwiseReceiver, PolicyWeights

BACKEND = "grpo_fast_shm"
SPARSE_BACKEND = "grpo_fast_sparse"
_ALIGNMENT = 64
_LOOK_S = 1.0
_ENDING_S = 20.0
"""After the death of its engine, for a server to answer its clients and end by itself."""


@functools.cache
def register() -> None:
    """Makes this package's backends known to vLLM in this process; the entry point of ``vllm.general_plugins``.

    A process that vLLM started for a trainer ends with it from then on, however that ends, where vLLM's own would stay; and not
    by Ctrl-C, which a terminal sends to both: it asks the trainer to save and end after a step that still needs the engine. A
    server ends with its engine, and the engine with it.
    """
    _end_with_owner()
    _end_with_engine()
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryReceiver)
    WeightTransferTrainerFactory.register_engine(BACKEND, SharedMemorySender)
    WeightTransferEngineFactory.register_engine(vllm_direct.BACKEND, vllm_direct.DirectReceiver)
    # By name: both are built upon what stands here.
    module = "grpo_fast.rollout.vllm_sparse"
    WeightTransferEngineFactory.register_engine(SPARSE_BACKEND, module, "SparseReceiver")
    WeightTransferTrainerFactory.register_engine(SPARSE_BACKEND, module, "SparseSender")


def _end_with_owner() -> None:
    """With the process that started it, which is the owner or, for a worker, the engine."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(OWNER) in {None, str(os.getpid())}:
        return

    def watch() -> None:
        while os.getppid() == parent.pid:  # a pipe between the two would stay open in whatever the trainer forked since
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="owner watch", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_engine() -> None:
    """Where vLLM's engine dies, its server (0.32) closes its port, and waits for ever if the engine still owes an answer."""
    if os.environ.get(SERVER) != str(os.getpid()):
        return

    def watch() -> None:
        engines: list[psutil.Process] = []
        while not engines:  # not by their ``wait``, which would take the exit code from vLLM
            time.sleep(_LOOK_S)
            with contextlib.suppress(psutil.NoSuchProcess):
                engines = [child for child in psutil.Process().children() if "EngineCor" in child.name()]
        with contextlib.suppress(psutil.NoSuchProcess):
            while all(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE for engine in engines):
                time.sleep(_LOOK_S)
        time.sleep(_ENDING_S)
        os._exit(1)

    threading.Thread(target=watch, name="engine watch", daemon=True).start()


@dataclass
class _InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    path: str
    num_bytes: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: what lies where in the file."""

    path: str = ""
    """Which file: a worker that opened another trainer's since must not read from that."""
    place: int = 0
    """Where the bucket lies in it."""
    num_bytes: int = 0
    num_filled: int = 0
    """Bytes of it, from its place on, that carry something."""
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """In the bucket."""

    def views(self, bucket: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as views of the bucket's bytes."""
        for name, dtype_name, shape, offset in zip(self.names, self.dtype_names, self.shapes, self.offsets, strict=True):
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            yield name, bucket[offset : offset + size].view(dtype).view(shape)


class SharedMemoryReceiver(LayerwiseReceiver):
    """The worker's side."""

    init_info_cls = _InitInfo
    update_info_cls = UpdateInfo
    _buffer: torch.Tensor | None = None
    _path = ""

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Opens the trainer's file, and makes sure of the queues to it where the engine has workers, as on several GPUs.

        Raises:
            OSError: shared memory has no room for the queues.
        """
        if multiprocessing.parent_process() is not None:
            reserve_queues()
        self._buffer = _map(init_info.path, init_info.num_bytes)
        self._path = init_info.path

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads one bucket, from where it lies; only what layers wait with for the next is copied."""
        bucket = self.bucket(update_info)
        self.load((name, view.to(self.device)) for name, view in update_info.views(bucket))
        self.keep_from(bucket)

    def bucket(self, update_info: UpdateInfo) -> torch.Tensor:
        """A bucket's place in the file.

        Raises:
            RuntimeError: it is not this file, or none was opened.
        """
        if self._buffer is None:
            raise RuntimeError("weights arrived before the trainer's shared memory was opened")
        if update_info.path != self._path:
            raise RuntimeError("another trainer has connected to this engine since the last sync; give each run its own engine")
        return self._buffer[update_info.place : update_info.place + update_info.num_bytes]

    def shutdown(self) -> None:
        """Lets go of the file."""
        self._buffer = None


@dataclass
class SharedMemoryInit(TrainerInitInfo):  # type: ignore[misc]
    """Settings of the trainer's side."""

    backend: ClassVar[str] = BACKEND
    bucket_bytes: int = 256 * 2**20
    """Size of the shared file, which holds two buckets; a single tensor larger than half of it makes it larger."""


class SharedMemorySender(TrainerWeightTransferEngine[SharedMemoryInit]):  # type: ignore[misc]
    """The trainer's side."""

    init_info_cls = SharedMemoryInit
    update_info_cls: type[UpdateInfo] = UpdateInfo
    sent_bytes = 0
    """Of the last update."""

    @classmethod
    def trainer_init(cls, init_info: SharedMemoryInit, *, client: Any, source: PolicyWeights | None = None) -> Self:
        """Makes the file and has every worker open it.

        Raises:
            ValueError: there is no source of weights.
            OSError: shared memory has no room for two buckets.
        """
        if source is None:
            raise ValueError("shared memory sends whole models; give a source of weights")
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        sender._plan(init_info.bucket_bytes // 2)
        if init_info.is_sender:
            sender._open()
        return sender

    def _plan(self, bucket_bytes: int) -> None:
        """Cuts the model into buckets, which take turns in the two halves of the file."""
        self._buckets: list[UpdateInfo] = []
        end = 0
        for meta in self.source.metadata:
            size = torch.Size(meta.shape).numel() * meta.dtype.itemsize
            if not self._buckets or end + size > bucket_bytes:
                self._buckets.append(self.update_info_cls())
                end = 0
            bucket = self._buckets[-1]
            bucket.names.append(meta.name)
            bucket.dtype_names.append(str(meta.dtype).removeprefix("torch."))
            bucket.shapes.append(list(meta.shape))
            bucket.offsets.append(end)
            bucket.num_bytes = end = end + -(-size // _ALIGNMENT) * _ALIGNMENT
        half = max(bucket.num_bytes for bucket in self._buckets)
        for bucket in self._buckets[1::2]:
            bucket.place = half
        self._buffer_bytes = half * min(2, len(self._buckets))

    def _open(self) -> None:
        home = HeldDirectory()  # in which the next trainer finds what this one leaves where it is killed here
        path = str(home.path / "weights")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fix = "lower bucket_bytes or give more shared memory (docker: --shm-size)"
            reserve(handle, self._buffer_bytes, "buckets of weights", place=home.path.parent, fix=fix)
            self._buffer = _map(path, self._buffer_bytes)
            for bucket in self._buckets:
                bucket.path = path
            self.client.init_weight_transfer_engine({"path": path, "num_bytes": self._buffer_bytes})
        finally:
            os.close(handle)
            home.close()

    def send_weights(self) -> None:
        """Sends the model, bucket by bucket; a rank that is not the sender gathers its part of each weight and drops it."""
        weights = self.source.uncast()
        if not self.is_sender:
            for _ in weights:
                pass
            return
        self.sent_bytes = 0
        self.client.start_weight_update()
        with ThreadPoolExecutor(1, thread_name_prefix="weights to vLLM") as background:
            loading: Future[None] | None = None
            for bucket in self._buckets:
                self.fill(bucket, self._buffer[bucket.place : bucket.place + bucket.num_bytes], weights)
                self.client.bring(bucket.place, bucket.num_filled)
                if loading is not None:
                    loading.result()
                loading = background.submit(self.client.update_weights, asdict(bucket))
            if loading is not None:
                loading.result()
        self.client.finish_weight_update()

    def fill(self, bucket: UpdateInfo, place: torch.Tensor, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Brings the next weights to the bucket's place in the file."""
        self.write(bucket, place, weights)
        bucket.num_filled = bucket.num_bytes
        self.sent_bytes += sum(view.nbytes for _, view in bucket.views(place))

    def write(self, bucket: UpdateInfo, data: torch.Tensor, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Writes the next weights into a bucket's bytes, converted on the way."""
        for name, view in bucket.views(data):
            found, weight = next(weights, ("nothing", view))
            if found != name:
                raise RuntimeError(f"the policy's parameters changed during the run: expected {name}, got {found}")
            view.copy_(weight)
            del weight  # before the next is gathered


def _map(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
