from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo_fast.ops import products
from grpo_fast.ops.products import PackedWeight
from grpo_fast.rollout.kv_cache import PreallocatedCache
from grpo_fast.rollout.llama_step import LlamaStep, supports

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()


@pytest.mark.parametrize("rope", ROPES)
def test_steps_equal_the_module(rope: str) -> None:
    assert furthest_from_the_module(llama(rope_parameters=ROPES[rope])) <= 1e-5


@pytest.mark.skipif(not products.ONEDNN_OPS, reason="this torch has no oneDNN")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_steps_by_packed_weights_equal_the_module(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "USES_ONEDNN", True)
    monkeypatch.setattr(products, "_LEAST_WORK", 1)
    torch.manual_seed(0)
    model = llama(attention_bias=True) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)  # a bias is 0 at first
    products.use_products(model)
    assert supports(model)
    calls = []
    monkeypatch.setattr(
        PackedWeight, "__call__", lambda self, rows, call=PackedWeight.__call__: calls.append(0) or call(self, rows)
    )
    assert furthest_from_the_module(model) <= 1e-4
    assert not calls, "six steps do not pay for it"
    assert furthest_from_the_module(model, num_steps=64) <= 1e-4
    assert len(calls) == 6 * (4 * 2 + 1)


@torch.no_grad()
def furthest_from_the_module(model: PreTrainedModel, *, num_steps: int = 6) -> float:
    ids = torch.randint(3, 32, (3, 12), generator=torch.Generator().manual_seed(0))
    start = model(ids[:, :6], use_cache=True)
    cache = PreallocatedCache(3, 12, start.past_key_values)
    cache.fill(slice(0, 3), start.past_key_values, torch.arange(3))
    step = LlamaStep(model, 12, num_rows=3, num_steps=num_steps)
    whole = model(ids).logits
    return max(
        (step(cache, ids[:, position], torch.full((3,), position), None) - whole[:, position]).abs().max().item()
        for position in range(6, 12)
    )


@pytest.mark.filterwarnings("ignore:Already found a .peft_config.:UserWarning")  # two adapters are meant
@pytest.mark.parametrize("state", ["on", "off", "merged", "two", "dora", "biased"])
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "down_proj"], ["q_proj"]], ids=str)
@torch.no_grad()
def test_steps_with_adapters_equal_the_module(targets: str | list[str], state: str) -> None:
    model = llama(attention_bias=True, mlp_bias=True).double()
    for parameter in model.parameters():
        parameter.add_(0.05)  # a bias is 0 at first
    plain = model(torch.tensor([[3, 4, 5]])).logits
    for name in ("default", "other")[: 1 + (state == "two")]:
        more = {"use_dora": state == "dora", "lora_bias": state == "biased"}
        settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more)
        peft.inject_adapter_in_model(settings, model, name)
    for layer in (module for module in model.modules() if hasattr(module, "base_layer")):
        if state == "two":
            layer.set_adapter(["default", "other"])
        elif state == "merged":
            layer.merge()
        layer.enable_adapters(state != "off")
    assert supports(model)
    moved = (model(torch.tensor([[3, 4, 5]])).logits - plain).abs().max()
    assert (moved > 1e-4) == (state != "off"), "the adapters matter"
    assert furthest_from_the_module(model) <= 1e-6  # the module's norms and angles are float32 in any case


def hooked(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.forward = lambda *_: None


class Adapter(torch.nn.Linear):
    """Stands for an adapter of another kind, or a quantised layer."""


def adapted(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.q_proj = Adapter(64, 64, bias=False)


def adapted_twice(model: PreTrainedModel) -> None:
    """An adapter over a layer that is not plain itself."""
    adapted(model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def gelu(model: PreTrainedModel) -> None:
    model.config.hidden_act = "gelu"


def dynamic(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_type"] = "dynamic"


@pytest.mark.parametrize(
    "change", [hooked, replaced, adapted, adapted_twice, gelu, dynamic], ids=lambda change: change.__name__
)
def test_anything_out_of_the_ordinary_is_left_to_the_module(change: Callable[[PreTrainedModel], None]) -> None:
    model = llama()
    assert supports(model)
    change(model)
    assert not supports(model)


def test_windows_and_foreign_classes_are_left_to_the_module() -> None:
    class LlamaForCausalLM2(LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    windowed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert supports(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    assert not supports(Qwen2ForCausalLM(windowed))
    assert not supports(LlamaForCausalLM2(LlamaConfig(**SIZES)))
