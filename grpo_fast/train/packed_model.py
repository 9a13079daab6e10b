"""Packed sequences through a model of transformers: its attention is told where each sequence lies.

transformers hands keywords of a forward pass down to the attention function that the configuration names. The functions named
``packed_sdpa`` and ``packed_eager``, registered here, take the layout from there; without one (sampling, the probe of the head)
they are ``sdpa`` and the model's own ``eager`` attention. Flash attention is told the borders by keywords of its own.

That is a contract of models that support flash attention: windows and caps come as keywords, and the mask holds nothing else.
A model that mixes tokens in another way (a recurrence, a convolution, attention in chunks) would leak across borders, so a
model is tried once: what it gives for packed sequences must be what it gives for each alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.ops import PackedLayout, Scores, packed_attention
from grpo_fast.types import TokenBatch

_PREFIX = "packed_"
_UNKNOWN_KEYWORDS = ("s_aux", "position_bias")
"""Keywords of terms that some models add to scores, and that the attention here does not know."""


def model_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Keywords of the model's body for a micro-batch."""
    layout = batch.packed_layout
    if layout is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if _implementation(model).startswith(_PREFIX):
        # a mask of four dimensions passes as finished: the T x T one that positions would call for is not made
        nothing = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=batch.input_ids.device)
        return inputs | {"attention_mask": nothing, "packed_layout": layout}
    if layout.shares_prompts:
        raise ValueError(f"attn_implementation={_implementation(model)!r} does not support shared prompts")
    borders = {f"cu_seq_lens_{side}": layout.cu_seqlens for side in "qk"}
    return inputs | borders | {f"max_length_{side}": layout.max_seqlen for side in "qk"}


def attention_of(model: PreTrainedModel, wanted: str) -> str:
    """Name of the attention that a model computes by: the wanted one, or for ``auto`` the one that transformers chose."""
    return _implementation(model).removeprefix(_PREFIX) if wanted == "auto" else wanted


def let_pack(model: PreTrainedModel) -> str | None:
    """Makes a model take packed sequences.

    Returns:
        Why it cannot, or ``None``.
    """
    name = _implementation(model)
    if name.startswith((_PREFIX, "flash_attention")):
        return None
    if name not in _ATTENTION:
        return f"attn_implementation={name!r} does not support packed sequences; use 'sdpa', 'eager' or 'flash_attention_2'"
    if not model._supports_flash_attn:
        return f"{type(model).__name__} does not tell its attention where sequences begin (it does not support flash attention)"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{type(model).__name__} has layers of kind {', '.join(sorted(kinds))}, which cannot be packed"
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} computes attention by code of its own, not by one that its configuration names"
    model.set_attn_implementation(_PREFIX + name)
    return None


def takes_shared_prompts(model: PreTrainedModel) -> bool:
    """Whether completions may lie behind one copy of their prompt: where attention here was put in by :func:`let_pack`."""
    return _implementation(model).startswith(_PREFIX)


def let_pad(model: PreTrainedModel) -> None:
    """Takes :func:`let_pack` back."""
    model.set_attn_implementation(_implementation(model).removeprefix(_PREFIX))


def let_compile() -> None:
    """Keeps torch's compiler out of packed attention: a layout holds other lengths in every micro-batch."""
    for name, function in _ATTENTION.items():
        AttentionInterface.register(_PREFIX + name, torch.compiler.disable(function))


def _implementation(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _packed(
    module: torch.nn.Module, sides: tuple[torch.Tensor, ...], layout: PackedLayout, scaling: float | None, **given: Any
) -> tuple[torch.Tensor, None]:
    unknown = [name for name in _UNKNOWN_KEYWORDS if given.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} adds {', '.join(unknown)} to its scores, which packed attention does not support"
        )
    # under autocast rotary positions leave queries and keys in float32, and attention with a prompt is not cast by it
    query, key, value = (side[0].transpose(0, 1).to(sides[2].dtype) for side in sides)
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=given.get("sliding_window"),
        softcap=given.get("softcap"),
    )
    return packed_attention(query, key, value, layout, scores)[None], None


def _packed_sdpa(module: torch.nn.Module, *sides: Any, packed_layout: PackedLayout | None = None, **given: Any) -> Any:
    if packed_layout is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *sides, **given)
    return _packed(module, sides[:3], packed_layout, given.pop("scaling", None), **given)


def _packed_eager(module: torch.nn.Module, *sides: Any, packed_layout: PackedLayout | None = None, **given: Any) -> Any:
    if packed_layout is None:  # every model brings its own
        return sys.modules[type(module).__module__].eager_attention_forward(module, *sides, **given)
    return _packed(module, sides[:3], packed_layout, given.pop("scaling", None), **given)


_ATTENTION = {"sdpa": _packed_sdpa, "eager": _packed_eager}
for _name, _function in _ATTENTION.items():
    AttentionInterface.register(_PREFIX + _name, _function)
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
