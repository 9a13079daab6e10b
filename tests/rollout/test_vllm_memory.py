from __future__ import annotations

from grpo_fast.rollout.vllm_memory import cpu_cache_bytes, memory_arguments


def test_a_cpu_has_a_cache_for_as_many_sequences_as_fit() -> None:
    assert cpu_cache_bytes(1000, 100) == 256 * 100 * 1000
    assert cpu_cache_bytes(10**6, 4096) == 2 * 2**30


def test_a_cache_that_is_told_frees_a_gpu_of_the_share() -> None:
    """vLLM holds the share against what is free even where it says nothing of the cache, so 1 of it starts nowhere."""
    on_gpu = memory_arguments(0.9, 2**30, on_gpu=True, cpu_bytes=5)
    assert on_gpu["kv_cache_memory_bytes"] == 2**30
    assert 0 < on_gpu["gpu_memory_utilization"] * 200e9 < 2**20
    assert memory_arguments(0.9, None, on_gpu=True, cpu_bytes=5) == {"gpu_memory_utilization": 0.9}
    assert memory_arguments(0.9, None, on_gpu=False, cpu_bytes=5) == {"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": 5}
    assert memory_arguments(0.9, 2**30, on_gpu=False, cpu_bytes=5)["kv_cache_memory_bytes"] == 2**30
