"""Triton kernels between the matrix products of the head, see :mod:`grpo_fast.ops.head_triton`.

The kernel of the logits reads each of them once, 4 bytes, and writes E once, 2 bytes (4 where E is float32). It can do so
because the reference is the target's own logit, which one load tells beforehand, where a maximum would take a pass. Only a row
with a logit more than ``MOST_OVER_TARGET`` nats over its target's is walked again, with that logit as its reference.

Sums are float32: each lane adds V / BLOCK values, then the lanes are added up as a tree. Every order is fixed by V, and no
row sees another.
"""

# ruff: noqa: PLR0124, PLR0913, PLR0917

from __future__ import annotations

from typing import no_type_check

from grpo_fast.ops.jit import bfloat16_of, jit, tl

MOST_OVER_TARGET = 16.0
"""Nats: a sampled token this far under the likeliest one is rare, and e^16 costs the exponential 1e-6 of its value."""


@jit
@no_type_check
def _tanh(x):
    """To two ulp: the form with e^2x loses small x, the series large ones."""
    size = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)
    square = size * size
    series = size + size * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    found = tl.where(size < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0))
    return tl.where(x < 0, -found, found)


@jit
@no_type_check
def _logits(row_ptr, bias_ptr, columns, inside, numbers, ROUNDED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits z of some columns of a row. ``numbers``: scale / temperature, scale / softcap, softcap / temperature."""
    slope, inner, cap = numbers
    z = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        # A finite floor for -inf: 0·(-inf) in the entropy would be NaN.
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        z += tl.maximum(bias, -3.4e32, propagate_nan=tl.PropagateNan.ALL)
    if ROUNDED:
        z = bfloat16_of(z)
    if SOFTCAP:
        return cap * _tanh(z * inner)
    return z * slope


@jit
@no_type_check
def _tile(
    row_ptr,
    bias_ptr,
    exp_ptr,
    columns,
    inside,
    target,
    reference,
    numbers,
    ROUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GATED: tl.constexpr,
):
    """Stores E of some columns of a row; returns E, 0 where the row has no such column, and z."""
    z = _logits(row_ptr, bias_ptr, columns, inside, numbers, ROUNDED, SOFTCAP)
    exp = tl.where(inside & (columns != target), tl.exp(z - reference), 0.0)
    if exp_ptr is not None:
        kept = exp
        if GATED:
            share = z / numbers[2]
            kept = exp * (1.0 - share * share)
        tl.store(exp_ptr + columns, kept.to(exp_ptr.dtype.element_ty), mask=inside)
    return exp, z


@jit
@no_type_check
def _row(
    row_ptr,
    bias_ptr,
    exp_ptr,
    target,
    reference,
    sizes,
    numbers,
    ROUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores E of a row; returns S_o, Σ E (z - peak) and the peak, the largest z.

    Each lane takes the second sum against the largest z it has seen, so that all its terms have one sign.
    """
    num_columns, num_sixteens = sizes
    # Whole sixteens first: a bound that is a multiple of 16 lets masked accesses be vectors. The few columns after it are last.
    bound = num_sixteens * 16
    others, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # In a row of NaN too, a number: maxima leave NaN out, and sums tell of it.
    lowest = tl.where(reference == reference, reference, -1e38)
    largest = tl.full((BLOCK,), 0.0, tl.float32) + lowest
    for start in range(0, bound, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < bound
        exp, z = _tile(row_ptr, bias_ptr, exp_ptr, columns, inside, target, reference, numbers, ROUNDED, SOFTCAP, GATED)
        larger = tl.maximum(largest, tl.where(inside, z, largest))
        weighted += exp * (z - larger) - others * (larger - largest)
        others += exp
        largest = larger
    columns = bound + tl.arange(0, 16)
    inside = columns < num_columns
    exp, z = _tile(row_ptr, bias_ptr, exp_ptr, columns, inside, target, reference, numbers, ROUNDED, SOFTCAP, GATED)
    peak = tl.maximum(tl.max(largest, axis=0), tl.max(tl.where(inside, z, lowest), axis=0))
    return (
        tl.sum(others, axis=0) + tl.sum(exp, axis=0),
        tl.sum(weighted + others * (largest - peak), axis=0) + tl.sum(exp * (z - peak), axis=0),
        peak,
    )


@jit(do_not_specialize=("num_columns", "num_sixteens", "statistics_stride"))
@no_type_check
def _head_rows_fwd_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    exp_ptr,
    statistics_ptr,
    logits_stride,
    exp_stride,
    statistics_stride,
    num_columns,
    num_sixteens,
    slope,
    inner,
    cap,
    limit,
    ROUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a row of ``h W^T``: stores E, and ref, z_y, S_o, Q_o and the peak; NaN for a target that is no token."""
    numbers, sizes = (slope, inner, cap), (num_columns, num_sixteens)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    if exp_ptr is not None:
        exp_ptr += row * exp_stride
    target = tl.load(targets_ptr + row)
    exists = (target >= 0) & (target < num_columns)
    reference = tl.where(exists, _logits(row_ptr, bias_ptr, target, exists, numbers, ROUNDED, SOFTCAP), float("nan"))
    target_logit = reference
    others, weighted, peak = _row(row_ptr, bias_ptr, exp_ptr, target, reference, sizes, numbers, ROUNDED, SOFTCAP, GATED, BLOCK)
    if peak - reference > limit:
        reference = peak
        others, weighted, peak = _row(
            row_ptr, bias_ptr, exp_ptr, target, reference, sizes, numbers, ROUNDED, SOFTCAP, GATED, BLOCK
        )
    statistics_ptr += row
    tl.store(statistics_ptr, reference)
    tl.store(statistics_ptr + statistics_stride, target_logit)
    tl.store(statistics_ptr + 2 * statistics_stride, others)
    tl.store(statistics_ptr + 3 * statistics_stride, weighted)
    tl.store(statistics_ptr + 4 * statistics_stride, peak)


@jit
@no_type_check
def _with_entropy(exp_ptr, columns, inside, row_numbers, inner, SOFTCAP: tl.constexpr):
    """Multiplies E of some columns of a row by what the entropy adds to the row's scale."""
    reference, shift, slope, entropy_slope = row_numbers
    exp = tl.load(exp_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    log = tl.log(tl.maximum(exp, 1.2e-38, propagate_nan=tl.PropagateNan.ALL))
    factor = slope + entropy_slope * (log + shift)
    if SOFTCAP:
        share = (log + reference) * inner
        factor *= 1.0 - share * share
    tl.store(exp_ptr + columns, (exp * factor).to(exp_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("num_columns", "num_sixteens"))
@no_type_check
def _head_entropy_bwd_kernel(
    exp_ptr,
    reference_ptr,
    shift_ptr,
    slope_ptr,
    entropy_slope_ptr,
    exp_stride,
    num_columns,
    num_sixteens,
    inner,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a row of E, in place: E·(g + c·(log E + shift)), with the softcap's derivative where there is one."""
    row = tl.program_id(0).to(tl.int64)
    exp_ptr += row * exp_stride
    row_numbers = (
        tl.load(reference_ptr + row),
        tl.load(shift_ptr + row),
        tl.load(slope_ptr + row),
        tl.load(entropy_slope_ptr + row),
    )
    bound = num_sixteens * 16
    for start in range(0, bound, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _with_entropy(exp_ptr, columns, columns < bound, row_numbers, inner, SOFTCAP)
    columns = bound + tl.arange(0, 16)
    _with_entropy(exp_ptr, columns, columns < num_columns, row_numbers, inner, SOFTCAP)


@jit(do_not_specialize=("num_columns", "width"))
@no_type_check
def _head_rows_bwd_kernel(
    exp_ptr,
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    telling_ptr,
    live_ptr,
    scale_ptr,
    target_scale_ptr,
    patch_ptr,
    product_ptr,
    dhidden_ptr,
    scaled_ptr,
    exp_stride,
    hidden_stride,
    weight_stride,
    num_columns,
    width,
    BLOCK: tl.constexpr,
):
    """A program finishes a row: dh = t·W_y - s·(E W), the row -s·h for the product with E, and E's entry of the target.

    A dead row gives zeros, whatever it holds: its E is overwritten where it is not finite, so that 0·NaN reaches nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(live_ptr + row) != 0
    scale = tl.load(scale_ptr + row)
    target = tl.load(targets_ptr + row)
    exists = (target >= 0) & (target < num_columns)
    columns = tl.arange(0, BLOCK)
    if dhidden_ptr is not None:
        target_scale = tl.load(target_scale_ptr + row)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            product = tl.load(product_ptr + row * width + start + columns, mask=inside, other=0.0)
            places = target * weight_stride + start + columns
            known = start + columns < tl.where(exists, width, 0)
            of_target = tl.load(weight_ptr + places, mask=known, other=0.0).to(tl.float32)
            found = tl.where(live, target_scale * of_target - scale * product, 0.0)
            tl.store(dhidden_ptr + row * width + start + columns, found.to(dhidden_ptr.dtype.element_ty), mask=inside)
    if scaled_ptr is not None:
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            hidden = tl.load(hidden_ptr + row * hidden_stride + start + columns, mask=inside, other=0.0).to(tl.float32)
            found = tl.where(live, -scale * hidden, 0.0)
            tl.store(scaled_ptr + row * width + start + columns, found.to(scaled_ptr.dtype.element_ty), mask=inside)
    exp_ptr += row * exp_stride
    telling = tl.load(telling_ptr + row)
    if (live == 0) & ((telling - telling) != 0.0):
        for start in range(0, num_columns, BLOCK):
            zeros = tl.zeros((BLOCK,), exp_ptr.dtype.element_ty)
            tl.store(exp_ptr + start + columns, zeros, mask=start + columns < num_columns)
        tl.debug_barrier()
    patch = tl.where(live, tl.load(patch_ptr + row), 0.0)
    tl.store(exp_ptr + target, patch.to(exp_ptr.dtype.element_ty), mask=exists)


@jit(do_not_specialize=("num_rows", "num_columns"))
@no_type_check
def _head_bias_bwd_kernel(
    exp_ptr,
    scale_ptr,
    live_ptr,
    dbias_ptr,
    exp_stride,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes columns of E: adds -Σ_t s_t E_t to their sums, tile after tile of rows."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, num_rows, ROWS):
        here = start + rows < num_rows
        live = tl.load(live_ptr + start + rows, mask=here, other=0) != 0
        scale = tl.where(live, tl.load(scale_ptr + start + rows, mask=here, other=0.0), 0.0)
        places = (start + rows).to(tl.int64)[:, None] * exp_stride + columns[None, :]
        inside = here[:, None] & (columns < num_columns)[None, :]
        total += scale[:, None] * tl.load(exp_ptr + places, mask=inside, other=0.0).to(tl.float32)
    known = tl.load(dbias_ptr + columns, mask=columns < num_columns, other=0.0)
    tl.store(dbias_ptr + columns, known - tl.sum(total, axis=0), mask=columns < num_columns)
