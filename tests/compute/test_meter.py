from __future__ import annotations

import json

import pytest

from grpo_fast.compute import (
    BUDGET_FIELDS,
    Budget,
    ComputeMeter,
    ModelShape,
    decode_flops,
    forward_flops,
    prefill_flops,
    reference_flops,
)

TINY = ModelShape(body_params=1000, head_params=100, attention_layers=2, attention_dim=8, hidden_size=8, vocab_size=12)


class Watts:
    """A steady draw, so that joules can be worked out by hand."""

    def __init__(self, watts: float, name: str = "estimated") -> None:
        self.watts = watts
        self.name = name

    def read(self, device_seconds: float) -> float:
        return self.watts * device_seconds


def meter(**changes: object) -> ComputeMeter:
    return ComputeMeter(TINY, **({"power": Watts(100.0)} | changes))


def test_meter_adds_up_a_step() -> None:
    m = meter(price_per_gpu_hour=2.0, num_devices=4, peak_flops=1e6)
    m.add_rollout([3, 5], [[2, 4], [1, 6]])
    m.add_reference([5, 7], 6)
    m.add_train([5, 7], 6, num_iterations=2)
    m.add_dropped(7)
    assert "mfu" not in m.metrics()
    m.add_seconds({"rollout": 900.0, "train": 600.0, "other": 300.0})

    forward = forward_flops(TINY, [5, 7], 6)
    assert m.summary()["flops_by_phase"] == {
        "prefill": prefill_flops(TINY, [3, 5]),
        "decode": decode_flops(TINY, [3, 5], [[2, 4], [1, 6]]),
        "reference": forward,
        "forward": 2 * forward,
        "backward": 4 * forward,
    }
    assert m.summary()["tokens_by_kind"] == {"prompt": 16, "completion": 13, "trained": 6, "dropped": 7}
    metrics = m.metrics()
    assert metrics["num_tokens"] == 29
    assert metrics["tokens/completion"] == metrics["tokens/trained"] + metrics["tokens/dropped"]
    assert metrics["flops"] == sum(value for name, value in metrics.items() if name.startswith("flops/"))
    assert metrics["gpu_seconds"] == 7200.0
    assert metrics["money"] == 4.0
    assert metrics["energy_kwh"] == pytest.approx(0.2)
    assert metrics["mfu"] == pytest.approx(metrics["flops"] / (7200 * 1e6))
    summary = m.summary()
    assert (summary["gpu_hours"], summary["wall_hours"], summary["energy_source"]) == (2.0, 0.5, "estimated")
    assert summary["seconds"]["train"] == 600.0
    assert summary["gpu_seconds"]["train"] == 2400.0


def test_meter_gives_the_mfu_of_the_last_step_only() -> None:
    m = meter(peak_flops=1e6)
    m.add_train([50], 50)
    m.add_seconds({"train": 1.0})
    m.add_train([10], 10)
    before = m.metrics()["flops"]
    m.add_seconds({"train": 2.0})
    step = 3 * forward_flops(TINY, [10], 10)
    assert step < before
    assert m.metrics()["mfu"] == pytest.approx(step / 2e6)
    assert "mfu" not in meter().metrics()


def test_prompts_are_read_once_or_for_each_completion() -> None:
    shared, apart = meter(), meter()
    shared.add_rollout([3, 5], [[2, 4, 1], []])
    apart.add_rollout([3, 5], [[2, 4, 1], []], shared_prefill=False)
    assert shared.metrics()["flops/prefill"] == prefill_flops(TINY, [3])
    assert apart.metrics()["flops/prefill"] == 3 * prefill_flops(TINY, [3])
    assert shared.metrics()["tokens/prompt"] == apart.metrics()["tokens/prompt"] == 9


def test_another_model_may_be_the_reference() -> None:
    m = meter()
    big = ModelShape(9000, 100, 2, 8, 8, 12)
    m.add_reference([5], 3, shape=big)
    assert m.metrics()["flops/reference"] == reference_flops(big, [5], 3)


def test_a_shared_prompt_is_charged_once() -> None:
    """A prompt of 3 with completions of 2 and 4: as one sequence of 3, and what each completion adds to it."""
    m = meter()
    m.add_reference([5, 7], 6, shared_prompts=[3])
    m.add_train([5, 7], 6, num_iterations=2, shared_prompts=[3])
    once = forward_flops(TINY, [3], 0) + sum(forward_flops(TINY, [3 + c], c) - forward_flops(TINY, [3], 0) for c in (2, 4))
    assert m.metrics()["flops/reference"] == once
    assert m.metrics()["flops/forward"] == 2 * once
    assert m.metrics()["flops/backward"] == 4 * once
    assert m.metrics()["tokens/trained"] == 6


