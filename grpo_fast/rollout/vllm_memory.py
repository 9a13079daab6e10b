"""Memory of a vLLM engine: how large its cache is on a CPU, and the options that say so. Nothing here imports vLLM."""

from __future__ import annotations

from typing import Any

_CPU_CACHE_BYTES = 2 * 2**30
_CONCURRENT_ON_CPU = 256
_NO_SHARE = 1e-6


def cpu_cache_bytes(position_bytes: int, context_length: int) -> int:
    """Memory for keys and values on a CPU, where nothing else is said: what 256 sequences need, up to 2 GiB.

    Args:
        position_bytes: keys and values of one token, in bytes.
        context_length: longest sequence, in tokens.
    """
    return min(_CPU_CACHE_BYTES, position_bytes * context_length * _CONCURRENT_ON_CPU)


def memory_arguments(
    gpu_memory_utilization: float, kv_cache_bytes: int | None, *, on_gpu: bool, cpu_bytes: int
) -> dict[str, Any]:
    """Memory options of vLLM. If the size of its cache is given, the share of the GPU's memory has no effect.

    vLLM (0.32) checks the share against the free memory all the same, and does not start if less is free.

    Args:
        gpu_memory_utilization: share of the GPU's memory for weights and cache.
        kv_cache_bytes: size of the cache, where it is given.
        on_gpu: where the engine runs.
        cpu_bytes: memory of its cache on a CPU where nothing else is said.
    """
    cache_bytes = kv_cache_bytes or (None if on_gpu else cpu_bytes)
    if cache_bytes is None:
        return {"gpu_memory_utilization": gpu_memory_utilization}
    share = _NO_SHARE if on_gpu else gpu_memory_utilization
    return {"gpu_memory_utilization": share, "kv_cache_memory_bytes": cache_bytes}
