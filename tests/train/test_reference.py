from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.config import Config
from grpo_fast.ops import token_logprob
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.distributed import ALONE
from grpo_fast.train.policy import BasePolicy, Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.reference import MovingReference, build_reference, weights_of
from tests.train.trainer.runs import LETTERS, rows, vowels, weights

SETTINGS: dict[str, Any] = {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}


@pytest.fixture
def pair(tiny_policy: Callable[..., Policy]) -> tuple[Policy, Policy]:
    """A reference, and a policy that has gone elsewhere."""
    reference, policy = tiny_policy(), tiny_policy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return reference, policy


def copies(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in weights_of(policy).items()}


def test_it_moves_a_share_of_the_way_when_that_is_due(pair: tuple[Policy, Policy]) -> None:
    reference, policy = pair
    moving = MovingReference(reference, policy, alpha=0.3, steps=4)
    start, there = copies(reference), copies(policy)
    for step in (1, 2, 3, 5, 7):
        moving.follow(step)
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(reference).items())
    for times, step in enumerate((4, 8), start=1):
        moving.follow(step)
        for name, weight in weights_of(reference).items():
            expected = there[name].double() - 0.7**times * (there[name].double() - start[name].double())
            torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(weight, there[name]) for name, weight in weights_of(policy).items())


def test_it_moves_as_trls_does(pair: tuple[Policy, Policy]) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks", reason="TRL is not installed; the comparison needs it")
    reference, policy = pair
    theirs = {name: weight.clone() for name, weight in weights_of(reference).items()}
    stand_in = torch.nn.ParameterList([torch.nn.Parameter(weight) for weight in theirs.values()])
    callbacks.SyncRefModelCallback._sync_target_model(policy.model, stand_in, 0.6)
    MovingReference(reference, policy, alpha=0.6, steps=1).follow(1)
    for found, expected in zip(weights_of(reference).values(), stand_in, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)


def test_all_the_way_makes_it_the_policy(pair: tuple[Policy, Policy]) -> None:
    reference, policy = pair
    moving = MovingReference(reference, policy, alpha=1.0, steps=1)
    sequence = TrainingSequence((4, 5), (6, 7, 8), (-1.0,) * 3, 1.0, in_loss=True)
    batch = build_batch([sequence], [1.0], torch.device("cpu"), layout=policy.layout)

    def logprobs(scorer: Any) -> torch.Tensor:
        with torch.no_grad(), scorer.whole_head(trains=False):
            return token_logprob(scorer.scored_hidden_states(batch), scorer.head(0.7), targets=batch.targets)[0]

    before = logprobs(moving)
    moving.follow(1)
    assert torch.equal(logprobs(moving), logprobs(policy))
    assert (before - logprobs(policy)).abs().max() > 0.01


def test_a_short_type_is_mixed_in_float32(pair: tuple[Policy, Policy]) -> None:
    reference, policy = pair
    for each in pair:
        each.model.bfloat16()
    start, there = copies(reference), copies(policy)
    MovingReference(reference, policy, alpha=0.1, steps=1).follow(1)
    for name, weight in weights_of(reference).items():
        expected = (0.9 * start[name].double() + 0.1 * there[name].double()).bfloat16()
        torch.testing.assert_close(weight, expected, rtol=2**-8, atol=0)
        assert (weight == expected).float().mean() > 0.99


def test_what_is_saved_is_put_back_bit_for_bit(pair: tuple[Policy, Policy], tmp_path: Path) -> None:
    reference, policy = pair
    moving = MovingReference(reference, policy, alpha=0.3, steps=1)
    moving.follow(1)
    saved = copies(reference)
    moving.save(tmp_path / "reference")
    moving.follow(2)
    assert not any(torch.equal(weight, saved[name]) for name, weight in weights_of(reference).items())
    moving.load(tmp_path / "reference")
    assert all(torch.equal(weight, saved[name]) for name, weight in weights_of(reference).items())


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, Policy), (SETTINGS, MovingReference), ({"use_peft": True}, BasePolicy)],
    ids=["still", "moving", "adapters"],
)
def test_the_configuration_chooses(changes: dict[str, Any], kind: type, tiny_model: Path) -> None:
    config = Config.parse({"model": str(tiny_model), "beta": 0.1, "max_completion_length": 8} | changes)
    source = PolicySource(config)
    policy = source.load()
    reference = build_reference(source, policy, config=config, world=ALONE)
    assert type(reference) is kind
    assert (policy.follower is reference) == (kind is MovingReference)


def test_a_run_with_it_is_resumed_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "model": str(tiny_model),
        "prompts_per_step": 3,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 3e-2,
        "max_steps": 5,
        "reward_workers": 0,
        "forecast": "off",
        "sinks": (),
        "report": False,
    }

    def run(name: str, leave: int | None = None, **changes: Any) -> tuple[list[float], torch.Tensor]:
        config = Config.parse(shared | {"output_dir": tmp_path / name, "resume_if_exists": True} | changes)
        with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
            for step in trainer.steps():
                if step.step == leave:
                    break
            return [row["kl"] for row in rows(tmp_path / name)], weights(trainer)

    straight, end = run("straight", **SETTINGS)
    run("left", 3, **SETTINGS)
    resumed, other = run("left", **SETTINGS)
    assert resumed == straight
    assert torch.equal(end, other)
    still, _ = run("still", beta=0.1)
    assert still[:2] == straight[:2]
    assert straight[2] < 0.8 * still[2], "after step 2 the reference is nearer"
