"""Whole training steps beside TRL's GRPOTrainer: same model, prompts, group size, lengths, loss and learning rate.

The two take turns, one step each, so that both meet the same state of the machine; each rollout is the trainer's own (TRL's
through ``model.generate``, its default without vLLM). Run ``python benchmarks/system/step_time.py``; it prints JSON and, with
``--output``, writes it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from grpo_fast import Config, GRPOTrainer, recipe
from grpo_fast.assets import embedded_model_dir
from grpo_fast.tasks.arithmetic import arithmetic_accuracy, arithmetic_task

WARMUP_STEPS = 3


class TakeTurns(TrainerCallback):
    """Times TRL's step and then takes one of ours."""

    def __init__(self, ours: GRPOTrainer, num_steps: int) -> None:
        self._steps = ours.steps()
        self._num_steps = num_steps
        self._begun = 0.0
        self.trl_s: list[float] = []
        self.ours_s: list[float] = []
        self.rewards: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trl_s.append(time.perf_counter() - self._begun)
        begun = time.perf_counter()
        step = next(self._steps)
        self.ours_s.append(time.perf_counter() - begun)
        self.rewards.append(step.metrics["reward"])
        control.should_training_stop = step.step >= self._num_steps

    def close(self) -> None:
        self._steps.close()


def measure(num_steps: int, *, seed: int = 0) -> dict[str, Any]:
    """Runs both for the first ``num_steps`` steps of the embedded recipe, with its schedule.

    Returns:
        Medians and quartiles in seconds, the ratio of medians, last rewards and versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = recipe("embedded", output_dir=Path(folder) / "ours", forecast="off", sinks=(), eval_steps=0, seed=seed)
        with GRPOTrainer(config) as ours:
            turns = TakeTurns(ours, num_steps)
            theirs = _trl_trainer(config, Path(folder) / "trl", turns)
            theirs.train()
            turns.close()
        trl_rewards = [row["reward"] for row in theirs.state.log_history if "reward" in row]
    return _table(turns, trl_rewards, num_steps)


def _trl_trainer(config: Config, folder: Path, turns: TakeTurns) -> TRLTrainer:
    task = arithmetic_task(size=config.dataset_size, eval_size=0, seed=config.seed)
    size = config.prompts_per_step * config.num_generations
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=size,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        loss_type=config.loss_type,
        beta=config.beta,
        warmup_steps=config.num_warmup_steps,
        max_steps=config.max_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )
    return TRLTrainer(
        model=AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(embedded_model_dir()),
        reward_funcs=arithmetic_accuracy,
        args=arguments,
        train_dataset=Dataset.from_list([dict(task.train[i]) for i in range(len(task.train))]),
        callbacks=[turns],
    )


def _table(turns: TakeTurns, trl_rewards: list[float], num_steps: int) -> dict[str, Any]:
    ours, theirs = turns.ours_s[WARMUP_STEPS:], turns.trl_s[WARMUP_STEPS:]
    return {
        "num_steps": num_steps,
        "warmup_steps": WARMUP_STEPS,
        "grpo_fast_step_s": dict(zip(("p25", "p50", "p75"), statistics.quantiles(ours, n=4), strict=True)),
        "trl_step_s": dict(zip(("p25", "p50", "p75"), statistics.quantiles(theirs, n=4), strict=True)),
        "median_ratio_trl_over_ours": statistics.median(theirs) / statistics.median(ours),
        "paired_ratio_median": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
        "reward_last_10": {
            "grpo_fast": statistics.mean(turns.rewards[-10:]),
            "trl": statistics.mean(trl_rewards[-10:]) if trl_rewards else None,
        },
        "torch_threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "grpo-fast")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = measure(options.steps)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
