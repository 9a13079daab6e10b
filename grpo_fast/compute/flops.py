"""The FLOP model: what prefill, decode, scoring, forward and backward of a causal language model cost.

FLOPs here are *model* FLOPs: two per multiply-add of every matrix product that the algorithm needs, on real tokens. Not
counted are padding, what a kernel recomputes on its own (flash attention runs its scores twice in backward, a fused
head its logits), element-wise work and embedding look-ups. Attention is counted under the causal mask: a query sees the
keys up to itself, ``S * (S + 1) / 2`` pairs for S tokens, half of the ``S * S`` that a profiler charges for a dense
mask. Gradient checkpointing is counted, since the configuration asks for it.

With N matmul parameters (body and head), L attention layers, d = query heads x head size, p prompt and c completion tokens,
S = p + c, the leading terms are: prefill ``2 N p + 2 L d p^2`` (once a prompt where its cache is shared), decode
``2 N c + 2 L d (S^2 - p^2)``, reference ``2 N S + 2 L d S^2``, forward the same, backward twice the forward; with LoRA
the frozen base gives back only the gradient of its inputs. The functions below keep the lower-order terms, which
matter for short sequences, and charge the head only for the rows that pass it, and where sampling cuts the support only for
the kept tokens of these rows: the others' logits are not needed.

Sources: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1; Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
Not covered: vision towers, and state updates of linear-attention layers (their projections are counted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide a model's FLOPs."""

    body_params: int
    """Matmul weights that every token passes, LoRA and head apart; of a mixture of experts the active ones."""
    head_params: int
    """Matmul weights of the language-model head, counted once also where they are tied to the embedding."""
    attention_layers: int
    """L: layers with causal attention over the whole context."""
    attention_dim: int
    """d: query heads times head size (grouped keys and values change the projections, not the scores)."""
    hidden_size: int
    """H."""
    vocab_size: int
    """V."""
    lora_params: int = 0
    """LoRA weights; above 0 the base counts as frozen."""
    sliding_layers: int = 0
    """Layers whose queries see only the last ``sliding_window`` keys."""
    sliding_window: int = 0
    """Keys that a sliding layer's query sees."""

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> Self:
        """Reads the sizes of a Hugging Face causal language model.

        A matmul weight is any parameter of two or more dimensions outside an embedding. Weights stacked by expert, or kept in
        a list named ``experts``, count by the share ``num_experts_per_tok / number of experts``. PEFT's ``lora_`` weights are
        counted apart. Call it before weights are sharded.

        Raises:
            ValueError: the model has no head or its configuration names no size of the attention.
        """
        find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings; pass a causal language model")
        whole: Any = model.config
        config = whole.get_text_config()
        body, lora, head_params = _count_matmul_params(model, head, config)
        full, sliding, window = _attention_layers(config)
        return cls(
            body_params=body,
            head_params=head_params,
            attention_layers=full,
            attention_dim=_attention_dim(config),
            hidden_size=_config_int(config, "hidden_size"),
            vocab_size=_config_int(config, "vocab_size"),
            lora_params=lora,
            sliding_layers=sliding,
            sliding_window=window,
        )


def _config_int(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(f"the configuration {type(config).__name__} has none of {', '.join(names)}; build ModelShape by hand")


def _attention_dim(config: Any) -> int:
    heads = _config_int(config, "num_attention_heads")
    value_dim = getattr(config, "v_head_dim", None)
    rope_dim = getattr(config, "qk_rope_head_dim", None)
    if value_dim is not None and rope_dim is not None:  # multi-head latent attention: scores and values differ in size
        return int(heads * (config.qk_nope_head_dim + rope_dim + value_dim) // 2)
    head_dim = getattr(config, "head_dim", None)
    return heads * int(head_dim) if head_dim else _config_int(config, "hidden_size")


def _attention_layers(config: Any) -> tuple[int, int, int]:
    layers = _config_int(config, "num_hidden_layers")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        windowed = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"] * layers
    sliding = sum(kind in {"sliding_attention", "chunked_attention"} for kind in kinds)
    full = sum(kind in {"full_attention", "attention"} for kind in kinds)
    if not sliding:
        return full, 0, 0
    return full, sliding, _config_int(config, "sliding_window", "attention_chunk_size")


def _count_matmul_params(model: torch.nn.Module, head: torch.nn.Module, config: Any) -> tuple[int, int, int]:
    """Weights of body, LoRA and head."""
    experts = next((n for k in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, k, None))), 1)
    share = int(getattr(config, "num_experts_per_tok", None) or experts) / experts
    in_head = {id(module) for module in head.modules()}
    counts = {"body": 0.0, "lora": 0.0, "head": 0.0}
    for path, module in model.named_modules():
        if hasattr(module, "num_embeddings") or "lora_embedding" in path:
            continue
        kind = "lora" if "lora_" in path else "head" if id(module) in in_head else "body"
        expert_share = share if ".experts." in f".{path}." else 1.0
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and hasattr(module, "in_features"):  # quantised weights are packed: trust the layer's sizes
            counts[kind] += expert_share * int(module.in_features) * int(module.out_features)
            continue
        for weight in own.values():
            stacked = weight.dim() > 2 and weight.shape[0] == experts
            counts[kind] += weight.numel() * (share if stacked else expert_share) if weight.dim() > 1 else 0
    return round(counts["body"]), round(counts["lora"]), round(counts["head"])


