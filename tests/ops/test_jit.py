from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, no_type_check

import pytest
import torch

from grpo_fast.ops import jit
from grpo_fast.ops.jit import Target, tl

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from grpo_fast.ops import group_advantage, jit
assert jit.jit(len) is len
assert jit.obstacle(torch.zeros(1)) == "triton is not installed; `pip install triton`"
assert not jit.interpreted()
print(group_advantage(torch.tensor([[0.0, 1.0]])).advantages.tolist())
"""


@jit.jit(do_not_specialize=("size",))
@no_type_check
def _add_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    tl.store(out_ptr + columns, tl.load(x_ptr + columns, mask=inside, other=0.0) + 1.0, mask=inside)


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_a_kernel_runs_here(device: torch.device) -> None:
    x = torch.arange(10, dtype=torch.float32, device=device)
    out = torch.full((12,), float("nan"), device=device)
    _add_kernel[(3,)](x, out, 10, BLOCK=4)
    assert torch.equal(out[:10], x + 1)
    assert out[10:].isnan().all()


def test_everything_works_without_triton() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[[-0.7")


def test_a_broken_triton_is_not_taken_for_a_missing_one() -> None:
    code = "import sys; sys.modules['triton.language'] = None; import grpo_fast.ops"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in run.stderr


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.obstacle(torch.zeros(1, dtype=torch.float64)) == "kernels compute in float32 and the input is float64"
    monkeypatch.setattr(jit, "interpreted", lambda: True)
    assert jit.obstacle(torch.zeros(1)) is None
    assert jit.drawback(torch.zeros(1)) == "only Triton's interpreter would run it"
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    assert jit.drawback(torch.zeros(1)) is None
    assert "need a CUDA device, or TRITON_INTERPRET=1" in str(jit.obstacle(torch.zeros(1)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert jit.obstacle(on("cuda")) == "kernels need compute capability 8.0 and this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert jit.obstacle(on("cuda")) is None


def test_the_target_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "interpreted", lambda: True)
    assert jit.target(torch.device("cpu")) == Target(90, 4)
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    properties = {3: SimpleNamespace(major=10, minor=3, multi_processor_count=148)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    jit._cuda_target.cache_clear()
    assert jit.target(torch.device("cuda")) == jit.target(torch.device("cuda", 3)) == Target(103, 148)
    jit._cuda_target.cache_clear()


def test_the_interpreter_is_on_where_there_is_no_gpu() -> None:
    assert jit.interpreted() == (os.environ.get("TRITON_INTERPRET", "0") == "1")


def test_what_decides_is_a_constant_under_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * jit._capability(x.device)[0] if jit.interpreted() else x * jit._capability(x.device)[1]

    torch._dynamo.reset()
    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert compiled(torch.ones(())) == (8 if jit.interpreted() else 6)
