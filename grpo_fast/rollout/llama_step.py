"""One decoding step of Llama-shaped models, written out: the module's own weights, a third of its operations.

transformers' forward of one token a row spends most of its time outside the matrix products: its norms are six operations,
its rotary embedding nine, and its attention goes through a kernel made for many queries. On a CPU (AMD EPYC, one thread, 128
rows, hidden size 128) a rollout of 32 tokens takes two thirds of the time; log-probabilities agree to 1e-5 in float32.

Only what :func:`supports` accepts is stepped this way; everything else runs through the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from grpo_fast.ops.products import PackedWeight, ProductLinear, pays_to_pack
from grpo_fast.rollout.shared_prefix import SharedPrefixCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo_fast.rollout.kv_cache import PreallocatedCache

_FAMILY = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}

_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles depend on the position alone, not on the length of the sequence."""


def supports(model: PreTrainedModel) -> bool:
    """Whether :class:`LlamaStep` computes what ``model`` computes.

    The class must be transformers' own, with plain linear layers on one device (LoRA adapters of peft's may lie over them, but
    no quantisation or offloading), full attention, SiLU and a static rotary embedding, and no module may carry a hook or a
    replaced ``forward``.
    """
    config = model.config
    if type(model).__name__ not in _FAMILY or not type(model).__module__.startswith("transformers."):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [])
    windowed = windowed or getattr(config, "sliding_window", None) is not None
    if config.hidden_act not in {"silu", "swish"} or rope.get("rope_type") not in _STATIC_ROPE or windowed:
        return False
    for module in model.modules():
        wrapped = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        strange = (
            type(module) not in {torch.nn.Linear, ProductLinear} and hasattr(module, "in_features") and not _is_lora(module)
        )
        if wrapped or strange:
            return False
    return len({parameter.device for parameter in model.parameters()}) == 1


def _is_lora(module: torch.nn.Module) -> bool:
    """Whether it is peft's adapter over a plain linear layer; its base layer and its factors are checked on their own."""
    return type(module).__name__ == "Linear" and type(module).__module__ == "peft.tuners.lora.layer"


class LoraFactors(NamedTuple):
    """A LoRA adapter without peft's dispatch, which takes longer than its products do for a token a row."""

    base: torch.nn.Linear
    a: torch.Tensor
    """[r, in]: A."""
    b: torch.Tensor
    """[out, r]: s B."""

    @classmethod
    def of(cls, layer: Any) -> LoraFactors | None:
        """The adapter over a linear layer; ``None`` if there is none, or anything but one plain adapter that is on."""
        if (
            not _is_lora(layer)
            or layer.disable_adapters
            or layer.merged
            or layer.lora_variant
            or len(layer.active_adapters) != 1
        ):
            return None
        [name] = layer.active_adapters
        a, b = layer.lora_A[name], layer.lora_B[name]
        if b.bias is not None:
            return None
        return cls(layer.base_layer, a.weight.detach(), layer.scaling[name] * b.weight.detach())


_Kind: TypeAlias = Literal["query_key_value", "out", "gate_up", "down"]


def linears(layer: Any) -> list[torch.nn.Linear]:
    """A decoder layer's: query, key, value, output, gate, up and down."""
    return [linear for kind in get_args(_Kind) for linear in _linears(layer, kind)]


