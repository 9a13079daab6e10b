"""The outcomes of an update and of a whole step, and what an update costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_fast.compute import ComputeMeter
from grpo_fast.config import Config
from grpo_fast.law import AlarmState, Forecast, StopDecision
from grpo_fast.train.batch import TrainingSequence
from grpo_fast.types import Group


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The outcome of an update."""

    metrics: dict[str, float]
    trained: tuple[TrainingSequence, ...]
    """The sequences that were trained on; the others carried no gradient."""
    num_dropped_tokens: int
    """Completion tokens that were sampled but not trained on."""
    measured: tuple[TrainingSequence, ...] = ()
    """Sequences without gradient that went through a forward pass for the metrics, or because their entropy counts."""
    shared_prompts: tuple[int, ...] = ()
    """Lengths of the prompts of ``trained`` that were computed by another sequence with the same one."""
    measured_shared_prompts: tuple[int, ...] = ()
    """The same of ``measured``."""

    def charge(self, meter: ComputeMeter, config: Config) -> None:
        """Meters what was computed."""
        lengths = [len(sequence) for sequence in self.trained]
        scored = sum(sequence.num_scored for sequence in self.trained)
        kept = _num_kept(self.trained)
        for adapters in config.scoring_passes:
            meter.add_reference(lengths, scored, adapters=adapters, shared_prompts=self.shared_prompts, num_kept=kept)
        meter.add_train(
            lengths,
            scored,
            checkpointing=config.recomputes_products,
            num_iterations=config.num_iterations,
            shared_prompts=self.shared_prompts,
            num_kept=kept,
        )
        if self.measured:
            passes = idle_passes(config)
            again = passes * self.measured
            meter.add_reference(
                [len(s) for s in again],
                sum(s.num_scored for s in again),
                adapters=True,
                shared_prompts=passes * self.measured_shared_prompts,
                num_kept=_num_kept(again),
            )
        meter.add_dropped(self.num_dropped_tokens)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of one step."""

    step: int
    metrics: dict[str, float]
    forecast: Forecast | None
    decision: StopDecision | None
    alarm: AlarmState | None
    groups: Sequence[Group]
    """The prompts of the step with completions, rewards and advantages."""


def _num_kept(sequences: Sequence[TrainingSequence]) -> int | None:
    """Tokens that were kept for the completions' tokens, all together; ``None`` where no support was cut."""
    sizes = [int(sequence.kept.sizes.sum()) for sequence in sequences if sequence.kept is not None]
    return sum(sizes) if sizes else None


def idle_passes(config: Config) -> int:
    """Forward passes over completions that give no gradient: for the metrics, and because their entropy counts."""
    return config.num_iterations * config.keep_dead_rows_for_metrics + (config.top_entropy_quantile < 1)
