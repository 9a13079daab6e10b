"""The peak of a step is that of its fullest phase."""

from __future__ import annotations

from grpo_fast.compute.memory import MemoryPlan


def test_phases_follow_each_other_and_parts_lie_beside_each_other():
    phases = {"sampling": {"keys and values": 5}, "training": {"gradients": 4, "activations": 3, "gathered weights": 0}}
    plan = MemoryPlan({"weights": 10, "optimiser": 20}, phases, room_bytes=37, host={"masters": 1000})
    assert plan.peak_phase == "training"
    assert plan.parts == {"weights": 10, "optimiser": 20, "gradients": 4, "activations": 3}
    assert plan.peak_bytes == 37
    assert plan.fits
    assert not MemoryPlan({"weights": 10}, phases, room_bytes=16, host={}).fits
