from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from grpo_fast.config import Config
from grpo_fast.train.optim import build_optimizer, learning_rate_at, progress_schedule, set_learning_rate

SHAPES = ("constant", "linear", "cosine")


def schedule(**values: object) -> list[float]:
    config = Config.parse({"learning_rate": 0.1, "max_steps": 8, **values})
    return [learning_rate_at(step, config) for step in range(1, config.max_steps + 1)]


def test_constant_after_warmup() -> None:
    expected = [0.1 / 4, 0.2 / 4, 0.3 / 4, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert schedule(warmup_steps=3) == pytest.approx(expected, rel=1e-15)


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


@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")], ids=SHAPES
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_shape_is_that_of_transformers_once_warm(ours: str, theirs: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = schedule(lr_scheduler_type=ours, warmup_steps=warmup, max_steps=20)
    assert found[warmup:] == pytest.approx(expected[warmup:], rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 3, 12])
def test_progress_rises_to_one(shape: str, warmup: int) -> None:
    progress = progress_schedule(Config.parse({"max_steps": 12, "lr_scheduler_type": shape, "warmup_steps": warmup}))
    assert len(progress) == 12
    assert progress[0] > 0
    assert all(earlier < later for earlier, later in pairwise(progress))
    assert progress[-1] == 1.0


def test_progress_is_learning_rate_spent() -> None:
    progress = progress_schedule(Config.parse({"max_steps": 4, "lr_scheduler_type": "linear"}))
    assert progress == pytest.approx([0.4, 0.7, 0.9, 1.0])


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model, Config(learning_rate=0.1, weight_decay=0.5))
    optimizer.step()
    values = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert values == {"0.weight": [pytest.approx(0.95)], "0.bias": [1.0], "1.weight": [1.0], "1.bias": [1.0]}


def test_frozen_weights_are_left_out_and_settings_arrive() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    model[0].weight.requires_grad_(False)
    config = Config(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(model, config)
    assert [parameter for group in optimizer.param_groups for parameter in group["params"]] == [model[1].weight]
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["lr"] == 0.1


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(torch.nn.Linear(4, 4), Config())
    assert len(optimizer.param_groups) == 2
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
