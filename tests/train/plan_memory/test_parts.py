"""What a run needs of a device is added up from its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, MambaConfig, Qwen2Config, Qwen3MoeConfig, StableLmConfig

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.activations import UncountableError
from grpo_fast.train.plan_memory import check_room
from tests.train.plan_memory.models import GIB, SERVERS, SIZES, SMALL, TWO_LAYERS, layers_of_llama, num_weights, planner


@pytest.mark.parametrize(
    ("changes", "weights", "optimiser", "gradients", "reference"),
    [
        ({}, 4, 8, 4, 0),
        ({"beta": 0.1}, 4, 8, 4, 4),
        ({"optim": "adamw_8bit"}, 4, 2, 4, 0),
        ({"weights_dtype": "bfloat16"}, 2, 8, 2, 0),
        ({"offload_optimizer": True}, 4, 0, 4, 0),
        ({"offload_optimizer": True, "weights_dtype": "bfloat16"}, 2, 0, 2, 0),
        ({"optim": "paged_adamw_8bit"}, 4, 0, 4, 0),
    ],
    ids=str,
)
def test_bytes_of_a_weight(changes: dict[str, Any], weights: int, optimiser: int, gradients: int, reference: int) -> None:
    plan = planner(SMALL, Config(**changes)).plan()
    count = num_weights(SMALL)
    assert plan.lasting["weights that are trained"] == weights * count
    assert plan.lasting["optimiser"] == optimiser * count
    assert plan.phases["updating weights"]["gradients"] == gradients * count
    assert plan.lasting["reference policy"] == reference * count


def test_a_cut_support_takes_the_head_rows_of_its_tokens() -> None:
    """Where nothing bounds how many are kept, it may take all."""
    of_top_k, of_top_p, whole = (
        planner(TWO_LAYERS, Config(**changes)).plan().phases["computing losses"]["head and loss"]
        for changes in ({"top_k": 20}, {"top_p": 0.9}, {})
    )
    hidden_size, vocabulary, rows = TWO_LAYERS.hidden_size, TWO_LAYERS.vocab_size, 512
    foretold = rows * 20 * ((2 * 2 + 4) * hidden_size + 8 * rows)  # two copies in bfloat16, a gradient in float32
    everything = vocabulary * ((2 + 4) * hidden_size + 8 * rows)
    assert of_top_p - of_top_k == everything - foretold
    assert of_top_k < whole


def test_adapters_leave_a_frozen_base() -> None:
    plain, nf4 = (
        planner(TWO_LAYERS, Config(use_peft=True, beta=0.1, **more)).plan()
        for more in ({}, {"load_in_4bit": True, "use_bnb_nested_quant": True})
    )
    assert plain.lasting["frozen weights"] == 2 * num_weights(TWO_LAYERS)
    ends = 2 * 128_256 * 4096  # embedding and head stay in bfloat16
    a_weight = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # and the scale of 64, in a byte, which 256 have one of in four
    expected = (num_weights(TWO_LAYERS) - ends) * a_weight
    assert nf4.lasting["frozen weights"] - 2 * ends == pytest.approx(expected, rel=0.001)
    adapters = 16 * sum(2 * (inputs + outputs) for inputs, outputs in layers_of_llama())
    assert nf4.lasting["weights that are trained"] == 4 * adapters
    assert nf4.lasting["reference policy"] == 0


def test_keys_and_values_of_sampling() -> None:
    config = Config(prompts_per_step=2, num_generations=4, max_completion_length=100)
    found = planner(SMALL, config, kind="cpu").plan().phases["sampling"]
    assert found["keys and values"] == 8 * (200 + 100) * 2 * 4 * 2 * 16 * 4
    assert planner(SMALL, Config(rollout="vllm"), room_gib=80).plan().lasting["vLLM"] == pytest.approx(0.3 * 80 * GIB)
    on_cpu = planner(SMALL, config.replace(rollout="vllm"), kind="cpu").plan().lasting
    assert on_cpu["vLLM's keys and values"] == 256 * (200 + 100) * 2 * 4 * 2 * 16 * 4
    told = planner(SMALL, config.replace(rollout="vllm", vllm_kv_cache_gib=3.0), kind="cpu").plan().lasting
    assert told["vLLM's keys and values"] == 3 * GIB
    assert planner(SMALL, Config(**SERVERS)).plan().phases["sampling"] == {}


def test_a_sleeping_vllm_lies_beside_sampling_alone() -> None:
    awake = planner(SMALL, Config(rollout="vllm"), room_gib=80).plan()
    asleep = planner(SMALL, Config(rollout="vllm", vllm_enable_sleep_mode=True), room_gib=80).plan()
    assert "vLLM" not in asleep.lasting
    assert asleep.phases["sampling"]["vLLM"] == awake.lasting["vLLM"]
    updates = [{name: parts for name, parts in plan.phases.items() if name != "sampling"} for plan in (asleep, awake)]
    assert updates[0] == updates[1]
    assert asleep.peak_bytes < awake.peak_bytes
    assert "vLLM's weights" not in asleep.host
    adapters = planner(SMALL, Config(rollout="vllm", vllm_enable_sleep_mode=True, use_peft=True)).plan()
    assert adapters.host["vLLM's weights"] >= 2 * num_weights(SMALL)


def test_vllm_computes_beside_a_cache_of_a_given_size() -> None:
    """Its share of the memory, where that is what is given, holds its activations too."""

    def found(model: Any = TWO_LAYERS, *, room_gib: float = 80, kind: str = "cuda", **changes: Any) -> tuple[Any, Any]:
        config = Config(rollout="vllm", vllm_kv_cache_gib=2.0, **changes)
        plan = planner(model, config, room_gib=room_gib, kind=kind).plan()
        return plan.phases["sampling"].get("vLLM's activations"), plan.lasting.get("vLLM's activations")

    token = (2 * 4096 + 3 * 14_336) * 2
    assert found() == (16_384 * token, None), "what the trainer takes again"
    assert found(room_gib=24) == (8192 * token, None)
    assert found(vllm_own_process=True) == (None, 16_384 * token)
    assert found(vllm_engine_args={"max_num_batched_tokens": 2048, "max_num_seqs": 64}) == (2048 * token, None)
    assert found(SMALL, vllm_engine_args={"max_num_batched_tokens": 1024}) == (3 * 1024 * 1000 * 4, None), "logits"
    assert found(SMALL, kind="cpu") == (4096 * (2 * 64 + 3 * 128) * 4, None)
    asleep = planner(TWO_LAYERS, Config(rollout="vllm", vllm_kv_cache_gib=2.0, vllm_enable_sleep_mode=True)).plan()
    assert asleep.phases["sampling"]["vLLM's activations"] == 16_384 * token
    assert "vLLM's activations" not in planner(TWO_LAYERS, Config(rollout="vllm")).plan().phases["sampling"]


def test_both_ends_of_a_sparse_transport_keep_what_went_over() -> None:
    urls = ("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    served = {"rollout": "vllm-http", "vllm_server_urls": urls}
    copies = {"weights as last sent", "weights as vLLM last got them"}
    count = num_weights(SMALL)

    def found(kind: str, **changes: Any) -> list[dict[str, int]]:
        plan = planner(SMALL, Config(**changes), kind=kind).plan()
        return [{name: size for name, size in part.items() if name in copies} for part in (plan.lasting, plan.host)]

    expected = {"weights as last sent": 2 * count, "weights as vLLM last got them": 2 * 2 * count}
    assert found("cuda", **served, vllm_transport="sparse") == [{}, expected]
    assert found("cuda", **served, vllm_transport="sparse", use_peft=True) == [{}, expected], "the base alone"
    assert found("cpu", rollout="vllm", vllm_transport="sparse") == [dict.fromkeys(sorted(copies), 4 * count), {}]
    for changes in (served, served | {"vllm_transport": "shared_memory"}, {}):
        assert found("cuda", **changes) == [{}, {}]


def test_sampling_ahead_lies_beside_training() -> None:
    plan = planner(SMALL, Config(max_staleness=1), kind="cpu").plan()
    assert plan.lasting["copy of trained weights"] == 4 * num_weights(SMALL)
    assert plan.lasting["keys and values"] > 0
    assert plan.phases["sampling"] == {}


def test_activations_follow_the_micro_batch_and_no_more_than_the_step() -> None:
    config = Config(prompts_per_step=1, num_generations=2, max_completion_length=56, tokens_per_microbatch=100_000)
    sizes = {
        tokens: planner(SMALL, config.replace(tokens_per_microbatch=tokens)).plan().phases["computing losses"]["activations"]
        for tokens in (256, 512, 100_000)
    }
    assert sizes[512] == sizes[100_000] > 1.9 * sizes[256]


def test_a_plan_changes_neither_the_model_nor_the_next_plan() -> None:
    model = Qwen2Config(**SIZES)
    one = planner(model, Config(), kind="cpu")
    first = one.plan()
    one.plan(Config(padding_free=False))
    assert model.to_dict() == Qwen2Config(**SIZES).to_dict()
    assert model._attn_implementation == Qwen2Config(**SIZES)._attn_implementation
    assert one.plan() == planner(model, Config(), kind="cpu").plan() == first


def test_models_of_other_kinds() -> None:
    mamba = MambaConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2)
    check_room(mamba, Config(), num_devices=1)
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True)
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_fast.train.plan_memory.outline_of", lambda model_config, config: BertModel(model_config))
        with pytest.raises(ConfigError, match="BertModel has no output embeddings"):
            check_room(bert, Config(), num_devices=1)


def test_a_model_that_takes_no_packed_sequences_is_padded() -> None:
    """Its attention would refuse them; and a policy then pads."""
    model = StableLmConfig(**SIZES)
    found, padded = (planner(model, Config(padding_free=value), kind="cpu").plan() for value in (None, False))
    assert found == padded
    with pytest.raises(UncountableError, match="passes of stablelm cannot be run without memory"):
        planner(model, Config(padding_free=True), kind="cpu").plan()


def test_of_experts_that_tokens_choose_weights_alone_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(UncountableError, match="passes of qwen3_moe"):
        planner(model, Config()).plan()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_fast.train.plan_memory.device_room", lambda config, gpu: (2**20, "cuda"))
        with pytest.raises(ConfigError, match=r"moments need 7.* MiB, and the device has 1 MiB; passes"):
            check_room(model, Config(), num_devices=1)
    assert caplog.text == ""
