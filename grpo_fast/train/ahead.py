"""The groups of each step: collected when the step asks for them, or ahead, while earlier steps train."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fast.compute import ComputeMeter
from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rollout import RolloutError
from grpo_fast.rollout.buffer import RolloutBuffer
from grpo_fast.train.collect import Collected, Collector
from grpo_fast.train.distributed import ALONE, World
from grpo_fast.types import Completion


class Rollouts:
    """Hands out the groups of one step after another; ``config.max_staleness`` decides how far ahead they are collected.

    Args:
        config: of the run.
        collector: works in a thread where groups are collected ahead.
        world: the ranks, whose threads collect together.
    """

    def __init__(self, config: Config, collector: Collector, *, world: World = ALONE) -> None:
        self._collector = collector
        self._max_staleness = config.max_staleness
        self._keeps_running = config.vllm_pause_mode == "keep"
        self._buffer: RolloutBuffer[Collected] | None = None
        if config.max_staleness:
            beside = world.beside()

            def collect(step: int) -> Collected:
                with beside():
                    return collector.collect(step, PhaseTimer())

            self._buffer = RolloutBuffer(collect, max_staleness=config.max_staleness, last_step=config.max_steps)

    def take(self, step: int, timer: PhaseTimer) -> Collected:
        """The groups of ``step``.

        Args:
            step: the next step.
            timer: charged with ``rollout`` and ``reward``, or, for groups collected ahead, with the wait, as ``rollout``.

        Returns:
            The groups; if they were collected ahead, with the metrics ``sample/staleness_mean`` and ``sample/staleness_max``
            (updates between the weights that sampled a token and the newest) and ``overlap/rollout_s`` (seconds of sampling
            that training did not wait for).

        Raises:
            RolloutError: a token is older than ``max_staleness`` allows.
            TrainingError: collecting failed; the error is the collector's.
        """
        if self._buffer is None:
            return self._collector.collect(step, timer)
        with timer.phase("rollout"):
            collected, overlapped = self._buffer.take(step)
        lags = [step - 1 - version for group in collected.groups for c in group.completions for version in token_versions(c)]
        if max(lags) > self._max_staleness:
            raise RolloutError(
                f"a token of step {step} was sampled {max(lags)} updates ago, but max_staleness={self._max_staleness}: the "
                "engine reports wrong weight versions, or did not receive an update"
            )
        collected.metrics |= {
            "sample/staleness_mean": sum(lags) / len(lags),
            "sample/staleness_max": float(max(lags)),
            "overlap/rollout_s": overlapped,
        }
        return collected

    def go_on(self, step: int) -> None:
        """Lets those be collected ahead that the :meth:`take` of ``step`` would, where its own groups are there already."""
        if self._buffer is not None:
            self._buffer.allow(step)

    def hold(self, timer: PhaseTimer) -> None:
        """Waits for the rollouts that the weights in force are to make; none begins before :meth:`take` or :meth:`go_on`.

        With ``vllm_pause_mode="keep"`` it does nothing: they may run while weights change.
        """
        if self._buffer is not None and not self._keeps_running:
            with timer.phase("rollout"):
                self._buffer.hold()

    def ready(self) -> list[Collected]:
        """The groups collected ahead, for the checkpoint: they are neither lost nor sampled again."""
        return [] if self._buffer is None else self._buffer.ready()

    def charge(self, meter: ComputeMeter) -> None:
        """Meters what was collected ahead since the last call, by the step that it ran beside."""
        for collected in self.ready():
            collected.charge(meter)

    def left_over(self, taken: Collected | None) -> str:
        """What the run's last sentence says of rollouts that were metered and not trained on; empty if there are none.

        Args:
            taken: those of a step that were taken, where its update was not begun.
        """
        left = [collected for collected in (taken, *self.ready()) if collected is not None and collected.charged]
        if self._buffer is None or not left:
            return ""
        tokens = sum(len(completion.token_ids) for each in left for group in each.sampled for completion in group.completions)
        steps = f"{len(left)} more step{'s' if len(left) > 1 else ''}"
        return f" Completions of {steps} ({tokens:,} tokens) were sampled ahead; a resumed run trains on them."

    def restore(self, next_step: int, ready: Sequence[Collected]) -> None:
        """Starts with the groups that a checkpoint contains."""
        if self._buffer is not None:
            self._buffer.restore(next_step, ready)

    def close(self) -> None:
        """Ends the thread when what it collects is collected."""
        if self._buffer is not None:
            self._buffer.close()


def token_versions(completion: Completion) -> Sequence[int]:
    """The version of the weights that sampled each token."""
    return completion.weight_versions or [completion.weight_version] * len(completion.token_ids)
