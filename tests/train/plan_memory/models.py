"""Models to plan for, and their planners."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config

from grpo_fast.config import Config
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner

GIB = 2**30
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
TWO_LAYERS = LlamaConfig(**LLAMA_8B.to_dict() | {"num_hidden_layers": 2})
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
SMALL = Qwen2Config(**SIZES)
WIDE = Qwen2Config(**SIZES | {"intermediate_size": 65_536})
"""Its weights take far more than what passes hold."""
SERVERS: dict[str, Any] = {"rollout": "vllm-http", "vllm_server_urls": ("http://127.0.0.1:8000",)}
"""Nothing samples on the trainer's devices."""


def planner(model: Any, config: Config, *, room_gib: float = 80.0, kind: str = "cuda", num_devices: int = 1) -> MemoryPlanner:
    return MemoryPlanner(model, config, MemoryInputs(round(room_gib * GIB), kind, prompt_tokens=200, num_devices=num_devices))


def num_weights(model: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(model).parameters())


def layers_of_llama() -> list[tuple[int, int]]:
    return [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14_336), (4096, 14_336), (14_336, 4096)]
