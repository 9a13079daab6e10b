"""The one door to the compiled extension of ``csrc/``.

It is one library on torch's stable ABI, built beside this file by ``GRPO_FAST_BUILD=cpu|cuda pip install .`` (``make`` does so
where it finds a compiler) and loaded when an op first asks for it. Nothing here needs it: every op has a PyTorch path, and
:func:`obstacle` says what stands in the way of the compiled one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from grpo_fast.ops.dispatch import Implementation

F = TypeVar("F", bound=Callable[..., Any])

BUILD = "pip install 'setuptools>=77' && GRPO_FAST_BUILD=cpu pip install --no-build-isolation --no-deps ."
"""Command that builds it from a checkout; use ``cuda`` in place of ``cpu`` with nvcc and a torch for CUDA."""
SLOWER = (
    "weight pack, weight delta, sequence packing, policy loss, group advantages and rollouts on a CPU run in plain PyTorch and "
    "Python"
)
"""Consequence of its absence."""


def library() -> Path | None:
    """The library file of this installation; ``None`` where none was built."""
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


@functools.cache
def load(path: Path | None = None) -> str:
    """Loads the library into torch, once.

    Args:
        path: another build than :func:`library`. Of two builds only the first that loads can register its ops.

    Returns:
        Why there is none, in words for people; empty where the ops are there.
    """
    if hasattr(torch.ops.grpo_fast, OPS[0]):
        return ""
    path = path or library()
    if path is None:
        return f"the native extension is not built; from a checkout: {BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__} ({error}); rebuild it: {BUILD}"
    if missing := [op for op in OPS if not hasattr(torch.ops.grpo_fast, op)]:
        return f"{path.name} has no {', '.join(missing)}, so it is older than this package; rebuild it: {BUILD}"
    for op, fake in _FAKES.items():
        torch.library.register_fake(f"grpo_fast::{op}", fake)
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _problem() -> str:
    return load()


def has_kernel(op: str, device: str) -> bool:
    """Whether the library is there and has an op for ``CPU`` or ``CUDA`` devices."""
    return not load() and torch._C._dispatch_has_kernel_for_dispatch_key(f"grpo_fast::{op}", device)


def has_cuda() -> bool:
    """Whether the library is there and holds kernels for CUDA devices."""
    return has_kernel(OPS[0], "CUDA")


def status() -> str:
    """``built`` or ``missing``, a colon, and the consequence, in words."""
    if problem := load():
        return f"missing: {SLOWER}; {problem}"
    steps = ", decoding steps" * has_kernel("decoder_layer", "CPU")
    compiled = f"compiled weight pack, delta, packing, policy loss, group advantages{steps}"
    return f"built: {compiled} for the CPU{' and CUDA' * has_cuda()}"


def obstacle(like: torch.Tensor) -> str | None:
    """Why the extension cannot run on inputs like a tensor; ``None`` where it can."""
    problem: str = _problem()
    if problem:
        return problem
    if like.device.type == "cpu" or (like.device.type == "cuda" and has_cuda()):
        return None
    if like.device.type == "cuda":
        return f"the native extension was built without CUDA; {BUILD.replace('=cpu', '=cuda')}"
    return f"the native extension has no kernels for {like.device.type}"


def host_obstacle(like: torch.Tensor) -> str | None:
    """The same of an op that the extension has for the CPU alone."""
    return (
        obstacle(like) if like.device.type == "cpu" else f"the extension has it for the CPU alone, not for {like.device.type}"
    )


def tracing(like: torch.Tensor) -> str | None:
    """Why ``auto`` passes the extension over in a graph; ``None`` outside of one."""
    return "a compiled graph fuses plain PyTorch" if torch.compiler.is_compiling() else None


def native_kernels(run: F) -> Implementation[F]:
    """An implementation that calls the extension."""
    return Implementation(run, obstacle)


def call(op: str, *arguments: Any) -> Any:
    """Runs an op of the extension.

    Args:
        op: one of :data:`OPS`.
        arguments: as its schema in ``csrc/bindings.cpp`` has them.

    Raises:
        RuntimeError: the extension is not there, or it refuses an argument, with its reason.
    """
    if problem := _problem():
        raise RuntimeError(f"{op}: {problem}")
    return getattr(torch.ops.grpo_fast, op)(*arguments)


def _writes(*arguments: Any) -> None:
    """The result of an op that only writes into its arguments: none."""


def _delta_shapes(old: torch.Tensor, new: torch.Tensor, capacity: int) -> tuple[torch.Tensor, ...]:
    size, one = _unknown_size(), torch.empty(1, dtype=torch.int64)
    return new.new_empty(size, dtype=torch.int32), new.new_empty(size), one, one.clone()


def _plan_shapes(lengths: torch.Tensor, token_budget: int) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(lengths), lengths.new_empty(_unknown_size())


def _index_shapes(
    prompts: torch.Tensor, sizes: torch.Tensor, completions: torch.Tensor, segment_starts: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    tokens, rows = _unknown_size(), _unknown_size()
    ends = segment_starts.new_empty(len(segment_starts), dtype=torch.int32)
    return ends, prompts.new_empty(tokens), prompts.new_empty(rows), prompts.new_empty(rows)


def _loss_shapes(logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return logprobs.new_empty(10, dtype=torch.float32), logprobs.new_empty(logprobs.shape, dtype=torch.float32)


def _truth(index: torch.Tensor) -> bool:
    """A truth that values decide, for tracing: the index of a traced call is not checked."""
    return True


def _advantage_shapes(rewards: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    each = rewards.new_empty(rewards.shape[0])
    return torch.empty_like(rewards), torch.empty_like(each, dtype=torch.bool), each, torch.empty_like(each)


def _product_shape(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def _draw_shapes(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    return draws.new_empty(draws.shape, dtype=torch.int64), logits.new_empty(draws.shape)


def _unknown_size() -> Any:
    """A size that values decide, for tracing."""
    return torch.library.get_ctx().new_dynamic_size()


_FAKES: dict[str, Callable[..., Any]] = {
    "pack_weights": _writes,
    "unpack_weights": _writes,
    "weight_delta": _delta_shapes,
    "pack_sequences": _plan_shapes,
    "packed_index": _index_shapes,
    "policy_loss": _loss_shapes,
    "ascends": _truth,
    "group_advantage": _advantage_shapes,
    "few_rows_product": _product_shape,
    "decoder_layer": _writes,
    "draw_tokens": _draw_shapes,
}
"""Of each op of the extension what stands in for it in tracing."""
OPS = tuple(_FAKES)
