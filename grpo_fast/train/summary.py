"""The summary of a run: why it ended, which checkpoint to use, what it cost, and what stopping saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fast.config import Config
from grpo_fast.device import device_facts, versions
from grpo_fast.law import Forecast
from grpo_fast.run_dir import SUMMARY_FILE, write_whole
from grpo_fast.sinks.jsonl import plain
from grpo_fast.train.best import Saved
from grpo_fast.train.parts import Parts


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a run ended."""

    kind: str
    """``forecast``, ``collapse``, ``interrupt``, ``user``, or the name of the budget that was reached."""
    message: str
    """One sentence with numbers."""
    signal: str | None = None
    """Name of the signal that interrupted the run, such as ``SIGTERM``."""

    @property
    def event(self) -> str:
        """Its name among the run's events."""
        return {"interrupt": "interrupt", "forecast": "stop", "user": "stop", "collapse": "alarm"}.get(self.kind, "budget")

    def again(self) -> Ending:
        """The ending of a resumed run that had already ended; its message says how to continue the run."""
        if self.kind in {"interrupt", "user"}:
            return self
        if self.kind == "forecast":
            told = (
                f"The forecast had ended this run: {self.message} Set forecast='warn' or 'off', or a larger limit, to continue."
            )
        elif self.kind == "collapse":
            told = f"The run ended in a collapse: {self.message} Set collapse_action='warn' or 'off' to continue."
        else:
            told = f"{self.message} The run had ended already; set a larger {self.kind} to continue."
        return Ending(self.kind, told)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a run."""

    step: int
    final_reward: float
    """Mean reward of the last steps."""
    best: Saved | None
    """The best checkpoint (after a collapse, the best from before it); None if none has a known reward."""
    evals: Mapping[str, float]
    """``first`` and ``last`` held-out reward, if there were evaluations, and that of the untrained ``baseline``, if probed."""
    forecast: Forecast | None


def write_summary(config: Config, parts: Parts, ending: Ending, outcome: Outcome) -> dict[str, Any]:
    """Writes ``summary.json`` into the run and returns its content."""
    compute, best = parts.meter.summary(), outcome.best
    forecast = None if outcome.forecast is None else outcome.forecast.to_dict()
    if forecast is not None:
        forecast.pop("band")
    summary = {
        "stopped_by": ending.kind,
        "reason": ending.message,
        "signal": ending.signal,
        "step": outcome.step,
        "max_steps": config.max_steps,
        "final_reward": outcome.final_reward,
        "best_reward": best and best.metric,
        "best_step": best and best.step,
        "use": best and {"checkpoint": best.name, "step": best.step, "reward": best.metric, "by": best.by},
        "baseline_reward": outcome.evals.get("baseline"),
        "initial_eval_reward": outcome.evals.get("first"),
        "eval_reward": outcome.evals.get("last"),
        "forecast": forecast,
        "saved": _saved(outcome.step, config.max_steps, compute),
        "compute": compute,
        "device": device_facts("cpu" if parts.policy.device.type == "cpu" else "cuda").as_dict(),
        "versions": versions(),
        "model": config.model,
        "dataset": parts.data.task.name,
    }
    text = json.dumps(plain(summary), indent=1, allow_nan=False)
    write_whole(config.output_dir / SUMMARY_FILE, text)
    result: dict[str, Any] = json.loads(text)
    return result


def _saved(step: int, max_steps: int, compute: Mapping[str, Any]) -> dict[str, float]:
    """Cost of the steps that were not run, at the mean cost of those that were."""
    ahead = (max_steps - step) / step if step else 0.0
    return {
        "steps": (max_steps - step) / max_steps,
        "flops": ahead * compute["flops"],
        "gpu_hours": ahead * compute["gpu_hours"],
        "money": ahead * compute["money"],
    }
