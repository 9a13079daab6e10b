"""What devices hold that share a model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PhiConfig, Qwen3MoeConfig

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner, check_room
from tests.train.plan_memory.models import GIB, SERVERS, SIZES, SMALL, TWO_LAYERS, WIDE, layers_of_llama, num_weights, planner


def test_sharded_adapters_that_begin_as_saved_ones_have_a_reference_beside_them() -> None:
    def reference(*, num_devices: int, begins: bool = True, **changes: Any) -> int:
        inputs = MemoryInputs(80 * GIB, "cuda", 200, num_devices=num_devices, begins_from_adapters=begins)
        lasting = MemoryPlanner(TWO_LAYERS, Config(use_peft=True, **changes), inputs).plan().lasting
        assert lasting["frozen weights"] >= 2 * count // num_devices
        return lasting["reference policy"]

    count = num_weights(TWO_LAYERS)
    adapters = 4 * 16 * sum(2 * (inputs + outputs) for inputs, outputs in layers_of_llama())
    sharded: dict[str, Any] = {"fsdp": "full_shard", "beta": 0.1}
    assert reference(num_devices=4, **sharded) == (2 * count + adapters) // 4
    assert reference(num_devices=4, begins=False, **sharded) == 0, "they are switched off for it"
    assert reference(num_devices=4, beta=0.1) == reference(num_devices=1, **sharded) == 0, "they are put back for it"
    assert reference(num_devices=4, fsdp="full_shard") == 0


def test_shards_divide_what_lasts() -> None:
    whole = planner(SMALL, Config(fsdp="full_shard")).plan()
    shared = planner(SMALL, Config(fsdp="full_shard"), num_devices=4).plan()
    assert shared.lasting["optimiser"] == whole.lasting["optimiser"] // 4
    assert shared.phases["updating weights"]["gradients"] == whole.phases["updating weights"]["gradients"] // 4
    assert "whole weights to sample from" not in whole.lasting
    for dtype, size in (("auto", 2), ("float32", 4)):
        found = planner(SMALL, Config(fsdp="full_shard", dtype=dtype, beta=0.1), num_devices=4).plan()
        assert found.lasting["whole weights to sample from"] == size * num_weights(SMALL)
        assert found.lasting["reference policy"] == size * num_weights(SMALL) // 4
    for model, changes in ((SMALL, {"sync_ref_model": True}), (PhiConfig(**SIZES), {})):  # Phi's head has a bias
        found = planner(model, Config(fsdp="full_shard", beta=0.1, **changes), num_devices=4).plan()
        assert found.lasting["reference policy"] == 4 * num_weights(model) // 4, "it keeps float32"
    assert planner(SMALL, Config(), num_devices=4).plan().lasting["optimiser"] == whole.lasting["optimiser"]
    streamed = planner(SMALL, Config(fsdp="full_shard", **SERVERS), num_devices=4).plan()
    assert streamed.lasting == {name: size for name, size in shared.lasting.items() if name != "whole weights to sample from"}


def test_hybrid_shards_divide_by_the_devices_of_a_node() -> None:
    config, full = Config(fsdp="hybrid_shard"), Config(fsdp="full_shard")
    for num_devices, divisor in ((4, 4), (16, 8)):
        found = planner(SMALL, config, num_devices=num_devices).plan()
        assert found.lasting == planner(SMALL, full, num_devices=divisor).plan().lasting
    room = planner(TWO_LAYERS, full, num_devices=16).least_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_fast.train.plan_memory.device_room", lambda config, gpu: (room, "cuda"))
        check_room(TWO_LAYERS, config, num_devices=16, devices_per_node=16)
        with pytest.raises(ConfigError, match="weights that are trained"):
            check_room(TWO_LAYERS, config, num_devices=16, devices_per_node=4)


def test_a_head_in_parts_is_neither_gathered_nor_has_a_whole_gradient() -> None:
    settings = {"fsdp": "full_shard", "tokens_per_microbatch": 1024}
    gathered, parts = (
        planner(SMALL, Config(**settings, fsdp_parallel_head=parallel), num_devices=4).plan().phases["computing losses"]
        for parallel in (False, True)
    )
    head = SMALL.vocab_size * SMALL.hidden_size * 4
    assert gathered["gathered weights"] - parts["gathered weights"] == head
    rows = 2 * 256  # of two sequences that fit
    more_rows = (8 + 2 * 3) * rows * SMALL.hidden_size * 4  # hidden states with their gradient, and what becomes of them
    copied = head // 2  # in bfloat16
    assert gathered["head and loss"] - parts["head and loss"] == (head + copied) * 3 / 4 - more_rows


def test_frozen_weights_are_shared_and_kept_whole_in_their_own_type() -> None:
    adapters = planner(SMALL, Config(use_peft=True, fsdp="full_shard"), num_devices=4).plan().lasting
    whole = planner(SMALL, Config(use_peft=True), num_devices=4).plan().lasting
    assert adapters["frozen weights"] == whole["frozen weights"] // 4
    copied = whole["frozen weights"] + whole["weights that are trained"]
    assert adapters["whole weights to sample from"] == copied


@pytest.mark.parametrize(("dtype", "itemsize"), [("auto", 2), ("float32", 4)])
def test_whole_weights_beside_shards_are_of_the_type_of_computation(dtype: str, itemsize: int) -> None:
    """Two layers of them, or all from forward to backward; then a layer's gradient, and its copy in float32, come on top."""
    count, layers = num_weights(WIDE), SIZES["num_hidden_layers"]
    head = 4 * SIZES["vocab_size"] * SIZES["hidden_size"]
    for kind, share in (("full_shard", 2 / layers), ("shard_grad_op", 1)):
        phases = planner(WIDE, Config(fsdp=kind, dtype=dtype, **SERVERS), num_devices=4).plan().phases
        losses, gradients = (phases[phase]["gathered weights"] for phase in ("computing losses", "computing gradients"))
        assert losses == share * itemsize * count + head
        assert gradients - losses == (itemsize + 4) * count // layers
        assert "gathered weights" not in phases["updating weights"]


