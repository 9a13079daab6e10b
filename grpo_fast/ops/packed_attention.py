"""Causal attention over sequences that lie one after the other in a row, none seeing another, at no cost for padding.

    out_t = sum_s softmax_s(scale * q_t k_s) v_s,   s in the own sequence, s <= t, and t - s < window where there is one

With a shared prompt, a completion's own sequence is the prompt, which lies in the row once, and then itself.

A mask of T x T would cost what attention inside sequences saves. On a GPU in half precision, torch's variable-length kernel
takes the row as it is. Elsewhere, sequences of similar length are laid side by side on padded slots, one call of torch's fused
attention for each such bucket: padding stands on the right, where a causal query never looks, so that no mask is read either.
Only attention pays for those slots; projections, norms and the MLP see real tokens alone. Rows are moved by one gather in each
direction, and each is the other's backward pass, so that no gradient is added up in an order of chance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

_SHORTEST_BUCKET = 32
"""Tokens under which a further call costs more than the padding that it saves."""
_LEAST_SHARE = 0.75
"""A bucket's shortest sequence, as a share of its longest: padding adds at most a third to a bucket's slots."""


class Piece(NamedTuple):
    """Tokens of one sequence that lie together in the row."""

    start: int
    length: int
    prompt_start: int = 0
    prompt_length: int = 0
    """Tokens elsewhere in the row that the piece continues; 0 where it is a whole sequence."""


class _Bucket(NamedTuple):
    num_rows: int
    width: int
    prompt: slice | None
    """Where the prompt lies that every row continues."""


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where T tokens lie: which pieces there are, and which slots of which bucket they take."""

    pieces: tuple[Piece, ...]
    buckets: tuple[_Bucket, ...]
    slots: torch.Tensor
    """int64 [slots] the token of each slot; 0 on padding."""
    place: torch.Tensor
    """int64 [T] the slot of each token."""
    padding: torch.Tensor | None
    """bool [slots, 1, 1], true where there is no token; ``None`` where every slot has one."""
    in_order: bool
    """Whether slots are the tokens as they lie, so that nothing is moved."""
    cu_seqlens: torch.Tensor
    """int32 [pieces + 1] where each piece begins."""
    max_seqlen: int
    """Tokens of the longest piece."""
    prompts: tuple[slice, ...]
    """Where the prompts lie that pieces continue, in the order of the row."""

    @property
    def shares_prompts(self) -> bool:
        """Whether a piece continues another."""
        return bool(self.prompts)


def packed_layout(pieces: Sequence[Piece], *, device: torch.device) -> PackedLayout:
    """Lays pieces out.

    Args:
        pieces: in the order of the row, which they fill without gaps.
        device: where attention will run.

    Raises:
        ValueError: there is no piece, or one is empty, leaves a gap, or continues tokens that do not lie before it; or prompts
            overlap.
    """
    if not pieces:
        raise ValueError("there are no pieces; attention needs a row of at least one token")
    ends = list(accumulate((piece.length for piece in pieces), initial=0))
    for number, (piece, begin) in enumerate(zip(pieces, ends, strict=False)):
        if piece.length < 1 or piece.start != begin:
            raise ValueError(f"piece {number} is {piece}, but must begin at {begin} and have at least one token")
        if piece.prompt_length and not 0 <= piece.prompt_start <= piece.prompt_start + piece.prompt_length <= begin:
            raise ValueError(f"piece {number} is {piece}: its prompt does not lie before it")
    spans = sorted({(piece.prompt_start, piece.prompt_start + piece.prompt_length) for piece in pieces if piece.prompt_length})
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            raise ValueError(f"prompts at {one} and at {other} overlap; let pieces continue the same or prompts that lie apart")
    buckets: list[_Bucket] = []
    slots: list[int] = []
    place, empty = [0] * ends[-1], list[int]()
    for rows in _bucket_rows(pieces):
        first, width = pieces[rows[0]], pieces[rows[0]].length
        prompt = slice(first.prompt_start, first.prompt_start + first.prompt_length) if first.prompt_length else None
        buckets.append(_Bucket(len(rows), width, prompt))
        for row in rows:
            start, length = pieces[row].start, pieces[row].length
            place[start : start + length] = range(len(slots), len(slots) + length)
            empty.extend(range(len(slots) + length, len(slots) + width))
            slots.extend([*range(start, start + length), *[0] * (width - length)])
    padding = None
    if empty:
        padding = torch.zeros(len(slots), 1, 1, dtype=torch.bool)
        padding[empty] = True
        padding = padding.to(device)
    return PackedLayout(
        pieces=tuple(pieces),
        buckets=tuple(buckets),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        place=torch.tensor(place, dtype=torch.int64, device=device),
        padding=padding,
        in_order=slots == list(range(ends[-1])),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
        max_seqlen=max(piece.length for piece in pieces),
        prompts=tuple(slice(*span) for span in spans),
    )


def _bucket_rows(pieces: Sequence[Piece]) -> list[list[int]]:
    """Pieces that share a call: those of one prompt, or whole sequences, of similar length."""
    order = sorted(
        range(len(pieces)), key=lambda i: (pieces[i].prompt_length > 0, pieces[i].prompt_start, -pieces[i].length, i)
    )
    result: list[list[int]] = []
    for index in order:
        piece = pieces[index]
        widest = pieces[result[-1][0]] if result else piece
        alike = (piece.prompt_start, piece.prompt_length) == (widest.prompt_start, widest.prompt_length)
        if result and alike and piece.length >= min(_LEAST_SHARE * widest.length, widest.length - _SHORTEST_BUCKET):
            result[-1].append(index)
        else:
            result.append([index])
    return result


