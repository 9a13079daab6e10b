"""Counted activations are what autograd and checkpointed layers really hold."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from grpo_fast.config import Config
from grpo_fast.ops import Piece, packed_layout
from grpo_fast.train.activations import activation_bytes
from grpo_fast.train.adapters import Adapters
from grpo_fast.train.checkpointing import checkpoint_layers
from grpo_fast.train.packed_model import let_pack, model_inputs
from grpo_fast.train.policy_source import outline_of
from grpo_fast.types import TokenBatch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TYPES = [torch.float32, torch.bfloat16]


def packed_batch(lengths: list[int]) -> TokenBatch:
    pieces = [Piece(sum(lengths[:number]), length) for number, length in enumerate(lengths)]
    tokens, none = sum(lengths), torch.zeros(0)
    return TokenBatch(
        input_ids=torch.ones(1, tokens, dtype=torch.int64),
        row_index=none,
        targets=none,
        sequence_index=none,
        advantages=none,
        loss_weights=none,
        sampling_logprobs=none,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        packed_layout=packed_layout(pieces, device=torch.device("cpu")),
    )


def tensors() -> list[torch.Tensor]:
    """Every tensor that Python knows of."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]  # isinstance wakes lazy modules


def held_bytes(model: Any, batch: TokenBatch | None = None, *, dtype: torch.dtype) -> int:
    """Bytes of what the forward pass holds: tensors that autograd saved, and those that a checkpoint keeps for itself."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[int, Any]] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its address might be given out again
        return tensor

    gc.collect()
    before = {id(thing) for thing in tensors()}
    hooks = torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor)
    inputs = {"input_ids": torch.ones(1, 192, dtype=torch.int64)} if batch is None else model_inputs(model, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), hooks:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    for thing in tensors():
        if id(thing) not in before and thing.device.type == "cpu":
            hold(thing)
    assert hidden.requires_grad
    return sum(size for size, _ in held.values())


def built(model_config: Any, config: Config, dtype: torch.dtype) -> Any:
    base = torch.bfloat16 if config.use_peft and dtype == torch.bfloat16 else torch.float32
    model = AutoModelForCausalLM.from_config(model_config, dtype=base)
    if config.use_peft:
        Adapters(model, config)
    return model


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig])
def test_they_are_what_autograd_keeps(kind: Callable[..., Any], use_peft: bool, dtype: torch.dtype) -> None:
    model_config, config = kind(**SIZES), Config(use_peft=use_peft)
    found = activation_bytes(outline_of(model_config, config), config, num_tokens=192, dtype=dtype)
    assert found.recomputed == 0
    assert found.saved == pytest.approx(held_bytes(built(model_config, config, dtype), dtype=dtype), rel=0.01)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("use_peft", [False, True], ids=["all weights", "adapters"])
def test_checkpointed_they_are_what_is_held(use_peft: bool, mode: Any, dtype: torch.dtype) -> None:
    model_config = LlamaConfig(**SIZES)
    config = Config(gradient_checkpointing=True, gradient_checkpointing_mode=mode, use_peft=use_peft)
    found = activation_bytes(outline_of(model_config, config), config, num_tokens=192, dtype=dtype)
    model = built(model_config, config, dtype)
    whole = held_bytes(model, dtype=dtype)
    checkpoint_layers(model, mode)
    model.train()
    assert found.saved == pytest.approx(held_bytes(model, dtype=dtype), rel=0.05)
    assert found.recomputed == pytest.approx((whole - found.saved) / 3, rel=0.05)


def test_packed_sequences_of_unlike_lengths_keep_little_more() -> None:
    model_config, config = LlamaConfig(**SIZES), Config()
    found = activation_bytes(outline_of(model_config, config), config, num_tokens=310, dtype=torch.float32)
    model = built(model_config, config, torch.float32)
    assert let_pack(model) is None
    assert found.saved == pytest.approx(held_bytes(model, packed_batch([90, 120, 100]), dtype=torch.float32), rel=0.1)


def test_the_outline_stays_as_it_is() -> None:
    model_config, config = LlamaConfig(**SIZES), Config(gradient_checkpointing=True)
    outline = outline_of(model_config, config)
    before = copy.deepcopy(outline.config.to_dict())
    activation_bytes(outline, config, num_tokens=8, dtype=torch.float32)
    assert outline.config.to_dict() == before
    assert outline.config._attn_implementation == "sdpa"
    assert not any(getattr(module, "gradient_checkpointing", False) for module in outline.modules())


def test_it_needs_no_memory() -> None:
    """Eight billion weights over 16k tokens."""
    model_config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8
    )
    config = Config()
    found = activation_bytes(outline_of(model_config, config), config, num_tokens=16_384, dtype=torch.bfloat16)
    # a layer and token: 26 H + 8 I + 4 (q + kv) bytes, and 4 for a head; bfloat16 copies of its matrices beside
    layer = 16_384 * (26 * 4096 + 8 * 14_336 + 4 * (4096 + 1024) + 4 * 32 + 8) + 2 * (2 * 4096 * 5120 + 3 * 4096 * 14_336)
    assert found.saved == pytest.approx(32 * layer, rel=0.01)
    assert found.gradients == pytest.approx(layer / 2, rel=0.01)
