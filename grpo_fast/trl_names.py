"""Settings of TRL that go by another name here, for people who bring a script or a configuration along."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_BATCH = "prompts_per_step, the prompts of a step over all processes; tokens_per_microbatch bounds memory and changes no result"
_SERVER = "rollout='vllm-http' with vllm_server_urls; `grpo-fast serve` starts one"

HERE: Mapping[str, str] = MappingProxyType(
    {
        "model_name_or_path": "model",
        "model_revision": "revision",
        "dataset_name": "dataset",
        "dataset_train_split": "dataset_split",
        "dataset_test_split": "eval_split",
        "per_device_train_batch_size": _BATCH,
        "gradient_accumulation_steps": _BATCH,
        "generation_batch_size": _BATCH,
        "steps_per_generation": "num_iterations; every step samples anew",
        "num_train_epochs": "max_steps; an epoch is the number of prompts over prompts_per_step",
        "bf16": "dtype='bfloat16', which is the default on a GPU",
        "use_cpu": "device='cpu'",
        "use_vllm": "rollout='vllm', or 'vllm-http' for servers",
        "vllm_mode": "rollout='vllm' for colocate, 'vllm-http' for server",
        "vllm_server_base_url": _SERVER,
        "vllm_server_host": _SERVER,
        "vllm_server_port": _SERVER,
        "vllm_server_timeout": "sync_deadline_s",
        "importance_sampling_level": "loss_type='gspo' for sequence",
        "max_tool_calling_iterations": "max_turns, with environment_factory",
        "shuffle_dataset": "shuffle",
        "data_seed": "seed",
        "report_to": "sinks",
        "logging_steps": "nothing: every step is logged",
        "num_completions_to_print": "log_completions",
        "eval_strategy": "eval_steps",
        "save_strategy": "save_steps",
        "resume_from_checkpoint": "resume_if_exists, or `grpo-fast train --resume RUN`",
        "load_best_model_at_end": "nothing: the best checkpoint is kept, and summary.json names it",
        "ddp_timeout": "ddp_timeout_s",
        "deepspeed": "fsdp",
    }
)
"""What to set here, by the name that TRL's scripts and ``GRPOConfig`` have for it."""
