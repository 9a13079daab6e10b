"""A step that nobody has sampled is cut as the update would cut it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MambaConfig

from grpo_fast.config import Config
from grpo_fast.train.activations import DryPass
from grpo_fast.train.plan_pass import StepLengths, largest_passes
from grpo_fast.train.policy_source import outline_of

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, **HEADS)


def passes(
    completions: tuple[int, ...] = (10,), *, model: Any = LLAMA, kind: str = "cpu", num_devices: int = 1, **changes: Any
) -> list[DryPass]:
    config = Config.parse({"prompts_per_step": 2, "num_generations": 4, **changes})
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    lengths = StepLengths(5, completions, num_devices)
    return largest_passes(outline_of(model, config), config, lengths, dtype=dtype, kind=kind)


def found(completions: tuple[int, ...] = (10,), **options: Any) -> DryPass:
    [work] = passes(completions, **options)
    return work


def test_lengths_are_taken_again_from_the_start() -> None:
    work = found((3, 4, 5))
    assert sorted(len(one.completion_ids) for one in work.sequences) == [3, 3, 3, 4, 4, 4, 5, 5]
    assert len({one.prompt_ids for one in work.sequences}) == 2
    assert all(len(one.prompt_ids) == 5 for one in work.sequences)
    assert not work.accumulates


def sizes(*given: DryPass) -> list[tuple[list[int], bool]]:
    return [([len(one) for one in work.sequences], work.accumulates) for work in given]


def test_of_several_the_first_meets_no_gradients() -> None:
    first, later = passes((20, 20, 20, 20, 1, 1, 1, 1), tokens_per_microbatch=75, share_prompts=False)
    assert sizes(first, later) == [([25, 25, 25], False), ([25, 6, 6, 6, 6], True)]
    even = found((20, 20, 20, 20, 1, 1, 1, 1), tokens_per_microbatch=50, share_prompts=False)
    assert sizes(even) == [([25, 25], True)], "the first is no larger than the second"


def test_one_longer_than_the_budget_stands_alone() -> None:
    alone = found((20, 20), tokens_per_microbatch=10)
    assert len(alone.sequences) == 1


def test_passes_are_of_a_size_for_the_device() -> None:
    on_cpu, on_gpu = (found((500,), kind=kind, share_prompts=True) for kind in ("cpu", "cuda"))
    assert (len(on_cpu.sequences), len(on_gpu.sequences)) == (4, 8), "5 + 4 * 500 of 2,048 tokens, and all"
    assert len(found((500,), kind="cuda", share_prompts=True, tokens_per_microbatch=2048).sequences) == 4


def test_shared_prompts_let_more_in() -> None:
    shared = found(tokens_per_microbatch=45)
    assert shared.shares_prompts
    assert len(shared.sequences) == 4, "5 + 4 * 10"
    assert len(found(tokens_per_microbatch=45, share_prompts=False).sequences) == 3
    assert not found(kind="cuda").shares_prompts
    assert found(kind="cuda", share_prompts=True).shares_prompts


def test_devices_share_a_step() -> None:
    assert len(found(num_devices=2).sequences) == 4
    assert len(found(num_devices=3).sequences) == 3


@pytest.mark.parametrize(
    ("changes", "model", "layout", "one_kernel"),
    [
        ({}, LLAMA, "packed", True),
        ({"share_prompts": True}, LLAMA, "packed", False),
        ({"padding_free": False}, LLAMA, "padded", False),
        ({"attn_implementation": "eager"}, LLAMA, "packed", True),
        ({"attn_implementation": "flash_attention_2"}, LLAMA, "packed", True),
        ({"attn_implementation": "flex_attention"}, LLAMA, "padded", False),
        ({}, Gemma2Config(**SIZES, **HEADS), "packed", False),
        ({}, MambaConfig(**SIZES), "padded", False),
    ],
    ids=["sdpa", "shared", "padded", "eager", "flash", "flex", "capped", "no attention"],
)
def test_sequences_are_laid_as_the_policy_lays_them(changes: dict[str, Any], model: Any, layout: str, one_kernel: bool) -> None:
    work = found(kind="cuda", model=model, **changes)
    assert (work.layout, work.one_kernel) == (layout, one_kernel)
    assert not found(model=model, **changes | {"attn_implementation": "auto"}).one_kernel, "buckets, on a CPU"
