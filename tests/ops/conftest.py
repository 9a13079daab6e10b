"""How kernels are tested, with a GPU and without.

Where torch finds a GPU, the tests here run kernels on it. Elsewhere they run the same kernels through Triton's interpreter:
tests/conftest.py sets ``TRITON_INTERPRET=1`` before the first import of Triton, for the whole test process and for what it
starts. Tests take the fixture ``device`` and put their tensors there. Inputs are small, and float32 or float16: the
interpreter's ``tl.dot`` returns garbage for bfloat16. What needs bfloat16 or real sizes carries the marker ``gpu``. An op
refuses in the interpreter what it refuses on a GPU, so that a test which passes without one does not fail on all of them.

A process that interprets can compile nothing. Kernels are therefore compiled ahead of time, for devices that are not there,
in processes of their own without the variable: ``benchmarks/aot.py``, which ``tests/benchmarks/test_aot.py`` runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from grpo_fast.ops import native

# Read once, at the first product on a GPU: without it, versions of torch refuse products while outputs are poisoned (below).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton", reason="neither a GPU nor Triton's interpreter is here")
    return torch.device("cpu")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Fills what a launcher allocates with NaN, so that what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Launch(NamedTuple):
    """What a kernel is launched with."""

    name: str
    values: tuple[Any, ...]
    flags: dict[str, Any]


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, Iterable[str]], list[Launch]]:
    """Has kernels of a module keep their launches in a list, and not run."""

    def keep(module: ModuleType, names: Iterable[str]) -> list[Launch]:
        launches: list[Launch] = []

        class Kernel:
            def __init__(self, name: str) -> None:
                self.name = name

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *values, **flags: launches.append(Launch(self.name, values, flags))

        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
        return launches

    return keep


@pytest.fixture(scope="session")
def native_library() -> None:
    """The compiled extension; ``make`` builds it where there is a compiler."""
    if problem := native.load():
        pytest.skip(problem)


@pytest.fixture(params=["native", "torch"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation of an op that the extension has beside PyTorch."""
    if request.param == "native" and (problem := native.load()):
        pytest.skip(problem)
    return str(request.param)
