"""Which implementation of an op runs: one explicit table per op, and one rule to read it.

A table lists implementations from the most to the least preferred. ``auto`` takes the first that can run on the inputs and
has no drawback there, and says so once; a name asks for that one and gets it or an error, never another one in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import torch

from grpo_fast.ops import jit

Impl: TypeAlias = Literal["auto", "triton", "native", "torch"]
"""Implementations to choose from: the best that runs, Triton kernels, the compiled extension, or plain PyTorch."""

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_announced: set[tuple[str, str, str]] = set()


def nothing(like: torch.Tensor) -> None:
    """The obstacle of an implementation that always runs: none."""


@dataclass(frozen=True, slots=True)
class Implementation(Generic[F]):
    """One way to run an op."""

    run: F
    """The function, with the op's own signature."""
    obstacle: Callable[[torch.Tensor], str | None] = nothing
    """Why it cannot run here on inputs like a tensor, in words for people; ``None`` where it can."""
    drawback: Callable[[torch.Tensor], str | None] = nothing
    """Why ``auto`` passes it over where it can run; ``None`` where it does not."""


def triton_kernels(run: F) -> Implementation[F]:
    """An implementation that launches Triton kernels."""
    return Implementation(run, jit.obstacle, jit.drawback)


def resolve(op: str, table: Mapping[str, Implementation[F]], *, impl: str, like: torch.Tensor) -> F:
    """Picks the implementation of one call.

    Args:
        op: name of the op, for messages.
        table: the op's implementations by name, most preferred first.
        impl: a name of the table, or ``auto``.
        like: the op's main input; its device and type decide.

    Returns:
        The function to call.

    Raises:
        ValueError: ``impl`` is not in the table, or it (for ``auto``: none of them) can run on ``like``. The message names
        what can.
    """
    if impl == "auto":
        objections = {name: candidate.obstacle(like) or candidate.drawback(like) for name, candidate in table.items()}
        for name, objection in objections.items():
            if objection is None:
                _announce(op, name, like.device)
                return table[name].run
        reasons = "; ".join(f"{name}: {objection}" for name, objection in objections.items())
        raise ValueError(f"{op}: no implementation runs on {_describe(like)} ({reasons})")
    others = [name for name, candidate in table.items() if candidate.obstacle(like) is None]
    if impl not in table:
        raise ValueError(f"{op}: no implementation {impl!r}; choose impl='auto' or one of {others}")
    obstacle = table[impl].obstacle(like)
    if obstacle is not None:
        raise ValueError(
            f"{op}: impl={impl!r} cannot run on {_describe(like)}: {obstacle}; choose impl='auto' or one of {others}"
        )
    return table[impl].run


def _describe(like: torch.Tensor) -> str:
    return f"{like.device.type} {str(like.dtype).removeprefix('torch.')}"


def _announce(op: str, name: str, device: torch.device) -> None:
    if torch.compiler.is_compiling():  # a log line would break the graph
        return
    key = (op, name, device.type)
    if key not in _announced:
        _announced.add(key)
        _log.info("%s: impl='auto' runs %r on %s", op, name, device.type)
