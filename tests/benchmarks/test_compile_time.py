"""The comparison of compiled and plain passes runs in miniature, traced as it is, but without a C++ compiler's minute."""

from __future__ import annotations

import pytest
import torch

from benchmarks.system import compile_time


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler and what it deprecates
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_both_ways_are_timed_over_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "NUM_BATCHES", 2)
    before = torch.get_num_threads()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        with torch.compiler.set_stance("default", force_backend="eager"):
            result = compile_time.measure("embedded", num_sequences=4, prompt=5, completion=6, rounds=3)
    finally:
        torch.set_num_threads(before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert result["num_passes"] == 2 * 3
    assert len(result["tokens"]) == 2
    assert all(5 + 4 * 3 <= tokens <= (5 + 4 * 6) * 9 / 8 for tokens in result["tokens"])
    assert result["first_compiled_cpu_s"] > result["compiled_cpu_s"] > 0
    assert result["uncompiled_cpu_s"] > 0
    assert result["paired_ratio_median"] > 0
