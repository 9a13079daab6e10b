"""What does not fit is told with what would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.parts import build_parts
from grpo_fast.train.plan_memory import check_room, device_room, refusal, table, to_dict
from tests.train.plan_memory.models import GIB, LLAMA_8B, SERVERS, SMALL, TWO_LAYERS, WIDE, planner


def test_sleep_is_offered_where_vllm_can() -> None:
    config = Config(rollout="vllm", tokens_per_microbatch=1024, gradient_checkpointing=True)
    on_gpu, on_cpu = (planner(SMALL, config, room_gib=1.0, kind=kind).changes() for kind in ("cuda", "cpu"))
    assert any("vllm_enable_sleep_mode" in change.settings for change in on_gpu)
    assert not any("vllm_enable_sleep_mode" in change.settings for change in on_cpu)


@pytest.mark.parametrize(
    ("changes", "num_devices", "offered"),
    [
        ({}, 2, {"fsdp": "full_shard"}),
        ({"optim": "adamw_8bit"}, 4, {"fsdp": "full_shard", "optim": "adamw_torch_fused"}),
        ({}, 1, None),
        ({"fsdp": "hybrid_shard"}, 16, {"fsdp": "full_shard"}),
        ({"fsdp": "hybrid_shard"}, 8, None),
        ({"fsdp": "full_shard"}, 16, None),
    ],
)
def test_shards_are_offered_where_there_are_devices_for_them(
    changes: dict[str, Any], num_devices: int, offered: dict[str, Any] | None
) -> None:
    config = Config(**SERVERS, tokens_per_microbatch=1024, gradient_checkpointing=True, **changes)
    room = (
        planner(WIDE, config.replace(fsdp="full_shard", optim="adamw_torch_fused"), num_devices=num_devices).plan().peak_bytes
    )
    tight = planner(WIDE, config, num_devices=num_devices, room_gib=room / GIB)
    found = [change for change in tight.changes() if "fsdp" in change.settings]
    assert [change.settings for change in found] == ([] if offered is None else [offered])
    assert all(change.peak_bytes == room < tight.plan().peak_bytes for change in found)


def test_what_does_not_fit_is_told_with_the_cheapest_changes() -> None:
    config = Config(tokens_per_microbatch=65_536, max_completion_length=1024)
    tight = planner(SMALL, config, room_gib=1.2)
    plan, changes = tight.plan(), tight.changes()
    assert not plan.fits
    assert [tuple(change.settings) for change in changes] == [
        ("tokens_per_microbatch",),
        ("tokens_per_microbatch",),
        ("gradient_checkpointing",),
    ]
    for change in changes:
        assert tight.plan(config.replace(**change.settings)).peak_bytes == change.peak_bytes <= plan.room_bytes
    told = refusal(plan, changes)
    assert told.startswith("the run needs ")
    assert "tokens_per_microbatch=32768" in told
    assert to_dict(plan, changes)["fits"] is False
    assert table(plan)[-1] == ("the device has", "1.20 GiB")


@pytest.mark.slow
def test_inputs_of_layers_may_wait_in_the_hosts_memory() -> None:
    config = Config(gradient_checkpointing=True, max_completion_length=1024, tokens_per_microbatch=16_384)
    full = planner(LLAMA_8B, config, room_gib=300)
    plan, offloaded = full.plan(), full.plan(config.replace(gradient_checkpointing_mode="offload"))
    tokens = 13 * (200 + 1024)  # as many sequences as a micro-batch takes
    inputs = tokens * 4096 * 4 * (32 + 3)  # hidden states in float32: of 32 layers, and three of the last norm
    assert offloaded.host["activations"] == pytest.approx(inputs, rel=0.01)
    saved = plan.phases["computing gradients"]["activations"] - offloaded.phases["computing gradients"]["activations"]
    assert saved == pytest.approx(tokens * 4096 * 4 * 30, rel=0.01), "those of two layers lie on the device"
    tight = planner(LLAMA_8B, config, room_gib=(plan.peak_bytes - inputs // 8) / GIB)
    assert ("gradient_checkpointing_mode",) in [tuple(change.settings) for change in tight.changes()]


@pytest.mark.slow
def test_where_no_change_is_enough_alone_some_are_together() -> None:
    config = Config(rollout="vllm", max_completion_length=1024)
    tight = planner(TWO_LAYERS, config, room_gib=16)
    [change] = tight.changes()
    assert change.price == "together"
    assert len(change.settings) > 1
    assert change.peak_bytes <= 16 * GIB
    for name in change.settings:
        fewer = {other: value for other, value in change.settings.items() if other != name}
        assert tight.plan(config.replace(**fewer)).peak_bytes > 16 * GIB, f"{name} is not needed"
    hopeless = planner(TWO_LAYERS, config, room_gib=2)
    assert hopeless.changes() == []
    assert "No known change of settings is enough" in refusal(hopeless.plan(), [])


def test_a_named_device_has_the_memory_of_its_data_sheet() -> None:
    assert device_room(Config(), "NVIDIA GeForce RTX 4090") == (24 * GIB, "cuda")
    room, kind = device_room(Config(device="cpu"), None)
    assert kind == "cpu"
    assert room > GIB


def test_training_refuses_before_anything_is_loaded(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_fast.train.plan_memory.device_room", lambda config, gpu: (400 * 2**20, "cpu"))
    monkeypatch.setattr("grpo_fast.train.policy_source.PolicySource.load", lambda self: pytest.fail("it was loaded"))
    with pytest.raises(
        ConfigError, match=r"the run needs .* and the device has 400 MiB.*No known change of settings is enough"
    ):
        build_parts(tiny_config(), {}, resume=False)


def test_weights_that_fit_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.train.plan_memory.device_room", lambda config, gpu: (GIB, "cuda"))
    check_room(SMALL, Config(tokens_per_microbatch=10**6), num_devices=1)  # what activations need is a forecast, no certainty
    with pytest.raises(ConfigError, match=r"weights that are trained 5\.54 GiB"):
        check_room(TWO_LAYERS, Config(), num_devices=1)