def causal_pairs(lengths: Sequence[int], *, window: int = 0) -> int:
    """Query-key pairs that a causal mask lets through, summed over sequences.

    Args:
        lengths: tokens of each sequence.
        window: keys that a query sees at most, itself included; 0 means all.
    """
    if not window:
        return (sum(n * n for n in lengths) + sum(lengths)) // 2
    return sum(m * (m + 1) // 2 + (n - m) * m for n in lengths for m in (min(n, window),))


def _attention_flops(shape: ModelShape, lengths: Sequence[int]) -> int:
    """Scores and their product with the values, ``4 d`` a pair and layer."""
    pairs = shape.attention_layers * causal_pairs(lengths)
    if shape.sliding_layers:
        pairs += shape.sliding_layers * causal_pairs(lengths, window=shape.sliding_window)
    return 4 * shape.attention_dim * pairs


def _head_flops(shape: ModelShape, head_rows: int, num_kept: int | None) -> int:
    return 2 * shape.head_params * head_rows if num_kept is None else 2 * shape.head_params * num_kept // shape.vocab_size


def forward_flops(shape: ModelShape, lengths: Sequence[int], head_rows: int, num_kept: int | None = None) -> int:
    """The policy's forward pass, LoRA included.

    Args:
        shape: the model.
        lengths: tokens of each sequence, prompt and completion together.
        head_rows: positions that pass the head; the trainer sends only those whose next token is scored.
        num_kept: tokens that sampling kept for these positions, all together; ``None``: the whole vocabulary for each.
    """
    linear = 2 * (shape.body_params + shape.lora_params) * sum(lengths) + _head_flops(shape, head_rows, num_kept)
    return linear + _attention_flops(shape, lengths)


def backward_flops(
    shape: ModelShape, lengths: Sequence[int], head_rows: int, num_kept: int | None = None, *, checkpointing: bool = False
) -> int:
    """The backward pass: gradients of inputs and of weights; arguments as in :func:`forward_flops`.

    Of a LoRA model the frozen base, head included, gives back the gradient of its inputs only. Attention has four products in
    backward for two in forward. With ``checkpointing`` the body's forward runs once more (the head lies outside).
    """
    tokens = sum(lengths)
    inputs = 2 * (shape.body_params + shape.lora_params) * tokens + _head_flops(shape, head_rows, num_kept)
    weights = 2 * shape.lora_params * tokens if shape.lora_params else inputs
    recomputed = forward_flops(shape, lengths, 0) if checkpointing else 0
    return inputs + weights + 2 * _attention_flops(shape, lengths) + recomputed


def reference_flops(shape: ModelShape, lengths: Sequence[int], head_rows: int, num_kept: int | None = None) -> int:
    """A scoring pass without gradient, by the reference or the old policy: a forward of the base, LoRA left out."""
    return forward_flops(shape, lengths, head_rows, num_kept) - 2 * shape.lora_params * sum(lengths)


def prefill_flops(shape: ModelShape, prompt_lengths: Sequence[int]) -> int:
    """Reading the prompts; the head sees only each one's last token, from which the first sampled token falls out.

    Args:
        shape: the model.
        prompt_lengths: tokens of each prompt that is read; list a prompt G times where its cache is not shared.
    """
    return forward_flops(shape, prompt_lengths, len(prompt_lengths))


def decode_flops(shape: ModelShape, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> int:
    """Sampling after the prefill: c tokens take c - 1 passes of one token over a growing cache.

    Args:
        shape: the model.
        prompt_lengths: tokens of each of P prompts.
        completion_lengths: [P][G], tokens of each prompt's completions, end token included.
    """
    pairs = [(p, c) for p, row in zip(prompt_lengths, completion_lengths, strict=True) for c in row if c > 0]
    before, after = [p for p, _ in pairs], [p + c - 1 for p, c in pairs]
    passes = sum(after) - sum(before)
    return forward_flops(shape, after, passes) - forward_flops(shape, before, 0)
