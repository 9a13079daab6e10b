"""The order in which prompts are visited: every prompt once an epoch, a new order each epoch, restorable anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_fast.types import Prompt


class PromptStream:
    """Hands out prompts without end.

    The order of an epoch depends on the seed and the number of the epoch alone, so a position is two numbers.

    Args:
        prompts: what is visited.
        seed: decides the orders.
        shuffle: whether each epoch has an order of its own; otherwise it is always that of ``prompts``.

    Raises:
        ValueError: there are no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("there are no prompts to train on; the dataset is empty, or all of its prompts were left out")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> float:
        """Epochs done, with the share of the present one."""
        return self._epoch + self._position / len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; an epoch that ends inside goes over into the next one."""
        taken: list[Prompt] = []
        while len(taken) < count:
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            here = self._order[self._position : self._position + count - len(taken)]
            taken += [self._prompts[index] for index in here]
            self._position += len(here)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self._prompts), "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where :meth:`state_dict` was taken.

        Raises:
            ValueError: that was over other prompts or with another seed.
        """
        if (state["num_prompts"], state["seed"]) != (len(self._prompts), self._seed):
            raise ValueError(
                f"the run was over {state['num_prompts']} prompts with seed {state['seed']}, now there are {len(self._prompts)} with "
                f"seed {self._seed}; resume with the dataset it began with"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)).tolist()
        return order
