from __future__ import annotations

from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_r": 4}, r"lora_r=4 without use_peft; set use_peft too"),
        (
            {"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]},
            r"\['all-linear', 'q_proj'\]: give names",
        ),
        (
            {"torch_compile": True, "gradient_checkpointing": True, "gradient_checkpointing_mode": "selective"},
            r"torch_compile=True with gradient_checkpointing_mode='selective'.*set gradient_checkpointing_mode='full' or torch",
        ),
        (
            {"torch_compile": True, "use_peft": True, "load_in_4bit": True},
            r"torch_compile=True with load_in_4bit.*leave",
        ),
        ({"torch_compile": True, "fsdp": "full_shard"}, r"torch_compile=True with fsdp='full_shard'.*leave one out"),
        ({"optim": "adamw_8bit", "offload_optimizer": True}, r"optim='adamw_8bit' with offload_optimizer"),
        ({"fsdp_parallel_head": True}, r"fsdp_parallel_head=True with fsdp='no_shard'.*choose fsdp='full_shard'"),
        ({"fsdp_offload_params": True}, r"fsdp_offload_params=True with fsdp='no_shard': there are no shards; choose fsdp="),
        (
            {"fsdp": "full_shard", "optim": "adamw_8bit"},
            r"fsdp='full_shard' with optim='adamw_8bit': bitsandbytes .* cannot update sharded tensors; use",
        ),
        ({"fsdp": "hybrid_shard", "optim": "paged_adamw_32bit"}, r"with optim='paged_adamw_32bit'"),
        (
            {"fsdp": "shard_grad_op", "fsdp_offload_params": True, "offload_optimizer": True},
            r"fsdp_offload_params=True with offload_optimizer=True: .*leave offload_optimizer out",
        ),
        (
            {"vllm_engine_args": {"max_num_seqs": 3}},
            r"vllm_engine_args={'max_num_seqs': 3} with rollout='transformers'.*grpo-fast serve MODEL -- --max-num-seqs 64",
        ),
        ({"num_generations_eval": 4}, r"num_generations_eval=4 with eval_temperature=0: greedy answers are all the same"),
        (
            {"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"},
            r"scale_rewards='batch' with multi_objective_aggregation='normalize_then_sum'",
        ),
        (
            {"loss_type": "rloo", "multi_objective_aggregation": "normalize_then_sum"},
            r"loss_type='rloo' with multi_objective_aggregation='normalize_then_sum'.*choose another loss_type",
        ),
        ({"eval_steps": 5, "eval_size": 0}, r"eval_steps=5 with eval_size=0: .*; set eval_size, or eval_steps=0"),
        ({"reward_funcs": ["accuracy"], "reward_weights": [1.0, 2.0]}, r"reward_weights has 2 values for 1 reward_funcs"),
        ({"loss_type": "cispo"}, r"loss_type='cispo' needs epsilon_high"),
        ({"sync_ref_model": True}, r"sync_ref_model=True with beta=0: there is no reference"),
        ({"sync_ref_model": True, "beta": 0.1, "use_peft": True}, r"sync_ref_model=True with use_peft.*leave one out"),
        ({"use_bias_correction_kl": False}, r"use_bias_correction_kl=False without beta; set beta too"),
        ({"entropy_target": 0.5}, r"entropy_target=0\.5 without use_adaptive_entropy"),
        (
            {"use_adaptive_entropy": True, "entropy_coef_min": 0.3, "entropy_coef_max": 0.2},
            r"entropy_coef_min=0\.3 exceeds entropy_coef_max=0\.2; swap them",
        ),
        (
            {"generation_kwargs": {"seed": 3}, "rollout": "vllm"},
            r"generation_kwargs={'seed': 3}: seed cannot be set here; take .*presence_penalty",
        ),
        ({"generation_kwargs": {"min_tokens": 3}}, r"with rollout='transformers': they are vLLM's.*or use temperature"),
        (
            {"generation_kwargs": {"min_tokens": 3}, "rollout": "vllm", "top_k": 5},
            r"generation_kwargs={'min_tokens': 3} with top_p=1, top_k=5, min_p=0.*leave one out",
        ),
        ({"ref_model_mixup_alpha": 0.5, "beta": 0.1}, r"ref_model_mixup_alpha=0\.5 without sync_ref_model"),
        (
            {"loss_type": "vespo", "rollout": "vllm"},
            r"loss_type='vespo' with vllm_importance_sampling_mode='sequence_mask'.*'token_truncate' or 'token_mask'",
        ),
        ({"rollout": "vllm-http"}, r"rollout='vllm-http' with vllm_server_urls=\(\)"),
        (
            {"rollout": "vllm-http", "vllm_server_urls": ["http://127.0.0.1:1"], "vllm_own_process": True},
            r"own_process=True with",
        ),
        (
            {"vllm_transport": "sparse"},
            r"vllm_transport='sparse' with rollout='transformers'.*set rollout='vllm' or 'vllm-http'",
        ),
        ({"vllm_enable_sleep_mode": True}, r"vllm_enable_sleep_mode=True with rollout='transformers'"),
        (
            {"vllm_enable_sleep_mode": True, "rollout": "vllm", "max_staleness": 1},
            r"sleep_mode=True .*max_staleness=1: vLLM",
        ),
        (
            {"top_k": 5, "fsdp": "full_shard", "fsdp_parallel_head": True},
            r"top_k=5.*whole output head on every rank; set fsdp_parallel_",
        ),
        ({"reward_range": [1.0, 0.0]}, r"reward_range=\(1.0, 0.0\)"),
        ({"overwrite": True, "resume_if_exists": True}, r"overwrite=True with resume_if_exists=True.*leave one out"),
        ({"forecast_reward_value": 5.0}, r"forecast_reward_value=5 with price_per_gpu_hour=0.*set price_per_gpu_hour too"),
        ({"warmup_steps": 9, "max_steps": 8}, r"warmup_steps=9 exceeds max_steps=8"),
    ],
)
def test_what_cannot_stand_together_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Config.parse(changes)
