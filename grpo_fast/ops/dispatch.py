"""Which implementation of an op runs: one explicit table per op, and one rule to read it.

A table lists implementations from the most to the least preferred. ``auto`` takes the first that can run on the device and
says so once; a name asks for that one and gets it or an error, never another one in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import torch

Impl: TypeAlias = Literal["auto", "torch"]
"""What a caller may ask for."""

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_announced: set[tuple[str, str, str]] = set()


def runs_everywhere(device: torch.device) -> None:
    """The answer of an implementation that nothing can be missing for."""


@dataclass(frozen=True, slots=True)
class Implementation(Generic[F]):
    """One way to run an op."""

    run: F
    """The function, with the op's own signature."""
    obstacle: Callable[[torch.device], str | None] = runs_everywhere
    """Why it cannot run on a device here, in words for people; ``None`` where it can."""


def resolve(op: str, table: Mapping[str, Implementation[F]], *, impl: str, device: torch.device) -> F:
    """Picks the implementation of one call.

    Args:
        op: name of the op, for messages.
        table: the op's implementations by name, most preferred first.
        impl: a name of the table, or ``auto``.
        device: where the op's inputs live.

    Returns:
        The function to call.

    Raises:
        ValueError: ``impl`` is not in the table, or it (for ``auto``: none of them) can run on ``device``. The message names
        what can.
    """
    if impl == "auto":
        for name, candidate in table.items():
            if candidate.obstacle(device) is None:
                _announce(op, name, device)
                return candidate.run
        reasons = "; ".join(f"{name}: {candidate.obstacle(device)}" for name, candidate in table.items())
        raise ValueError(f"{op}: no implementation runs on {device.type} ({reasons})")
    if impl not in table:
        raise ValueError(f"{op}: no implementation {impl!r}; choose impl='auto' or one of {_available(table, device)}")
    obstacle = table[impl].obstacle(device)
    others = _available(table, device)
    if obstacle is not None:
        raise ValueError(f"{op}: impl={impl!r} cannot run on {device.type}: {obstacle}; choose impl='auto' or one of {others}")
    return table[impl].run


def _available(table: Mapping[str, Implementation[F]], device: torch.device) -> list[str]:
    return [name for name, candidate in table.items() if candidate.obstacle(device) is None]


def _announce(op: str, name: str, device: torch.device) -> None:
    key = (op, name, device.type)
    if key not in _announced:
        _announced.add(key)
        _log.info("%s: impl='auto' runs %r on %s", op, name, device.type)
