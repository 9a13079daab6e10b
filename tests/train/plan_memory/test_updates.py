"""The plan beside what real updates and a real run held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_fast.compute.memory import MemoryPlan
from grpo_fast.config import Config
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.step import Learner
from grpo_fast.types import Group
from tests.train.real_update import most_held, update_peak

EVEN = (48,) * 32

UNEVEN = tuple(8 + 31 * number % 41 for number in range(32))


def most_in_an_update(plan: MemoryPlan) -> int:
    return max(sum(parts.values()) for name, parts in plan.phases.items() if name != "sampling")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("completion_tokens", "changes"),
    [
        (EVEN, {}),
        (EVEN, {"padding_free": False}),
        (EVEN, {"tokens_per_microbatch": 512}),
        (UNEVEN, {}),
        (UNEVEN, {"share_prompts": False}),
        (UNEVEN, {"padding_free": False}),
        (UNEVEN, {"tokens_per_microbatch": 512}),
        (UNEVEN, {"gradient_checkpointing": True}),
        (UNEVEN, {"gradient_checkpointing": True, "tokens_per_microbatch": 512}),
        (UNEVEN, {"gradient_checkpointing": True, "tokens_per_microbatch": 1024, "padding_free": False}),
        (UNEVEN, {"gradient_checkpointing": True, "gradient_checkpointing_mode": "selective", "share_prompts": False}),
        (UNEVEN, {"use_peft": True}),
        (UNEVEN, {"use_peft": True, "gradient_checkpointing": True, "dtype": "bfloat16"}),
        (UNEVEN, {"dtype": "bfloat16", "weights_dtype": "bfloat16", "padding_free": False}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "even" if value == EVEN else "uneven",
)
def test_a_real_update_peaks_where_it_is_foretold(completion_tokens: tuple[int, ...], changes: dict[str, Any]) -> None:
    step = {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 48, "tokens_per_microbatch": 16_384}
    config = Config.parse(step | changes)
    model_config = PolicySource(config).model_config
    inputs = MemoryInputs(2**34, "cpu", prompt_tokens=12, completion_tokens=completion_tokens)
    real = update_peak(model_config, config, prompt_tokens=12, completion_tokens=completion_tokens)
    assert most_in_an_update(MemoryPlanner(model_config, config, inputs).plan()) == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_the_peak_of_a_real_run_is_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step of the embedded model, in one micro-batch of completions as they were sampled."""
    peaks: list[int] = []
    lengths: tuple[int, ...] = ()
    update = Learner.update

    def measured(self: Learner, groups: list[Group], **options: Any) -> Any:
        nonlocal lengths
        lengths = tuple(len(one.token_ids) for group in groups for one in group.completions)
        results: list[Any] = []
        peaks.append(most_held(lambda: results.append(update(self, groups, **options))))
        return results[0]

    monkeypatch.setattr(Learner, "update", measured)
    config = Config(
        output_dir=tmp_path / "run",
        prompts_per_step=16,
        num_generations=16,
        max_completion_length=48,
        tokens_per_microbatch=65_536,
        max_steps=2,
        temperature=3.0,
        forecast="off",
        report=False,
        sinks=(),
        reward_workers=0,
    )
    with GRPOTrainer(
        config, reward_funcs=[lambda completions, **_: [float(i % 2) for i in range(len(completions))]]
    ) as trainer:
        assert len(list(trainer.steps())) == 2
    inputs = MemoryInputs(2**34, "cpu", prompt_tokens=8, completion_tokens=lengths)
    plan = MemoryPlanner(PolicySource(config).model_config, config, inputs).plan()
    assert most_in_an_update(plan) == pytest.approx(peaks[1], rel=0.05)