def test_shards_in_the_hosts_memory_are_counted_there() -> None:
    there, here = (
        planner(WIDE, Config(fsdp="full_shard", fsdp_offload_params=offload, beta=0.1, **SERVERS), num_devices=4).plan()
        for offload in (True, False)
    )
    moved = {"weights that are trained", "reference policy", "optimiser"}
    assert {name: here.lasting[name] for name in moved} == {name: there.host[name] for name in moved}
    assert there.host["gradients"] == here.phases["updating weights"]["gradients"] == num_weights(WIDE)
    assert {name: size for name, size in here.lasting.items() if size} == {
        **{name: size for name, size in there.lasting.items() if size},
        **{name: there.host[name] for name in moved},
    }
    assert there.phases["updating weights"] == {"gradients": 0, "numbers of one update": 0}
    assert there.phases["computing gradients"]["gradients"] == 0
    assert there.phases["computing gradients"]["gathered weights"] == here.phases["computing gradients"]["gathered weights"] > 0


def test_gathered_weights_are_not_cast_again() -> None:
    def of(**changes: Any) -> dict[str, int]:
        phases = planner(WIDE, Config(**SERVERS, **changes), num_devices=4).plan().phases
        assert phases["updating weights"]["gradients"] >= phases["computing gradients"]["gradients"] > 0
        return phases["computing losses"]

    whole, shards, short = (of(**changes) for changes in ({}, {"fsdp": "full_shard"}, {"weights_dtype": "bfloat16"}))
    assert shards["activations"] == short["activations"]
    casts = 2 * num_weights(WIDE) - 2 * 2 * SIZES["vocab_size"] * SIZES["hidden_size"]  # but embedding and head
    assert whole["activations"] - shards["activations"] > casts, "these, and hidden states in float32 between layers"


def test_experts_in_parts_are_counted() -> None:
    model = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    plan = planner(model, Config(fsdp="full_shard", **SERVERS), num_devices=2).plan()
    assert plan.phases["computing losses"]["activations"] > 0
