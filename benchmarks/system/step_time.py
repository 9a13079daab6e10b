"""Whole training steps beside TRL's GRPOTrainer: same model, prompts, group size, lengths, loss and learning rate.

The two take turns, one step each, so that both meet the same state of the machine. With ``--stride`` several of ours go to one
of TRL's: its steps cost the same all through a run, ours cost less where groups agree, so a short measurement has to see the
whole of a run of ours. ``cpu_s`` is what the process computed in a step, which a busy machine changes less than the time that
it took (functions that reward in processes of their own are not in it). Each rollout is the trainer's own (TRL's through
``model.generate``, its default without vLLM). Run ``python -m benchmarks.system.step_time``; it prints JSON and, with
``--output``, writes it. ``--model DIRECTORY`` (such as what ``smollm2.py`` writes) takes another model on the same prompts,
with a reward that differs between any two answers, so that no group is left out and both train on every token. Peak memory is
that of each trainer alone, in a process of its own, over enough steps for the heap to stop growing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from benchmarks.system.arguments import checkpointing
from grpo_fast import Config, GRPOTrainer, recipe
from grpo_fast.assets import embedded_model_dir
from grpo_fast.device import package_version
from grpo_fast.tasks.arithmetic import arithmetic_accuracy, arithmetic_task

WARMUP_STEPS = 3
"""Steps that are left out; one alone of a model whose steps take many seconds."""
OURS = ("rollout", "reward", "score", "train", "sync")
"""Phases of a step; what is left holds the wait for TRL's turn."""
Reward = Callable[..., list[float]]


def distinct_characters(completions: list[str], **_: Any) -> list[float]:
    """Characters of an answer, each counted once, plus a little of its length: hardly ever equal for two answers."""
    return [len(set(text)) / 64 + len(text) / 4096 for text in completions]


class TimedTRL(TRLTrainer):
    """TRL's trainer, with what it takes to sample and score told apart from the rest of its step."""

    sampled_s = 0.0
    num_tokens = 0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        begun = time.perf_counter()
        made = super()._generate_and_score_completions(inputs)
        self.sampled_s = time.perf_counter() - begun
        self.num_tokens = int(made["completion_mask"].sum()) + int(made["prompt_mask"].sum())
        return made


class TakeTurns(TrainerCallback):
    """Times TRL's step and then takes ``stride`` of ours."""

    def __init__(self, ours: GRPOTrainer, num_steps: int, stride: int) -> None:
        self._steps = ours.steps()
        self._num_steps = num_steps
        self.stride = stride
        self._begun = self._begun_cpu = 0.0
        self.theirs: TimedTRL | None = None
        self.trl_s: list[float] = []
        self.trl_sampled_s: list[float] = []
        self.trl_tokens: list[int] = []
        self.ours_s: list[float] = []
        self.trl_cpu_s: list[float] = []
        self.ours_cpu_s: list[float] = []
        self.ours: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun, self._begun_cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trl_s.append(time.perf_counter() - self._begun)
        self.trl_cpu_s.append(time.process_time() - self._begun_cpu)
        assert self.theirs is not None
        self.trl_sampled_s.append(self.theirs.sampled_s)
        self.trl_tokens.append(self.theirs.num_tokens)
        for _ in range(self.stride):
            begun, begun_cpu = time.perf_counter(), time.process_time()
            step = next(self._steps)
            self.ours_s.append(time.perf_counter() - begun)
            self.ours_cpu_s.append(time.process_time() - begun_cpu)
            self.ours.append(dict(step.metrics))
        control.should_training_stop = len(self.trl_s) >= self._num_steps

    def close(self) -> None:
        self._steps.close()


def configuration(folder: Path, model: str, seed: int) -> Config:
    """The embedded recipe, or a step of 8 answers by another model."""
    config = recipe("embedded", output_dir=folder / "ours", forecast="off", sinks=(), eval_steps=0, seed=seed)
    if model == "embedded":
        return config
    sizes = {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 64, "save_steps": 1000, "reward_workers": 0}
    return config.replace(model=model, learning_rate=1e-6, baseline_probe=0, report=False, reward_range=None, **sizes)


def measure(num_steps: int, *, stride: int = 1, seed: int = 0, model: str = "embedded") -> dict[str, Any]:
    """Runs both in turns.

    Args:
        num_steps: of TRL's.
        stride: steps of ours to one of TRL's; a pair's ratio is of TRL's step to the mean of ours.
        seed: of both.
        model: ``embedded``, for the first steps of the embedded recipe, with its schedule; or a directory.

    Returns:
        Medians and quartiles in seconds, the ratio of medians, phases, tokens a second, last rewards and versions.

    Raises:
        ValueError: our run is shorter than that.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), model, seed)
        if num_steps * stride > config.max_steps:
            raise ValueError(
                f"{num_steps} steps of TRL's, {stride} of ours to each, are more than the run's {config.max_steps}; take fewer"
            )
        reward = arithmetic_accuracy if model == "embedded" else distinct_characters
        with GRPOTrainer(config, reward_funcs=None if model == "embedded" else [reward]) as ours:
            turns = TakeTurns(ours, num_steps, stride)
            turns.theirs = theirs = _trl_trainer(config, Path(folder) / "trl", turns, reward)
            theirs.train()
            turns.close()
        trl_rewards = [row["reward"] for row in theirs.state.log_history if "reward" in row]
    return {"model": Path(model).name} | _table(turns, trl_rewards, WARMUP_STEPS if model == "embedded" else 1)


def peak_memory(which: Literal["grpo_fast", "trl"], model: str, num_steps: int) -> float:
    """MiB that a process of its own has resident at most over a few steps, libraries included."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak_memory, which, model, num_steps).result()


