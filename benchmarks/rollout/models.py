"""Models with the layout of published ones and random weights: what a sync costs depends on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from grpo_fast.assets import embedded_model_dir

CONTEXT = 512


@dataclass(frozen=True)
class Layout:
    """What the shapes of a Qwen2.5 model follow from."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    num_layers: int
    tied: bool

    def build(self, num_layers: int) -> PreTrainedModel:
        """The model in float32 with the first ``num_layers`` of its layers."""
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=self.tied,
            eos_token_id=2,
        )
        model: PreTrainedModel = Qwen2ForCausalLM(config).float()
        return model


LAYOUTS = {
    "miniature": Layout("miniature", 64, 128, 2, 1, 300, 2, tied=True),
    "0.5B": Layout("Qwen2.5-0.5B", 896, 4864, 14, 2, 151_936, 24, tied=True),
    "1.5B": Layout("Qwen2.5-1.5B", 1536, 8960, 12, 2, 151_936, 28, tied=True),
    "7B": Layout("Qwen2.5-7B", 3584, 18_944, 28, 4, 152_064, 28, tied=False),
}


def any_tokenizer() -> PreTrainedTokenizerBase:
    """A tokeniser, which an engine asks for and a sync never uses."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(embedded_model_dir())
    return tokenizer
