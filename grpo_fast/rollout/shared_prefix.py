"""Attention over prompts kept once and completions that grow: the G completions of a prompt read its keys together.

A decoding step is bound by reading keys and values. Copying a prompt of W positions to its G completions makes a step read
``G * (W + t)`` positions; here it reads ``W + G * t``, and the prompt's part becomes one product with G rows instead of G
products with one. For one head of prompt u, queries ``q_1..q_G`` and own keys ``K_i`` of completion i:

    scores_i = [q_i K_u^T | q_i K_i^T] / sqrt(d),   p_i = softmax(scores_i),   out_i = p_i[:W] V_u + p_i[W:] V_i

Groups shrink unevenly when completions end. Queries are therefore gathered into [U, largest group] before the prompt's part
and scattered back after it; the empty places cost products, but no memory traffic. All in float32, for the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from grpo_fast.ops.decoder_layer import LayerCache
from grpo_fast.rollout.kv_cache import PreallocatedCache, attention_layers

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import DynamicCache


class SharedPrefixCache:
    """Keys and values of U prompts and of N completions.

    Args:
        source: int64 [N], which prompt each completion continues.
        padding: int64 [U], left-padded positions of each prompt.
        max_tokens: room of a completion.
        like: the prefilled cache of some of the prompts; gives layers, heads and width W.
    """

    def __init__(self, source: NDArray[np.int64], padding: NDArray[np.int64], *, max_tokens: int, like: DynamicCache) -> None:
        self._source, self._padding = source, padding
        self._own = PreallocatedCache(len(source), max_tokens, like)
        self._prefixes = []
        for layer in attention_layers(like):
            assert layer.keys is not None
            _, heads, width, size = layer.keys.shape
            self._prefixes.append([layer.keys.new_empty(len(padding), heads, width, size) for _ in range(2)])
        self._heads = heads
        self._width = width
        self._queries_a_head = 0

    def fill(self, prompts: slice, prefilled: DynamicCache) -> None:
        """Takes the keys and values of ``prompts``."""
        for prefix, layer in zip(self._prefixes, attention_layers(prefilled), strict=True):
            assert layer.keys is not None
            assert layer.values is not None
            prefix[0][prompts], prefix[1][prompts] = layer.keys, layer.values

    def move(self, source: torch.Tensor, target: torch.Tensor, num_rows: int) -> None:
        """Copies completions ``source`` over ``target``, keeps the first ``num_rows``, forgets prompts without any."""
        self._own.move(source, target, num_rows)
        moved = self._source.copy()
        moved[target.numpy()] = moved[source.numpy()]
        used, self._source = np.unique(moved[:num_rows], return_inverse=True)
        self._queries_a_head = 0
        if len(used) == len(self._prefixes[0][0]):
            return
        index = torch.from_numpy(used)
        self._prefixes = [[side[index] for side in prefix] for prefix in self._prefixes]
        self._padding = self._padding[used]

    def append(self, layer: int) -> LayerCache:
        """Makes room for a position of every completion in one layer; what the extension needs to fill it and to attend."""
        source, padding = torch.from_numpy(self._source), torch.from_numpy(self._padding)
        prefix_keys, prefix_values = self._prefixes[layer]
        return LayerCache(source, padding, prefix_keys, prefix_values, *self._own.append(layer))

    def _group(self, queries_a_head: int) -> None:
        """Works out where each query stands in [U, key-value heads, largest group, queries a head], and back; and the mask."""
        self._queries_a_head = queries_a_head
        counts = np.bincount(self._source)
        order = np.argsort(self._source, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        heads, largest = self._heads, counts.max()
        row, head, query = np.ogrid[: len(order), :heads, :queries_a_head]
        at = ((self._source[row] * heads + head) * largest + place[row]) * queries_a_head + query
        gather = np.zeros(len(counts) * heads * largest * queries_a_head, dtype=np.int64)
        gather[at] = (row * heads + head) * queries_a_head + query
        self._gather, self._scatter = torch.from_numpy(gather), torch.from_numpy(at.reshape(-1))
        hidden = torch.from_numpy(np.arange(self._width) < self._padding[:, None])
        blocked = torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
        self._mask = blocked.repeat_interleave(heads, dim=0)[:, None] if self._padding.any() else None

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Appends a position to every completion of one layer and attends from it.

        Args:
            layer: which layer.
            query: float32 [n, heads, head size].
            key: float32 [n, key-value heads, head size].
            value: as ``key``.
            scale: what scores are multiplied with.

        Returns:
            float32 [n, heads * head size].
        """
        count, _, size = query.shape
        keys, values = (side.flatten(0, 1) for side in self._own.update(key[:, :, None], value[:, :, None], layer))
        prefix_keys, prefix_values = (side.flatten(0, 1) for side in self._prefixes[layer])
        rows = query.reshape(count * self._heads, -1, size)
        if self._queries_a_head != rows.shape[1]:
            self._group(rows.shape[1])
        groups, width = len(prefix_keys), prefix_keys.shape[1]
        grouped = rows.view(-1, size).index_select(0, self._gather).view(groups, -1, size)
        none = rows.new_empty(1, 1, 1)
        added, beta = (none, 0) if self._mask is None else (self._mask, 1)
        shared = torch.baddbmm(added, grouped, prefix_keys.transpose(1, 2), beta=beta, alpha=scale)
        shared = shared.view(-1, width).index_select(0, self._scatter).view(len(rows), -1, width)
        own = torch.baddbmm(none, rows, keys.transpose(1, 2), beta=0, alpha=scale)
        probs = torch.cat((shared, own), dim=-1).softmax(-1)
        regrouped = probs.view(-1, probs.shape[-1])[:, :width].index_select(0, self._gather).view(groups, -1, width)
        mixed = torch.bmm(regrouped, prefix_values).view(-1, size).index_select(0, self._scatter)
        return torch.baddbmm(mixed.view_as(rows), probs[..., width:], values).view(count, -1)
