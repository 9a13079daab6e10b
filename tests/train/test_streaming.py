"""Over a group of one rank: what is asked for, and when; several ranks that follow: ``tests/train/distributed``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo_fast.config import Config
from grpo_fast.rollout.sync_probe import SyncProbe
from grpo_fast.train.distributed import World
from grpo_fast.train.policy import Policy
from grpo_fast.train.sharding import ShardedPolicy
from grpo_fast.train.streaming import StreamedModel, streams_weights

PROBE = SyncProbe((4, 5, 6, 7, 8), 1e-8)


@pytest.fixture(params=["untied", "tied", "capped"])
def make_model(request: pytest.FixtureRequest, sizes: dict[str, Any]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(3)
        if request.param == "capped":
            return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5))
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=request.param == "tied"))

    return make


@pytest.fixture
def policy(world: World, tiny_policy: Callable[..., Policy], make_model: Callable[[], PreTrainedModel]) -> ShardedPolicy:
    config = Config(fsdp="full_shard", fsdp_parallel_head=True, device="cpu", max_completion_length=8)
    return ShardedPolicy(tiny_policy(make_model()), None, config=config, world=world, streams=True)


def test_the_probe_scores_shards_as_it_does_the_whole_model_after_an_update_too(
    policy: ShardedPolicy, world: World, make_model: Callable[[], PreTrainedModel]
) -> None:
    model, whole = policy.whole_model(), make_model()
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    for _ in range(2):
        found = policy.reading(world).once(lambda: PROBE.score(model)).logprobs
        assert (found - PROBE.score(whole).logprobs).abs().max() < 1e-5
        with torch.no_grad():
            for weight in (*policy.model.parameters(), *whole.parameters()):
                weight.mul_(1.5)
    assert (found - PROBE.score(whole).logprobs).abs().max() > 1e-3


def test_weights_come_a_unit_at_a_time(policy: ShardedPolicy, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = policy.whole_model()
    names = [name for name, _ in model.named_parameters()]
    gathered: list[int] = []
    gather = DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda shard: gathered.append(1) or gather(shard))

    def read() -> list[tuple[str, int]]:
        return [(name, len(gathered)) for name, _ in model.gathered(names, None)]

    told = policy.reading(world).once(read)
    assert [name for name, _ in told] == names
    layers = [[count for name, count in told if f"layers.{number}." in name] for number in range(2)]
    assert [set(counts) for counts in layers] == [{1 + len(layers[0])}, {1 + len(layers[0]) + len(layers[1])}]
    assert len(gathered) == len(names)


def test_an_engine_reads_the_models_configuration_beside_its_weights(policy: ShardedPolicy) -> None:
    model: Any = policy.whole_model()
    assert isinstance(model, StreamedModel)
    assert model.config is policy.model.config
    assert not hasattr(model, "peft_config")


def test_nothing_is_gathered_but_while_rank_0_leads(policy: ShardedPolicy, world: World) -> None:
    model: Any = policy.whole_model()
    with pytest.raises(RuntimeError, match="weights were requested after the gather on rank 0 had ended"):
        next(model.gathered(["model.norm.weight"], None))

    def fail() -> None:
        raise ConnectionError("the wire broke")

    with pytest.raises(ConnectionError, match="the wire broke"):
        policy.reading(world).once(fail)
    with pytest.raises(RuntimeError, match="weights were requested after the gather on rank 0 had ended"):
        PROBE.score(model)


def test_servers_alone_read_shards() -> None:
    servers = {"rollout": "vllm-http", "vllm_server_urls": ("http://127.0.0.1:8000",)}
    assert streams_weights(Config(fsdp="full_shard", **servers))
    assert not streams_weights(Config(fsdp="no_shard", **servers))
    assert not streams_weights(Config(fsdp="full_shard"))
    assert streams_weights(Config(fsdp="full_shard", use_peft=True, load_in_4bit=True, **servers))
