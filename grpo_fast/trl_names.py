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
        "eval_on_start": "baseline_probe, which asks training prompts before step 1",
        "disable_tqdm": "sinks without 'console'",
        "project": "nothing: W&B takes WANDB_PROJECT from the environment",
        "fsdp_config": "fsdp, fsdp_offload_params and fsdp_parallel_head",
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing_mode",
        "gradient_checkpointing_kwargs": "gradient_checkpointing_mode",
        "vllm_model_impl": "vllm_engine_args={'model_impl': ...}; servers take --model-impl",
        "quantization_config": "load_in_4bit with bnb_4bit_quant_type and use_bnb_nested_quant",
        "args": "config, the trainer's first argument",
        "processing_class": "nothing: the tokeniser is the model's",
        "reward_processing_classes": "RewardModel(model, tokenizer=...) in reward_funcs",
        "callbacks": "the loop, `for step in trainer.steps()`, and sinks",
    }
)
"""What to use here, by the name in TRL's scripts and ``GRPOConfig``."""

_NO_LOADER = "prompts are in memory and are read by no other process"
_NO_EVAL_LOSS = "an evaluation samples answers and rates them, in as many at a time as fit"
_ALL_OR_ONE = "every process reads and writes what it has to, and rank 0 logs"
_TORCH = "torch and its environment decide it"
_PAGED = "the embedded engine batches and keeps keys and values by itself; rollout='vllm' does continuously"
_NOT_GRPO = "GRPO has no labels"

NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "router_aux_loss_coef": "the load-balancing loss of mixtures of experts is not there",
        "disable_dropout": "dropout is always off, since with it the ratio of an on-policy step would not be 1",
        "cast_lm_head_to_fp32": "log-probabilities are always of float32 logits",
        "ds3_gather_for_generation": "vLLM, or layers gathered one by one, sample from a sharded policy",
        "pad_to_multiple_of": "sequences are packed, and rounded up where a kernel gains by it",
        "cache_implementation": _PAGED,
        "use_transformers_continuous_batching": _PAGED,
        "transformers_continuous_batching_config": _PAGED,
        "use_transformers_paged": _PAGED,
        "vllm_structured_outputs_regex": "completions are not held to a grammar; a reward can ask for the form",
        "vllm_group_port": "a free port is chosen",
        "log_multimodal": "there are no images",
        "log_unique_prompts": "completions.jsonl has the first log_completions of a step as they are",
        "log_completions_hub_repo": "completions.jsonl is a file to upload",
        "optimizers": "optim and lr_scheduler_type choose from what resumes bit for bit",
        "rollout_func": "an environment_factory answers between turns, and an engine of your own samples (engine=...)",
        "optim_args": "adam_beta1, adam_beta2, adam_epsilon and weight_decay are all there are",
        "optim_target_modules": "no optimiser of a low rank is there",
        "average_tokens_across_devices": "normalisers are always of all processes",
        "label_smoothing_factor": _NOT_GRPO,
        "label_names": _NOT_GRPO,
        "neftune_noise_alpha": "noise in embeddings would make the ratio of an on-policy step differ from 1",
        "bf16_full_eval": _NO_EVAL_LOSS,
        "fp16_full_eval": _NO_EVAL_LOSS,
        "eval_delay": "eval_steps counts from the start",
        "per_device_eval_batch_size": _NO_EVAL_LOSS,
        "prediction_loss_only": _NO_EVAL_LOSS,
        "eval_do_concat_batches": _NO_EVAL_LOSS,
        "eval_use_gather_object": _NO_EVAL_LOSS,
        "eval_accumulation_steps": _NO_EVAL_LOSS,
        "batch_eval_metrics": _NO_EVAL_LOSS,
        "include_for_metrics": _NO_EVAL_LOSS,
        "do_train": "the command says it: train, or evaluate",
        "do_eval": "the command says it: train, or evaluate",
        "do_predict": "the command says it: train, or evaluate",
        "greater_is_better": "a greater reward is always better",
        "tf32": _TORCH,
        "debug": _TORCH,
        "ddp_backend": "it follows from the device",
        "ddp_find_unused_parameters": "gradients are added up once an update, not in buckets",
        "ddp_bucket_cap_mb": "gradients are added up once an update, not in buckets",
        "ddp_broadcast_buffers": "policies have no buffers that training changes",
        "ddp_static_graph": "gradients are added up once an update, not in buckets",
        "torch_compile_backend": "torch_compile compiles by Inductor",
        "torch_compile_mode": "torch_compile compiles by Inductor",
        "liger_kernel_config": "use_liger_kernel takes its kernels for norms, rotary positions and gated activations",
        "use_cache": "sampling uses keys and values, training does not",
        "torch_empty_cache_steps": "`grpo-fast plan` tells what a run needs",
        "auto_find_batch_size": "`grpo-fast plan` says what fits; tokens_per_microbatch limits memory",
        "logging_strategy": "every step is logged",
        "logging_first_step": "every step is logged",
        "log_on_each_node": _ALL_OR_ONE,
        "save_on_each_node": _ALL_OR_ONE,
        "logging_nan_inf_filter": "a gradient that is not finite ends the run, with the weights of before",
        "include_num_input_tokens_seen": "num_tokens is always logged",
        "skip_memory_metrics": "memory is no metric; `grpo-fast plan` tells it before a run",
        "log_level": "Python's logging decides it",
        "log_level_replica": "Python's logging decides it",
        "trackio_space_id": "trackio keeps its local store",
        "trackio_bucket_id": "trackio keeps its local store",
        "trackio_static_space_id": "trackio keeps its local store",
        "save_only_model": "every checkpoint can be resumed",
        "enable_jit_checkpoint": "a signal saves a checkpoint in any case",
        "hub_token": "nothing is uploaded",
        "hub_private_repo": "nothing is uploaded",
        "hub_model_id": "nothing is uploaded",
        "hub_strategy": "nothing is uploaded",
        "hub_always_push": "nothing is uploaded",
        "hub_revision": "nothing is uploaded",
        "ignore_data_skip": "a resumed run goes on with the prompt that comes next",
        "restore_callback_states_from_checkpoint": "there are no callbacks",
        "full_determinism": "the seed decides every random draw",
        "accelerator_config": "torchrun starts the processes, and fsdp shards",
        "parallelism_config": "torchrun starts the processes, and fsdp shards",
        "local_rank": "torchrun sets it",
        "dataloader_drop_last": _NO_LOADER,
        "dataloader_num_workers": _NO_LOADER,
        "dataloader_pin_memory": _NO_LOADER,
        "dataloader_persistent_workers": _NO_LOADER,
        "dataloader_prefetch_factor": _NO_LOADER,
        "dataloader_multiprocessing_context": _NO_LOADER,
        "dataloader_in_order": _NO_LOADER,
        "remove_unused_columns": "columns are kept for the rewards",
        "train_sampling_strategy": "shuffle is all there is",
        "length_column_name": "lengths are counted",
    }
)
"""Why there is no such setting here, by its name in TRL."""

