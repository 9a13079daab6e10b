"""Triton kernels of the head's one-pass product, see :mod:`grpo_fast.ops.head_exp`.

A program of ``_head_exp_fwd_kernel`` makes tiles of C rows by V columns, one after the other. Tiles that follow one another
share rows and columns of the head, so that panels of both stay in L2. Logits live in registers only: a tile leaves E, and for
each of its rows a partial sum (two with entropy) that ``_head_exp_sum_kernel`` adds up. No atomics: every sum is taken in an
order that V and the tile's width fix, so a row's numbers do not depend on the rows beside it.

Products accumulate in float32, and everything after them is float32 too.
"""

# ruff: noqa: PLR0913, PLR0917, RUF005

from __future__ import annotations

from typing import no_type_check

from grpo_fast.ops.jit import bfloat16_of, jit, tl


@jit
@no_type_check
def _capped(u, inner, outer, SOFTCAP: tl.constexpr):
    """Z of ``u = h W^T + b``, right to 1e-7 of a cap, and a softcap's derivative, right to some ulp where it is small too."""
    x = u * inner
    if SOFTCAP:
        decay = tl.exp2(tl.abs(x) * -2.885390081777927)
        share = 1.0 / (1.0 + decay)
        size = (1.0 - decay) * share * outer
        return tl.where(x < 0, -size, size), 4.0 * decay * share * share
    return x, x


