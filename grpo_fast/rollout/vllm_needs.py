"""How a vLLM server must have been started for a trainer. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from grpo_fast.rollout.transports import BACKENDS, OLDEST_VLLM

ONE_REPLICA = "a weight sync checks one engine per server; start one server per replica and give all their URLs"


class Needs(NamedTuple):
    """Settings that a server must have been started with."""

    dtype: torch.dtype
    """Type that the server must compute in."""
    transport: str
    """Transport of the weights."""
    context_length: int
    """Longest sequence, in tokens."""
    sleeps: bool
    """Whether it must free its memory while the policy trains."""
    sizes: Mapping[str, int] = MappingProxyType({})
    """Sizes of the policy's model, see :func:`~grpo_fast.rollout.model_sizes.model_sizes`."""


def misfits(settings: Mapping[str, Any], version: str, needs: Needs) -> list[str]:
    """Settings of a server that a trainer cannot work with, one line each with its fix.

    Args:
        settings: vLLM's, as its server reports them.
        version: vLLM's.
        needs: the trainer's.
    """
    model, needed = settings["model_config"], str(needs.dtype).removeprefix("torch.")
    replicas = settings["parallel_config"]["data_parallel_size"]
    dtype, length, sleeps = str(model["dtype"]).removeprefix("torch."), model["max_model_len"], model["enable_sleep_mode"]
    backend, wanted = (settings["weight_transfer_config"] or {}).get("backend"), BACKENDS[needs.transport]
    checks = {
        f"its vLLM {version} is too old, {OLDEST_VLLM} or newer is needed": (
            Version(version).release >= Version(OLDEST_VLLM).release
        ),
        f"it computes in {dtype}, the trainer in {needed}; start it with --dtype {needed}": dtype == needed,
        f"its log-probabilities are {model['logprobs_mode']}, not those that tokens are sampled from; start it with "
        "--logprobs-mode processed_logprobs": model["logprobs_mode"] == "processed_logprobs",
        f"its weights are quantised ({model['quantization']}), the trainer's are not; start it without --quantization": (
            model["quantization"] is None
        ),
        f"it receives weights by {backend!r}, not {wanted!r}; start it with `grpo-fast serve --transport {needs.transport}`": (
            backend == wanted
        ),
        f"it takes {length} tokens, but prompt and completion may have {needs.context_length}; start it with --max-model-len "
        f"{needs.context_length}": length >= needs.context_length,
        f"it has {replicas} data-parallel engines, and {ONE_REPLICA}": replicas == 1,
        "it cannot sleep; start it with `grpo-fast serve --enable-sleep-mode`": sleeps or not needs.sleeps,
    }
    return [problem for problem, holds in checks.items() if not holds]