_LENGTHS = "max_completion_length and max_prompt_length"
_PROCESSES = "nothing: `torchrun --nproc-per-node N` starts a process on each of N GPUs"
_USUAL: Mapping[str, str] = MappingProxyType(
    {
        "lr": "learning_rate",
        "batch_size": _BATCH,
        "epochs": HERE["num_train_epochs"],
        "num_epochs": HERE["num_train_epochs"],
        "group_size": "num_generations",
        "torch_dtype": "dtype",
        "stop_strings": "stop",
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
    if name in NOT_HERE:
        return f", a TRL name; leave it out, it has no counterpart: {NOT_HERE[name]}"
    return f"; here it corresponds to {_USUAL[name]}" if name in _USUAL else ""


_SHARE = "give a number of steps, such as max_steps times that share"
_VALUES: Mapping[str, tuple[tuple[object, str], ...]] = MappingProxyType(
    {
        "scale_rewards": ((True, "give 'group'"), (False, "give 'none'")),
        "top_k": ((-1, "0 keeps all tokens"),),
        "max_steps": ((-1, "give the steps: prompts over prompts_per_step make an epoch"),),
        "sinks": (("none", "give none: sinks=[] in Python and files"),),
        "fsdp": (("", "leave it out, or give 'no_shard'"), (False, "leave it out, or give 'no_shard'")),
    }
)


def value_here(field: str, value: object) -> str:
    """What to give in place of a value that TRL or transformers takes for a field of this name; empty if nothing is known."""
    if field in {"eval_steps", "save_steps"} and isinstance(value, float) and 0 < value < 1:
        return _SHARE
    known = ((type(given), given, told) for given, told in _VALUES.get(field, ()))
    return next((told for kind, given, told in known if type(value) is kind and value == given), "")