def _linears(layer: Any, kind: _Kind) -> list[torch.nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    match kind:
        case "query_key_value":
            return [attention.q_proj, attention.k_proj, attention.v_proj]
        case "out":
            return [attention.o_proj]
        case "gate_up":
            return [mlp.gate_proj, mlp.up_proj]
        case "down":
            return [mlp.down_proj]


class _PackedLayer(NamedTuple):
    """A layer's linear layers, those of one input together."""

    query_key_value: PackedWeight
    out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight

    @classmethod
    def of(cls, layer: Any) -> _PackedLayer:
        return cls(*(PackedWeight(_linears(layer, kind)) for kind in get_args(_Kind)))


def rotary_table(inner: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [num_positions, head size] of a model; sines of the first half negated, so that a plain roll is enough.

    Rotation takes (-second half, first half): the sign goes into the table.
    """
    weight = inner.embed_tokens.weight
    cos, sin = inner.rotary_emb(weight[:1, None], torch.arange(num_positions, device=weight.device)[None])
    half = cos.shape[-1] // 2
    return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)


class LlamaStep:
    """Steps a batch by one token.

    Args:
        model: a model that :func:`supports` accepts; its weights are read, and copied only where packing them pays.
        num_positions: longest sequence of the batch.
        num_rows: sequences of the batch, at first.
        num_steps: steps to be taken at most.
    """

    def __init__(self, model: PreTrainedModel, num_positions: int, *, num_rows: int, num_steps: int) -> None:
        inner: Any = model.model
        self._layers = list(inner.layers)
        found = ((layer, LoraFactors.of(layer)) for layer in inner.layers.modules())
        self._adapters = {layer: adapter for layer, adapter in found if adapter is not None}
        self._embedding, self._norm, self._head = inner.embed_tokens, inner.norm, model.lm_head
        self._packed = None
        if not self._adapters and pays_to_pack(self._layers[0].mlp.gate_proj, num_rows=num_rows, num_uses=num_steps):
            self._packed = [_PackedLayer.of(layer) for layer in self._layers]
            self._head = PackedWeight([self._head])
        self._cos, self._sin = rotary_table(inner, num_positions)

    def __call__(
        self,
        cache: PreallocatedCache | SharedPrefixCache,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Appends one token to every row.

        Args:
            cache: keys and values so far; grows by one position.
            tokens: int64 [n].
            positions: int64 [n].
            mask: [n, 1, 1, length + 1], added to the scores; ``None`` where every position is seen, and for a
                :class:`SharedPrefixCache`, which masks its prompts itself.

        Returns:
            Logits [n, V] of the next token.
        """
        hidden = self._embedding(tokens)
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        for index, layer in enumerate(self._layers):
            normed = _rms_norm(hidden, layer.input_layernorm)
            attended = self._attend(cache, index, normed, (cos, sin), mask)
            hidden = self._add_projected(hidden, attended, index, "out")
            gate, up = self._projected(_rms_norm(hidden, layer.post_attention_layernorm), index, "gate_up")
            hidden = self._add_projected(hidden, F.silu(gate, inplace=True).mul_(up), index, "down")
        logits = self._head(_rms_norm(hidden, self._norm))
        assert isinstance(logits, torch.Tensor)
        return logits

    def _attend(
        self,
        cache: PreallocatedCache | SharedPrefixCache,
        index: int,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one query a row, [n, heads * head size]."""
        attention = self._layers[index].self_attn
        count, size = normed.shape[0], attention.head_dim
        query, key, value = (side.view(count, -1, size) for side in self._projected(normed, index, "query_key_value"))
        if hasattr(attention, "q_norm"):
            query, key = _rms_norm(query, attention.q_norm), _rms_norm(key, attention.k_norm)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if isinstance(cache, SharedPrefixCache):
            return cache.attend(index, query, key, value, scale=attention.scaling)
        keys, values = cache.update(key[:, :, None], value[:, :, None], index)
        grouped = query.view(count, keys.shape[1], -1, size)
        mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=attention.scaling)
        return mixed.reshape(count, -1)

    def _projected(self, hidden: torch.Tensor, index: int, kind: _Kind) -> list[torch.Tensor]:
        """Outputs of the linear layers of one kind, which take the same rows."""
        if self._packed is None:
            return [self._linear(hidden, linear) for linear in _linears(self._layers[index], kind)]
        packed: PackedWeight = getattr(self._packed[index], kind)
        return list(packed(hidden).split(packed.sizes, dim=-1))

    def _add_projected(self, residual: torch.Tensor, hidden: torch.Tensor, index: int, kind: _Kind) -> torch.Tensor:
        if self._packed is None:
            return self._add_linear(residual, hidden, *_linears(self._layers[index], kind))
        packed: PackedWeight = getattr(self._packed[index], kind)
        return packed(hidden).add_(residual)

    def _linear(self, hidden: torch.Tensor, linear: torch.nn.Module) -> torch.Tensor:
        adapter = self._adapters.get(linear)
        if adapter is None:
            found: torch.Tensor = linear(hidden)
            return found
        found = adapter.base(hidden)
        return found.addmm_(hidden @ adapter.a.t(), adapter.b.t())

    def _add_linear(self, residual: torch.Tensor, hidden: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
        adapter = self._adapters.get(linear)
        base = linear if adapter is None else adapter.base
        if type(base) is torch.nn.Linear:
            total = torch.addmm(residual, hidden, base.weight.t())
            if base.bias is not None:
                total.add_(base.bias)
        else:  # one that multiplies in its own way, or an adapter of another kind, whose ``weight`` is its base's alone
            total = torch.add(residual, base(hidden))
        return total if adapter is None else total.addmm_(hidden @ adapter.a.t(), adapter.b.t())


def _rms_norm(hidden: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    epsilon = norm.variance_epsilon
    assert isinstance(epsilon, float)
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def _rotate(heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)
