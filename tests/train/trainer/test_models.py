"""Models that differ from a Llama in their head, attention, layers or experts are trained as what they sample as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo_fast.config import Config, ConfigError
from grpo_fast.train import GRPOTrainer
from tests.train.trainer.runs import LETTERS, vowels

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "head_dim": None}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "some layers with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "experts": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 1}),
    "experts with noise": ("mixtral", {**EXPERTS, "router_jitter_noise": 0.2}),
    "caps": ("gemma2", {"sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}),
    "window and norms": ("gemma3_text", {"sliding_window": 4}),
    "scaled logits": ("cohere2", {"logit_scale": 0.25, "sliding_window": 4}),
    "scaled all over": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "head with a bias": ("phi", {}),
    "joined products": ("phi3", {}),
    "learnt positions": ("gpt2", GPT),
    "no rotary layers": ("smollm3", {}),
    "norms of queries": ("olmo2", {}),
    "padded": ("falcon", {"head_dim": None}),
    "sinks": ("gpt_oss", {**EXPERTS, "sliding_window": 4, "rope_parameters": None}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_trained_as_what_it_samples_as(
    name: str,
    sizes: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
) -> None:
    kind, changes = KINDS[name]
    given = {key: value for key, value in (sizes | changes).items() if value is not None}
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    norms = []
    for num_steps, changes in ((2, {}), (1, {"gradient_checkpointing": True, "tokens_per_microbatch": 30})):
        config = tiny_config(model=str(tmp_path / "model"), max_steps=num_steps, overwrite=True, **changes)
        with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
            rows = [step.metrics for step in trainer.steps()]
        assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-5
        norms.append(rows[0]["grad_norm"])
    assert norms[0] > 0.01, "the guard"
    assert norms[1] == pytest.approx(norms[0], rel=1e-5), "checkpointed and in parts"


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (
            "mamba",
            {"state_size": 4},
            "of type 'mamba', has layers of type linear_attention, but rollout='transformers' samples",
        ),
        ("rwkv", {"context_length": 64}, "of type 'rwkv', has a running state in place of keys and values"),
    ],
)
def test_a_model_that_cannot_be_sampled_from_is_refused_before_it_is_loaded(
    kind: str,
    sizes: dict[str, Any],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
) -> None:
    AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, **sizes).save_pretrained(tmp_path)  # and no weights
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(tiny_config(model=str(tmp_path), output_dir=tmp_path / "run"), task=LETTERS, reward_funcs=[vowels])


def test_a_model_that_vllm_cannot_be_sized_for_is_refused_before_it_is_loaded(
    tokenizer: PreTrainedTokenizerFast, tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_fast.train.engines.require_vllm", lambda: None)  # it need not be installed to say so
    AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = tiny_config(model=str(tmp_path), output_dir=tmp_path / "run", rollout="vllm")
    with pytest.raises(ConfigError, match="of type 'mamba', has no max_position_embeddings, by which rollout='vllm' sizes"):
        GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels])
