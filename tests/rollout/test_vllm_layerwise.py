from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# vLLM and what it imports use deprecated parts of torch.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 3))
    model.register_parameter("steps", torch.nn.Parameter(torch.arange(3), requires_grad=False))
    return model


def test_what_comes_is_what_was_announced(model: torch.nn.Module) -> None:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights

    source = PolicyWeights(model, torch.bfloat16)
    metas = source.metadata
    found = dict(source)
    assert [(meta.name, meta.dtype, meta.shape) for meta in metas] == [(n, w.dtype, tuple(w.shape)) for n, w in found.items()]
    assert {meta.name: meta.dtype for meta in metas}["steps"] == torch.int64, "only what is a number of the model is converted"
    assert all(torch.equal(found[name], weight.to(found[name].dtype)) for name, weight in model.named_parameters())
    assert source.num_bytes == 2 * (24 + 12 + 3) + 8 * 3
    assert source.largest_bytes == 2 * 24
    elsewhere = dict(PolicyWeights(model, torch.bfloat16, torch.device("meta")))
    assert {weight.device.type for weight in elsewhere.values()} == {"meta"}
    assert all(weight.data_ptr() == dict(model.named_parameters())[name].data_ptr() for name, weight in source.uncast())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_gathered_one_at_a_time(model: torch.nn.Module, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    from grpo_fast.rollout.vllm_layerwise import PolicyWeights

    whole = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for module in (model[0], model[1]):
        for name, weight in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
    gathered: list[torch.Size] = []
    gather = DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda self: gathered.append(self.shape) or gather(self))
    for number, (name, weight) in enumerate(PolicyWeights(model, torch.float32)):
        assert not isinstance(weight, DTensor)
        assert torch.equal(weight, whole[name])
        assert len(gathered) == number  # "steps" comes first and is whole
    assert len(gathered) == 3


def test_of_an_adapted_model_in_four_bits_the_base_comes_under_its_own_names() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from grpo_fast.config import Config
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.train.policy_source import PolicySource

    plain = PolicySource(Config(max_completion_length=16)).load().model
    for four_bits in (False, True):
        source = PolicyWeights(
            PolicySource(Config(use_peft=True, load_in_4bit=four_bits, max_completion_length=16)).load().model, torch.float32
        )
        found = dict(source)
        metas = {meta.name: (meta.dtype, meta.shape) for meta in source.metadata}
        assert metas == {name: (torch.float32, tuple(weight.shape)) for name, weight in plain.named_parameters()}
        assert metas == {name: (weight.dtype, tuple(weight.shape)) for name, weight in found.items()}
        off = {name: (found[name] - weight).abs().max() / weight.abs().max() for name, weight in plain.named_parameters()}
        assert {name for name, share in off.items() if share > 0} == (
            {name for name in off if name.endswith("proj.weight")} if four_bits else set()
        )
        assert max(off.values()) < 0.16  # half the widest gap between two of the sixteen numbers


@pytest.mark.parametrize("nested", [False, True])
def test_shards_in_four_bits_come_as_what_the_whole_base_stands_for(nested: bool, world: Any) -> None:
    """A forward pass between two readings leaves nothing behind that the second would read."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from grpo_fast.config import Config
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.train.policy_source import PolicySource
    from grpo_fast.train.sharding import ShardedPolicy

    config = Config(
        use_peft=True, load_in_4bit=True, use_bnb_nested_quant=nested, max_completion_length=16, fsdp="full_shard", device="cpu"
    )
    source = PolicySource(config)
    whole = PolicyWeights(source.load().model, torch.float32)
    policy = ShardedPolicy(source.load(), None, config=config, world=world, streams=True)
    shards = PolicyWeights(policy.whole_model(), torch.float32)
    for _ in range(2):
        found = policy.reading(world).once(lambda: dict(shards))
        assert {name: weight.tolist() for name, weight in found.items()} == {n: w.tolist() for n, w in whole}
        assert shards.metadata == whole.metadata
        assert shards.num_bytes == whole.num_bytes
        policy.reading(world).once(lambda: policy.whole_model()(torch.tensor([[4, 5, 6]]), logits_to_keep=torch.tensor([2])))
