"""What a run needs of a device is added up from its parts, and what does not fit is told with what would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, MambaConfig, PhiConfig, Qwen2Config, Qwen3MoeConfig, StableLmConfig

from grpo_fast.compute.memory import MemoryPlan
from grpo_fast.config import Config, ConfigError
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.activations import UncountableError
from grpo_fast.train.parts import build_parts
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner, check_room, device_room, refusal, table, to_dict
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.step import Learner
from grpo_fast.types import Group
from tests.train.real_update import most_held, update_peak

GIB = 2**30
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
TWO_LAYERS = LlamaConfig(**LLAMA_8B.to_dict() | {"num_hidden_layers": 2})
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
SMALL = Qwen2Config(**SIZES)


def planner(model: Any, config: Config, *, room_gib: float = 80.0, kind: str = "cuda", num_devices: int = 1) -> MemoryPlanner:
    return MemoryPlanner(model, config, MemoryInputs(round(room_gib * GIB), kind, prompt_tokens=200, num_devices=num_devices))


def num_weights(model: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(model).parameters())


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
    adapters = 16 * sum(2 * (inputs + outputs) for inputs, outputs in _layers_of_llama())
    assert nf4.lasting["weights that are trained"] == 4 * adapters
    assert nf4.lasting["reference policy"] == 0


def test_sharded_adapters_that_begin_as_saved_ones_have_a_reference_beside_them() -> None:
    def reference(*, num_devices: int, begins: bool = True, **changes: Any) -> int:
        inputs = MemoryInputs(80 * GIB, "cuda", 200, num_devices=num_devices, begins_from_adapters=begins)
        lasting = MemoryPlanner(TWO_LAYERS, Config(use_peft=True, **changes), inputs).plan().lasting
        assert lasting["frozen weights"] >= 2 * count // num_devices
        return lasting["reference policy"]

    count = num_weights(TWO_LAYERS)
    adapters = 4 * 16 * sum(2 * (inputs + outputs) for inputs, outputs in _layers_of_llama())
    sharded: dict[str, Any] = {"fsdp": "full_shard", "beta": 0.1}
    assert reference(num_devices=4, **sharded) == (2 * count + adapters) // 4
    assert reference(num_devices=4, begins=False, **sharded) == 0, "they are switched off for it"
    assert reference(num_devices=4, beta=0.1) == reference(num_devices=1, **sharded) == 0, "they are put back for it"
    assert reference(num_devices=4, fsdp="full_shard") == 0


def _layers_of_llama() -> list[tuple[int, int]]:
    return [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14_336), (4096, 14_336), (14_336, 4096)]


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
    servers = {"rollout": "vllm-http", "vllm_server_urls": ("http://127.0.0.1:8000",)}
    streamed = planner(SMALL, Config(fsdp="full_shard", **servers), num_devices=4).plan()
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


def test_keys_and_values_of_sampling() -> None:
    config = Config(prompts_per_step=2, num_generations=4, max_completion_length=100)
    found = planner(SMALL, config, kind="cpu").plan().phases["sampling"]
    assert found["keys and values"] == 8 * (200 + 100) * 2 * 4 * 2 * 16 * 4
    assert planner(SMALL, Config(rollout="vllm"), room_gib=80).plan().lasting["vLLM"] == pytest.approx(0.3 * 80 * GIB)
    on_cpu = planner(SMALL, config.replace(rollout="vllm"), kind="cpu").plan().lasting
    assert on_cpu["vLLM's keys and values"] == 256 * (200 + 100) * 2 * 4 * 2 * 16 * 4
    told = planner(SMALL, config.replace(rollout="vllm", vllm_kv_cache_gib=3.0), kind="cpu").plan().lasting
    assert told["vLLM's keys and values"] == 3 * GIB
    http = Config(rollout="vllm-http", vllm_server_urls=("http://127.0.0.1:8000",))
    assert planner(SMALL, http).plan().phases["sampling"] == {}


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


def test_sleep_is_offered_where_vllm_can() -> None:
    config = Config(rollout="vllm", tokens_per_microbatch=1024, gradient_checkpointing=True)
    on_gpu, on_cpu = (planner(SMALL, config, room_gib=1.0, kind=kind).changes() for kind in ("cuda", "cpu"))
    assert any("vllm_enable_sleep_mode" in change.settings for change in on_gpu)
    assert not any("vllm_enable_sleep_mode" in change.settings for change in on_cpu)


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
