"""Combinations of settings that contradict each other, refused before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_fast.config import Config

_NEEDED_BY = {
    "gradient_checkpointing": ("gradient_checkpointing_mode",),
    "use_peft": ("base_model", "lora_r", "lora_alpha", "use_rslora", "lora_target_modules", "load_in_4bit"),
    "load_in_4bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant"),
    "beta": ("use_bias_correction_kl",),
    "use_adaptive_entropy": ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
    "sync_ref_model": ("ref_model_mixup_alpha", "ref_model_sync_steps"),
}
"""Fields that have no effect unless another one is set."""


VLLM_SAMPLING = {"presence_penalty", "frequency_penalty", "min_tokens", "allowed_token_ids"}
"""Sampling parameters of vLLM that change which token is drawn and nothing else that a run decides."""


def check_consistency(config: Config) -> None:
    """Checks the settings of a run against each other.

    Raises:
        ValueError: two settings contradict each other; the message names both, their values and the fix.
    """
    _check_idle(config)
    _check_adapters(config)
    _check_layout(config)
    _check_compiler(config)
    _check_shards(config)
    _check_optimizer(config)
    _check_rollout(config)
    _check_objective_and_run(config)


def _check_idle(config: Config) -> None:
    for switch, fields in _NEEDED_BY.items():
        idle = [name for name in fields if getattr(config, name) != type(config).model_fields[name].default]
        if idle and not getattr(config, switch):
            told = ", ".join(f"{name}={getattr(config, name)!r}" for name in idle)
            raise ValueError(f"{told} without {switch}; set {switch} too")


def _check_adapters(config: Config) -> None:
    targets = config.lora_target_modules
    if not targets or ("all-linear" in targets and len(targets) > 1):
        raise ValueError(f"lora_target_modules={list(targets)}: give names of modules, or 'all-linear' alone")


def _check_layout(config: Config) -> None:
    if config.share_prompts and config.padding_free is False:
        raise ValueError("share_prompts=True with padding_free=False: only packed sequences share a prompt; leave one out")


def _check_compiler(config: Config) -> None:
    if not config.torch_compile:
        return
    if config.gradient_checkpointing_mode == "selective":
        raise ValueError(
            "torch_compile=True with gradient_checkpointing_mode='selective': selective checkpointing cannot look inside "
            "compiled layers, so it cannot keep their matrix products; set gradient_checkpointing_mode='full' or "
            "torch_compile=False"
        )
    if config.load_in_4bit:
        raise ValueError("torch_compile=True with load_in_4bit: 4-bit layers cannot be compiled here; leave one out")
    if config.fsdp != "no_shard":
        raise ValueError(f"torch_compile=True with fsdp={config.fsdp!r}: sharded layers cannot be compiled here; leave one out")


def _check_shards(config: Config) -> None:
    if config.fsdp == "no_shard":
        for name, told in (("fsdp_parallel_head", "the head is not sharded"), ("fsdp_offload_params", "there are no shards")):
            if getattr(config, name):
                raise ValueError(f"{name}=True with fsdp='no_shard': {told}; choose fsdp='full_shard'")
        return
    if config.optim != "adamw_torch_fused":
        raise ValueError(
            f"fsdp={config.fsdp!r} with optim={config.optim!r}: bitsandbytes (0.50) cannot update sharded tensors; use "
            "optim='adamw_torch_fused', whose moments are sharded, with offload_optimizer if they do not fit"
        )
    if config.fsdp_offload_params and config.offload_optimizer:
        raise ValueError(
            "fsdp_offload_params=True with offload_optimizer=True: fsdp_offload_params keeps shards and their moments in host "
            "memory already; leave offload_optimizer out"
        )


def _check_optimizer(config: Config) -> None:
    short = config.weights_dtype == "bfloat16"
    if config.optim != "adamw_torch_fused" and (short or config.offload_optimizer):
        other = "weights_dtype='bfloat16'" if short else "offload_optimizer"
        raise ValueError(
            f"optim={config.optim!r} with {other}: only optim='adamw_torch_fused' supports that; change one of the two"
        )
    if short and config.dtype == "float32":
        raise ValueError("weights_dtype='bfloat16' with dtype='float32': set dtype='bfloat16', or leave weights_dtype out")
    if short and config.use_peft:
        raise ValueError(
            "weights_dtype='bfloat16' with use_peft: adapters are float32, and frozen weights have the type dtype; leave "
            "weights_dtype out"
        )


def _check_rollout(config: Config) -> None:
    if (config.rollout == "vllm-http") != bool(config.vllm_server_urls):
        raise ValueError(
            f"rollout={config.rollout!r} with vllm_server_urls={config.vllm_server_urls}: set vllm_server_urls if, and only "
            "if, rollout='vllm-http'; start a server with `grpo-fast serve`"
        )
    if config.vllm_own_process and config.rollout != "vllm":
        raise ValueError(
            f"vllm_own_process=True with rollout={config.rollout!r}: it moves the engine of rollout='vllm' into a separate "
            "process; set rollout='vllm', or leave vllm_own_process out"
        )
    if config.vllm_engine_args and config.rollout != "vllm":
        raise ValueError(
            f"vllm_engine_args={config.vllm_engine_args} with rollout={config.rollout!r}: they apply to rollout='vllm' only; "
            "give a server vLLM's options when you start it: `grpo-fast serve MODEL -- --max-num-seqs 64`"
        )
    if config.vllm_transport != "auto" and config.rollout == "transformers":
        raise ValueError(
            f"vllm_transport={config.vllm_transport!r} with rollout='transformers', which samples from the policy itself and "
            "sends no weights; set rollout='vllm' or 'vllm-http'"
        )
    if config.vllm_pause_mode == "keep" and (config.max_staleness == 0 or config.rollout == "transformers"):
        raise ValueError(
            f"vllm_pause_mode='keep' with max_staleness={config.max_staleness} and rollout={config.rollout!r}: 'keep' "
            "continues running requests on new weights, so it needs vLLM and max_staleness >= 1; set both, or use 'wait'"
        )
    if config.vllm_pause_mode == "keep" and config.use_peft:
        raise ValueError("vllm_pause_mode='keep' with use_peft: running requests would finish with the old adapter; use 'wait'")
    if config.vllm_enable_sleep_mode and (config.rollout == "transformers" or config.max_staleness):
        raise ValueError(
            f"vllm_enable_sleep_mode=True with rollout={config.rollout!r} and max_staleness={config.max_staleness}: vLLM "
            "sleeps while the policy trains, so vLLM must do the sampling, and not during training; set rollout='vllm' and "
            "max_staleness=0"
        )
    _check_support(config)
    _check_generation(config)
    if config.vllm_importance_sampling_correction and config.bypass_old_logprobs:
        raise ValueError(
            "vllm_importance_sampling_correction=True with bypass_old_logprobs=True: the ratio is taken to the sampler "
            "already, so there is nothing to correct; choose one of the two"
        )
    mode = config.vllm_importance_sampling_mode
    if config.loss_type == "vespo" and config.corrects_sampler and not mode.startswith("token"):
        raise ValueError(
            f"loss_type='vespo' with vllm_importance_sampling_mode={mode!r}: VESPO multiplies ratios of tokens to one of the "
            "sequence itself; set vllm_importance_sampling_mode='token_truncate' or 'token_mask'"
        )
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is not None and high is not None and not low < high:
        raise ValueError(f"vllm_importance_sampling_clip_min={low:g} must be below vllm_importance_sampling_clip_max={high:g}")


def _check_generation(config: Config) -> None:
    given = config.generation_kwargs
    if not given:
        return
    unknown = sorted(given.keys() - VLLM_SAMPLING)
    if unknown:
        raise ValueError(
            f"generation_kwargs={given}: {', '.join(unknown)} cannot be set here; take {', '.join(sorted(VLLM_SAMPLING))}, or "
            "the setting of that name, if there is one"
        )
    if config.rollout == "transformers":
        raise ValueError(
            f"generation_kwargs={given} with rollout='transformers': they are vLLM's; set rollout='vllm' or 'vllm-http', or "
            "use temperature, top_p, top_k, min_p and repetition_penalty"
        )
    if config.truncates_support:
        raise ValueError(
            f"generation_kwargs={given} with {config.support_text}: which tokens were kept is not known then; leave one out"
        )


def _check_support(config: Config) -> None:
    if config.fsdp_parallel_head and config.truncates_support:
        raise ValueError(
            f"{config.support_text} with fsdp_parallel_head=True: restricted sampling needs the whole output head on every "
            "rank; set fsdp_parallel_head=False, or top_p=1, top_k=0, min_p=0"
        )


def _check_decoupled(config: Config) -> None:
    if config.scale_rewards != "group":
        raise ValueError(
            f"scale_rewards={config.scale_rewards!r} with multi_objective_aggregation='normalize_then_sum', which always "
            "scales each reward in its group and their sum over the batch; leave scale_rewards at 'group'"
        )
    if config.loss_type == "rloo":
        raise ValueError(
            "loss_type='rloo' with multi_objective_aggregation='normalize_then_sum': RLOO subtracts the mean of the group's "
            "other completions and scales nothing; choose another loss_type, or 'sum_then_normalize'"
        )


def _check_objective_and_run(config: Config) -> None:
    if config.reward_weights and config.reward_funcs and len(config.reward_weights) != len(config.reward_funcs):
        raise ValueError(
            f"reward_weights has {len(config.reward_weights)} values for {len(config.reward_funcs)} reward_funcs; give one each"
        )
    if config.multi_objective_aggregation == "normalize_then_sum":
        _check_decoupled(config)
    if config.num_generations_eval > 1 and config.eval_temperature == 0:
        raise ValueError(
            f"num_generations_eval={config.num_generations_eval} with eval_temperature=0: greedy answers are all the same; set "
            "eval_temperature (for example the training temperature), or num_generations_eval=1"
        )
    if config.eval_steps and config.eval_size == 0:
        raise ValueError(
            f"eval_steps={config.eval_steps} with eval_size=0: there is nothing to evaluate on; set eval_size, or eval_steps=0"
        )
    if config.overwrite and config.resume_if_exists:
        raise ValueError("overwrite=True with resume_if_exists=True: a run is either replaced or resumed; leave one out")
    if config.loss_type == "cispo" and config.epsilon_high is None:
        raise ValueError("loss_type='cispo' needs epsilon_high, the absolute cap of the ratio (MiniMax-M1 and ScaleRL use 5.0)")
    if config.sync_ref_model and config.beta == 0:
        raise ValueError(
            "sync_ref_model=True with beta=0: there is no reference policy; set beta above 0, or leave sync_ref_model out"
        )
    if config.sync_ref_model and config.use_peft:
        raise ValueError(
            "sync_ref_model=True with use_peft: the reference is the base with adapters off, or as they began, and does not "
            "move; leave one out"
        )
    if config.use_adaptive_entropy and config.entropy_coef_min > config.entropy_coef_max:
        raise ValueError(
            f"entropy_coef_min={config.entropy_coef_min:g} exceeds entropy_coef_max={config.entropy_coef_max:g}; swap them"
        )
    if config.reward_range is not None and not config.reward_range[0] < config.reward_range[1]:
        raise ValueError(f"reward_range={config.reward_range} must be (lowest, highest), with lowest < highest")
    if config.forecast_reward_value is not None and config.price_per_gpu_hour == 0:
        raise ValueError(
            f"forecast_reward_value={config.forecast_reward_value:g} with price_per_gpu_hour=0: the gain is compared with its "
            "cost; set price_per_gpu_hour too"
        )
    if config.warmup_steps > config.max_steps:
        raise ValueError(f"warmup_steps={config.warmup_steps:g} exceeds max_steps={config.max_steps}")
