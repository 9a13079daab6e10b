"""Whether all ranks do the same between two steps, where the loop is its user's.

A loop body may end on one rank alone: by a condition that only its numbers meet, or by an exception. The others would wait for
it in the next exchange, until ``ddp_timeout_s``. A call of the trainer that only rank 0 makes would be worse, since the others
would answer it with the exchanges of a step. So each rank says what it is about to do whenever the trainer takes over.
"""

from __future__ import annotations

from enum import StrEnum

from grpo_fast.train.distributed import World
from grpo_fast.train.launch import in_words
from grpo_fast.train.summary import Ending
from grpo_fast.types import TrainingError


class Turn(StrEnum):
    """What a rank is about to do."""

    START = "starts the loop"
    GO_ON = "goes on with the loop"
    LEAVE = "leaves the loop"
    SAVE = "calls save()"
    EVALUATE = "calls evaluate()"


class InStep:
    """Keeps the ranks of a run in step; in a single process nothing can go wrong.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._apart = False

    def take(self, turn: Turn, step: int, ending: Ending | None = None) -> Ending | None:
        """Tells the other ranks what this one is about to do.

        Args:
            turn: what that is.
            step: steps done.
            ending: why the run ends in any case.

        Returns:
            Why it ends, if it does: by ``ending``, or because a rank leaves the loop and the others with it. It is ``None`` too
            where nothing can be done together any more.

        Raises:
            TrainingError: ranks are about to do different things, for which they cannot wait for each other; on every rank.
            RankLostError: a rank is gone.
        """
        if self._apart:
            return None
        turns = self._world.gather(lambda: turn)
        leaving = [rank for rank, taken in enumerate(turns) if taken == Turn.LEAVE]
        if leaving and set(turns) <= {Turn.LEAVE, Turn.GO_ON}:
            by = "" if len(leaving) == len(turns) else f" by {in_words(leaving)}, and so it ended on every rank"
            return ending or Ending("user", f"The loop was left after step {step}{by}.")
        if len(set(turns)) > 1:
            self._apart = True
            told = ", ".join(f"rank {rank} {taken}" for rank, taken in enumerate(turns))
            raise TrainingError(
                f"after step {step} the ranks are not in step: {told}. Each has to make the same calls of the trainer at one "
                "place: take them out of conditions such as `if trainer.is_main_process`. The newest checkpoint is valid"
            )
        return ending
