"""One decoding step of Llama-shaped models by the compiled extension: for a few sequences on a CPU, in float32.

The same step as :class:`~grpo_fast.rollout.llama_step.LlamaStep`'s, a call a layer; log-probabilities agree to 1e-5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from grpo_fast.ops.decoder_layer import MOST_NUMBERS, LayerWeights, decoder_layer, few_rows_product, problem
from grpo_fast.rollout.llama_step import LoraFactors, linears, rotary_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo_fast.rollout.shared_prefix import SharedPrefixCache

_PLAIN = {torch.Tensor, torch.nn.Parameter}


def takes(model: PreTrainedModel, num_rows: int) -> bool:
    """Whether :class:`NativeStep` runs a model that :func:`~grpo_fast.rollout.llama_step.supports` accepts, and is the faster.

    Args:
        model: of plain float32 weights on a CPU; plain LoRA adapters may lie over the decoder layers' linear ones.
        num_rows: sequences of the batch, at first.
    """
    if num_rows * model.config.hidden_size > MOST_NUMBERS or problem():
        return False
    inner: Any = model.model
    adapted = {module for module in model.modules() if hasattr(module, "base_layer")}
    taken = {linear for layer in inner.layers for linear in linears(layer) if LoraFactors.of(linear) is not None}
    return adapted == taken and all(
        type(weight) in _PLAIN and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
        for weight in model.parameters()
    )


class NativeStep:
    """Steps a batch by one token.

    Args:
        model: a model that :func:`takes` accepts; its weights are read where they lie, adapters as they are now.
        num_positions: longest sequence of the batch.
    """

    def __init__(self, model: PreTrainedModel, num_positions: int) -> None:
        inner: Any = model.model
        self._embedding, self._norm, self._head = inner.embed_tokens, inner.norm, model.lm_head
        self._layers = [_weights(layer) for layer in inner.layers]
        self._cos, self._sin = rotary_table(inner, num_positions)

    def __call__(self, cache: SharedPrefixCache, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Appends one token to every row.

        Args:
            cache: keys and values so far; grows by one position.
            tokens: int64 [n].
            positions: int64 [n].

        Returns:
            Logits [n, V] of the next token.
        """
        hidden = self._embedding(tokens)
        cos, sin = self._cos[positions], self._sin[positions]
        for index, layer in enumerate(self._layers):
            decoder_layer(hidden, layer, cache.append(index), cos, sin)
        normed = F.rms_norm(hidden, self._norm.weight.shape, self._norm.weight, self._norm.variance_epsilon)
        return few_rows_product(normed, self._head.weight, self._head.bias)


def _weights(layer: Any) -> LayerWeights:
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(attention, "q_norm"):
        norms += [attention.q_norm, attention.k_norm]
    none = torch.empty(0)
    found = linears(layer)
    adapters = [LoraFactors.of(linear) for linear in found]
    plain = [linear if adapter is None else adapter.base for linear, adapter in zip(found, adapters, strict=True)]
    return LayerWeights(
        [norm.weight.detach() for norm in norms],
        [norm.variance_epsilon for norm in norms],
        [linear.weight.detach() for linear in plain],
        [none if linear.bias is None else linear.bias.detach() for linear in plain],
        attention.scaling,
        [none if adapter is None else adapter.a for adapter in adapters],
        [none if adapter is None else adapter.b for adapter in adapters],
    )
