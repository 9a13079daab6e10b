from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.policy_source import outline_of
from grpo_fast.train.text_part import beside_text

SEES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def gemma3(sizes: dict[str, Any]) -> Gemma3Config:
    vision = SEES | {"image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=dict(sizes), vision_config=vision, mm_tokens_per_image=4)


@pytest.mark.parametrize("kind", [Qwen2Config, GPT2Config, OPTConfig])
def test_text_passes_all_of_a_decoder(kind: type) -> None:
    with torch.device("meta"):
        assert beside_text(MODEL_FOR_CAUSAL_LM_MAPPING[kind](kind(num_hidden_layers=1))) == []


@pytest.mark.parametrize("use_peft", [False, True])
def test_what_sees_is_not_trained(use_peft: bool, sizes: dict[str, Any]) -> None:
    outline = outline_of(gemma3(sizes), Config(use_peft=use_peft))
    assert beside_text(outline) == ["model.vision_tower", "model.multi_modal_projector"]
    trained = [name for name, weight in outline.named_parameters() if weight.requires_grad]
    assert trained
    assert all(name.startswith(("model.language_model.", "lm_head")) for name in trained)
    assert not any(".lora_" in name and "vision" in name for name, _ in outline.named_parameters())


def test_adapters_on_what_sees_alone_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"no layer is called fc1\. Linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj"
    ):
        outline_of(gemma3(sizes), Config(use_peft=True, lora_target_modules=("q_proj", "fc1")))


def test_a_model_that_sees_learns_from_text_and_keeps_what_sees(
    sizes: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tiny_config: Callable[..., Config],
    letters: Task,
    share_of_vowels: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(gemma3(sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(model=str(tmp_path / "model"), max_steps=1, weight_decay=0.5)
    with GRPOTrainer(config, task=letters, reward_funcs=[share_of_vowels]) as trainer:
        trainer.train()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1", dtype=torch.float32)
    for name, weight in trained.named_parameters():
        is_matrix_of_text = "language_model" in name and weight.ndim > 1
        if is_matrix_of_text or "language_model" not in name:
            assert torch.equal(weight, model.get_parameter(name)) != is_matrix_of_text, name
