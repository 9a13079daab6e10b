"""The prediction beside what autograd and the checkpointed layers really hold after a forward pass."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_fast.compute.activations import Checkpointing, LayerSizes, activation_bytes
from grpo_fast.ops import Piece, packed_layout
from grpo_fast.train.checkpointing import checkpoint_layers
from grpo_fast.train.packed_model import let_pack, model_inputs
from grpo_fast.types import TokenBatch

LLAMA = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 2}
MODELS: dict[str, PreTrainedModel] = {
    "llama": LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=1)),
    "qwen2": Qwen2ForCausalLM(
        Qwen2Config(**LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}, num_key_value_heads=2)
    ),
    "wide": LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": 512, "num_hidden_layers": 2}, num_key_value_heads=2)),
}


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


def held_bytes(model: PreTrainedModel, batch: TokenBatch, *, autocast: bool) -> int:
    """Bytes of what the forward pass holds: tensors that autograd saved, and those that a checkpoint keeps for itself."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, tuple[int, Any]] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its address might be given out again
        return tensor

    gc.collect()
    before = {id(thing) for thing in tensors()}
    hooks = torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        hidden = model.base_model(**model_inputs(model, batch), use_cache=False).last_hidden_state
    for thing in tensors():
        if id(thing) not in before and thing.device.type == "cpu":
            hold(thing)
    assert hidden.requires_grad
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize(
    ("name", "lengths"),
    [("llama", [64] * 4), ("llama", [90, 120, 100]), ("qwen2", [90, 120, 100]), ("wide", [64] * 4)],
    ids=["llama, even", "llama, ragged", "qwen2, ragged", "wide, even"],
)
def test_within_a_tenth_of_what_is_held(name: str, lengths: list[int], checkpointing: Checkpointing, autocast: bool) -> None:
    model = copy.deepcopy(MODELS[name]).train()
    assert let_pack(model) is None
    if checkpointing != "none":
        checkpoint_layers(model, checkpointing)
    found = held_bytes(model, packed_batch(lengths), autocast=autocast)
    sizes = LayerSizes.from_config(model.config)
    predicted = activation_bytes(sizes, sum(lengths), checkpointing=checkpointing, autocast=autocast)
    assert predicted.kept == pytest.approx(found, rel=0.1)


def test_checkpointing_trades_what_is_kept_for_one_layer() -> None:
    sizes = LayerSizes(32, 4096, 14336, 32, 8, 128)
    none, selective, full = (activation_bytes(sizes, 1000, checkpointing=mode) for mode in ("none", "selective", "full"))
    assert none.peak > selective.peak > full.peak
    assert none.recomputed == 0
    assert selective.recomputed == full.recomputed == pytest.approx(none.kept / 32, rel=0.02)
    assert full.kept == 1000 * 4 * (32 * 4096 + 3 * 4096 + 2 * 128)


@pytest.mark.parametrize("config", [GptOssConfig(), PreTrainedConfig()])
def test_other_models_are_not_guessed(config: PreTrainedConfig) -> None:
    with pytest.raises(ValueError, match=f"{type(config).__name__} is no decoder with one gated MLP a layer"):
        LayerSizes.from_config(config)
