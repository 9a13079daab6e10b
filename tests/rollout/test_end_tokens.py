from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.rollout.end_tokens import end_token_ids


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "expected"),
    [(2, "<eos>", {2}), (3, "<eos>", {2, 3}), ([2, 4], "<eos>", {2, 4}), (None, "<eos>", {2}), (None, None, set())],
)
def test_model_and_tokenizer_are_asked(
    configured: int | list[int] | None, of_tokenizer: str | None, expected: set[int]
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.generation_config = GenerationConfig(eos_token_id=configured)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=of_tokenizer)
    assert end_token_ids(model, tokenizer) == expected
