from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo_fast.train.layers import layers_of


@pytest.fixture
def model(sizes: dict[str, Any]) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_the_layers_of_a_model_in_their_order(model: PreTrainedModel) -> None:
    assert layers_of(model) == list(model.model.layers)
    assert len(layers_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=8)))) == 3


def test_a_model_that_names_no_class_has_none(model: PreTrainedModel) -> None:
    model._no_split_modules = None
    assert layers_of(model) == []
