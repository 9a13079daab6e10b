"""The one door to Triton: what kernels are written with, what they are compiled for, and why they may not run.

Triton is imported where it is installed and missed where it is not: modules with kernels can be imported either way, and
:func:`obstacle` keeps calls from reaching a kernel that nothing can run. Kernels are decorated with :func:`jit`, and under
it with ``typing.no_type_check``, which keeps the type checker out of a language that only looks like Python.

``TRITON_INTERPRET=1``, set before Triton is imported, makes every kernel of the process run on the CPU, one program after
the other, in numpy: exact, slow, and good for tests only, so ``impl="auto"`` never chooses it. Such a process can compile
nothing; one without it can interpret nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = tl = TensorDescriptor = None

__all__ = [
    "INTERPRETED_ARCH",
    "OLDEST_ARCH",
    "Target",
    "TensorDescriptor",
    "bfloat16_of",
    "drawback",
    "interpreted",
    "jit",
    "obstacle",
    "target",
    "tl",
]

_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

OLDEST_ARCH = 80
"""Compute capability, times ten, under which there is no bfloat16 tensor core and no asynchronous copy."""
INTERPRETED_ARCH = 90
"""The architecture that the interpreter stands in for: the launch shapes of an H100, tensor descriptors included."""


class Target(NamedTuple):
    """The device that a launch is shaped for."""

    arch: int
    """Compute capability times ten: 80, 90, 100."""
    num_sms: int
    """Streaming multiprocessors: how many programs a persistent kernel starts."""


def jit(kernel: Callable[..., Any] | None = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """``triton.jit`` where Triton is installed; elsewhere the function itself, which nothing calls.

    A kernel is launched on the device of its tensors. Triton by itself takes the current device, whose context has no access
    to tensors of another one.

    Args:
        kernel: the function.
        do_not_specialize: parameters whose value (1, or divisible by 16) must not make another kernel.
    """
    if kernel is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    if triton is None:
        return kernel
    made = triton.jit(kernel, do_not_specialize=do_not_specialize)
    if isinstance(made, triton.JITFunction):  # what the interpreter runs has no device

        def run(*values: Any, **options: Any) -> Any:
            with _device_of(values):
                return type(made).run(made, *values, **options)

        made.run = run
    return made


def _device_of(values: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of a launch's first tensor the current one; does nothing where that is no CUDA device."""
    bases = (value.base if isinstance(value, TensorDescriptor) else value for value in values)
    first = next((base for base in bases if isinstance(base, torch.Tensor)), None)
    return contextlib.nullcontext() if first is None or not first.is_cuda else torch.cuda.device(first.device)


@jit
@no_type_check
def bfloat16_of(x):
    """For kernels: float32 to the nearest bfloat16, ties to even, in integers: Triton's interpreter rounds towards zero."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # noqa: PLR0124


def interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter."""
    return _INTERPRETED


def obstacle(like: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on tensors like ``like``, in words for people; ``None`` where one can."""
    if triton is None:
        return "triton is not installed; `pip install triton`"
    if like.dtype == torch.float64:
        return "kernels compute in float32 and the input is float64"
    if interpreted():
        return None
    if like.device.type != "cuda":
        return "kernels need a CUDA device, or TRITON_INTERPRET=1 in the environment for a slow test on the CPU"
    major, minor = _capability(like.device)
    if 10 * major + minor < OLDEST_ARCH:
        return f"kernels need compute capability 8.0 and this device has {major}.{minor}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def drawback(like: torch.Tensor) -> str | None:
    """Why ``impl="auto"`` leaves a Triton kernel alone that could run: only the interpreter would run it."""
    return "only Triton's interpreter would run it" if interpreted() else None


def target(device: torch.device) -> Target:
    """The target that kernels launched on ``device`` are compiled for.

    A tensor on the ``meta`` device belongs to an ahead-of-time compilation, which says by its driver what it compiles for.
    """
    if interpreted():
        return Target(INTERPRETED_ARCH, num_sms=4)
    if device.type == "meta":
        return Target(triton.runtime.driver.active.get_current_target().arch, num_sms=128)
    return _cuda_target(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)
