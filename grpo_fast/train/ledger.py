"""Counts the memory that is held over time, from the operators that allocate it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"


class Ledger(TorchDispatchMode):
    """Records every piece of memory that operators allocate in its context, and when it is freed.

    Views have no memory of their own, and what was there before is not counted. Works on real tensors and on fake ones.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._changes: list[tuple[int, int]] = []
        self._kinds: list[str] = []
        self._known: dict[int, tuple[int | None, Any]] = {}
        self._kind = OTHER

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and takes note of what it gives."""
        arguments = kwargs or {}
        for storage in _storages((args, arguments)):
            if storage._cdata not in self._known:
                self._follow(storage, None)
        result = func(*args, **arguments)
        for storage in _storages(result):
            if storage._cdata not in self._known:
                self._follow(storage, len(self._kinds))
                self._kinds.append(self._kind)
        return result

    def _follow(self, storage: torch.UntypedStorage, number: int | None) -> None:
        """Follows a storage until it is freed; one without a number was there before."""
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._known[key]
            if number is not None:
                self._changes.append((number, -size))

        if number is not None:
            self._changes.append((number, size))
        self._known[key] = number, weakref.ref(storage, freed)

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Gives everything that is made in this context a kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def rename(self, tensors: Sequence[torch.Tensor], kind: str) -> None:
        """Changes the kind of tensors that were made in the context and are still held, as if made so."""
        for tensor in tensors:
            number, _ = self._known[tensor.untyped_storage()._cdata]
            if number is not None:
                self._kinds[number] = kind

    @property
    def now(self) -> int:
        """Number of changes so far."""
        return len(self._changes)

    def held(self, kinds: Sequence[str]) -> npt.NDArray[np.int64]:
        """Bytes that are held after each change, [kinds, changes]."""
        rows = {kind: row for row, kind in enumerate(kinds)}
        found = np.zeros((len(kinds), self.now), dtype=np.int64)
        for time, (number, size) in enumerate(self._changes):
            found[rows[self._kinds[number]], time] = size
        return found.cumsum(axis=1)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
