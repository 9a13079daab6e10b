from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.rollout import vllm_arguments
from grpo_fast.rollout.vllm_arguments import check_engine_args


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu_memory_utilization", "'gpu_memory_utilization' is decided by vllm_gpu_memory_utilization; set that"),
        ("max_model_len", "'max_model_len' is decided by max_prompt_length and max_completion_length"),
        ("enable_prefix_caching", "'enable_prefix_caching' is decided by the weight sync; leave it out"),
        ("quantization", "'quantization' is not supported: the weights that are sent are not quantised"),
        ("speculative_config", "'speculative_config' is not supported: a draft model gets no new weights"),
        ("hf_token", "'hf_token' is not supported: it would stand in the run's files.*; leave it out$"),
        ("tensor_parallel_size", "grpo-fast serve MODEL -- --tensor-parallel-size 2"),
        ("data_parallel_size", "rollout='vllm' runs on one device"),
        ("block_size", "'block_size' cannot be changed on a CPU"),
    ],
)
def test_what_is_decided_elsewhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine_args({name: 2}, on_gpu=False)


def test_the_settings_that_are_named_exist() -> None:
    for told in vllm_arguments._SETTINGS.values():
        assert set(told.split(" and ")) <= Config.model_fields.keys()


def test_nothing_given_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_arguments, "load_beside_vllm", None)
    check_engine_args({}, on_gpu=False)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_num_sequences": 3}, "vLLM has no engine argument 'max_num_sequences'; did you mean 'max_num_seqs'"),
        ({"max-num-seqs": 3}, "did you mean 'max_num_seqs'"),
        ({"zzzzz": 3}, "vLLM has no engine argument 'zzzzz'$"),
    ],
)
def test_names_that_vllm_does_not_know_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine_args(given, on_gpu=False)


@pytest.mark.vllm
def test_what_is_refused_exists_and_the_rest_is_free() -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    refused = {*vllm_arguments._SETTINGS, *vllm_arguments._OF_THE_SYNC, *vllm_arguments._NOT_COVERED, *vllm_arguments._ON_A_CPU}
    assert refused <= known
    assert all(any(name.startswith(start) for name in known) for start in vllm_arguments._OF_SEVERAL_DEVICES)
    check_engine_args({"enforce_eager": True, "max_num_batched_tokens": 4096, "kv_cache_dtype": "fp8"}, on_gpu=True)
    check_engine_args({"block_size": 16}, on_gpu=True)
