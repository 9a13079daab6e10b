"""What passes are foretold to hold is what real ones do."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from grpo_fast.config import Config
from grpo_fast.train import activations
from grpo_fast.train.activations import DryPass, HeadBytes, PassBytes, pass_bytes
from grpo_fast.train.batch import TrainingSequence
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner
from grpo_fast.train.policy_source import outline_of
from tests.train.real_update import update_peak

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8
)
UNEVEN = tuple(8 + 23 * number % 57 for number in range(32))


def dry(lengths: list[int], **changes: Any) -> DryPass:
    sequences = [TrainingSequence((0,), (0,) * (length - 1), (0.0,) * (length - 1), 1.0, in_loss=True) for length in lengths]
    plain = DryPass(
        sequences,
        layout="packed",
        shares_prompts=False,
        one_kernel=True,
        accumulates=False,
        dtype=torch.bfloat16,
        kind="cuda",
    )
    return dataclasses.replace(plain, **changes)


def foretold(model_config: Any, config: Config, work: DryPass) -> PassBytes:
    return pass_bytes(outline_of(model_config, config), config, work, HeadBytes(model_config.vocab_size, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_config", "changes"),
    [
        (MistralConfig(**SIZES, sliding_window=24), {}),
        (
            Qwen2Config(**SIZES, tie_word_embeddings=True),
            {"padding_free": False, "gradient_checkpointing": True, "tokens_per_microbatch": 16_384},
        ),
        (Qwen3Config(**SIZES), {"use_peft": True, "tokens_per_microbatch": 512, "dtype": "bfloat16"}),
        (Gemma3TextConfig(**SIZES, sliding_window=24), {"tokens_per_microbatch": 512}),
    ],
    ids=["mistral", "qwen2 padded and checkpointed", "qwen3 with adapters", "gemma3 in small parts"],
)
def test_models_hold_what_is_foretold(model_config: Any, changes: dict[str, Any]) -> None:
    config = Config.parse({"num_generations": 8, "prompts_per_step": 4, "max_completion_length": 64, **changes})
    inputs = MemoryInputs(2**34, "cpu", prompt_tokens=20, completion_tokens=UNEVEN)
    phases = MemoryPlanner(model_config, config, inputs).plan().phases
    peak = max(sum(parts.values()) for name, parts in phases.items() if name != "sampling")
    assert peak == pytest.approx(update_peak(model_config, config, prompt_tokens=20, completion_tokens=UNEVEN), rel=0.05)


@pytest.mark.parametrize(("mode", "use_peft"), [(None, False), (None, True), ("full", False), ("offload", False)])
@pytest.mark.parametrize("accumulates", [False, True], ids=["one", "several"])
def test_layers_that_repeat_are_counted_as_all_are(
    use_peft: bool, mode: Any, accumulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_mode": mode} if mode else {}
    config, model_config = Config(use_peft=use_peft, **changes), LlamaConfig(**SIZES | {"num_hidden_layers": 8})
    work = dry([90, 120], accumulates=accumulates)
    few = foretold(model_config, config, work)
    monkeypatch.setattr(activations, "_period", lambda outline: 8)
    every = foretold(model_config, config, work)
    assert few.losses.total == pytest.approx(every.losses.total, rel=0.005)
    assert few.gradients.total == pytest.approx(every.gradients.total, rel=0.005)
    assert few.waiting == every.waiting
    assert (few.waiting > 0) == (mode == "offload")


def test_layers_of_unlike_kinds_repeat_after_all_of_them() -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    for count, period in ((6, 3), (7, 7)):
        model_config = Gemma3TextConfig(**SIZES | {"num_hidden_layers": count}, layer_types=(kinds * 3)[:count])
        assert activations._period(outline_of(model_config, Config())) == period
    assert activations._period(outline_of(LLAMA_8B, Config())) == 1


def test_gradients_wait_until_all_passes_are_made() -> None:
    model_config, config = LlamaConfig(**SIZES), Config()
    one, several = (foretold(model_config, config, dry([300], accumulates=value)) for value in (False, True))
    body = outline_of(model_config, config).base_model
    assert 0 < one.gradients.gradients <= 4 * sum(weight.numel() for weight in body.parameters())
    assert several.gradients.gradients == 0
    assert several.losses == one.losses


def test_a_padded_mask_and_padding_cost_memory() -> None:
    model_config, config = LlamaConfig(**SIZES), Config()
    ragged, even, packed = (
        foretold(model_config, config, dry(lengths, layout=layout, one_kernel=False)).losses.total
        for lengths, layout in (([200, 100], "padded"), ([200, 200], "padded"), ([200, 100], "packed"))
    )
    assert packed < even < ragged


@pytest.mark.parametrize("num_layers", [2, 6])
def test_the_outline_stays_as_it_is(num_layers: int) -> None:
    config = Config(gradient_checkpointing=True)
    outline = outline_of(LlamaConfig(**SIZES | {"num_hidden_layers": num_layers}), config)
    before = copy.deepcopy(outline.config.to_dict())
    pass_bytes(outline, config, dry([8]), HeadBytes(512, 0))
    assert outline.config.to_dict() == before
    assert outline.config._attn_implementation == "sdpa"
    assert not any(getattr(module, "gradient_checkpointing", False) for module in outline.modules())
    assert all(weight.is_meta for weight in outline.parameters())


def test_it_needs_no_memory() -> None:
    """Eight billion weights over 16k tokens."""
    found = foretold(LLAMA_8B, Config(), dry([16_384]))
    # a layer and token: 26 H + 8 I + 4 (q + kv) bytes, and 4 for a head; bfloat16 copies of its matrices beside
    layer = 16_384 * (26 * 4096 + 8 * 14_336 + 4 * (4096 + 1024) + 4 * 32 + 8) + 2 * (2 * 4096 * 5120 + 3 * 4096 * 14_336)
    assert found.losses.activations == pytest.approx(32 * layer, rel=0.015)
    assert found.losses.head == 16_383 * 4096 * 4 + 128_256 * 4096 * 4
