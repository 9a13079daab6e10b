from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from grpo_fast.rollout.kv_cache import CACHE_ARGUMENTS, PreallocatedCache, cache_argument


def filled(rows: int, length: int) -> DynamicCache:
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*torch.randn(2, rows, 3, length, 4, generator=generator), layer)
    return cache


def test_grows_like_a_dynamic_cache_and_in_place() -> None:
    source, index = filled(2, 5), torch.tensor([0, 0, 1])
    cache = PreallocatedCache(3, 8, source)
    cache.fill(slice(0, 2), source, index[:2])
    cache.fill(slice(2, 3), source, index[2:])
    expected = filled(2, 5)
    expected.batch_select_indices(index)
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(1, 0) == (6, 0)
    addresses = set()
    for step in range(3):
        for layer in range(2):
            keys, values = torch.randn(2, 3, 3, 1, 4, generator=torch.Generator().manual_seed(step))
            got, truth = cache.update(keys, values, layer), expected.update(keys, values, layer)
            assert torch.equal(got[0], truth[0])
            assert torch.equal(got[1], truth[1])
            addresses.add(got[0].data_ptr())
    assert len(addresses) == 2


def test_move_fills_holes_and_shrinks() -> None:
    source = filled(5, 4)
    cache = PreallocatedCache(5, 6, source)
    cache.fill(slice(0, 5), source, torch.arange(5))
    cache.move(torch.tensor([4, 3]), torch.tensor([0, 2]), 3)
    keys, values = torch.zeros(2, 3, 3, 1, 4)
    got = cache.update(keys, values, 1)
    for part, whole in zip(got, (source.layers[1].keys, source.layers[1].values), strict=True):
        assert torch.equal(part[:, :, :4], whole[[4, 1, 3]])
        assert part.shape == (3, 3, 5, 4)


def test_under_autocast_keys_are_kept_as_attention_reads_them() -> None:
    source = filled(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = PreallocatedCache(2, 8, source)
        cache.fill(slice(0, 2), source, torch.arange(2))
        keys, values = torch.randn(2, 2, 3, 1, 4)
        got = cache.update(keys, values, 0)
    for part, before, new in zip(got, (source.layers[0].keys, source.layers[0].values), (keys, values), strict=True):
        assert torch.equal(part, torch.cat((before, new), dim=2).bfloat16())


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_a_cache_goes_by_the_name_that_the_model_gives_it(name: str) -> None:
    class Newer:
        def forward(self, input_ids: Any, cache: Any = None, **rest: Any) -> None: ...

    class Older:
        def forward(self, input_ids: Any, past_key_values: Any = None, **rest: Any) -> None: ...

    model: Any = {"cache": Newer, "past_key_values": Older}[name]()
    assert cache_argument(model) == name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT still asks by the old name
def test_adapters_hide_no_cache() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    cache, ids = DynamicCache(), torch.tensor([[1, 2, 3]])
    adapted(input_ids=ids, **{cache_argument(adapted): cache})
    assert cache_argument(adapted) == cache_argument(model)
    assert cache.get_seq_length() == 3
