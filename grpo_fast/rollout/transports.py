"""Transports by which weights reach an engine; those that cannot work are refused before anything is built.

================= ==============================================================================================
Name              Way
================= ==============================================================================================
``direct``        an engine in the trainer's process reads the policy's own parameters
``shared_memory`` buckets in one file in memory; a server that does not see it, as on another machine, gets a copy of each
                  over its port
``sparse``        what changed of each bucket since the last sync, in the same way; costs a copy of the weights in host memory
                  at either end
``ipc``           CUDA IPC, packed: a process on the trainer's own GPU reads a staging buffer there
``nccl``          NCCL broadcast, packed: a server on other GPUs; two ranks on one GPU is what NCCL refuses
================= ==============================================================================================

The last two are vLLM's own. Half an update leaves vLLM's receivers with layers that they would take for loaded, so only ours
begin a broken update anew. Nothing here imports vLLM. ``ipc`` and ``nccl`` have met no GPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Transport: TypeAlias = Literal["auto", "direct", "shared_memory", "sparse", "ipc", "nccl"]
Host: TypeAlias = Literal["in process", "own process", "server", "server elsewhere"]


OLDEST_VLLM = "0.28"
"""The first version whose weight transfer keeps a trainer's side open over many updates."""


class Delivery(NamedTuple):
    """The way by which new weights reach an engine."""

    transport: str
    """From :func:`choose_transport`."""
    bucket_bytes: int
    """Weights on the way at a time, but for ``direct``."""
    pause_mode: Literal["wait", "keep"]
    """Whether running requests end before an update, or are kept and continue with the new weights."""


BACKENDS = {
    "direct": "grpo_fast_direct",
    "shared_memory": "grpo_fast_shm",
    "sparse": "grpo_fast_sparse",
    "ipc": "ipc",
    "nccl": "nccl",
}
"""Their names in vLLM's weight transfer."""

_OFFERED: dict[Host, tuple[str, ...]] = {
    "in process": ("direct", "shared_memory", "sparse"),
    "own process": ("shared_memory", "sparse", "ipc"),
    "server": ("shared_memory", "sparse", "ipc", "nccl"),
    "server elsewhere": ("shared_memory", "sparse", "nccl"),
}


def choose_transport(name: Transport, host: Host, *, on_gpu: bool, num_engines: int = 1) -> str:
    """The way for weights to an engine; ``auto`` is the first that always works there.

    Args:
        name: what was asked for.
        host: where the engine runs.
        on_gpu: whether the policy is on a GPU.
        num_engines: engines that take the same weights.

    Raises:
        ValueError: the transport does not lead to such an engine, or needs a GPU, or takes one engine only.
    """
    offered = _OFFERED[host]
    if name == "auto":
        return offered[0]
    if name not in offered:
        raise ValueError(f"transport={name!r} cannot reach an engine {_WHERE[host]}; choose {' or '.join(offered)}")
    if name in {"ipc", "nccl"} and not on_gpu:
        raise ValueError(f"transport={name!r} moves weights between GPUs, but the policy is on a CPU; choose shared_memory")
    if name in {"ipc", "nccl"} and num_engines > 1:
        raise ValueError(f"transport={name!r} supports one server, not {num_engines}; choose shared_memory")
    return name


def sync_attempts(transport: str) -> int:
    """Number of attempts at a whole update."""
    return 1 if transport in {"ipc", "nccl"} else 2


_WHERE: dict[Host, str] = {
    "in process": "in the trainer's process",
    "own process": "in its own process on the trainer's GPU",
    "server": "behind a server",
    "server elsewhere": "behind a server on another machine",
}
