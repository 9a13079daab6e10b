"""The order in which prompts are drawn: shuffled each epoch, decided by the seed, resumed at the very prompt."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from grpo_fast.tasks.encoded import token_ids_of
from grpo_fast.types import Prompt


class PromptStream:
    """An endless stream over prompts; within an epoch each comes exactly once.

    The order of an epoch is a function of (seed, epoch), so the position is two numbers. Nothing is dropped at the end of an
    epoch: a draw that reaches it goes on in the next.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        """Starts before the first prompt.

        Args:
            prompts: at least one; kept, not copied.
            seed: decides the order, 0 or more.
            shuffle: whether each epoch has a new random order; otherwise all have that of ``prompts``.

        Raises:
            ValueError: no prompts.
        """
        if not prompts:
            raise ValueError("there are no prompts to train on; give a dataset with at least one row")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._pass = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far; 1.5 is half-way through the second."""
        return self._pass + self._position / len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; where that is more than an epoch holds, some come again.

        Raises:
            ValueError: ``count`` below 0.
        """
        if count < 0:
            raise ValueError(f"count={count} must be 0 or more")
        taken: list[Prompt] = []
        while len(taken) < count:
            rows = self._order[self._position : self._position + count - len(taken)]
            taken += [self._prompts[row] for row in rows]
            self._position += len(rows)
            if self._position == len(self._prompts):
                self._pass, self._position = self._pass + 1, 0
                self._order = self._order_of(self._pass)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """JSON values that :meth:`load_state_dict` takes: the position, and what the order depends on."""
        return {"pass": self._pass, "position": self._position, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where the stream was.

        Args:
            state: what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is of other prompts, another seed or another order, or is damaged.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the saved data position is of another data order: {key} was {state.get(key)!r} and is {value!r} now; "
                    "resume with the same dataset, tokeniser and seed"
                )
        epoch, position = state.get("pass"), state.get("position")
        if not (isinstance(epoch, int) and epoch >= 0 and isinstance(position, int) and 0 <= position < len(self._prompts)):
            raise ValueError(f"pass={epoch!r} and position={position!r} are not a position in {len(self._prompts)} prompts")
        self._pass, self._position = epoch, position
        self._order = self._order_of(epoch)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        digest = 0
        for token_ids in token_ids_of(self._prompts):
            digest = zlib.crc32(np.asarray(token_ids, dtype=np.int64).tobytes(), digest)
        return {"seed": self._seed, "shuffle": self._shuffle, "num_prompts": len(self._prompts), "prompts_crc32": digest}

    def _order_of(self, epoch: int) -> list[int]:
        size = len(self._prompts)
        if not self._shuffle:
            return list(range(size))
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(size).tolist()
        return order
