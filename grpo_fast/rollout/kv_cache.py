"""A key-value cache that is allocated once, written in place and shrunk by moving rows.

transformers' ``DynamicCache`` concatenates, which allocates and copies the whole cache at every token. Here a step writes
only its own position, and attention reads a view. When sequences end, rows from the end of the batch move into their
places, so that a shrinking batch copies only what moves.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What models and their layers call the cache that they are given: the first since transformers 5.24, the second before."""


def cache_argument(model: PreTrainedModel) -> str:
    """Which of :data:`CACHE_ARGUMENTS` a model takes."""
    forward = getattr(model, "get_base_model", lambda: model)().forward  # peft's own passes on what it is given
    known = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), CACHE_ARGUMENTS[-1])


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer: [rows, key-value heads, capacity, head size], of which [n, ..., length] are in use."""

    def __init__(self, rows: int, capacity: int, like: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert like.keys is not None
        assert like.values is not None
        dtype = _attention_dtype(like.keys)
        self._key_buffer = like.keys.new_empty(rows, like.keys.shape[1], capacity, like.keys.shape[3], dtype=dtype)
        self._value_buffer = like.values.new_empty(rows, like.values.shape[1], capacity, like.values.shape[3], dtype=dtype)
        self._rows = rows
        self.length = 0
        self.dtype, self.device = dtype, like.keys.device
        self.is_initialized = True

    def fill(self, rows: slice, source: DynamicLayer, index: torch.Tensor) -> None:
        """Copies sequences ``index`` of a prefilled layer into ``rows``, from position 0."""
        assert source.keys is not None
        assert source.values is not None
        self.length = source.keys.shape[2]
        self._key_buffer[rows, :, : self.length] = source.keys[index]
        self._value_buffer[rows, :, : self.length] = source.values[index]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends positions to the rows in use and returns views of all keys and values."""
        start, self.length = self.length, self.length + key_states.shape[2]
        keys, values = self._key_buffer[: self._rows, :, : self.length], self._value_buffer[: self._rows, :, : self.length]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def append(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Makes room for a position; returns the whole of keys and of values, and where in them it is to be written."""
        self.length += 1
        return self._key_buffer, self._value_buffer, self.length - 1

    def move(self, source: torch.Tensor, target: torch.Tensor, num_rows: int) -> None:
        """Copies rows ``source`` over rows ``target`` and keeps the first ``num_rows``."""
        for buffer in (self._key_buffer, self._value_buffer):
            used = buffer[:, :, : self.length]
            used[target] = used[source]
        self._rows = num_rows

    def get_seq_length(self) -> int:
        """Positions in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a query of ``query_length`` positions meets."""
        return self.length + query_length, 0


class PreallocatedCache(Cache):
    """A layer of the above for each layer of a prefilled cache."""

    def __init__(self, rows: int, capacity: int, like: DynamicCache) -> None:
        self._owned = [PreallocatedLayer(rows, capacity, layer) for layer in attention_layers(like)]
        super().__init__(layers=list(self._owned))

    def fill(self, rows: slice, source: DynamicCache, index: torch.Tensor) -> None:
        """Copies sequences ``index`` of ``source`` into ``rows``, layer by layer."""
        for layer, prefilled in zip(self._owned, attention_layers(source), strict=True):
            layer.fill(rows, prefilled, index)

    def append(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Makes room for a position in one layer, see :meth:`PreallocatedLayer.append`."""
        return self._owned[layer].append()

    def move(self, source: torch.Tensor, target: torch.Tensor, num_rows: int) -> None:
        """Copies rows ``source`` over rows ``target`` and keeps the first ``num_rows``, layer by layer."""
        for layer in self._owned:
            layer.move(source, target, num_rows)


def _attention_dtype(keys: torch.Tensor) -> torch.dtype:
    """The type to which attention rounds keys under autocast, also after rotary embeddings: stored in it, they take half."""
    kind = keys.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype


def attention_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """Layers of a cache that transformers filled, all of them keeping every position."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert len(layers) == len(cache.layers)
    return layers
