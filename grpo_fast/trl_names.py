"""Settings that have another name here or none: TRL's, with its trainer's arguments, and those that are usual elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_BATCH = "prompts_per_step, the prompts of a step over all processes; tokens_per_microbatch limits memory and changes no result"
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
        "model_init_kwargs": "model, revision, dtype and attn_implementation",
        "bf16": "dtype='bfloat16', which is the default on a GPU",
        "fp16": "nothing: dtype is bfloat16 or float32; 'auto' chooses by the GPU",
        "use_cpu": "device='cpu'",
        "warmup_ratio": "warmup_steps, which below 1 is a share of max_steps",
        "use_vllm": "rollout='vllm', or 'vllm-http' for servers",
        "peft_config": "use_peft with lora_r, lora_alpha and lora_target_modules",
        "lora_dropout": "nothing: with dropout the ratio of an on-policy step would not be 1",
        "vllm_mode": "rollout='vllm' for colocate, 'vllm-http' for server",
        "vllm_server_base_url": _SERVER,
        "vllm_server_host": _SERVER,
        "vllm_server_port": _SERVER,
        "vllm_max_model_length": "nothing: it follows from max_prompt_length and max_completion_length",
        "vllm_tensor_parallel_size": "`grpo-fast serve MODEL -- --tensor-parallel-size N`, with rollout='vllm-http'",
        "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
        "importance_sampling_level": "loss_type='gspo' for sequence",
        "max_tool_calling_iterations": "max_turns, which counts the answer behind the last call too: one more",
        "shuffle_dataset": "shuffle",
        "data_seed": "seed",
        "report_to": "sinks",
        "run_name": "output_dir, whose last part names the run; W&B takes WANDB_NAME from the environment",
        "logging_dir": "output_dir; TensorBoard's files are in its folder tensorboard",
        "logging_steps": "nothing: every step is logged",
        "num_completions_to_print": "log_completions",
        "eval_strategy": "eval_steps",
        "save_strategy": "save_steps",
        "resume_from_checkpoint": "resume_if_exists, or `grpo-fast train --resume RUN`",
        "push_to_hub": "nothing: from_pretrained reads checkpoints, and `hf upload REPOSITORY CHECKPOINT` uploads one",
        "metric_for_best_model": "nothing: it is the held-out reward, or without evaluation the training reward",
        "load_best_model_at_end": "nothing: the best checkpoint is kept, and summary.json names it",
        "ddp_timeout": "ddp_timeout_s",
        "deepspeed": "fsdp",
        "args": "config, the trainer's first argument",
        "processing_class": "nothing: the tokeniser is the model's",
        "reward_processing_classes": "RewardModel(model, tokenizer=...) in reward_funcs",
        "callbacks": "the loop, `for step in trainer.steps()`, and sinks",
    }
)
"""What to use here, by the name in TRL's scripts and ``GRPOConfig``."""

_LENGTHS = "max_completion_length and max_prompt_length"
_PROCESSES = "nothing: `torchrun --nproc-per-node N` starts a process on each of N GPUs"
_USUAL: Mapping[str, str] = MappingProxyType(
    {
        "lr": "learning_rate",
        "batch_size": _BATCH,
        "epochs": HERE["num_train_epochs"],
        "num_epochs": HERE["num_train_epochs"],
        "group_size": "num_generations",
        "max_new_tokens": "max_completion_length",
        "max_length": _LENGTHS,
        "max_seq_length": _LENGTHS,
        "kl_coef": "beta",
        "clip_range": "epsilon and epsilon_high",
        "lora": "use_peft",
        "lora_rank": "lora_r",
        "vllm": HERE["use_vllm"],
        "wandb": "sinks with 'wandb' in it",
        "gpus": _PROCESSES,
        "num_gpus": _PROCESSES,
    }
)
"""What to use here, by names that are usual elsewhere and that the nearest name here would mislead about."""


def here(name: str) -> str:
    """What to use in place of a name that is not one here, to be put behind it; empty if it is not known from elsewhere."""
    if name in HERE:
        return f", a TRL name; here it corresponds to {HERE[name]}"
    return f"; here it corresponds to {_USUAL[name]}" if name in _USUAL else ""
