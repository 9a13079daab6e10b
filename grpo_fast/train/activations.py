"""What a forward pass keeps for the backward pass, counted without running it.

The model is built and run on tensors that have shapes and no memory, under autograd's own hooks: what autograd would save is
what counts. So it holds for any architecture that transformers builds, with adapters, checkpointing and autocast as a run has
them, and takes seconds for a model of any size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from grpo_fast.config import Config
from grpo_fast.train.checkpointing import KEPT_OPS, checkpoint_layers

_ATTENTION = "counted"


@dataclass(frozen=True)
class ActivationBytes:
    """What is kept for T tokens of one micro-batch.

    Attributes:
        saved: bytes that live when the forward pass ends.
        recomputed: bytes that the backward pass makes anew for one layer while it is at that; 0 without checkpointing.
        gradients: bytes of gradients on their way through a layer, while those of its activations are freed: about half of
            what a layer keeps.
        waiting: bytes that are kept in the host's memory meanwhile.
    """

    saved: int
    recomputed: int
    gradients: int
    waiting: int = 0

    @property
    def peak(self) -> int:
        """The most that lives at once."""
        return self.saved + self.recomputed + self.gradients


def activation_bytes(outline: PreTrainedModel, config: Config, *, num_tokens: int, dtype: torch.dtype) -> ActivationBytes:
    """Counts what a micro-batch keeps between forward and backward pass, in the model's body.

    Attention is taken to be fused: it keeps what it reads and writes, and no scores.

    Args:
        outline: the model, adapters included; its weights are not read and may be on the meta device.
        config: the run's; read are adapters, checkpointing and the type of trained weights.
        num_tokens: T, in one row; the count is linear in it.
        dtype: type of computation.
    """
    model: Any = copy.deepcopy(outline)
    model.set_attn_implementation(_ATTENTION)
    model.eval()
    whole = _bytes_saved(model, config, num_tokens=num_tokens, dtype=dtype)
    sizes = model.config.get_text_config()
    num_layers = int(sizes.num_hidden_layers)
    if not config.gradient_checkpointing:
        return ActivationBytes(whole, 0, whole // num_layers // 2)
    checkpoint_layers(model, "full")
    model.train()  # transformers checkpoints in training mode only
    ops = KEPT_OPS if config.gradient_checkpointing_mode == "selective" else frozenset()
    kept = _bytes_saved(model, config, num_tokens=num_tokens, dtype=dtype, kept_ops=ops)
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    kept += 2 * num_tokens * head_dim * 4  # rotary tables: layers keep them as arguments, where autograd would keep them too
    recomputed, gradients = (whole - kept) // num_layers, whole // num_layers // 2
    if config.gradient_checkpointing_mode == "offload":
        return ActivationBytes(2 * kept // num_layers, recomputed, gradients, waiting=kept)
    return ActivationBytes(kept, recomputed, gradients)


def _bytes_saved(
    model: Any, config: Config, *, num_tokens: int, dtype: torch.dtype, kept_ops: frozenset[Any] = frozenset()
) -> int:
    """Bytes that autograd saves, and those that ``kept_ops`` give, which selective checkpointing keeps without autograd."""
    body = model.base_model
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no storage is freed and its place counted for another's
    with FakeTensorMode():
        weights = _weights(body, config, dtype)
        known = {tensor.untyped_storage()._cdata for tensor in weights.values()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        inputs = {"input_ids": torch.zeros(1, num_tokens, dtype=torch.int64), "use_cache": False}
        precision = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision, _Outputs(kept_ops, pack):
            hidden = torch.func.functional_call(body, weights, (), inputs).last_hidden_state
        return sum(kept.values()) + int(hidden.untyped_storage().nbytes())


class _Outputs(TorchDispatchMode):
    """Hands on what certain ops give."""

    def __init__(self, ops: frozenset[Any], take: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops = ops
        self._take = take

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._ops:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self._take(tensor)
        return result


def _weights(body: torch.nn.Module, config: Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Stand-ins of weights and buffers, of the types that :meth:`PolicySource.load` gives them."""
    short = dtype == torch.bfloat16 and (config.use_peft or config.weights_dtype == "bfloat16")
    base = torch.bfloat16 if short else torch.float32
    weights = {
        name: torch.empty(weight.shape, dtype=torch.float32 if ".lora_" in name else base, requires_grad=weight.requires_grad)
        for name, weight in body.named_parameters()
    }
    return weights | {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in body.named_buffers()}


def _counted_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Fused causal attention; the mask that transformers makes while it is traced would count as kept."""
    shared = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _counted_attention)
AttentionMaskInterface.register(_ATTENTION, flash_attention_mask)
