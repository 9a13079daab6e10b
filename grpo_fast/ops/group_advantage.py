"""Advantages: rewards centred, and scaled, inside their groups.

For prompt p with rewards ``R_pg``, over the completions that have one (``n_p`` of them):

    centred        A_pg = R_pg - mean_p                     mean_p over the group
    leave one out  A_pg = R_pg - (Σ_{g'≠g} R_pg') / (n_p - 1)
    group          A_pg / (std_p + 1e-4)                    std_p of the group, n_p - 1 in its denominator
    batch          A_pg / (std + 1e-4)                      std of every reward of the step

A completion without a reward (NaN) leaves its group's statistics alone and gets advantage 0. A group whose rewards are all
equal gets exactly 0, where rounding of the mean would leave about 1e-8: the row plan may then leave it out without changing a
gradient. Everything is float64 inside: P*G numbers cost nothing, and rewards like 1e6 + x keep their x.

Source: TRL 1.16 ``GRPOTrainer`` and ``RLOOTrainer``; GRPO arXiv 2402.03300; RLOO arXiv 2402.14740; batch scale arXiv
2508.08221.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve

ScaleRewards: TypeAlias = Literal["group", "batch", "none"]
STD_EPSILON = 1e-4
"""Added to a standard deviation before dividing, as TRL does."""


class GroupAdvantage(NamedTuple):
    """What the rewards of a step say of its completions."""

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
    mean, std = _mean_and_std(values, dim=1)
    others = (values.nansum(1, keepdim=True) - values) / (count - 1)
    advantages = values - (others if leave_one_out else mean)
    if scale_rewards == "group":
        advantages = advantages / (std + STD_EPSILON)
    elif scale_rewards == "batch":
        _, batch_std = _mean_and_std(values.reshape(1, -1), dim=1)
        advantages = advantages / (batch_std + STD_EPSILON)
    infinity = float("inf")
    lowest = values.masked_fill(~scored, infinity).amin(1)
    highest = values.masked_fill(~scored, -infinity).amax(1)
    zero_variance = (count[:, 0] < 2) | (lowest == highest)
    advantages = advantages.masked_fill(~scored | zero_variance[:, None], 0.0)
    dtype = rewards.dtype
    return GroupAdvantage(advantages.to(dtype), zero_variance, mean[:, 0].to(dtype), std[:, 0].to(dtype))


def _mean_and_std(values: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = (~values.isnan()).sum(dim, keepdim=True)
    mean = values.nansum(dim, keepdim=True) / count
    squares = (values - mean).square().nansum(dim, keepdim=True)
    return mean, (squares / (count - 1)).sqrt().masked_fill(count < 2, float("nan"))


_IMPLEMENTATIONS = {"torch": Implementation(group_advantage_reference)}


def group_advantage(
    rewards: torch.Tensor, *, scale_rewards: ScaleRewards = "group", leave_one_out: bool = False, impl: Impl = "auto"
) -> GroupAdvantage:
    """Advantages of a step.

    Args:
        rewards: float [P, G], one row a prompt; NaN where there is no reward, also as padding of groups of unequal size.
        scale_rewards: what centred rewards are divided by.
        leave_one_out: take the mean of the other completions as baseline, rather than the group's.
        impl: how it is computed.

    Returns:
        Advantages and group statistics in the type of ``rewards``; advantages are always finite.

    Raises:
        ValueError: the shape is not [P, G], a reward is infinite, or ``scale_rewards`` is unknown.
        TypeError: rewards are not floating point.

    Source:
        TRL 1.16, ``scale_rewards`` and RLOO's leave-one-out baseline, both with NaN left out.
    """
    if not rewards.is_floating_point():
        raise TypeError(f"rewards are {rewards.dtype}; give floats, with NaN where there is no reward")
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; they must be (P, G), one row a prompt and G at least 1")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r}; choose 'group', 'batch' or 'none'")
    if rewards.isinf().any():
        row, column = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {row}, completion {column} is {rewards[row, column].item()}; rewards must be finite"
        )
    run = resolve("group_advantage", _IMPLEMENTATIONS, impl=impl, like=rewards)
    return run(rewards, scale_rewards=scale_rewards, leave_one_out=leave_one_out)