@jit
@no_type_check
def _finished(u, bias_ptr, columns, inside, numbers, SOFTCAP: tl.constexpr, ROUNDED: tl.constexpr):
    """Z and a softcap's derivative from products ``u``; ``columns`` has the shape of ``u`` or one row of it."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        # A finite floor for -inf: 0·(-inf) in the entropy would be NaN. Scaling keeps it finite.
        u += tl.where(bias < -3.4e32, -3.4e32, bias)
    if ROUNDED:
        u = bfloat16_of(u)
    return _capped(u, numbers[0], numbers[1], SOFTCAP)


@jit
@no_type_check
def _exponentials(z, gate, columns, inside, targets, ref, GATED: tl.constexpr):
    """E for the sums, E as it is stored, and the distance from the reference."""
    distance = z - ref
    kept = inside & (columns != targets)
    exp = tl.where(kept, tl.exp2(distance * 1.4426950408889634), 0.0)
    if GATED:
        return exp, tl.where(kept, exp * gate, 0.0), distance
    return exp, exp, distance


@jit
@no_type_check
def _halves(tiles):
    """Cuts each tile of a tuple into its left and its right half, which are other registers of the same threads."""
    result = ()
    for index in tl.static_range(len(tiles)):
        tile = tiles[index]
        left, right = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))
        result = result + (left, right)
    return result


@jit
@no_type_check
def _products(
    rows_in,
    weight_in,
    row,
    column,
    sizes,
    strides,
    DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """A tile of ``h W^T``."""
    num_rows, vocab, hidden = sizes
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if DESCRIPTORS:
        for k in range(0, hidden, BLOCK_HIDDEN):
            acc = tl.dot(rows_in.load([row, k]), weight_in.load([column, k]).T, acc, input_precision="ieee")
    else:
        # Outside of both, the last row there is: a mask would cost registers in the loop, and nothing of it is kept.
        rows = tl.minimum(row + tl.arange(0, BLOCK_ROWS), num_rows - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, BLOCK_COLUMNS), vocab - 1).to(tl.int64)
        depth = tl.arange(0, BLOCK_HIDDEN)
        left_ptrs = rows_in + rows[:, None] * strides[0] + depth[None, :]
        right_ptrs = weight_in + columns[None, :] * strides[1] + depth[:, None]
        for k in range(0, hidden, BLOCK_HIDDEN):
            left = tl.load(left_ptrs, mask=depth[None, :] < hidden - k, other=0.0)
            right = tl.load(right_ptrs, mask=depth[:, None] < hidden - k, other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
            left_ptrs += BLOCK_HIDDEN
            right_ptrs += BLOCK_HIDDEN
    return acc


@jit
@no_type_check
def _store_tile(exp_out, exp, row, column, sizes, stride, DESCRIPTORS: tl.constexpr):
    if DESCRIPTORS:
        exp_out.store([row, column], exp.to(exp_out.dtype))
    else:
        rows, columns = row + tl.arange(0, exp.shape[0])[:, None], column + tl.arange(0, exp.shape[1])[None, :]
        inside = (rows < sizes[0]) & (columns < sizes[1])
        tl.store(exp_out + rows.to(tl.int64) * stride + columns, exp.to(exp_out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("num_rows",))
@no_type_check
def _head_exp_fwd_kernel(
    rows_in,
    weight_in,
    exp_out,
    bias_ptr,
    targets_ptr,
    ref_ptr,
    others_ptr,
    weighted_ptr,
    num_rows,
    vocab,
    hidden,
    exp_columns,
    rows_stride,
    weight_stride,
    exp_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    PART: tl.constexpr = BLOCK_COLUMNS // 2**SPLITS
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(vocab, BLOCK_COLUMNS)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        first = tile // (GROUP * column_tiles) * GROUP
        height = tl.minimum(row_tiles - first, GROUP)
        within = tile % (GROUP * column_tiles)
        row, column_tile = (first + within % height) * BLOCK_ROWS, within // height
        column = column_tile * BLOCK_COLUMNS
        sizes, strides = (num_rows, vocab, hidden), (rows_stride, weight_stride)
        acc = _products(rows_in, weight_in, row, column, sizes, strides, DESCRIPTORS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_HIDDEN)
        rows = row + tl.arange(0, BLOCK_ROWS)
        real = rows < num_rows
        targets = tl.load(targets_ptr + rows, mask=real, other=-1).to(tl.int32)[:, None]
        ref = tl.load(ref_ptr + rows, mask=real, other=0.0)[:, None]
        others, weighted = tl.zeros((BLOCK_ROWS,), tl.float32), tl.zeros((BLOCK_ROWS,), tl.float32)
        # Part after part, each down to its sums: a whole tile of E and distances at once would not fit into registers.
        parts = (acc,)
        for _ in tl.static_range(SPLITS):
            parts = _halves(parts)
        for index in tl.static_range(2**SPLITS):
            begin = column + index * PART
            columns = begin + tl.arange(0, PART)[None, :]
            inside = columns < vocab
            z, gate = _finished(parts[index], bias_ptr, columns, inside, (inner, outer), SOFTCAP, ROUNDED)
            exp, stored, distance = _exponentials(z, gate, columns, inside, targets, ref, GATED)
            others += tl.sum(exp, axis=1)
            if weighted_ptr is not None:
                weighted += tl.sum(exp * distance, axis=1)
            if exp_out is not None:
                _store_tile(exp_out, stored, row, begin, (num_rows, exp_columns), exp_stride, DESCRIPTORS)
        offsets = column_tile.to(tl.int64) * num_rows + rows
        tl.store(others_ptr + offsets, others, mask=real)
        if weighted_ptr is not None:
            tl.store(weighted_ptr + offsets, weighted, mask=real)


@jit(do_not_specialize=("num_rows", "num_parts"))
@no_type_check
def _head_exp_sum_kernel(parts_ptr, out_ptr, num_rows, num_parts, BLOCK_PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Adds up the parts [parts, C] of each row, of the kind of sum that the second index names."""
    kind = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = rows < num_rows
    # One tree over many short sums: a single running sum of a whole vocabulary is some ulp off.
    total = tl.zeros((BLOCK_PARTS, BLOCK_ROWS), tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        parts = start + tl.arange(0, BLOCK_PARTS)
        offsets = (kind * num_parts + parts)[:, None] * num_rows + rows[None, :]
        total += tl.load(parts_ptr + offsets, mask=(parts < num_parts)[:, None] & real[None, :], other=0.0)
    tl.store(out_ptr + kind * num_rows + rows, tl.sum(total, axis=0), mask=real)


@jit
@no_type_check
def _head_target_kernel(
    rows_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    out_ptr,
    vocab,
    hidden,
    rows_stride,
    weight_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a row: the logit of its target; NaN where that is no token."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    known = (target >= 0) & (target < vocab)
    width = tl.where(known, hidden, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(rows_ptr + row * rows_stride + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(weight_ptr + target * weight_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total += left * right
    z, _ = _finished(tl.sum(total, axis=0), bias_ptr, target, known, (inner, outer), SOFTCAP, ROUNDED)
    tl.store(out_ptr + row, tl.where(known, z, float("nan")))


@jit
@no_type_check
def _row_products(
    row_ptr, weight_ptr, columns, inside, hidden, stride, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr
):
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    depth = tl.arange(0, BLOCK_HIDDEN)
    for k in range(0, hidden, BLOCK_HIDDEN):
        there = k + depth < hidden
        left = tl.load(row_ptr + k + depth, mask=there, other=0.0).to(tl.float32)
        places = columns.to(tl.int64)[:, None] * stride + k + depth[None, :]
        right = tl.load(weight_ptr + places, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
        total += tl.sum(left[None, :] * right, axis=1)
    return total


@jit
@no_type_check
def _head_exp_again_kernel(
    rows_ptr,
    weight_ptr,
    exp_ptr,
    bias_ptr,
    targets_ptr,
    ref_ptr,
    sums_ptr,
    num_rows,
    vocab,
    hidden,
    exp_columns,
    rows_stride,
    weight_stride,
    exp_stride,
    inner,
    outer,
    largest_sum,
    SOFTCAP: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """A program takes a row: if its sum is too large, makes E and sums once more, from the row's largest logit."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(sums_ptr + row) > largest_sum:
        row_ptr = rows_ptr + row * rows_stride
        target = tl.load(targets_ptr + row).to(tl.int32)
        largest = tl.full((BLOCK_COLUMNS,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            inside = columns < vocab
            u = _row_products(row_ptr, weight_ptr, columns, inside, hidden, weight_stride, BLOCK_COLUMNS, BLOCK_HIDDEN)
            z, _ = _finished(u, bias_ptr, columns, inside, (inner, outer), SOFTCAP, ROUNDED)
            largest = tl.maximum(largest, tl.where(inside, z, float("-inf")))
        ref = tl.max(largest, axis=0)
        others, weighted = tl.zeros((BLOCK_COLUMNS,), tl.float32), tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for start in range(0, exp_columns, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            inside = columns < vocab
            u = _row_products(row_ptr, weight_ptr, columns, inside, hidden, weight_stride, BLOCK_COLUMNS, BLOCK_HIDDEN)
            z, gate = _finished(u, bias_ptr, columns, inside, (inner, outer), SOFTCAP, ROUNDED)
            exp, stored, distance = _exponentials(z, gate, columns, inside, target, ref, GATED)
            others += exp
            weighted += exp * distance
            if exp_ptr is not None:
                places = exp_ptr + row * exp_stride + columns
                tl.store(places, stored.to(exp_ptr.dtype.element_ty), mask=columns < exp_columns)
        tl.store(ref_ptr + row, ref)
        tl.store(sums_ptr + row, tl.sum(others, axis=0))
        if ENTROPY:
            tl.store(sums_ptr + num_rows + row, tl.sum(weighted, axis=0))
