"""A token a row through a whole decoder layer of the Llama kind, by the compiled extension: for a few rows on a CPU.

Such a step is bound by reading the weights. The extension reads each once, as it lies, fetching ahead what comes next, and does
what stands between the products without torch's some 25 small operations a layer. On an Intel Xeon (2 cores, AVX-512,
torch 2.13, November 2026) 64 tokens of 8 sequences of SmolLM2-135M take 2.5 s in place of 5.8 s; the products alone are in
benchmarks/rollout/few_rows.py. float32 only, no gradients, processors with AVX-512.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from grpo_fast.ops import native

MOST_NUMBERS = 40_000
"""Rows times hidden size up to which it is the faster way: on that Xeon 1.5 times with 32 rows of SmolLM2-135M's 576, 1.2 with
64 and as fast with 96; with rows of 128, 1.4 times with 256 and 1.1 with 512. Beyond, torch's libraries multiply faster."""


class LayerWeights(NamedTuple):
    """What a layer holds, all float32."""

    norms: list[torch.Tensor]
    """RMSNorm before attention and before the MLP, [H] each; where queries and keys have them, also theirs, [D] each."""
    epsilons: list[float]
    """Of these norms."""
    weights: list[torch.Tensor]
    """Query, key, value, output, gate, up and down, [out, in] each."""
    biases: list[torch.Tensor]
    """Of these, [out] each; [0] where there is none."""
    scale: float
    """What scores are multiplied with."""
    lora_a: Sequence[torch.Tensor] = ()
    """What adapters over these weights narrow their inputs with, [r, in] each; [0] where there is none."""
    lora_b: Sequence[torch.Tensor] = ()
    """What is added then, the scaling within, [out, r] each; [0] where there is none."""


class LayerCache(NamedTuple):
    """Keys and values of one layer: of U prompts, and of the completions that share them."""

    source: torch.Tensor
    """int64 [n], which prompt each row continues."""
    padding: torch.Tensor
    """int64 [U], positions at the left of a prompt that are not seen."""
    prefix_keys: torch.Tensor
    """float32 [U, key-value heads, W, D]."""
    prefix_values: torch.Tensor
    """As ``prefix_keys``."""
    keys: torch.Tensor
    """float32 [n or more, key-value heads, capacity, D], of the completions; grows by one position."""
    values: torch.Tensor
    """As ``keys``."""
    position: int
    """Where in ``keys`` and ``values`` the new position goes; those before it are seen."""


def problem() -> str:
    """Why there is no decoder layer on this machine, in words for people; empty where there is."""
    missing = native.load()
    if missing or native.has_kernel("decoder_layer", "CPU"):
        return missing
    return "this processor has no AVX-512, for which decoder layers are compiled"


def decoder_layer(hidden: torch.Tensor, layer: LayerWeights, cache: LayerCache, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Takes each row one token through a layer, in place; appends its key and value to the cache.

    Args:
        hidden: float32 [n, H]; becomes the layer's output.
        layer: the weights.
        cache: keys and values so far.
        cos: float32 [n, D], of each row's position.
        sin: float32 [n, D], the first half negated: what multiplies a head rolled by half.

    Raises:
        RuntimeError: a shape or type that does not fit, or no extension (:func:`problem`).
    """
    norms, epsilons, weights, biases, scale, *adapters = layer
    native.call("decoder_layer", hidden, norms, epsilons, weights, biases, *adapters, cos, sin, *cache, scale)


def few_rows_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows`` times the transpose of ``weight``, where rows are few; no gradient is kept.

    Args:
        rows: float32 [n, in].
        weight: float32 [out, in].
        bias: float32 [out].

    Returns:
        float32 [n, out]. A row's bits do not depend on the rows beside it.

    Raises:
        RuntimeError: a shape or type that does not fit, or no extension (:func:`problem`).
    """
    result: torch.Tensor = native.call("few_rows_product", rows, weight, bias)
    return result
