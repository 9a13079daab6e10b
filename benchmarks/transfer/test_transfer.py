"""The native extension under pytest-benchmark, to compare two commits: ``pytest benchmarks/ --benchmark-only -k transfer``.

Small buckets, so that a comparison takes seconds; ``python -m benchmarks.transfer.speed`` measures whole models.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.transfer.speed import Transformer, delta_calls, pack_calls, packing_calls
from grpo_fast.ops import native

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = Transformer("a few layers", 896, 4864, 128, 4096, 2, attention_bias=True)


@pytest.fixture(autouse=True)
def native_library() -> None:
    if problem := native.load():
        pytest.skip(problem)


def calls_of(case: str):
    if case == "delta":
        return delta_calls(1 << 25, 0.01, DEVICE)[0]
    if case.startswith("sequences"):
        return next(iter(packing_calls(100_000).values()))[0]
    return pack_calls(MODEL, getattr(torch, case), DEVICE)[0]


CONTENDERS = [(case, name) for case in ("float32", "bfloat16") for name in ("native", "torch loop")]
CONTENDERS += [("delta", "native"), ("delta", "torch"), ("sequences", "native")]


@pytest.mark.parametrize(("case", "contender"), CONTENDERS)
def test_transfer(benchmark, case: str, contender: str) -> None:
    call = calls_of(case)[contender]
    benchmark.group = case

    def once() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark(once)
