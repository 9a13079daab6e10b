"""What reward functions log among the run's own metrics: under its own name, as in TRL, unless the run has that name itself."""

from __future__ import annotations

import re
from collections.abc import Mapping

_OWN = re.compile(
    r"(step|progress|epoch|learning_rate|reward|reward_std|rewards|frac_reward_zero_std|frac_reward_all_wrong|refilled_prompts"
    r"|steps_without_variance|alarm|forecast|completions|num_turns|tools|loss|grad_norm|entropy|kl|clip_ratio|cispo_clip_ratio"
    r"|sampling|sample|overlap|sync|num_tokens|tokens|flops|gpu_seconds|energy_kwh|money|mfu|step_time|time|budget)(/.*)?"
    r"|eval_.*",
    re.DOTALL,
)


def is_own(name: str) -> bool:
    """Whether a metric of the run has the name, or might have: those of the kind ``time/...`` are many."""
    return _OWN.fullmatch(name) is not None


def named_apart(logged: Mapping[str, float]) -> dict[str, float]:
    """Metrics under names that no metric of the run has: ``loss`` becomes ``logged/loss``, in every step.

    Args:
        logged: by the name that a reward function gave.
    """
    return {f"logged/{name}" if is_own(name) else name: value for name, value in logged.items()}
