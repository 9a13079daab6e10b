"""Triton kernels of the policy loss: loss, metrics and ``dL/dlogp`` together, see :mod:`grpo_fast.ops.policy_loss`.

Token level: a program walks tiles of tokens, reads each once, writes its coefficient once and keeps sums. Sequence level: a
program takes one sequence; it reads its tokens once for the sums that make the ratio, and where there is a KL term once more
(from cache unless the sequence is longer than that), and writes the coefficients. A second, small launch adds the programs'
sums. Bytes of device memory a token: 4 (logp) + 4 or 8 (index) + 4 (coefficient), and 4 each for old, ref, importance weight
and entropy, 1 for the mask, where they are given; 24 for the common case of old, entropy and an int64 index.

Terms are float32, sums over tokens, sequences and programs float64, so that a metric of millions of tokens still counts. There
are no atomics; every sum is taken in an order that T alone fixes at token level, and each sequence's own length at sequence
level: a token's coefficient does not depend on what else is in the batch, and a repeated call is bitwise the same.
"""

# ruff: noqa: PLR0124, PLR0912, PLR0913, PLR0915, PLR0917, SIM108

from __future__ import annotations

from typing import no_type_check

from grpo_fast.ops.jit import jit, tl


@jit
@no_type_check
def _surrogate_terms(ratio, logp, advantage, numbers, SURROGATE: tl.constexpr, TWO_SIDED: tl.constexpr):
    """The surrogate, and its derivative by log r (cispo, vespo: by logp). NaN goes through every minimum."""
    low, high, delta, _, tau_pos, tau_neg = numbers
    if SURROGATE == "cispo":
        slope = -tl.minimum(ratio, high, propagate_nan=tl.PropagateNan.ALL) * advantage
        value = slope * logp
    elif SURROGATE == "vespo":
        slope = -advantage
        value = slope * logp
    elif SURROGATE == "sapo":
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        argument = tau * (ratio - 1.0)
        decay = tl.exp(-tl.abs(argument))
        value = -tl.where(argument < 0, decay, 1.0) / (1.0 + decay) * 4.0 / tau * advantage
        slope = decay / ((1.0 + decay) * (1.0 + decay)) * -4.0 * advantage * ratio
    else:
        bounded = ratio
        if TWO_SIDED:
            bounded = tl.minimum(ratio, delta, propagate_nan=tl.PropagateNan.ALL)
        clipped = tl.maximum(ratio, low, propagate_nan=tl.PropagateNan.ALL)
        clipped = tl.minimum(clipped, high, propagate_nan=tl.PropagateNan.ALL)
        first, second = bounded * advantage, clipped * advantage
        value = -tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)
        half = tl.where(first == second, 0.5, 0.0)
        reach = tl.where(first < second, 1.0, half)
        if TWO_SIDED:
            reach = tl.where(ratio <= delta, reach, 0.0)
        inside = (ratio >= low) & (ratio <= high)
        reach += tl.where(inside, tl.where(second < first, 1.0, half), 0.0)
        slope = -reach * advantage * ratio
    return value, slope


