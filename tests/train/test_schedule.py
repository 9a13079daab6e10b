from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from grpo_fast.config import Config, ConfigError
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.plan import make_plan
from grpo_fast.train.resumable import check_resumable
from grpo_fast.train.schedule import falls_if_shorter, learning_rate_at, learning_rates, progress_schedule

SHAPES = ("constant", "linear", "cosine")
ALL: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "polynomial": {"power": 2.0, "lr_end": 0.01},
    "inverse_sqrt": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.02},
    "warmup_stable_decay": {"num_decay_steps": 4, "decay_type": "linear"},
}
"""Every schedule, with arguments that it has or needs."""


def schedule(**values: object) -> list[float]:
    config = Config.parse({"learning_rate": 0.1, "max_steps": 8, **values})
    return learning_rates(config)


def test_constant_after_warmup() -> None:
    expected = [0.1 / 4, 0.2 / 4, 0.3 / 4, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert schedule(warmup_steps=3) == pytest.approx(expected, rel=1e-15)


def test_the_usual_schedules_wait_for_no_package_that_they_do_not_need(imported_by: Callable[[str], set[str]]) -> None:
    code = (
        "from grpo_fast.config import Config; from grpo_fast.train import GRPOTrainer\n"
        "from grpo_fast.train.schedule import learning_rates\n"
        "for kind in ('constant', 'linear'):\n"
        "    learning_rates(Config(warmup_steps=3, lr_scheduler_type=kind))"
    )
    assert not {"peft", "bitsandbytes", "datasets", "transformers.optimization"} & imported_by(code)


def test_linear_after_warmup() -> None:
    expected = [0.1 / 3, 0.2 / 3, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.1 * 3 / 6, 0.1 * 2 / 6, 0.1 / 6]
    assert schedule(warmup_steps=2, lr_scheduler_type="linear") == pytest.approx(expected, rel=1e-12)


def test_cosine_without_warmup() -> None:
    expected = [0.1, 0.09619397663, 0.08535533906, 0.06913417162, 0.05, 0.03086582838, 0.01464466094, 0.00380602337]
    assert schedule(lr_scheduler_type="cosine") == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_is_without_effect(shape: str) -> None:
    assert min(schedule(lr_scheduler_type=shape, warmup_steps=4)) > 0
    assert min(schedule(lr_scheduler_type=shape, warmup_steps=8)) > 0
    assert max(schedule(lr_scheduler_type=shape, warmup_steps=8)) < 0.1


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_nothing_is_left_after_the_last_step(shape: str) -> None:
    config = Config.parse({"learning_rate": 0.1, "max_steps": 8, "lr_scheduler_type": shape, "warmup_steps": 2})
    assert learning_rate_at(9, config) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate_at(12, config) >= 0.0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("warmup", [0, 5])
def test_shape_is_that_of_transformers_once_warm(kind: str, warmup: int) -> None:
    expected = theirs("constant_with_warmup" if kind == "constant" else kind, warmup, ALL[kind])
    found = schedule(lr_scheduler_type=kind, warmup_steps=warmup, max_steps=20, lr_scheduler_kwargs=ALL[kind])
    assert found[warmup:] == pytest.approx(expected[warmup:], rel=1e-12)
    if kind != "cosine_warmup_with_min_lr":  # which begins above 0 of its own
        assert found[:warmup] == pytest.approx([0.1 * step / (warmup + 1) for step in range(1, warmup + 1)], rel=1e-15)
    else:
        assert found == pytest.approx(expected, rel=1e-12)


def theirs(kind: str, warmup: int, given: dict[str, Any]) -> list[float]:
    """Rates of 20 steps of a run by transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = get_scheduler(kind, optimizer, warmup, 20, scheduler_specific_kwargs=dict(given))
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 5, 19])
def test_a_linear_fall_is_that_of_transformers_bit_by_bit(warmup: int) -> None:
    assert (
        schedule(lr_scheduler_type="linear", warmup_steps=warmup, max_steps=20)[warmup:]
        == theirs("linear", warmup, {})[warmup:]
    )


def test_every_schedule_of_transformers_is_there_or_refused() -> None:
    assert {kind.value for kind in SchedulerType} == {*ALL, "reduce_lr_on_plateau", "greedy"}
    assert len({tuple(schedule(lr_scheduler_type=kind, lr_scheduler_kwargs=given)) for kind, given in ALL.items()}) == 9
    for kind in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ConfigError, match="lr_scheduler_type: depends on a metric of the run"):
            Config.parse({"lr_scheduler_type": kind})


def test_a_restart_and_a_decay_at_the_end() -> None:
    twice = schedule(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2})
    assert twice[:4] == pytest.approx(twice[4:])
    assert twice[0] == 0.1
    stable = schedule(lr_scheduler_type="warmup_stable_decay", warmup_steps=2, lr_scheduler_kwargs={"num_decay_steps": 2})
    assert stable[2:] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.05])
    told = {"num_decay_steps": 2, "num_stable_steps": 3, "min_lr_ratio": 0.2}
    assert schedule(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=told)[5:] == pytest.approx([0.02] * 3)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("linear", {"power": 2}, r"lr_scheduler_type='linear' with .*'power': 2.*: the schedule has no 'power'; it has none"),
        ("constant", {"num_cycles": 1}, "no 'num_cycles'; it has none"),
        ("cosine", {"min_lr": 1e-7}, "no 'min_lr'; it has num_cycles"),
        ("polynomial", {"last_epoch": 3}, "no 'last_epoch'; it has lr_end, power"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": 0.01, "min_lr_rate": 0.1}, "Only one of min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.2}, r"step 2 of max_steps=8, .* learning rate of 0\.1.*at most learning_rate=0\.1"),
        ("cosine_with_restarts", {"num_cycles": "two"}, "could not convert string to float: 'two'"),
        ("cosine", {"num_cycles": 1}, r"step 5 of max_steps=8, warmup_steps=0, would have a learning rate of 0; it"),
        ("polynomial", {"lr_end": 0.1}, r"lr_end \(0\.1\) must be smaller than initial lr \(0\.1\)"),
        ("inverse_sqrt", {"timescale": 0}, "float division by zero|division by zero"),
        ("warmup_stable_decay", {}, r"needs num_decay_steps, such as lr_scheduler_kwargs=\{'num_decay_steps': 10\}"),
        ("warmup_stable_decay", {"num_decay_steps": 0.5}, r"num_decay_steps=0\.5 must be a number of steps"),
        ("warmup_stable_decay", {"num_decay_steps": 9}, r"num_warmup_steps=0 \+ num_decay_steps=9 exceeds max_steps=8"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 3}, "step 6 of max_steps=8"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "Unknown decay type: steep"),
    ],
)
def test_arguments_that_cannot_work_are_told(kind: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        schedule(lr_scheduler_type=kind, lr_scheduler_kwargs=given)


@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_is_gone_on_with_has_the_same_rates(kind: str, tmp_path: Path) -> None:
    config = Config.parse(
        {
            "learning_rate": 0.1,
            "max_steps": 12,
            "warmup_steps": 0.25,
            "lr_scheduler_type": kind,
            "lr_scheduler_kwargs": ALL[kind],
        }
    )
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    again = Config.from_toml(tmp_path / "config.toml")
    check_resumable(config, again)
    assert [learning_rate_at(step, again) for step in range(7, 13)] == learning_rates(config)[6:]
    with pytest.raises(ConfigError, match="a resumed run cannot change lr_scheduler_kwargs"):
        check_resumable(config, again.replace(lr_scheduler_kwargs={"num_cycles": 3}))


def test_they_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    config = Config.parse(
        {"model": "no/such-model", "output_dir": tmp_path / "run", "lr_scheduler_kwargs": {"power": 2}, "sinks": ()}
    )
    with pytest.raises(ConfigError, match="no 'power'"):
        GRPOTrainer(config)
    with pytest.raises(ConfigError, match="no 'power'"):
        make_plan(config)


def test_a_shorter_run_lets_a_schedule_fall_that_is_laid_over_it() -> None:
    def falls(kind: str, **values: Any) -> bool:
        return falls_if_shorter(Config.parse({"learning_rate": 0.1, "lr_scheduler_type": kind, "max_steps": 100} | values), 20)

    assert [kind for kind, given in ALL.items() if falls(kind, lr_scheduler_kwargs=given)] == [
        "linear",
        "cosine",
        "polynomial",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ]
    assert not falls("linear", warmup_steps=30)
    assert not falls("warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 40})


@pytest.mark.parametrize("shape", ALL)
@pytest.mark.parametrize("warmup", [0, 3, 8])
def test_progress_rises_to_one(shape: str, warmup: int) -> None:
    values = {"lr_scheduler_type": shape, "lr_scheduler_kwargs": ALL[shape], "warmup_steps": warmup}
    progress = progress_schedule(Config.parse({"max_steps": 12, "learning_rate": 0.1, **values}))
    assert len(progress) == 12
    assert progress[0] > 0
    assert all(earlier < later for earlier, later in pairwise(progress))
    assert progress[-1] == 1.0


def test_progress_is_learning_rate_spent() -> None:
    progress = progress_schedule(Config.parse({"max_steps": 4, "lr_scheduler_type": "linear"}))
    assert progress == pytest.approx([0.4, 0.7, 0.9, 1.0])
