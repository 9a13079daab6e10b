from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from grpo_fast.rollout.whole_weights import GatheringModel, gather, whole_weights


class Gathering(torch.nn.Linear):
    def gathered(self, names: Sequence[str], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
        return iter([(f"{names} in {dtype}", torch.ones(1))])


@pytest.fixture
def shard(group_of_one: None) -> DTensor:
    return distribute_tensor(torch.tensor([1.001, 2.0, 3.0]), dist.init_device_mesh("cpu", (1,)), [Shard(0)])


def test_weights_that_are_whole_come_as_they_are() -> None:
    model = torch.nn.Linear(3, 2)
    found = list(whole_weights(model, ["bias", "weight"], torch.bfloat16))
    assert [name for name, _ in found] == ["bias", "weight"]
    assert all(weight.data_ptr() == model.get_parameter(name).data_ptr() for name, weight in found)
    assert not any(weight.requires_grad for _, weight in found)


def test_a_shard_is_gathered_in_the_type_that_is_wanted(shard: DTensor) -> None:
    assert torch.equal(gather(shard, torch.bfloat16), torch.tensor([1.001, 2.0, 3.0]).bfloat16())
    assert torch.equal(gather(shard), torch.tensor([1.001, 2.0, 3.0]))
    counts = distribute_tensor(torch.arange(3), shard.device_mesh, [Shard(0)])
    assert gather(counts, torch.bfloat16).dtype == torch.int64
    assert not isinstance(gather(shard), DTensor)


def test_a_model_that_gathers_is_asked_in_one_go() -> None:
    model = Gathering(3, 2)
    assert isinstance(model, GatheringModel)
    assert not isinstance(torch.nn.Linear(3, 2), GatheringModel)
    assert [name for name, _ in whole_weights(model, iter(["weight"]), torch.float16)] == ["['weight'] in torch.float16"]
