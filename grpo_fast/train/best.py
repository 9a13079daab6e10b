"""Chooses the best checkpoint, and keeps those that may become it if a collapse is confirmed later."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on the disk, and how good its policy was when it was saved."""

    step: int
    train: float | None
    """Mean reward of the last training steps; None where there was none."""
    held_out: float | None = None
    """Held-out reward of the same weights, where they were evaluated."""

    @property
    def metric(self) -> float | None:
        """The better founded of the two."""
        return self.train if self.held_out is None else self.held_out

    @property
    def by(self) -> str:
        """The name of :attr:`metric`, in words."""
        return "training reward" if self.held_out is None else "held-out reward"

    @property
    def name(self) -> str:
        """Its directory in the run."""
        return f"checkpoint-{self.step}"


class BestCheckpoints:
    """Ranks checkpoints: by held-out reward as soon as one of them has it, by mean training reward before.

    The reward of step t is that of the weights after step t - 1. Where a reward falls from step ``onset`` on, those weights are
    spoilt already, so the newest checkpoint that is certainly sound is that of step ``onset - 2``.
    """

    def __init__(self, saved: Sequence[Saved] = ()) -> None:
        self._saved = list(saved)

    def add(self, step: int, *, train: float, held_out: float | None) -> None:
        """Takes note of a checkpoint that is about to be written; NaN counts as unknown."""
        known = [None if value is None or math.isnan(value) else value for value in (train, held_out)]
        self._saved = [one for one in self._saved if one.step != step] + [Saved(step, *known)]

    def best(self, *, until: int | None = None) -> Saved | None:
        """The best checkpoint, of those up to a step where one is given; None where there is none with a known reward.

        Of equals the older one wins. The weights before the first step are no result of the run and do not count.
        """
        able = [one for one in self._saved if one.step and one.metric is not None and (until is None or one.step <= until)]
        judged = [one for one in able if one.held_out is not None] or able
        return max(judged, key=lambda one: (one.metric, -one.step), default=None)

    def facts(self) -> dict[str, Any]:
        """What Hugging Face's ``TrainerState`` keeps of the best one; nothing where there is none."""
        best = self.best()
        return {} if best is None else {"best_metric": best.metric, "best_step": best.step, "best_checkpoint": best.name}

    def is_better(self, held_out: float) -> bool:
        """Whether a held-out reward beats that of every checkpoint."""
        known = [one.held_out for one in self._saved if one.held_out is not None]
        return not math.isnan(held_out) and held_out > max(known, default=-math.inf)

    def forget_after(self, step: int) -> None:
        """Leaves newer checkpoints out of the choice: they were saved while the policy came apart."""
        self._saved = [one for one in self._saved if one.step <= step]

    def protected(self, *, sound_until: int) -> set[str]:
        """Directories that no pruning may delete: the best one, and the best of those that are certainly sound."""
        return {one.name for one in (self.best(), self.best(until=sound_until)) if one is not None}

    def keep_only(self, names: Collection[str]) -> None:
        """Forgets what is no longer on the disk."""
        self._saved = [one for one in self._saved if one.name in names]

    def state_dict(self) -> list[dict[str, Any]]:
        """The checkpoints, as JSON values."""
        return [asdict(one) for one in self._saved]

    @classmethod
    def from_state_dict(cls, state: Sequence[dict[str, Any]]) -> BestCheckpoints:
        """Rebuilds what :meth:`state_dict` gave."""
        return cls([Saved(**one) for one in state])


def way_back(best: Saved | None) -> str:
    """Advice after a collapse, in one sentence."""
    if best is None:
        return "No checkpoint is older than the collapse: lower save_steps, and start again with a lower learning_rate."
    return f"Go back to {best.name}, the best checkpoint from before ({best.by} {best.metric:.3f})."
