"""Run directories as a run leaves them, from a made-up S-shaped reward curve, written through the real JSONL sink."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fast.config import Config
from grpo_fast.sinks import JsonlSink, RunInfo

SECONDS = {"rollout": 1.1, "reward": 0.05, "score": 0.12, "train": 0.6, "sync": 0.02, "other": 0.03}
FLOPS = {"prefill": 0.4e9, "decode": 2.1e9, "reference": 0.0, "forward": 1.3e9, "backward": 2.6e9}


@dataclass
class RunMaker:
    """Writes one run; the fields say what kind of run."""

    path: Path
    steps: int = 168
    max_steps: int = 400
    stopped_by: str | None = "forecast"
    forecasts: bool = True
    eval_steps: int = 20
    nan_steps: tuple[int, ...] = (33, 34, 90)
    resumed_at: int | None = None
    kl: bool = False
    alarm: bool = False
    collapse_at: int | None = None
    price: float = 2.5
    completion: str = "17 + 25 = 42\nThe answer is 42."
    seed: int = 0

    def law(self, step: Any) -> Any:
        risen = 0.08 + 0.83 / (1 + np.exp(-(np.asarray(step, dtype=float) - 62) / 13))
        return risen if self.collapse_at is None else risen / (1 + np.exp((np.asarray(step) - self.collapse_at) / 3))

    def write(self) -> Path:
        self.rng = np.random.default_rng(self.seed)
        config = Config(
            max_steps=self.max_steps,
            eval_steps=self.eval_steps,
            price_per_gpu_hour=self.price,
            learning_rate=1e-3,
            output_dir=self.path,
        )
        sink = JsonlSink(self.path)
        sink.start(
            RunInfo(
                run_dir=self.path,
                model="embedded",
                dataset="arithmetic",
                max_steps=self.max_steps,
                config=config.model_dump(mode="json"),
            )
        )
        (self.path / "config.toml").write_text(config.to_toml())
        sink.log_event(0, "start", f"embedded on arithmetic, at most {self.max_steps} steps")
        rewards = []
        last_forecast = None
        for step in range(1, self.steps + 1):
            row = self.row(step)
            forecast = self.forecast(step) if self.forecasts and step >= 5 else None
            last_forecast = forecast or last_forecast
            rewards.append(row["reward"])
            sink.log_step(row, forecast)
            if step == self.resumed_at:
                sink.log_event(step, "interrupt", f"interrupted at step {step}; go on with --resume")
                sink.log_event(step, "resume", f"from checkpoint-{step}")
            if step % 50 == 0:
                sink.log_event(step, "checkpoint", f"checkpoint-{step}")
            if step in {1, self.steps // 2, self.steps}:
                sink.log_completions(self.completions(step))
        sink.save_state(self.steps)
        if self.stopped_by is not None:
            self.finish(sink, rewards, last_forecast)
        sink.close()
        return self.path

    def row(self, step: int) -> dict[str, float]:
        rng, done = self.rng, float(self.law(step))
        reward = math.nan if step in self.nan_steps else float(np.clip(done + rng.normal(0, 0.035), 0, 1))
        row = {
            "step": step,
            "progress": step / self.max_steps,
            "learning_rate": 1e-3 * (1 - step / self.max_steps),
            "reward": reward,
            "reward_std": 0.1 + 0.4 * math.sqrt(done * (1 - done)),
            "rewards/accuracy/mean": reward,
            "frac_reward_zero_std": float(np.clip(abs(done - 0.4) + rng.normal(0, 0.06), 0, 1)),
            "completions/mean_length": 18 + 14 * done + rng.normal(0, 0.8),
            "completions/clipped_ratio": float(np.clip(0.06 * (1 - done) + rng.normal(0, 0.01), 0, 1)),
            "loss": rng.normal(0, 0.02),
            "grad_norm": float(np.exp(rng.normal(-1 + 1.2 * (1 - done), 0.3))),
            "entropy": 1.4 * (1 - done) + 0.12 + rng.normal(0, 0.03),
            "clip_ratio/region_mean": float(np.clip(rng.normal(0.02, 0.006), 0, 1)),
            "sampling/sampling_logp_difference/mean": abs(rng.normal(1e-4, 3e-5)),
            "num_tokens": 5200.0 * step,
            "step_time": sum(SECONDS.values()),
            "flops": sum(FLOPS.values()) * step,
            "gpu_seconds": sum(SECONDS.values()) * step,
            "energy_kwh": 3e-5 * step,
            "money": self.price * sum(SECONDS.values()) * step / 3600,
            "budget/steps": 1 - step / self.max_steps,
        }
        row |= {f"time/{name}": value for name, value in SECONDS.items()}
        row |= {f"flops/{name}": value * step for name, value in FLOPS.items()}
        row |= {"tokens/prompt": 1900.0 * step, "tokens/completion": 3300.0 * step, "tokens/trained": 2100.0 * step}
        if self.alarm:
            fallen = 0.0 if self.collapse_at is None else max(0, step - self.collapse_at) / 8
            row["alarm/reward"] = max(0.0, 0.15 + 0.2 * math.sin(step / 5)) + fallen
            row["alarm/grad_norm"] = max(0.0, 0.3 * math.sin(step / 9)) + 0.8 * fallen
            row["alarm/entropy_up"] = max(0.0, 0.2 * math.sin(step / 4))
        if self.kl:
            row["kl"] = 0.05 * done + abs(rng.normal(0, 0.004))
        if self.eval_steps and (step % self.eval_steps == 0 or step == self.steps):
            row["eval_reward"] = float(np.clip(done + 0.02 + rng.normal(0, 0.012), 0, 1))
        return row

    def forecast(self, step: int) -> dict[str, Any]:
        """A made-up belief that is wide and low at first, and right in the end."""
        known = 1 / (1 + math.exp(-(step - 75) / 16))
        final = 0.55 * (1 - known) + 0.905 * known + 0.01 * math.sin(step / 9)
        low, high = max(0.0, final - 0.42 * (1 - known) - 0.025), min(1.0, final + 0.4 * (1 - known) + 0.02)
        grid = np.unique(np.round(np.linspace(0, self.max_steps, 25)))
        law = np.minimum(self.law(grid), final + (self.law(grid) - self.law(step)).clip(max=0))
        median = np.where(grid <= step, self.law(grid), np.maximum(law, self.law(step)) * 0 + self.blend(grid, step, final))
        spread = np.clip((grid - step) / max(self.max_steps - step, 1), 0.02, 1) ** 0.4
        phase = "slow start" if step < 35 else "rapid improvement" if step < 105 else "plateau"
        phase = "rapid improvement" if step in {108, 112} else phase
        identifiable = step > 45
        return {
            "step": step,
            "median": final,
            "low": low,
            "high": high,
            "plateau": min(1.0, final + 0.005),
            "plateau_low": low,
            "plateau_high": min(1.0, high + 0.01),
            "x80": 84 if identifiable else None,
            "x95": 104 if identifiable else None,
            "p_gain_below_eps": float(np.clip(0.96 / (1 + math.exp(-(step - 125) / 11)) + 0.02 * math.sin(step / 3), 0, 1)),
            "phase": phase,
            "phase_probability": 0.5 + 0.45 * abs(math.tanh((step - 35) / 30)) if step < 70 else 0.85,
            "phase_probabilities": self.phases(step),
            "identifiable": identifiable,
            "reason": "" if identifiable else "the rise has not begun: plateau and speed cannot be told apart",
            "band": {
                "step": grid.tolist(),
                "low": (median - (final - low) * spread).clip(0, 1).tolist(),
                "median": median.tolist(),
                "high": (median + (high - final) * spread).clip(0, 1).tolist(),
            },
        }

    def phases(self, step: int) -> list[float]:
        begun, done = (1 / (1 + math.exp(-(step - at) / 9)) for at in (35, 105))
        return [1 - begun, begun - done, done]

    def blend(self, grid: Any, step: int, final: float) -> Any:
        now = float(self.law(step))
        return now + (final - now) * (1 - np.exp(-np.clip(grid - step, 0, None) / 40))

    def completions(self, step: int) -> list[dict[str, Any]]:
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 + 25?"}]
        texts = [self.completion, "I think it is 41", "17 + 25 = 42. So 42.", ""]
        return [
            {
                "step": step,
                "prompt": chat if i % 2 else "17 + 25 =",
                "completion": text,
                "reward": float("42" in text),
                "advantage": 0.87 - i,
            }
            for i, text in enumerate(texts)
        ]

    def finish(self, sink: JsonlSink, rewards: list[float], forecast: dict[str, Any] | None) -> None:
        unused = 1 - self.steps / self.max_steps
        hours = sum(SECONDS.values()) * self.steps / 3600
        reasons = {
            "forecast": f"At step {self.steps} there is a 91.2% chance that less than 0.01 reward is left to gain in the "
            "budget (expected gain 0.003); 3 forecasts in a row, since step 28. The forecast for the end is 0.905 "
            "(90 % interval 0.880 to 0.921)",
            "max_steps": f"max_steps={self.max_steps} is reached: {self.steps} steps are done.",
            "max_tokens": "max_tokens=870,000 is reached: 873,600 tokens are used.",
            "collapse": f"The reward fell from 0.910 to 0.300 since step {self.steps - 12}",
            "interrupt": f"Interrupted by the user after step {self.steps}.",
        }
        reason = reasons[str(self.stopped_by)]
        finite = [value for value in rewards if math.isfinite(value)]
        per_step = 1 / max(self.steps, 1)
        full = unused * self.max_steps * per_step
        summary = {
            "stopped_by": self.stopped_by,
            "reason": reason,
            "step": self.steps,
            "max_steps": self.max_steps,
            "final_reward": float(np.mean(finite[-10:])) if finite else None,
            "best_reward": max(finite, default=None),
            "best_step": int(np.nanargmax(rewards)) + 1 if finite else None,
            "eval_reward": float(self.law(self.steps)) + 0.02 if self.eval_steps else None,
            "forecast": {k: v for k, v in forecast.items() if k != "band"} if forecast else None,
            "saved": {
                "steps": unused,
                "flops": sum(FLOPS.values()) * self.steps * full,
                "gpu_hours": hours * full,
                "money": hours * full * self.price,
            },
            "compute": {
                "flops": sum(FLOPS.values()) * self.steps,
                "tokens": 5200 * self.steps,
                "gpu_hours": hours,
                "wall_hours": hours,
                "energy_kwh": 3e-5 * self.steps,
                "energy_source": "estimated",
                "money": hours * self.price,
                "seconds": {name: value * self.steps for name, value in SECONDS.items()},
                "flops_by_phase": {name: value * self.steps for name, value in FLOPS.items()},
            },
            "device": {"name": "CPU, 2 cores", "memory_gib": 23.5, "dtype": "float32"},
            "versions": {"grpo_fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
            "model": "embedded",
            "dataset": "arithmetic",
        }
        sink.log_event(self.steps, "stop" if self.stopped_by == "forecast" else "budget", reason)
        sink.log_event(self.steps, "end", "the run is over")
        (self.path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="session")
def run_maker() -> Callable[..., Path]:
    """Writes a run to a path of one's own."""
    return lambda path, **options: RunMaker(path, **options).write()


@pytest.fixture
def make_run(tmp_path: Path, run_maker: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a run into the test's directory."""
    return lambda name="run", **options: run_maker(tmp_path / name, **options)