@jit
@no_type_check
def _clip_flags(ratio, advantage, low, high, SURROGATE: tl.constexpr):
    """Whether a ratio counts as clipped below, and above."""
    if SURROGATE == "clip":
        return (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    above = (ratio > high) & (advantage > 0)
    if SURROGATE != "cispo":
        above = above & (ratio < ratio)
    return ratio < ratio, above


@jit
@no_type_check
def _present(mask_ptr, rows, inside):
    """Which tokens are in the loss."""
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return inside


@jit
@no_type_check
def _load_token(ptr, rows, inside, present):
    """A token's number in float32, 0 where the token is masked."""
    return tl.where(present, tl.load(ptr + rows, mask=inside, other=0.0).to(tl.float32), 0.0)


@jit
@no_type_check
def _sum64(values):
    return tl.sum(values.to(tl.float64), axis=0)


@jit
@no_type_check
def _smallest(values, live):
    return tl.min(tl.where(live & (values == values), values, float("inf")), axis=0)


@jit
@no_type_check
def _largest(values, live):
    return tl.max(tl.where(live & (values == values), values, float("-inf")), axis=0)


@jit
@no_type_check
def _no_sums():
    zero = tl.zeros((), tl.float64)
    none = tl.zeros((), tl.int32)
    infinity = tl.full((), float("inf"), tl.float32)
    return zero, none, none, none, zero, zero, zero, infinity, -infinity


@jit
@no_type_check
def _add_sums(a, b):
    return (
        a[0] + b[0],
        a[1] + b[1],
        a[2] + b[2],
        a[3] + b[3],
        a[4] + b[4],
        a[5] + b[5],
        a[6] + b[6],
        tl.minimum(a[7], b[7]),
        tl.maximum(a[8], b[8]),
    )


@jit
@no_type_check
def _store_sums(ptr, stride, sums, num_ratios):
    tl.store(ptr, sums[0])
    tl.store(ptr + stride, sums[1].to(tl.float64))
    tl.store(ptr + 2 * stride, num_ratios.to(tl.float64))
    tl.store(ptr + 3 * stride, sums[2].to(tl.float64))
    tl.store(ptr + 4 * stride, sums[3].to(tl.float64))
    tl.store(ptr + 5 * stride, sums[4])
    tl.store(ptr + 6 * stride, sums[5])
    tl.store(ptr + 7 * stride, sums[6])
    tl.store(ptr + 8 * stride, sums[7].to(tl.float64))
    tl.store(ptr + 9 * stride, sums[8].to(tl.float64))


@jit
@no_type_check
def _token_tile(
    ptrs,
    coefficient_ptr,
    rows,
    inside,
    numbers,
    SURROGATE: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
):
    """Stores the coefficients of one tile of tokens; returns its sums."""
    logp_ptr, index_ptr, advantage_ptr, weight_ptr, old_ptr, ref_ptr, importance_ptr, mask_ptr, entropy_ptr = ptrs
    low, high, _, beta, _, _ = numbers
    present = _present(mask_ptr, rows, inside)
    index = tl.load(index_ptr + rows, mask=inside, other=0)
    advantage = tl.load(advantage_ptr + index, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + index, mask=inside, other=0.0).to(tl.float32)
    logp = _load_token(logp_ptr, rows, inside, present)
    if old_ptr is not None:
        ratio = tl.exp(logp - _load_token(old_ptr, rows, inside, present))
    else:
        ratio = tl.exp(logp - logp)
    value, slope = _surrogate_terms(ratio, logp, advantage, numbers, SURROGATE, TWO_SIDED)
    if importance_ptr is not None:
        importance = _load_token(importance_ptr, rows, inside, present)
        value, slope = value * importance, slope * importance
    kl_sum = tl.zeros((), tl.float64)
    if ref_ptr is not None:
        difference = _load_token(ref_ptr, rows, inside, present) - logp
        growth = tl.exp(difference)
        kl = growth - difference - 1.0
        kl_slope = 1.0 - growth
        if BIAS_CORRECTION:
            kl *= ratio
            kl_slope = -difference * ratio
        value += beta * kl
        slope += beta * kl_slope
        kl_sum = _sum64(kl)
    tl.store(coefficient_ptr + rows, tl.where(present, weight * slope, 0.0), mask=inside)
    entropy_sum = tl.zeros((), tl.float64)
    if entropy_ptr is not None:
        entropy_sum = _sum64(_load_token(entropy_ptr, rows, inside, present))
    below, above = _clip_flags(ratio, advantage, low, high, SURROGATE)
    return (
        _sum64(tl.where(present, weight * value, 0.0)),
        tl.sum(present.to(tl.int32), axis=0),
        tl.sum((present & below).to(tl.int32), axis=0),
        tl.sum((present & above).to(tl.int32), axis=0),
        kl_sum,
        entropy_sum,
        _sum64(tl.where(present, ratio, 0.0)),
        _smallest(ratio, present),
        _largest(ratio, present),
    )


@jit(do_not_specialize=("num_tokens", "num_sixteens", "tiles_per_program"))
@no_type_check
def _policy_loss_token_kernel(
    logp_ptr,
    index_ptr,
    advantage_ptr,
    weight_ptr,
    old_ptr,
    ref_ptr,
    importance_ptr,
    mask_ptr,
    entropy_ptr,
    coefficient_ptr,
    sums_ptr,
    num_tokens,
    num_sixteens,
    tiles_per_program,
    low,
    high,
    delta,
    beta,
    tau_pos,
    tau_neg,
    SURROGATE: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ptrs = (logp_ptr, index_ptr, advantage_ptr, weight_ptr, old_ptr, ref_ptr, importance_ptr, mask_ptr, entropy_ptr)
    numbers = (low, high, delta, beta, tau_pos, tau_neg)
    program = tl.program_id(0)
    # Whole sixteens first: a bound that is a multiple of 16 lets masked accesses be vectors. The few tokens after it come last.
    bound = num_sixteens.to(tl.int64) * 16
    start = program.to(tl.int64) * tiles_per_program * BLOCK
    sums = _no_sums()
    for tile in range(tiles_per_program):
        first = start + tile * BLOCK
        lanes = tl.arange(0, BLOCK)
        rows = first + lanes
        # Compared in 32 bits: in 64, ptxas 12.8 (Triton 3.6 and 3.7) runs out of the registers that it sets itself.
        inside = lanes < tl.minimum(bound - first, BLOCK).to(tl.int32)
        part = _token_tile(ptrs, coefficient_ptr, rows, inside, numbers, SURROGATE, TWO_SIDED, BIAS_CORRECTION)
        sums = _add_sums(sums, part)
    if program == tl.num_programs(0) - 1:
        rows = bound + tl.arange(0, 16)
        part = _token_tile(ptrs, coefficient_ptr, rows, rows < num_tokens, numbers, SURROGATE, TWO_SIDED, BIAS_CORRECTION)
        sums = _add_sums(sums, part)
    _store_sums(sums_ptr + program, tl.num_programs(0), sums, sums[1])


@jit
@no_type_check
def _policy_loss_sequence_kernel(
    logp_ptr,
    offset_ptr,
    advantage_ptr,
    weight_ptr,
    old_ptr,
    ref_ptr,
    importance_ptr,
    mask_ptr,
    entropy_ptr,
    coefficient_ptr,
    sums_ptr,
    low,
    high,
    delta,
    beta,
    tau_pos,
    tau_neg,
    SURROGATE: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numbers = (low, high, delta, beta, tau_pos, tau_neg)
    program = tl.program_id(0)
    first, last = tl.load(offset_ptr + program), tl.load(offset_ptr + program + 1)
    advantage = tl.load(advantage_ptr + program).to(tl.float32)
    weight = tl.load(weight_ptr + program).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    count = tl.zeros((), tl.int32)
    log_ratio, mass = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    kl, entropy = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for start in range(first, last, BLOCK):
        rows = start + columns
        inside = rows < last
        present = _present(mask_ptr, rows, inside)
        count += tl.sum(present.to(tl.int32), axis=0)
        logp = _load_token(logp_ptr, rows, inside, present)
        if old_ptr is not None:
            log_ratio += _sum64(logp - _load_token(old_ptr, rows, inside, present))
        else:
            log_ratio += _sum64(logp - logp)
        if importance_ptr is not None:
            mass += _sum64(_load_token(importance_ptr, rows, inside, present))
        if ref_ptr is not None:
            difference = _load_token(ref_ptr, rows, inside, present) - logp
            kl += _sum64(tl.exp(difference) - difference - 1.0)
        if entropy_ptr is not None:
            entropy += _sum64(_load_token(entropy_ptr, rows, inside, present))
    length = tl.maximum(count, 1).to(tl.float32)
    if importance_ptr is None:
        mass = count.to(tl.float64)
    if MEAN:
        log_ratio /= length
    ratio = tl.exp(log_ratio.to(tl.float32))
    value, slope = _surrogate_terms(ratio, 0.0, advantage, numbers, SURROGATE, TWO_SIDED)
    mass = mass.to(tl.float32)
    value, slope = value * mass, slope * mass
    kl_weight = weight * beta
    if ref_ptr is not None:
        if BIAS_CORRECTION:
            kl *= ratio
            kl_weight *= ratio
            slope += beta * kl.to(tl.float32)
        value += beta * kl.to(tl.float32)
    if MEAN:
        slope /= length
    slope *= weight
    for start in range(first, last, BLOCK):
        rows = start + columns
        inside = rows < last
        present = _present(mask_ptr, rows, inside)
        coefficient = tl.where(present, slope, 0.0)
        if ref_ptr is not None:
            difference = _load_token(ref_ptr, rows, inside, present) - _load_token(logp_ptr, rows, inside, present)
            coefficient += tl.where(present, kl_weight * (1.0 - tl.exp(difference)), 0.0)
        tl.store(coefficient_ptr + rows, coefficient, mask=inside)
    live = count > 0
    below, above = _clip_flags(ratio, advantage, low, high, SURROGATE)
    sums = (
        (weight * value).to(tl.float64),
        count,
        (live & below).to(tl.int32),
        (live & above).to(tl.int32),
        kl,
        entropy,
        tl.where(live, ratio, 0.0).to(tl.float64),
        tl.where(live & (ratio == ratio), ratio, float("inf")),
        tl.where(live & (ratio == ratio), ratio, float("-inf")),
    )
    _store_sums(sums_ptr + program, tl.num_programs(0), sums, live)


@jit(do_not_specialize=("num_parts",))
@no_type_check
def _policy_loss_sum_kernel(sums_ptr, out_ptr, num_parts, entropy_slope, BLOCK: tl.constexpr):
    """Program k adds up the k-th sum of every part: 0 is the loss, which takes the entropy's along, 8 and 9 are extremes."""
    program = tl.program_id(0)
    # The ratio's sum tells the extremes of a NaN, which minima and maxima leave out.
    second = tl.where(program == 0, 6, 7)
    total, other = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    smallest = tl.full((), float("inf"), tl.float64)
    for start in range(0, num_parts, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_parts
        values = tl.load(sums_ptr + program.to(tl.int64) * num_parts + columns, mask=inside, other=0.0)
        other += tl.sum(tl.load(sums_ptr + second.to(tl.int64) * num_parts + columns, mask=inside, other=0.0), axis=0)
        total += tl.sum(values, axis=0)
        sign = tl.where(program == 9, -1.0, 1.0)
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, values * sign, float("inf")), axis=0))
    if program == 0:
        total += tl.where(entropy_slope == 0.0, 0.0, entropy_slope * other)  # 0 times an unknown entropy is no loss
    if program >= 8:
        total = tl.where(other == other, tl.where(program == 9, -smallest, smallest), other)
    tl.store(out_ptr + program, total.to(tl.float32))
