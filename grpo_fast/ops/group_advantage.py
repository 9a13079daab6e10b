"""Advantages: rewards centred, and scaled, inside their groups.

For prompt p with rewards ``R_pg``, over the completions that have one (``n_p`` of them):

    centred        A_pg = R_pg - mean_p                     mean_p over the group
    leave one out  A_pg = R_pg - (Σ_{g'≠g} R_pg') / (n_p - 1)
    group          A_pg / (std_p + 1e-4)                    std_p of the group, n_p - 1 in its denominator
    batch          A_pg / (std + 1e-4)                      std of every reward of the step

A completion without a reward (NaN) leaves its group's statistics alone and gets advantage 0. A group whose rewards are all
equal gets exactly 0, where rounding of the mean would leave about 1e-8: the row plan may then leave it out without changing a
gradient. Everything is float64 inside, so rewards like 1e6 + x keep their x.

The kernel is one launch: a program takes whole groups, reads each reward once and writes each advantage once; with float32
rewards that is 8 bytes a completion and 9 a prompt. ``batch`` needs the standard deviation of every reward before the first
advantage: where one program holds all of them it still is one launch, and otherwise a launch before it reads them once more
(12 bytes a completion) and leaves at most 256 partial moments, which every program adds up in the same order. No atomics; a
group's numbers do not depend on the others, but for that standard deviation.

Source: TRL 1.16 ``GRPOTrainer`` and ``RLOOTrainer``; GRPO arXiv 2402.03300; RLOO arXiv 2402.14740; batch scale arXiv
2508.08221.
"""

# ruff: noqa: PLR0124, PLR0913, PLR0917

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, no_type_check

import torch

from grpo_fast.ops import jit as kernels
from grpo_fast.ops import native
from grpo_fast.ops.dispatch import Impl, Implementation, resolve
from grpo_fast.ops.jit import jit, tl

ScaleRewards: TypeAlias = Literal["group", "batch", "none"]
STD_EPSILON = 1e-4
"""Added to a standard deviation before dividing, as TRL does."""


class GroupAdvantage(NamedTuple):
    """Advantages and group statistics of a step's rewards."""

    advantages: torch.Tensor
    """[P, G]; 0 where there was no reward."""
    zero_variance: torch.Tensor
    """bool [P]: every reward of the group is the same, or there are fewer than two."""
    mean: torch.Tensor
    """[P]; NaN for a group without rewards."""
    std: torch.Tensor
    """[P] with n - 1 in the denominator; NaN for a group with fewer than two rewards."""


def group_advantage_reference(
    rewards: torch.Tensor, *, scale_rewards: ScaleRewards = "group", leave_one_out: bool = False
) -> GroupAdvantage:
    """The specification of :func:`group_advantage`, in plain PyTorch."""
    values = rewards.double()
    scored = ~values.isnan()
    count = scored.sum(1, keepdim=True)
    mean, std = _mean_and_std(values)
    others = (values.nansum(1, keepdim=True) - values) / (count - 1)
    advantages = values - (others if leave_one_out else mean)
    if scale_rewards == "group":
        advantages = advantages / (std + STD_EPSILON)
    elif scale_rewards == "batch":
        _, batch_std = _mean_and_std(values.reshape(1, -1))
        advantages = advantages / (batch_std + STD_EPSILON)
    infinity = float("inf")
    lowest = values.masked_fill(~scored, infinity).amin(1)
    highest = values.masked_fill(~scored, -infinity).amax(1)
    zero_variance = (count[:, 0] < 2) | (lowest == highest)
    advantages = advantages.masked_fill(~scored | zero_variance[:, None], 0.0)
    dtype = rewards.dtype
    return GroupAdvantage(advantages.to(dtype), zero_variance, mean[:, 0].to(dtype), std[:, 0].to(dtype))


