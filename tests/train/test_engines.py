from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from grpo_fast.config import ConfigError
from grpo_fast.rollout.vllm_environment import held_port


def test_a_vllm_that_is_to_sleep_on_a_cpu_is_refused_before_the_model_is_read(build: Any) -> None:
    with pytest.raises(ConfigError, match="vllm_enable_sleep_mode=True: vLLM's sleep mode works on GPUs only"):
        build(rollout="vllm", vllm_enable_sleep_mode=True, model="no/such/model", device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": "vllm", "vllm_transport": "nccl"}, "cannot reach an engine in the trainer's process"),
        ({"rollout": "vllm-http", "vllm_server_urls": ("http://192.0.2.1:80",)}, "http://192.0.2.1:80 is on another machine"),
        ({"rollout": "vllm-http", "vllm_server_urls": ("127.0.0.1:80",)}, "is not the address of a server"),
        ({"rollout": "vllm-http", "vllm_server_urls": ("http://localhost:80", "http://127.0.0.1:80")}, "are the same server"),
    ],
)
def test_a_way_to_vllm_that_leads_nowhere_is_refused_before_the_model_is_read(
    changes: dict[str, Any], message: str, build: Any
) -> None:
    with pytest.raises(ConfigError, match=f"rollout='{changes['rollout']}': .*{message}"):
        build(model="no/such/model", device="cpu", **changes)


def test_a_key_that_no_request_can_carry_is_refused_before_the_model_is_read(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    with pytest.raises(ConfigError, match="rollout='vllm-http': VLLM_API_KEY begins or ends with a space or a line break"):
        build(rollout="vllm-http", vllm_server_urls=("http://127.0.0.1:80",), model="no/such/model", device="cpu")


def test_servers_are_waited_for_before_the_weights_are_read_and_after_the_data(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_fast.train.engines.require_vllm", lambda: None)
    monkeypatch.setattr("grpo_fast.train.policy_source.PolicySource.load", lambda self: pytest.fail("the weights are read"))
    with held_port() as port:
        served = {"rollout": "vllm-http", "vllm_server_urls": (f"http://127.0.0.1:{port}",), "device": "cpu"}
        with pytest.raises(ConfigError, match="no/such/model"):
            build(**served, model="no/such/model")
        told = rf"vLLM's server http://127\.0\.0\.1:{port} was not up within 0\.1 s \(vllm_server_timeout\)"
        with pytest.raises(ConfigError, match=told):
            build(**served, vllm_server_timeout=0.1)


def test_arguments_of_vllm_are_checked_before_the_model_is_read(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.train.engines.require_vllm", lambda: None)
    with pytest.raises(ConfigError, match="rollout='vllm': engine argument 'max_model_len' is decided by max_prompt_length"):
        build(rollout="vllm", vllm_engine_args={"max_model_len": 2}, model="no/such/model", device="cpu")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_rollouts_by_a_vllm_that_is_not_there_are_refused_before_the_model_is_read(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"rollout='vllm': vLLM is not installed; `pip install 'grpo-fast\[vllm\]'`"):
        build(rollout="vllm", model="no/such/model")
