"""What a server is refused for; vLLM's own server is in the tests of ``vllm_http``."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from grpo_fast.rollout.vllm_needs import Needs, misfits

SETTINGS: dict[str, Any] = {
    "model_config": {
        "dtype": "torch.float32",
        "max_model_len": 128,
        "enable_sleep_mode": False,
        "logprobs_mode": "processed_logprobs",
        "quantization": None,
    },
    "weight_transfer_config": {"backend": "grpo_fast_shm"},
    "parallel_config": {"data_parallel_size": 1},
}
NEEDS = Needs(torch.float32, "shared_memory", context_length=100, sleeps=False)


def test_a_server_as_it_should_be_has_no_misfit() -> None:
    assert misfits(SETTINGS, "0.32.0", NEEDS) == []
    assert misfits(SETTINGS, "0.28.1.dev3", NEEDS._replace(context_length=128)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("model_config", "dtype"),
            "torch.bfloat16",
            "in bfloat16, the trainer in float32; start it with --dtype float32",
        ),
        (("model_config", "logprobs_mode"), "raw_logprobs", "are raw_logprobs, .*--logprobs-mode processed_logprobs"),
        (("model_config", "quantization"), "fp8", r"quantised \(fp8\)"),
        (("model_config", "max_model_len"), 64, "takes 64 tokens, but prompt and completion may have 100"),
        (
            ("weight_transfer_config",),
            None,
            "by None, not 'grpo_fast_shm'; start it with `grpo-fast serve",
        ),
        (("weight_transfer_config", "backend"), "nccl", "by 'nccl', not 'grpo_fast_shm'"),
        (("parallel_config", "data_parallel_size"), 2, "has 2 data-parallel engines, and .*start one server per replica"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(path: tuple[str, ...], value: Any, message: str) -> None:
    settings = copy.deepcopy(SETTINGS)
    place = settings
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    [problem] = misfits(settings, "0.32.0", NEEDS)
    assert re.search(message, problem)


def test_an_old_server_is_named() -> None:
    assert misfits(SETTINGS, "0.27.1", NEEDS) == ["its vLLM 0.27.1 is too old, 0.28 or newer is needed"]
    [problem] = misfits(SETTINGS, "0.32.0", NEEDS._replace(sleeps=True))
    assert problem == "it cannot sleep; start it with `grpo-fast serve --enable-sleep-mode`"