def test_the_head_is_charged_for_kept_tokens_where_the_support_is_cut() -> None:
    """Of 6 rows 18 logits in 72, a quarter; all of them are the whole head."""
    m, whole = meter(), meter()
    for each, kept in ((m, 18), (whole, 72)):
        each.add_reference([5, 7], 6, shared_prompts=[3], num_kept=kept)
        each.add_train([5, 7], 6, shared_prompts=[3], num_iterations=2, num_kept=kept)
    head = 2 * 100 * 6
    assert m.metrics()["flops/reference"] == whole.metrics()["flops/reference"] - head * 3 // 4
    assert m.metrics()["flops/forward"] == whole.metrics()["flops/forward"] - 2 * head * 3 // 4
    assert m.metrics()["flops/backward"] == whole.metrics()["flops/backward"] - 4 * head * 3 // 4
    assert whole.metrics()["flops/reference"] == forward_flops(TINY, [5, 7], 6) - forward_flops(TINY, [3], 0)
    assert m.metrics()["tokens/trained"] == 6


def test_the_reference_of_a_lora_model_is_its_base() -> None:
    lora = ModelShape(1000, 100, 2, 8, 8, 12, lora_params=50)
    assert reference_flops(lora, [3, 5], 4) == forward_flops(TINY, [3, 5], 4)
    assert forward_flops(lora, [3, 5], 4) == forward_flops(TINY, [3, 5], 4) + 2 * 50 * 8


def test_adapters_are_charged_where_the_policy_itself_scores() -> None:
    m = meter()
    lora = ModelShape(1000, 100, 2, 8, 8, 12, lora_params=50)
    m.add_reference([3, 5], 4, shape=lora, adapters=True)
    assert m.metrics()["flops/reference"] == forward_flops(lora, [3, 5], 4)


def test_meter_continues_exactly_from_json() -> None:
    def step(m: ComputeMeter, k: int) -> None:
        m.add_rollout([3 + k], [[k + 1, 2]])
        m.add_train([4 + k], k + 1)
        m.add_seconds({"rollout": 0.1 * k, "train": 1 / (k + 3)})

    straight = meter(price_per_gpu_hour=1.1, num_devices=3)
    for k in range(6):
        step(straight, k)
    first = meter(price_per_gpu_hour=1.1, num_devices=3)
    for k in range(3):
        step(first, k)
    second = meter(price_per_gpu_hour=1.1, num_devices=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for k in range(3, 6):
        step(second, k)
    assert second.state_dict() == straight.state_dict()
    assert second.metrics() == straight.metrics()


def test_a_resumed_meter_is_no_view_of_its_state() -> None:
    first, second = meter(), meter()
    state = first.state_dict()
    second.load_state_dict(state)
    second.add_train([5], 5)
    second.add_seconds({"train": 1.0})
    assert state == first.state_dict()


def test_energy_sources_add_up_over_resumes() -> None:
    first = meter(power=Watts(100.0, "nvml"))
    first.add_seconds({"train": 3600.0})
    second = meter(power=Watts(50.0))
    second.load_state_dict(first.state_dict())
    assert second.energy_source == "nvml"
    second.add_seconds({"train": 3600.0})
    assert second.energy_source == "estimated+nvml"
    assert second.metrics()["energy_kwh"] == pytest.approx(0.15)


def test_meter_refuses_foreign_states() -> None:
    state = meter().state_dict()
    with pytest.raises(ValueError, match="does not fit at 'money'"):
        meter().load_state_dict({k: v for k, v in state.items() if k != "money"})
    with pytest.raises(ValueError, match="does not fit at 'extra'"):
        meter().load_state_dict(state | {"extra": 1})
    with pytest.raises(ValueError, match="does not fit at 'flops'"):
        meter().load_state_dict(state | {"flops": {"prefill": 1}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price_per_gpu_hour": -1.0}, "price_per_gpu_hour must be 0 or more, got -1.0"),
        ({"num_devices": 0}, "num_devices must be at least 1"),
        ({"peak_flops": 0.0}, "peak_flops must be positive"),
    ],
)
def test_meter_refuses_impossible_settings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meter(**changes)


def test_meter_refuses_unknown_phases_and_charges_nothing() -> None:
    m = meter()
    with pytest.raises(ValueError, match="unknown phase 'sleep'; known are rollout, reward"):
        m.add_seconds({"train": 1.0, "sleep": 1.0})
    with pytest.raises(ValueError, match="seconds of train must be 0 or more, got nan"):
        m.add_seconds({"train": float("nan")})
    assert m.metrics()["gpu_seconds"] == 0


@pytest.mark.parametrize("limit", BUDGET_FIELDS)
def test_each_limit_trips_on_a_metered_run(limit: str) -> None:
    def step(m: ComputeMeter) -> None:
        m.add_rollout([10], [[20, 20]])
        m.add_train([30], 20)
        m.add_seconds({"rollout": 4.0, "train": 2.0})

    m = meter(price_per_gpu_hour=2.0, num_devices=4)
    step(m)
    budget = Budget(**{limit: 2.5 * getattr(m.usage(1), limit)})
    assert budget.check(m.usage(1)) is None
    step(m)
    assert budget.check(m.usage(2)) is None
    step(m)
    verdict = budget.check(m.usage(3))
    assert verdict is not None
    assert verdict.limit == limit
