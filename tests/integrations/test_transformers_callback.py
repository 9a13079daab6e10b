"""The callback in the trainers that it is for: they run, nothing stands in for them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.system.arguments import checkpointing
from grpo_fast.assets import embedded_model_dir
from grpo_fast.integrations import PlateauStopCallback
from grpo_fast.law import OnlinePredictor, Prior, RunFacts, Spending, StoppingRule
from grpo_fast.tasks.arithmetic import arithmetic_task

EASY: dict[str, Any] = {"epsilon": 0.05, "reward_range": (0, 1), "confidence": 0.6, "patience": 2, "min_steps": 5}


def trl(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that trains with TRL 1.16, which still uses names that transformers 5.23 has renamed."""
    return pytest.mark.slow(pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")(test))


def constant_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def growing_reward() -> Callable[..., list[float]]:
    """A reward that rises by the same amount a call and never rests."""
    calls = [0]

    def growing(completions: list[str], **_: Any) -> list[float]:
        calls[0] += 1
        return [calls[0] / 40 + (0.001 if i % 2 else 0.0) for i in range(len(completions))]

    return growing


class Seen(TrainerCallback):
    """What a callback that comes later gets to see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def trl_trainer(
    folder: Path, *callbacks: TrainerCallback, reward: Any = constant_reward, peft_config: Any = None, **options: Any
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    task = arithmetic_task(size=16, eval_size=4, seed=0)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        **checkpointing(on=False),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 3,
        "learning_rate": 1e-5,
        "max_steps": 30,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    rows = [dict(task.train[i]) for i in range(len(task.train))]
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(embedded_model_dir()),
        reward_funcs=reward,
        args=GRPOConfig(**settings | options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


@trl
def test_trl_stops_at_a_constant_reward(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, seen = PlateauStopCallback(reward_range=(0, 1)), Seen()
    often = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 1000}
    trainer = trl_trainer(tmp_path, callback, seen, max_steps=100, **often)
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        trainer.train()
    stopped = trainer.state.global_step
    assert 20 <= stopped < 90
    assert [row["step"] for row in callback.history] == list(range(1, stopped + 1)), "evaluations are not observations"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("grpo_fast")]
    assert len(said) == 1
    told = f"training stops at the plateau: In the {stopped} steps up to step {stopped} no group held two different rewards"
    assert told in said[0]
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert len(rows) == stopped
    for row, belief in zip(rows, callback.history, strict=True):
        assert row["forecast/low"] == belief["low"] <= row["forecast/median"] <= row["forecast/high"] == belief["high"]
        assert row["forecast/plateau"] == belief["plateau"]
        assert row["forecast/p_gain_below_eps"] == belief["p_gain_below_eps"]
    assert rows[-1]["forecast/median"] == pytest.approx(0.5, abs=0.05)
    assert any("eval_reward" in row for row in trainer.state.log_history), "an evaluation did take place"
    later = [row for row in seen.logs if "reward" in row]
    assert all("forecast/median" in row for row in later)
    saved = json.loads((tmp_path / f"checkpoint-{stopped}" / "trainer_state.json").read_text(encoding="utf-8"))
    assert saved["log_history"][-1]["forecast/median"] == callback.history[-1]["median"]
    assert callback._counts == (2, 2), "four completions a step in pairs"
    assert callback.history[-1]["spent"]["tokens"] == rows[-1]["num_tokens"] == trainer.state.num_input_tokens_seen
    size = sum(weight.numel() for weight in trainer.model.parameters()) / 1e9
    assert callback.predictor.facts == RunFacts(size_b=size)


@trl
def test_trl_goes_on_while_the_reward_rises(tmp_path: Path) -> None:
    callback = PlateauStopCallback(**EASY)
    trainer = trl_trainer(tmp_path, callback, reward=growing_reward(), lr_scheduler_type="constant")
    trainer.train()
    assert trainer.state.global_step == 30
    assert callback.forecast is not None
    assert callback.forecast.median > 0.6


@trl
def test_warn_says_it_once_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = PlateauStopCallback(mode="warn", **EASY)
    trainer = trl_trainer(tmp_path, callback, max_steps=24, logging_steps=2)
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        trainer.train()
    assert trainer.state.global_step == 24
    assert [row["step"] for row in callback.history] == list(range(2, 25, 2))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("grpo_fast")]
    assert len(said) == 1
    assert said[0].startswith("the plateau is reached, but training continues (mode='warn'): At step")


@trl
@pytest.mark.parametrize("restore", [True, False], ids=["restored", "replayed"])
def test_a_resumed_run_believes_what_the_straight_one_did(tmp_path: Path, restore: bool) -> None:
    whole = PlateauStopCallback(mode="warn", **EASY)
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    trl_trainer(tmp_path / "run", whole, **settings).train()
    again = PlateauStopCallback(mode="warn", **EASY)
    trainer = trl_trainer(tmp_path / "run", again, restore_callback_states_from_checkpoint=restore, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    resumed = next(item for item in trainer.callback_handler.callbacks if isinstance(item, PlateauStopCallback))
    assert (resumed is again) != restore
    assert resumed.history == whole.history, "the constant reward is the same, so every forecast must be"
    assert [step for step, _ in resumed.rewards] == list(range(1, 13))


@trl
def test_adapters_are_seen(tmp_path: Path) -> None:
    from peft import LoraConfig

    callback = PlateauStopCallback()
    trainer = trl_trainer(tmp_path, callback, max_steps=1, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    assert callback.predictor.facts.lora
    size = sum(weight.numel() for weight in trainer.model.parameters()) / 1e9
    assert callback.predictor.facts.size_b == size


@trl
def test_a_callback_that_is_new_after_a_resume_reads_the_log(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 6}
    trl_trainer(tmp_path, max_steps=6, **settings).train()
    callback = PlateauStopCallback(mode="warn", **EASY)
    trl_trainer(tmp_path, callback, max_steps=8, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [row["step"] for row in callback.history] == list(range(1, 9))
    assert (tmp_path / "checkpoint-8" / "trainer_state.json").exists()
    assert callback.predictor.horizon == 8


class Loop:
    """A trainer's calls without a model: what a log leads to, step by step."""

    def __init__(
        self, callback: PlateauStopCallback, folder: Path, *, max_steps: int = 40, scheduler: Any = None, model: Any = None
    ) -> None:
        self.callback = callback
        self.args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
        self.state = TrainerState(max_steps=max_steps, is_world_process_zero=True)
        self.control = TrainerControl()
        callback.on_train_begin(self.args, self.state, self.control, lr_scheduler=scheduler, model=model)

    def log(self, step: int, **values: Any) -> dict[str, Any]:
        self.state.global_step = step
        self.state.log_history.append({**values, "step": step})
        self.callback.on_log(self.args, self.state, self.control, values)
        return values


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records]


