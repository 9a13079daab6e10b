"""torch.compile for the layers of a policy, one by one: they are alike, so that what is compiled for the first serves all.

Shapes are dynamic, as micro-batches have other lengths each time. Packed attention is called from compiled code and is not part
of it. A layer that is given a cache, as in sampling, runs as it was written: each token would be another kind of input. Weights
and their names stay, and so does a copy of the model free of all this.

Where a layer meets more kinds of input than torch compiles code for (``torch._dynamo.config.recompile_limit``), torch warns
with the reason, and what is new runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_fast.config import ConfigError
from grpo_fast.rollout.kv_cache import CACHE_ARGUMENTS
from grpo_fast.train.layers import layers_of
from grpo_fast.train.packed_model import let_compile


def require_compiler(device: torch.device) -> None:
    """Checks that torch can compile for a device.

    Args:
        device: where the model will be.

    Raises:
        ConfigError: what it makes code with is missing: a C++ compiler for a CPU, Triton for a GPU.
    """
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise ConfigError("torch_compile=True needs Triton on a GPU; `pip install triton`, or leave it out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 (slow to import)
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "torch_compile=True needs a C++ compiler on a CPU, and none is found; install g++, or name one in the environment "
            "variable CXX, or leave it out"
        ) from None


def compile_layers(model: PreTrainedModel) -> None:
    """Has every layer of a model compiled when it first runs, in place.

    Args:
        model: as it will be trained, adapters and checkpointing included.

    Raises:
        ConfigError: the model does not say which of its modules are layers.
    """
    layers: list[Any] = layers_of(model)
    if not layers:
        raise ConfigError(
            f"torch_compile=True: {type(model).__name__} does not say which of its modules are layers; leave it out"
        )
    let_compile()
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            layer._gradient_checkpointing_func = _recomputed(layer._gradient_checkpointing_func)
        else:
            layer._compiled_call_impl = _Compiled(layer)


def _recomputed(checkpoint: Any) -> Callable[..., Any]:
    """The forward pass of a checkpointed layer, compiled inside the checkpoint, which stays as it is."""
    compiled: Any = torch.compile(_call, dynamic=True)
    return lambda layer, *given: checkpoint(compiled, layer, *given)


def _call(layer: Callable[..., Any], *given: Any) -> Any:
    return layer(*given)


class _Compiled:
    """Runs a layer, compiled where it has no cache."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._eager = layer._call_impl
        self._compiled: Any = torch.compile(layer._call_impl, dynamic=True)

    def __call__(self, *given: Any, **named: Any) -> Any:
        cached = any(named.get(name) is not None for name in CACHE_ARGUMENTS)
        run = self._eager if cached else self._compiled
        return run(*given, **named)