def _mean_and_std(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, [rows, 1], without its NaN."""
    count = (~values.isnan()).sum(1, keepdim=True)
    mean = values.nansum(1, keepdim=True) / count
    squares = (values - mean).square().nansum(1, keepdim=True)
    return mean, (squares / (count - 1)).sqrt().masked_fill(count < 2, float("nan"))


class LaunchShape(NamedTuple):
    """How P groups of G become programs."""

    rows: int
    """Groups of one program."""
    columns: int
    """G, rounded up to a power of 2."""
    num_parts: int
    """Programs of the launch that gathers the moments of all rewards; 0 where one program holds them."""


_TILE = 1024
_NUM_WARPS = 8
_MAX_PARTS = 256
_MAX_GROUP = 4096


def _launch_shape(num_prompts: int, group_size: int, scale_rewards: str) -> LaunchShape:
    """Tiles of 1,024 rewards, four a thread; larger ones for larger groups, and to hold every reward of a ``batch``."""
    columns, every_row = _power_of_two(group_size), _power_of_two(num_prompts)
    together = scale_rewards == "batch" and every_row * columns <= _MAX_GROUP
    rows = every_row if together else max(1, _TILE // columns)
    apart = scale_rewards == "batch" and not together
    num_parts = min(_MAX_PARTS, -(-num_prompts * group_size // _TILE)) if apart else 0
    return LaunchShape(rows, columns, num_parts)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@jit
@no_type_check
def _moments(values, scored):
    """Count, mean and sum of squares around it of the scored values of a flat tile; a mean of 0 of none."""
    count = tl.sum(scored.to(tl.float64), axis=0)
    mean = tl.sum(tl.where(scored, values, 0.0), axis=0) / tl.maximum(count, 1.0)
    offset = tl.where(scored, values - mean, 0.0)
    return count, mean, tl.sum(offset * offset, axis=0)


@jit(do_not_specialize=("num_rewards", "tiles_per_part"))
@no_type_check
def _reward_moments_kernel(rewards_ptr, moments_ptr, num_rewards, tiles_per_part, BLOCK: tl.constexpr):
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    start = part.to(tl.int64) * tiles_per_part * BLOCK
    count, mean, squares = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for tile in range(tiles_per_part):
        offsets = start + tile * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(rewards_ptr + offsets, mask=offsets < num_rewards, other=float("nan")).to(tl.float64)
        more, its_mean, its_squares = _moments(values, values == values)
        total = tl.maximum(count + more, 1.0)
        gap = its_mean - mean
        squares += its_squares + gap * gap * count * more / total
        mean += gap * more / total
        count += more
    tl.store(moments_ptr + part, count)
    tl.store(moments_ptr + num_parts + part, mean)
    tl.store(moments_ptr + 2 * num_parts + part, squares)


@jit
@no_type_check
def _reciprocal(x):
    """1/x in float64, by two Newton steps from float32: a float64 division takes ten times the instructions."""
    guess = (1.0 / x.to(tl.float32)).to(tl.float64)
    guess = guess * (2.0 - x * guess)
    return guess * (2.0 - x * guess)


@jit
@no_type_check
def _std_of_parts(moments_ptr, num_parts, MAX_PARTS: tl.constexpr):
    parts = tl.arange(0, MAX_PARTS)
    inside = parts < num_parts
    counts = tl.load(moments_ptr + parts, mask=inside, other=0.0)
    means = tl.load(moments_ptr + num_parts + parts, mask=inside, other=0.0)
    squares = tl.load(moments_ptr + 2 * num_parts + parts, mask=inside, other=0.0)
    count = tl.sum(counts, axis=0)
    gaps = means - tl.sum(counts * means, axis=0) / tl.maximum(count, 1.0)
    return tl.sqrt(tl.sum(squares + counts * gaps * gaps, axis=0) / tl.maximum(count - 1.0, 1.0))


@jit
@no_type_check
def _store(ptr, values, mask, DOUBLE: tl.constexpr):
    if not DOUBLE:
        values = values.to(tl.float32)
    tl.store(ptr, values, mask=mask)


@jit(do_not_specialize=("num_prompts", "group_size", "num_parts"))
@no_type_check
def _group_advantage_kernel(
    rewards_ptr,
    moments_ptr,
    advantages_ptr,
    zero_variance_ptr,
    mean_ptr,
    std_ptr,
    num_prompts,
    group_size,
    num_parts,
    epsilon,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    DOUBLE: tl.constexpr,
    PADDED: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    # From here on in 32 bits, relative to the program's first group: 64-bit offsets would take the registers.
    start = first * group_size
    rows = tl.arange(0, ROWS)
    exists = rows < num_prompts - first
    if PADDED:
        columns = tl.arange(0, COLUMNS)[None, :]
        offsets = rows[:, None] * group_size + columns
        inside = exists[:, None] & (columns < group_size)
        values = tl.load(rewards_ptr + start + offsets, mask=inside, other=float("nan"))
    else:
        # One flat run of memory with a bound that is a multiple of COLUMNS: accesses are vectors.
        offsets = tl.arange(0, ROWS * COLUMNS)
        inside = offsets < tl.minimum(num_prompts - first, ROWS).to(tl.int32) * COLUMNS
        values = tl.load(rewards_ptr + start + offsets, mask=inside, other=float("nan"))
        values = tl.reshape(values, (ROWS, COLUMNS))
    values = values.to(tl.float64)
    scored = values == values
    count = tl.sum(scored.to(tl.int32), axis=1).to(tl.float64)
    total = tl.sum(tl.where(scored, values, 0.0), axis=1)
    mean = total * _reciprocal(tl.maximum(count, 1.0))
    others = _reciprocal(tl.maximum(count - 1.0, 1.0))
    centred = tl.where(scored, values - mean[:, None], 0.0)
    std = tl.sqrt(tl.sum(centred * centred, axis=1) * others)
    lowest = tl.min(tl.where(scored, values, float("inf")), axis=1)
    highest = tl.max(tl.where(scored, values, float("-inf")), axis=1)
    zero_variance = (count < 2.0) | (lowest == highest)
    advantages = centred
    if LEAVE_ONE_OUT:
        advantages = values - (total[:, None] - values) * others[:, None]
    if SCALE == "group":
        advantages *= _reciprocal(std + epsilon)[:, None]
    if SCALE == "batch":
        if moments_ptr is None:
            flat = tl.reshape(values, (ROWS * COLUMNS,))
            every, _, squares = _moments(flat, flat == flat)
            batch_std = tl.sqrt(squares / tl.maximum(every - 1.0, 1.0))
        else:
            batch_std = _std_of_parts(moments_ptr, num_parts, MAX_PARTS)
        advantages *= _reciprocal(batch_std + epsilon)
    advantages = tl.where(scored & (zero_variance[:, None] == 0), advantages, 0.0)
    if not PADDED:
        advantages = tl.reshape(advantages, (ROWS * COLUMNS,))
    _store(advantages_ptr + start + offsets, advantages, inside, DOUBLE)
    tl.store(zero_variance_ptr + first + rows, zero_variance, mask=exists)
    _store(mean_ptr + first + rows, tl.where(count > 0.0, mean, float("nan")), exists, DOUBLE)
    _store(std_ptr + first + rows, tl.where(count > 1.0, std, float("nan")), exists, DOUBLE)


def _launch_group_advantage(
    rewards: torch.Tensor, scale_rewards: str, leave_one_out: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rewards = rewards.contiguous()
    num_prompts, group_size = rewards.shape
    shape = _launch_shape(num_prompts, group_size, scale_rewards)
    advantages, mean, std = torch.empty_like(rewards), rewards.new_empty(num_prompts), rewards.new_empty(num_prompts)
    zero_variance = torch.empty(num_prompts, dtype=torch.bool, device=rewards.device)
    moments = None
    if shape.num_parts > 0:
        moments = torch.empty(3, shape.num_parts, dtype=torch.float64, device=rewards.device)
        tiles_per_part = -(-rewards.numel() // (_TILE * shape.num_parts))
        _reward_moments_kernel[(shape.num_parts,)](
            rewards, moments, rewards.numel(), tiles_per_part, BLOCK=_TILE, num_warps=_NUM_WARPS, enable_fp_fusion=True
        )
    if num_prompts > 0:
        _group_advantage_kernel[(-(-num_prompts // shape.rows),)](
            rewards,
            moments,
            advantages,
            zero_variance,
            mean,
            std,
            num_prompts,
            group_size,
            shape.num_parts,
            STD_EPSILON,
            SCALE=scale_rewards,
            LEAVE_ONE_OUT=leave_one_out,
            DOUBLE=rewards.dtype == torch.float64,
            PADDED=group_size != shape.columns,
            MAX_PARTS=_MAX_PARTS,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=True,
        )
    return advantages, zero_variance, mean, std


_group_advantage_fwd = torch.library.custom_op("grpo_fast::group_advantage_fwd", _launch_group_advantage, mutates_args=())


@_group_advantage_fwd.register_fake
def _(rewards: torch.Tensor, scale_rewards: str, leave_one_out: bool) -> tuple[torch.Tensor, ...]:
    per_prompt = rewards.new_empty(rewards.shape[0])
    contiguous = rewards.new_empty(rewards.shape)
    return contiguous, torch.empty_like(per_prompt, dtype=torch.bool), per_prompt, torch.empty_like(per_prompt)


def _group_advantage_triton(rewards: torch.Tensor, *, scale_rewards: ScaleRewards, leave_one_out: bool) -> GroupAdvantage:
    return GroupAdvantage(*_group_advantage_fwd(rewards.detach(), scale_rewards, leave_one_out))


def _obstacle(like: torch.Tensor) -> str | None:
    if like.ndim == 2 and like.shape[1] > _MAX_GROUP:
        return f"the kernel takes groups of at most {_MAX_GROUP}, here they have {like.shape[1]}"
    # This kernel, unlike the others, computes in float64 anyway.
    return kernels.obstacle(like.new_empty(0, dtype=torch.float32))


def aot_calls() -> dict[str, Callable[[], object]]:
    """Launches that cover every branch of the kernels, on tensors that hold nothing; for ahead-of-time compilation."""

    def call(shape: tuple[int, int], dtype: torch.dtype, scale: str, leave_one_out: bool) -> object:
        return _launch_group_advantage(torch.empty(shape, dtype=dtype, device="meta"), scale, leave_one_out)

    rows = {
        "whole-groups": ((2**16, 8), torch.float32, "group", False),
        "padded-groups": ((2**16, 7), torch.float32, "group", True),
        "one-large-group": ((2, _MAX_GROUP), torch.float32, "group", False),
        "batch": ((2**16, 16), torch.float32, "batch", False),
        "batch-in-one-program": ((64, 8), torch.float64, "batch", True),
        "float64": ((2**16, 16), torch.float64, "none", False),
        "bfloat16": ((2**16, 16), torch.bfloat16, "none", True),
    }
    return {name: functools.partial(call, *row) for name, row in rows.items()}


def _group_advantage_native(rewards: torch.Tensor, *, scale_rewards: ScaleRewards, leave_one_out: bool) -> GroupAdvantage:
    return GroupAdvantage(*native.call("group_advantage", rewards.detach(), scale_rewards, leave_one_out, STD_EPSILON))


def _native_obstacle(like: torch.Tensor) -> str | None:
    if like.dtype not in (torch.float32, torch.float64):
        return f"the extension takes rewards in float32 or float64, here they are {str(like.dtype).removeprefix('torch.')}"
    return native.host_obstacle(like)


_IMPLEMENTATIONS: Mapping[str, Implementation[Callable[..., GroupAdvantage]]] = {
    "triton": Implementation(_group_advantage_triton, _obstacle, kernels.drawback),
    "native": Implementation(_group_advantage_native, _native_obstacle, native.tracing),
    "torch": Implementation(group_advantage_reference),
}


def group_advantage(
    rewards: torch.Tensor | Sequence[Sequence[float | None]],
    *,
    scale_rewards: ScaleRewards = "group",
    leave_one_out: bool = False,
    impl: Impl = "auto",
) -> GroupAdvantage:
    """Advantages of a step.

    Args:
        rewards: float [P, G], one row a prompt; NaN where there is no reward, also as padding of groups of unequal size. Or a
            list of groups, of any sizes, with ``None`` or NaN where there is no reward: it becomes float64 on the CPU, padded.
        scale_rewards: what centred rewards are divided by.
        leave_one_out: take the mean of the other completions as baseline, rather than the group's.
        impl: how it is computed.

    Returns:
        Advantages and group statistics in the type of ``rewards``; advantages are finite where rewards are, or NaN.

    Raises:
        ValueError: the shape is not [P, G], ``scale_rewards`` is unknown, or a reward is infinite. The last is seen of rewards
            on the CPU; elsewhere nothing waits for the device, and an infinite reward makes its group's advantages NaN.
        TypeError: rewards are not floating point, or not groups.

    Source:
        TRL 1.16, ``scale_rewards`` and RLOO's leave-one-out baseline, both with NaN left out.
    """
    if not isinstance(rewards, torch.Tensor):
        if not isinstance(rewards, list | tuple) or not all(isinstance(group, list | tuple) for group in rewards):
            raise TypeError(f"rewards are {rewards!r}; give a tensor (P, G), or a list of groups: [[1.0, 0.0], [0.5, None]]")
        rewards = _padded(rewards)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards are {rewards.dtype}; give floats, with NaN where there is no reward")
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; they must be (P, G), one row a prompt and G at least 1")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r}; choose 'group', 'batch' or 'none'")
    run = resolve("group_advantage", _IMPLEMENTATIONS, impl=impl, like=rewards)
    result = run(rewards, scale_rewards=scale_rewards, leave_one_out=leave_one_out)
    # An infinite reward shows in its group's mean, and there are fewer means than rewards.
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(result.mean.sum().item()):
        _refuse_infinite(rewards)
    return result


def _padded(groups: Sequence[Sequence[float | None]]) -> torch.Tensor:
    width = max((len(group) for group in groups), default=0)
    nan = float("nan")
    rows = [[nan if reward is None else reward for reward in group] + [nan] * (width - len(group)) for group in groups]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(groups), width if groups else 1)


def _refuse_infinite(rewards: torch.Tensor) -> None:
    if rewards.isinf().any():
        row, column = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {row}, completion {column} is {rewards[row, column].item()}; rewards must be finite"
        )