def test_numbers_are_those_of_the_law(tmp_path: Path) -> None:
    callback = PlateauStopCallback(num_prompts=8, num_generations=4)
    loop, law = Loop(callback, tmp_path), OnlinePredictor(40)
    for step in range(2, 21, 2):
        reward = 1 - math.exp(-step / 5)
        belief = law.observe(step, step / 40, reward, num_prompts=16, num_generations=4)
        written = loop.log(step, reward=reward)
        assert callback.forecast == belief
        assert written["forecast/high"] == belief.high


def test_the_rules_own_defaults_hold(tmp_path: Path) -> None:
    callback, rule = PlateauStopCallback(), StoppingRule()
    assert callback.rule.state_dict() == rule.state_dict()
    Loop(callback, tmp_path)
    assert callback.rule.state_dict() == rule.state_dict()


def test_what_is_known_of_the_run_goes_in(tmp_path: Path) -> None:
    model = torch.nn.Linear(50, 40)
    prior = replace(Prior.default(), drift_median=0.123456)
    start = RunFacts(start=0.2, start_error=0.01, lora=True)
    callback = PlateauStopCallback(prior=prior, facts=start)
    loop = Loop(callback, tmp_path, model=model)
    facts = replace(start, size_b=2040 / 1e9)
    assert callback.predictor.facts == facts
    law = OnlinePredictor(40, facts=facts, prior=Prior.from_dict(prior.to_dict()))
    plain = Loop(PlateauStopCallback(), tmp_path)
    for step in range(1, 11):
        belief = law.observe(step, step / 40, step / 20, spent=Spending(tokens=100.0 * step))
        loop.log(step, reward=step / 20, num_tokens=100 * step)
        plain.log(step, reward=step / 20)
        assert callback.forecast == belief
    assert callback.history[-1]["spent"] == {"tokens": 1000.0, "device_hours": None, "money": None}
    assert callback.history[-1]["end_spending"]["tokens"] == pytest.approx(4000)
    assert plain.callback.forecast != belief
    assert "spent" not in plain.callback.history[-1], "what is not logged is not known"
    Loop(callback, tmp_path, model=torch.nn.Linear(500, 40))
    assert callback.predictor.facts.size_b == 20040 / 1e9, "another training, another model"
    told = PlateauStopCallback(facts=RunFacts(size_b=7.0))
    Loop(told, tmp_path, model=model)
    assert told.predictor.facts.size_b == 7.0, "what is told wins"