def _peak_memory(which: str, model: str, num_steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), model, 0).replace(max_steps=num_steps, warmup_steps=0)
        reward = arithmetic_accuracy if model == "embedded" else distinct_characters
        if which == "trl":
            _trl_trainer(config, Path(folder), None, reward).train()
        else:
            with GRPOTrainer(config, reward_funcs=None if model == "embedded" else [reward]) as trainer:
                for _ in trainer.steps():
                    pass
    # not getrusage, whose maximum a process takes over from the one that started it
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _trl_trainer(config: Config, folder: Path, turns: TakeTurns | None, reward: Reward) -> TimedTRL:
    task = arithmetic_task(size=config.dataset_size, eval_size=0, seed=config.seed)
    size = config.prompts_per_step * config.num_generations
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        **checkpointing(on=False),
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
    directory = embedded_model_dir() if config.model == "embedded" else config.model
    return TimedTRL(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(directory),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([dict(task.train[i]) for i in range(len(task.train))]),
        callbacks=[turns] if turns else [],
    )


def _table(turns: TakeTurns, trl_rewards: list[float], warmup_steps: int) -> dict[str, Any]:
    stride = turns.stride
    kept, our_kept = slice(warmup_steps, None), slice(warmup_steps * stride, None)
    ours, theirs, sampled = turns.ours_s[our_kept], turns.trl_s[kept], turns.trl_sampled_s[kept]
    means = [statistics.mean(ours[start : start + stride]) for start in range(0, len(ours), stride)]
    return {
        "num_steps": len(turns.trl_s),
        "stride": stride,
        "warmup_steps": warmup_steps,
        "grpo_fast_step_s": dict(zip(("p25", "p50", "p75"), statistics.quantiles(ours, n=4), strict=True)),
        "trl_step_s": dict(zip(("p25", "p50", "p75"), statistics.quantiles(theirs, n=4), strict=True)),
        "median_ratio_trl_over_ours": statistics.median(theirs) / statistics.median(ours),
        "paired_ratio_median": statistics.median(t / o for t, o in zip(theirs, means, strict=True)),
        "cpu_s": {
            "grpo_fast": statistics.median(turns.ours_cpu_s[our_kept]),
            "trl": statistics.median(turns.trl_cpu_s[kept]),
        },
        "phases_s": {
            "grpo_fast": {name: statistics.median(m[f"time/{name}"] for m in turns.ours[our_kept]) for name in OURS},
            "trl": {
                "rollout, reward and score": statistics.median(sampled),
                "rest": statistics.median(t - s for t, s in zip(theirs, sampled, strict=True)),
            },
        },
        "tokens_per_s": {
            "grpo_fast": (turns.ours[-1]["num_tokens"] - turns.ours[our_kept.start - 1]["num_tokens"]) / sum(ours),
            "trl": sum(turns.trl_tokens[kept]) / sum(theirs),
        },
        "reward_last_10": {
            "grpo_fast": statistics.mean(m["reward"] for m in turns.ours[-10:]),
            "trl": statistics.mean(trl_rewards[-10:]) if trl_rewards else None,
        },
        "steps_to_reward_0.9": {
            "grpo_fast": _first_above(0.9, [m["reward"] for m in turns.ours]),
            "trl": _first_above(0.9, trl_rewards),
        },
        "seconds_to_reward_0.9": {
            "grpo_fast": _seconds_to(0.9, [m["reward"] for m in turns.ours], turns.ours_s),
            "trl": _seconds_to(0.9, trl_rewards, turns.trl_s),
        },
        "torch_threads": torch.get_num_threads(),
        "versions": {name: package_version(name) for name in ("torch", "transformers", "trl", "grpo-fast")},
    }


def _first_above(level: float, rewards: list[float]) -> int | None:
    """The first step by which ten in a row had so high a mean reward."""
    means = (statistics.mean(rewards[end - 10 : end]) for end in range(10, len(rewards) + 1))
    return next((end for end, mean in enumerate(means, 10) if mean >= level), None)


def _seconds_to(level: float, rewards: list[float], step_s: list[float]) -> float | None:
    """Seconds of the steps until then."""
    step = _first_above(level, rewards)
    return None if step is None else sum(step_s[:step])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--stride", type=int, default=1, help="steps of ours to one of TRL's")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--memory-steps", type=int, default=90, help="steps of each trainer alone; 0 leaves peak memory out")
    parser.add_argument("--machine", default="", help="what else to say of the machine: shared, clocks locked, ...")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = measure(options.steps, stride=options.stride, model=options.model) | {"machine": options.machine}
    if options.memory_steps:
        trainers: tuple[Literal["grpo_fast", "trl"], ...] = ("grpo_fast", "trl")
        result["peak_memory_steps"] = options.memory_steps
        result["peak_memory_mib"] = {name: peak_memory(name, options.model, options.memory_steps) for name in trainers}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