class _ToSlots(torch.autograd.Function):
    """[T, heads, head size] to [slots, heads, head size]; what stands on padding is of no meaning."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.slots)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.layout.place), None  # padding gets no gradient: no real query sees it


class _FromSlots(torch.autograd.Function):
    """Back again."""

    @staticmethod
    def forward(ctx: Any, slots: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return slots.index_select(0, layout.place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        spread = gradient.index_select(0, ctx.layout.slots)
        return spread if ctx.layout.padding is None else spread.masked_fill_(ctx.layout.padding, 0.0), None


class Scores(NamedTuple):
    """How scores are made."""

    scale: float
    window: int | None = None
    """Keys that a query sees at most, itself included."""
    softcap: float | None = None
    """Scores s become ``softcap * tanh(s / softcap)``."""


def packed_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """The specification: one softmax over a masked square of T x T; arguments as in :func:`packed_attention`."""
    owner = torch.zeros(len(query), len(query), dtype=torch.bool, device=query.device)
    position = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    for start, length, prompt_start, prompt_length in layout.pieces:
        owner[start : start + length, start : start + length] = True
        owner[start : start + length, prompt_start : prompt_start + prompt_length] = True
        position[start : start + length] = torch.arange(prompt_length, prompt_length + length, device=query.device)
    distance = position[:, None] - position
    seen = owner & (distance >= 0)
    if scores.window is not None:
        seen &= distance < scores.window
    q, k, v = (side.transpose(0, 1)[None] for side in (query, key, value))
    return _plain(q, k, v, seen, scores)[0].transpose(0, 1)


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scores: Scores) -> torch.Tensor:
    """[rows, heads, queries, head size], with scores in memory: for what torch's fused attention does not know."""
    groups = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    weights = (query @ key.transpose(2, 3)) * scores.scale
    if scores.softcap is not None:
        weights = (weights / scores.softcap).tanh() * scores.softcap
    weights = weights.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return weights.to(query.dtype) @ value


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [queries, keys]; the last query stands at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < (window or keys))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
    """One bucket, [rows, heads, width, head size]."""
    queries, keys = query.shape[2], key.shape[2]
    windowed = scores.window is not None and scores.window < keys
    if scores.softcap is not None:
        return _plain(query, key, value, _seen(queries, keys, scores.window if windowed else None, query.device), scores)
    mask: Any = None
    if windowed or (queries != keys and not query.is_cuda):
        mask = _seen(queries, keys, scores.window if windowed else None, query.device)
    elif queries != keys:  # CUDA's kernels need no mask for it; elsewhere it becomes one, and dispatch modes refuse its kind
        mask = causal_lower_right(queries, keys)
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=shared
    )


def _prompts(side: torch.Tensor, layout: PackedLayout) -> dict[int, torch.Tensor]:
    """The prompts that pieces continue, by where they begin."""
    edges = [0, *(edge for prompt in layout.prompts for edge in (prompt.start, prompt.stop)), len(side)]
    parts = side.split([after - before for before, after in pairwise(edges)])
    return {prompt.start: part for prompt, part in zip(layout.prompts, parts[1::2], strict=True)}


def _bucketed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    sides = [query, key, value]
    if not layout.in_order:
        sides = [_ToSlots.apply(side, layout) for side in sides]  # type: ignore[no-untyped-call]
    # in one split of a side: each slice's backward pass would fill a whole row with zeros and add it to the others'
    in_buckets = [side.split([num_rows * width for num_rows, width, _ in layout.buckets]) for side in sides]
    prompts = [_prompts(side, layout) if layout.shares_prompts else {} for side in (key, value)]
    done = []
    for (num_rows, width, prompt), *parts in zip(layout.buckets, *in_buckets, strict=True):
        rows = [part.unflatten(0, (num_rows, width)) for part in parts]
        if prompt is not None:
            for at, known in enumerate(prompts, 1):
                rows[at] = torch.cat((known[prompt.start].expand(num_rows, -1, -1, -1), rows[at]), dim=1)
        q, k, v = (side.transpose(1, 2) for side in rows)
        out = _attend(q, k, v, scores)
        done.append(out.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(done) if len(done) > 1 else done[0]
    if not layout.in_order:
        joined = _FromSlots.apply(joined, layout)  # type: ignore[no-untyped-call]
    return joined


def _fits_varlen(query: torch.Tensor, layout: PackedLayout, scores: Scores) -> bool:
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    whole = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return half and whole and scores.softcap is None and not layout.shares_prompts


@functools.cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (torch builds without flash attention cannot import it)

    # torch 2.11 has no word for key-value heads that are shared: its kernel takes them as they come
    shared: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _keywords(varlen_attn) else {}
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.max_seqlen,
        layout.max_seqlen,
        scale=scores.scale,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        **shared,
    )
    assert isinstance(out, torch.Tensor)
    return out


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """Attention of packed sequences, each alone.

    Args:
        query: [T, heads, head size].
        key: [T, key-value heads, head size]; their number divides that of the heads.
        value: as ``key``.
        layout: from :func:`packed_layout`.
        scores: how scores are made.

    Returns:
        [T, heads, head size]; differentiable.

    Raises:
        ValueError: the layout is of another number of tokens.
    """
    if len(query) != len(layout.place):
        raise ValueError(f"{len(query)} queries for a layout of {len(layout.place)} tokens")
    run = _varlen if _fits_varlen(query, layout, scores) else _bucketed
    return run(query, key, value, layout, scores)
