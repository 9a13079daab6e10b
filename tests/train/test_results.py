from __future__ import annotations

from typing import Any

import pytest

from grpo_fast.compute import ComputeMeter, ModelShape, forward_flops, reference_flops
from grpo_fast.config import Config
from grpo_fast.device import EstimatedEnergy
from grpo_fast.train.batch import TrainingSequence
from grpo_fast.train.results import UpdateResult

SHAPE = ModelShape(
    body_params=1000, head_params=100, attention_layers=2, attention_dim=8, hidden_size=8, vocab_size=12, lora_params=50
)


def sequence(prompt: int, completion: int, sampled: tuple[bool, ...] = ()) -> TrainingSequence:
    return TrainingSequence((0,) * prompt, (0,) * completion, (0.0,) * completion, advantage=1.0, in_loss=True, sampled=sampled)


def charged(**settings: Any) -> ComputeMeter:
    trained, measured = (sequence(3, 4), sequence(3, 2, (True, False))), (sequence(5, 6),)
    result = UpdateResult({}, trained, num_dropped_tokens=6, measured=measured, shared_prompts=(3,))
    meter = ComputeMeter(SHAPE, power=EstimatedEnergy(0.0))
    result.charge(meter, Config(**settings))
    return meter


FORWARD = forward_flops(SHAPE, [7, 5], 5) - forward_flops(SHAPE, [3], 0)
"""Of the trained sequences, whose common prompt is computed once, and of whose tokens one was not sampled."""
REFERENCE = reference_flops(SHAPE, [7, 5], 5) - reference_flops(SHAPE, [3], 0)
MEASURED = forward_flops(SHAPE, [11], 6)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"beta": 0.1}, REFERENCE),
        ({"vllm_importance_sampling_correction": True}, FORWARD),
        ({"top_entropy_quantile": 0.5}, FORWARD + MEASURED),
        ({"keep_dead_rows_for_metrics": True}, MEASURED),
        ({"keep_dead_rows_for_metrics": True, "num_iterations": 2, "top_entropy_quantile": 0.5}, FORWARD + 3 * MEASURED),
    ],
    ids=str,
)
def test_passes_without_gradient_are_charged(settings: dict[str, Any], passes: int) -> None:
    without = charged(num_iterations=settings.get("num_iterations", 1))
    assert charged(**settings).usage(0).flops - without.usage(0).flops == passes


def test_iterations_and_recomputation_are_charged() -> None:
    once, twice = (charged(num_iterations=n).usage(0).flops for n in (1, 2))
    assert twice == 2 * once
    assert charged(gradient_checkpointing=True).usage(0).flops > once
