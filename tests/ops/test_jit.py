from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, no_type_check

import pytest
import torch

from grpo_fast.ops import jit
from grpo_fast.ops.jit import Target, tl

ROOT = Path(__file__).parents[2]
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


ON_THE_SECOND_DEVICE = """
import torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from grpo_fast.ops import jit
from tests.ops.test_jit import _add_kernel

entered, launched = [], []

class Device:
    def __init__(self, device):
        self.device = device
    def __enter__(self):
        entered.append(self.device)
    def __exit__(self, *_):
        entered.append(None)

torch.cuda.device = Device
triton.JITFunction.run = lambda self, *values, grid, warmup, **flags: launched.append((self.__name__, grid, list(entered)))
host = torch.zeros(16, 16)
with FakeTensorMode(allow_non_fake_inputs=True):
    there = torch.empty(16, 16, device="cuda:1")
    for values in ((there, there, 256), (jit.TensorDescriptor.from_tensor(there, [8, 8]), 256), (host, host, 256), (256,)):
        entered.clear()
        _add_kernel[(3,)](*values, BLOCK=4)
        print(*launched.pop(), entered)
"""


@jit.jit(do_not_specialize=("size",))
@no_type_check
def _add_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    tl.store(out_ptr + columns, tl.load(x_ptr + columns, mask=inside, other=0.0) + 1.0, mask=inside)


@jit.jit
@no_type_check
def _round_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, jit.bfloat16_of(tl.load(x_ptr + columns)))


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_a_kernel_runs_here(device: torch.device) -> None:
    x = torch.arange(10, dtype=torch.float32, device=device)
    out = torch.full((12,), float("nan"), device=device)
    _add_kernel[(3,)](x, out, 10, BLOCK=4)
    assert torch.equal(out[:10], x + 1)
    assert out[10:].isnan().all()


def test_a_kernel_rounds_as_torch_does(device: torch.device) -> None:
    heads = torch.arange(0, 2**16, 3, dtype=torch.int64)[:, None] << 16
    bits = heads + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = torch.nn.functional.pad(bits.flatten(), (0, 2**17 - bits.numel())).int().view(torch.float32).to(device)
    out = torch.empty_like(x)
    _round_kernel[(16,)](x, out, BLOCK=2**13)
    torch.testing.assert_close(out, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    assert x.isnan().any()
    assert x.isinf().any()
    assert (out != x).float().mean() > 0.3


@pytest.mark.skipif(jit.triton is None, reason="Triton is not installed")
def test_a_kernel_is_launched_on_the_device_of_its_tensors() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ON_THE_SECOND_DEVICE]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    second = "device(type='cuda', index=1)"
    there, here = f"_add_kernel (3,) [{second}] [{second}, None]", "_add_kernel (3,) [] []"
    assert run.stdout.splitlines() == [there, there, here, here]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_kernel_runs_on_another_device_than_the_current_one() -> None:
    x = torch.arange(10, dtype=torch.float32, device="cuda:1")
    out = torch.empty_like(x)
    assert torch.cuda.current_device() == 0
    _add_kernel[(3,)](x, out, 10, BLOCK=4)
    assert torch.equal(out, x + 1)
    assert torch.cuda.current_device() == 0


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
