"""Arguments of vLLM's engine: those that a user may give, and those that the weight sync or a setting of the run decides."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from grpo_fast.rollout.vllm_environment import load_beside_vllm, undisturbed, vllm_environment

_SETTINGS = {
    "model": "model",
    "tokenizer": "model",
    "revision": "revision",
    "dtype": "dtype",
    "seed": "seed",
    "max_model_len": "max_prompt_length and max_completion_length",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "kv_cache_memory_bytes": "vllm_kv_cache_gib",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "enable_lora": "use_peft",
    "max_lora_rank": "lora_r",
    "lora_target_modules": "lora_target_modules",
}
"""Arguments that a setting of the run stands for."""
_OF_THE_SYNC = {
    "skip_tokenizer_init",
    "load_format",
    "weight_transfer_config",
    "logprobs_mode",
    "max_logprobs",
    "enable_prefix_caching",
    "async_scheduling",
    "max_loras",
    "max_cpu_loras",
    "worker_extension_cls",
}
_OF_SEVERAL_DEVICES = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "decode_context_parallel",
    "nnodes",
    "node_rank",
)
"""How names of arguments begin; the other collections hold whole names."""
_NOT_COVERED = {
    "quantization": "the weights that are sent are not quantised",
    "speculative_config": "a draft model gets no new weights",
    "hf_token": "it would stand in the run's files, and vLLM reads the policy from this machine",
}
_ON_A_CPU = ("block_size", "distributed_executor_backend", "enable_chunked_prefill")


def check_engine_args(given: Mapping[str, Any], *, on_gpu: bool) -> None:
    """Refuses arguments that a user may not give, and names that vLLM does not know; for the latter vLLM is loaded.

    Args:
        given: arguments of vLLM's ``EngineArgs``, by name.
        on_gpu: where the engine runs.

    Raises:
        ValueError: there is such an argument; the message names it and the fix.
        RolloutError: this version of vLLM, which was not tested, has no such arguments.
    """
    for name in given:
        if name in _SETTINGS:
            raise ValueError(f"engine argument {name!r} is decided by {_SETTINGS[name]}; set that instead")
        if name in _OF_THE_SYNC:
            raise ValueError(f"engine argument {name!r} is decided by the weight sync; leave it out")
        if name in _NOT_COVERED:
            raise ValueError(f"engine argument {name!r} is not supported: {_NOT_COVERED[name]}; leave it out")
        if name.startswith(_OF_SEVERAL_DEVICES):
            raise ValueError(
                f"engine argument {name!r}: rollout='vllm' runs on one device, the trainer's; for several, start a server, as "
                "with `grpo-fast serve MODEL -- --tensor-parallel-size 2`, and use rollout='vllm-http'"
            )
        if name in _ON_A_CPU and not on_gpu:
            raise ValueError(f"engine argument {name!r} cannot be changed on a CPU; leave it out")
    if not given:
        return
    with undisturbed(), vllm_environment():
        engine_args = load_beside_vllm("vllm.engine.arg_utils").EngineArgs
    known = [field.name for field in dataclasses.fields(engine_args)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            raise ValueError(f"vLLM has no engine argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