def test_logs_of_groups_without_variance_stop_a_run_whose_end_nobody_can_foretell(tmp_path: Path) -> None:
    def loop(folder: str, **arguments: Any) -> Loop:
        made = Loop(PlateauStopCallback(patience=2), tmp_path / folder, max_steps=200)
        for name, value in arguments.items():
            setattr(made.args, name, value)
        made.callback.on_train_begin(made.args, made.state, made.control)
        return made

    def stopped(loop: Loop, steps: range, zero_std: float, slope: float = 1 / 200) -> list[int]:
        found = []
        for step in steps:
            loop.log(step, reward=slope * step, frac_reward_zero_std=zero_std)
            found += [step] if loop.callback.decision.stop else []
        return found

    alike = loop("alike")
    assert stopped(alike, range(2, 11, 2), 1.0) == []
    assert stopped(alike, range(12, 13), 0.99) == []
    assert stopped(alike, range(14, 35, 2), 1.0) == [34], "20 steps to step 32, and the next log"
    assert alike.control.should_training_stop
    copy = PlateauStopCallback.from_state(json.loads(json.dumps(alike.callback.state())))
    copy.on_train_begin(alike.args, alike.state, alike.control)
    assert copy.decision == alike.callback.decision
    for name, value in {"beta": 0.04, "entropy_coef": 0.01}.items():
        assert stopped(loop(name, **{name: value}), range(1, 41), 1.0) == []
    wrong = loop("all wrong")
    stopped(wrong, range(1, 41), 1.0, slope=0.0)
    assert "no group held" not in wrong.callback.decision.reason, "a first right answer may come"


def test_tokens_that_only_the_state_counts(tmp_path: Path) -> None:
    loop = Loop(PlateauStopCallback(), tmp_path)
    loop.state.num_input_tokens_seen = 700
    loop.log(1, reward=0.1)
    loop.log(2, reward=0.1, num_input_tokens_seen=900)
    assert loop.callback.tokens == [700, 900.0]


def test_what_is_no_observation(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    callback = PlateauStopCallback(horizon=3)
    loop = Loop(callback, tmp_path)
    callback.on_log(loop.args, loop.state, loop.control, None)
    assert loop.log(1, eval_reward=0.3) == {"eval_reward": 0.3}
    loop.log(1, reward=0.1)
    loop.log(1, reward=0.2)
    loop.log(2, train_loss=1.0)
    loop.log(3, reward=None)
    assert callback.rewards[0] == (1, 0.1)
    assert [step for step, _ in callback.rewards] == [1, 3]
    assert math.isnan(callback.rewards[1][1])
    for step in (4, 5):
        assert "forecast/median" not in loop.log(step, reward=0.2)
    assert said() == ["step 4 is beyond horizon=3; no forecasts from here on"]


def test_rewards_that_were_not_expected(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    callback = PlateauStopCallback(reward_range=(0, 1), reward_key="rewards/score/mean")
    loop, free = Loop(callback, tmp_path), Loop(PlateauStopCallback(reward_key="rewards/score/mean"), tmp_path)
    for step, value in enumerate([0.2, math.inf, 0.4, 1.5, 0.6, 2.5], 1):
        loop.log(step, **{"rewards/score/mean": value})
        free.log(step, **{"rewards/score/mean": value})
    assert callback.forecast == free.callback.forecast, "as if no range had been given"
    told = [message for message in said() if "outside" in message]
    assert told == ["the reward 1.5 of step 4 is outside reward_range=(0.0, 1.0); the range is ignored from here on"]
    assert "the reward of step 2 is infinite and counts as missing" in said()
    assert callback.state()["args"]["reward_range"] is None


def test_progress_follows_the_schedule(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))
    callback = PlateauStopCallback()
    Loop(callback, tmp_path, max_steps=4, scheduler=linear)
    assert callback._progress == pytest.approx([0.4, 0.7, 0.9, 1.0])
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 1))
    Loop(callback, tmp_path, max_steps=4, scheduler=warm)
    assert callback._progress == pytest.approx([0, 0, 0.5, 1.0], abs=1e-8)
    assert min(callback._progress) > 0
    for other in (None, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)):
        Loop(callback, tmp_path, max_steps=4, scheduler=other)
        assert callback._progress == [0.25, 0.5, 0.75, 1.0]


def test_state_is_json_and_a_second_training_starts_afresh(tmp_path: Path) -> None:
    prior = replace(Prior.default(), part_logits=Prior.default().part_logits + 1 / 3e4)
    callback = PlateauStopCallback(reward_range=(0, 1), epsilon=0.02, prior=prior, facts=RunFacts(start=0.1))
    loop = Loop(callback, tmp_path)
    for step in range(1, 6):
        loop.log(step, reward=step / 10, num_tokens=50 * step)
    state = json.loads(json.dumps(callback.state()))
    copy = PlateauStopCallback.from_state(state)
    copy.on_train_begin(loop.args, loop.state, loop.control)
    assert copy.history == callback.history
    assert copy.history[-1]["spent"]["tokens"] == 250
    assert copy.predictor.epsilon == 0.02
    assert copy.predictor.facts == RunFacts(start=0.1)
    Loop(callback, tmp_path)
    assert callback.history == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "halt"}, "mode='halt'"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"confidence": 2.0}, "confidence=2.0"),
        ({"horizon": 0}, "horizon=0"),
        ({"reward_range": (1, 0)}, "reward_range"),
        ({"patience": 0}, "patience=0"),
        ({"reward_range": (0, 1), "facts": RunFacts(start=2.0)}, "reward=2.0 at the start is outside"),
        ({"facts": {"size_b": -1.0}}, "size_b=-1.0"),
        ({"prior": {"format": 0}}, "its format is 0"),
    ],
)
def test_wrong_settings_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlateauStopCallback(**options)
