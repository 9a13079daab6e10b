"""What a forward pass keeps for its backward pass: activation memory of a decoder, by the way it is checkpointed.

Counted, per token, is what autograd saves of a pre-norm decoder layer of transformers with RMSNorm and a gated MLP (Llama,
Qwen2, Mistral, SmolLM2) whose sequences are packed, H hidden, I intermediate, h query and k key-value heads of size D:

    two norms        their input and their normalised input                  4 H      in the residual stream's type
    projections      what the norms give, for q, k, v and for the MLP             2 H, under autocast 5 H
    attention        q, k, v, the output, and that as the projection reads it     (3 h + 2 k) D, and h sums in float32
    gated MLP        both projections, the activation, the product                4 I

Under autocast the residual stream stays float32 while what the products read is bfloat16: each of the five projections after
a norm has a copy of its own, and so has each weight. Checkpointed, a layer keeps its input (``full``), or that and what its
matrix products and its attention gave (``selective``), and one layer at a time is had again in the backward pass. On top
come the embedding, the last norm and the tables of rotary positions; the head's part is the loss's, in ``ops``.
Not counted: weights, gradients, work space within an op, the padded slots of attention, mixtures of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeAlias

Checkpointing: TypeAlias = Literal["none", "full", "selective"]


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of a decoder that decide its activations."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Reads the sizes of a Hugging Face configuration.

        Raises:
            ValueError: it names no size of a gated MLP, or counts experts.
        """
        text = config.get_text_config()
        if not getattr(text, "intermediate_size", None) or getattr(text, "num_experts_per_tok", None):
            raise ValueError(f"{type(config).__name__} is no decoder with one gated MLP a layer; its activations are not known")
        heads = int(text.num_attention_heads)
        return cls(
            num_layers=int(text.num_hidden_layers),
            hidden_size=int(text.hidden_size),
            intermediate_size=int(text.intermediate_size),
            num_heads=heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        )


class ActivationBytes(NamedTuple):
    """Memory of one micro-batch's activations."""

    kept: int
    """Bytes from the forward pass to the backward pass."""
    recomputed: int
    """Bytes of the one layer that the backward pass has computed again at any time."""

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.kept + self.recomputed


def activation_bytes(
    sizes: LayerSizes, num_tokens: int, *, checkpointing: Checkpointing = "none", autocast: bool = False
) -> ActivationBytes:
    """Predicts the activations of a micro-batch, head and loss apart.

    Args:
        sizes: of the model.
        num_tokens: positions that the model computes.
        checkpointing: what layers keep.
        autocast: whether products are in bfloat16 over a float32 residual stream; everything is float32 otherwise.
    """
    stream, product, inputs = (4, 2, 5) if autocast else (4, 4, 2)
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    per_token = stream * 4 * hidden + product * (inputs * hidden + 3 * queries + 2 * keys + 4 * inner) + 4 * sizes.num_heads
    weights = product * hidden * (2 * queries + 2 * keys + 3 * inner) if autocast else 0
    layer = per_token * num_tokens + weights
    ends = stream * (3 * hidden + 2 * sizes.head_dim) * num_tokens
    if checkpointing == "none":
        return ActivationBytes(sizes.num_layers * layer + ends, 0)
    kept = stream * hidden
    if checkpointing == "selective":
        kept += product * (2 * queries + 2 * keys + 2 * hidden + 2 * inner) + 4 * sizes.num_heads
    return ActivationBytes(sizes.num_layers * kept * num_tokens + ends, layer)
