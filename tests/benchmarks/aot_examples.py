"""Kernels for the tests of ``benchmarks/aot.py``: one that is fine and one that spills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch

from grpo_fast.ops import jit
from grpo_fast.ops.jit import tl


@jit.jit
@no_type_check
def _square_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * stride + columns)
    tl.store(out_ptr + rows * stride + columns, tl.dot(x, x))


@jit.jit
@no_type_check
def _normalise_kernel(x_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    tl.store(x_ptr + columns, x / tl.sum(x, 0))


def square(**options: Any) -> None:
    x = torch.empty(128, 128, dtype=torch.float16, device="meta")
    _square_kernel[(1,)](x, torch.empty_like(x, dtype=torch.float32), x.stride(0), BLOCK=128, num_warps=8, **options)


def _normalise() -> None:
    x = torch.empty(16384, device="meta")
    _normalise_kernel[(1,)](x, BLOCK=16384, num_warps=1, enable_fp_fusion=True)  # 512 values a thread


def aot_calls() -> dict[str, Callable[[], object]]:
    return {"fine": lambda: square(enable_fp_fusion=True), "spills": _normalise}
