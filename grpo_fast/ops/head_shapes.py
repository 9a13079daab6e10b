"""How a head is computed on each GPU, and in which tiles: a table of measurements, and defaults for the rest.

There are two tiers. Tier 1 multiplies by cuBLAS into a buffer of logits and goes over it with a kernel; tier 2
(:mod:`grpo_fast.ops.head_exp`) never writes logits. ``head_shapes.json`` holds what ``benchmarks/tune_head.py`` measured, one
entry an architecture, type, head and size of chunk. **Where nothing was measured tier 1 runs**, with the tile below kept for
whoever asks for tier 2: nobody is given kernels that no GPU of their kind has timed against cuBLAS.

The number of rows in the key is the most that a chunk may have, never how many it happens to have: a row must not change its
bits with the rows beside it.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any, NamedTuple

TABLE = "head_shapes.json"


class Tile(NamedTuple):
    """How a program of tier 2 works."""

    rows: int
    columns: int
    hidden: int
    """Depth of one step of the product."""
    splits: int
    """How often a tile is halved before its exponentials are taken: what is alive at once, and stored at once."""
    num_stages: int
    num_warps: int
    persistent: bool
    """Whether one program a multiprocessor walks all tiles, rather than one program a tile."""


class Key(NamedTuple):
    """The key of a choice."""

    arch: int
    """Compute capability times ten."""
    dtype: str
    """``bfloat16``, ``float16`` or ``float32``: of hidden rows and weight."""
    hidden: int
    vocab: int
    rows: int
    """The most rows of a chunk."""
    plain: bool
    """Whether the head has neither softcap nor bias."""


class Choice(NamedTuple):
    """The implementation to run."""

    tier: int
    """1 or 2."""
    tile: Tile
    """Of tier 2."""
    measured: bool
    """Whether a measurement says so."""


_TENSOR_MEMORY = range(90, 110)
"""Architectures whose programs have 227 KiB of shared memory and copy whole tiles; consumer cards from 120 on do not."""


def copies_tiles(arch: int) -> bool:
    """Whether tensor descriptors are used: where a program has room for a pipeline of large tiles."""
    return arch in _TENSOR_MEMORY


def default_tile(arch: int, *, wide: bool, aligned: bool) -> Tile:
    """The tile where nothing was measured: large, and without spilled registers (``benchmarks/results/aot.json``).

    Args:
        arch: compute capability times ten.
        wide: whether registers are left for a wide tile: for bfloat16, whose E is, under neither softcap nor bias.
        aligned: whether rows of every operand begin at multiples of 16 bytes, as tensor descriptors and wide loads want.
    """
    if copies_tiles(arch) and arch >= 100:
        # Triton 3.9 cannot compile a capped tile that is halved out of tensor memory; 3.6 and 3.7 spill with a fourth stage.
        return Tile(128, 64, 64, splits=0, num_stages=3, num_warps=8, persistent=aligned)
    if not aligned:
        return Tile(128, 128, 32, splits=1, num_stages=3, num_warps=8, persistent=False)
    if not copies_tiles(arch):
        return Tile(128, 128, 64, splits=1, num_stages=3, num_warps=8, persistent=False)
    if wide:
        return Tile(128, 256, 64, splits=3, num_stages=4, num_warps=8, persistent=True)
    return Tile(128, 128, 64, splits=2, num_stages=4, num_warps=8, persistent=True)


def choose(key: Key) -> Choice:
    """The choice for ``key``: that measured for the same head with the most similar chunk size, or the default."""
    same = [entry for entry in _measured() if key_of(entry)._replace(rows=key.rows) == key]
    if not same:
        wide = key.plain and key.dtype == "bfloat16"
        return Choice(1, default_tile(key.arch, wide=wide, aligned=True), measured=False)
    best = min(same, key=lambda entry: (abs(math.log(entry["rows"] / max(1, key.rows))), entry["rows"]))
    return Choice(best["tier"], Tile(*best["tile"]), measured=True)


def key_of(entry: dict[str, Any]) -> Key:
    """The key of an entry of the table."""
    return Key(*(entry[name] for name in Key._fields))


@functools.cache
def _measured() -> tuple[dict[str, Any], ...]:
    text = resources.files("grpo_fast.ops").joinpath(TABLE).read_text(encoding="utf-8")
    return tuple(json.loads(text)["measured"])
