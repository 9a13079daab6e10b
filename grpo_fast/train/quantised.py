"""A frozen base in four bits, by bitsandbytes: what QLoRA puts its adapters over.

A weight is kept as 4-bit numbers with a scale for each 64 of them (and, nested, those scales in 8 bits); each product makes
it anew in the type of computation. Head, embedding and norms stay as they are.

Source: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from grpo_fast.config import Config, ConfigError

_BLOCK = 64
_log = logging.getLogger(__name__)
_KERNELS = logging.getLogger("bitsandbytes.backends.cpu.ops")
_KERNELS.setLevel(logging.ERROR)  # it warns of a faster 4-bit kernel when peft or transformers import it, for runs without any


def require_bitsandbytes(field: str) -> None:
    """Checks that bitsandbytes is there.

    Raises:
        ConfigError: it is not; ``field`` is what asked for it.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{field} needs {' and '.join(missing)}; `pip install 'grpo-fast[quant]'`")
    _KERNELS.setLevel(logging.NOTSET)


def refuse_ragged_blocks(outline: torch.nn.Module, device: torch.device) -> None:
    """On a CPU bitsandbytes (0.50) reads scales as if a block ended with its row, and gives wrong weights where it does not.

    Args:
        outline: the model, with or without weights, before it is quantised.
        device: where it will go.

    Raises:
        ConfigError: a layer whose rows are not made of whole blocks.
    """
    for name, layer in outline.named_modules():
        if device.type == "cpu" and isinstance(layer, torch.nn.Linear) and "lora_" not in name and layer.in_features % _BLOCK:
            raise ConfigError(
                f"load_in_4bit on a CPU: {name} has {layer.in_features} inputs, but bitsandbytes computes only multiples of "
                f"{_BLOCK} correctly there; use a GPU, or leave load_in_4bit out"
            )


def loading_arguments(config: Config, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments by which ``from_pretrained`` quantises on the way to the device.

    Args:
        config: which four bits.
        dtype: type of computation.
        device: where the model goes.
    """
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 (slow, and wanted for a quantised base alone)

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    # by its number: transformers loads in threads of its own, and the GPU of the rank is that of this thread alone
    place = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    return {"quantization_config": settings, "device_map": {"": place}}


def keep_as_loaded(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from rounding the scales once more at the first forward pass without gradient on a CPU.

    Where a CPU has AVX512-BF16, it packs the weights anew for that pass, for good, with scales in bfloat16. The policy would
    from then on sample from, and be trained as, another model than the one that was loaded.
    """
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu = False


def tell_what_is_left(model: torch.nn.Module) -> None:
    """Reports weights that were not quantised: experts that transformers stacks are in no linear layer."""
    left = [(name, weight) for name, weight in model.named_parameters() if weight.ndim > 2]
    if left:
        name, weight = left[0]
        _log.warning(
            "load_in_4bit: %.1f million weights stay in %s, because bitsandbytes quantises only linear layers (%s, ...)",
            sum(weight.numel() for _, weight in left) / 1e6,
            str(weight.dtype).removeprefix("torch."),
            name,
        )


def make_shardable(model: torch.nn.Module) -> None:
    """Makes weights of four bits plain parameters of bytes, which can be cut anywhere; their scales stay whole with the layer.

    bitsandbytes looks for the scales at the weight, and a gathered weight comes without them.
    """
    for layer in _layers(model):
        layer.quant_state = layer.weight.quant_state
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
        layer.register_forward_pre_hook(_give_scales)


def give_shards_scales(model: torch.nn.Module) -> None:
    """Puts the scales at the shards of four-bit weights too, so that who gathers one can tell what it stands for."""
    for layer in _layers(model):
        _give_scales(layer, None)


def _give_scales(layer: Any, _: Any) -> None:
    layer.weight.quant_state = layer.quant_state


@torch.no_grad()
def dequantised(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and float32 weight of every layer that is in four bits."""
    functional: Any = import_module("bitsandbytes.functional")
    names = {id(module): name for name, module in model.named_modules()}
    for layer in _layers(model):
        weight = layer.weight
        yield names[id(layer)], functional.dequantize_4bit(weight.data, weight.quant_state).float()


def _layers(model: torch.nn.Module) -> list[Any]:
    kind = import_module("bitsandbytes.nn").Linear4bit
    return [module for module in model.modules() if isinstance(module, kind)]
