"""Objectives as rows of one table: what differs between GRPO and its relatives, as data.

Every row is the same loss (:mod:`grpo_fast.ops.policy_loss`) with four choices: the surrogate, what the ratio ``r`` is of,
the normaliser that weighs sequences, and how rewards become advantages ``A``. With N sequences of a step, ``n_i`` scored
tokens in sequence i and ``clip(r) = clamp(r, 1 - eps_low, 1 + eps_high)``:

=========  ============================================================================  =========================
Row        Loss                                                                          Paper (arXiv); TRL 1.16
=========  ============================================================================  =========================
grpo       1/N sum_i 1/n_i sum_t -min(r_t A_i, clip(r_t) A_i)                            2402.03300; ``grpo``
dr_grpo    1/(N max_completion_length) sum_i sum_t (the same); the paper also sets       2503.20783; ``dr_grpo``
           ``scale_rewards="none"``, which stays the user's choice here as in TRL
bnpo       1/(sum_i n_i) sum_i sum_t (the same); TRL takes that mean in each             2506.02864; ``bnpo``
           micro-batch and averages, over the whole step (as here) it is dapo's
dapo       1/(sum_i n_i) sum_i sum_t (the same), usually with ``epsilon_high=0.28``      2503.14476; ``dapo``
cispo      1/(sum_i n_i) sum_i sum_t -stop_grad(min(r_t, eps_high)) A_i logp_t           2506.13585; ``cispo``
gspo       grpo with r_i = exp(mean_t log r_t); the paper clips 3e-4 below, 4e-4 above   2507.18071; ``grpo`` (*)
rloo       1/N sum_i -min(r_i A_i, clip(r_i) A_i), r_i = exp(sum_t log r_t); A against   2402.14740; ``RLOOTrainer``
           the mean of the *other* completions, unscaled; the KL goes into the reward
luspo      1/N sum_i n_i -min(r_i A_i, clip(r_i) A_i), r_i = exp(mean_t log r_t)         2602.05261; ``luspo`` (*)
sapo       1/N sum_i 1/n_i sum_t -sigmoid(tau (r_t - 1)) 4/tau A_i                       2511.20347; ``sapo``
vespo      1/(sum_i n_i) sum_i sum_t -stop_grad(phi(w_i)) A_i logp_t, with               2602.10693; ``vespo``
           phi(w) = exp(lambda (1 - w)) w^k and w_i = exp(sum_t log r_t), times the
           importance ratio against the sampler where that is corrected
=========  ============================================================================  =========================

(*) with ``importance_sampling_level="sequence"``.

To each, ``beta`` adds the k3 estimate of the KL to the reference, token by token under the same normaliser (rloo excepted), and
``entropy_coef`` subtracts the mean entropy over the step's tokens, whatever the normaliser is.

:func:`decoupled_advantages` is the other way to ``A`` that any row but rloo can take, where there are several rewards.

A normaliser counts every sequence and token of the step: it is computed before groups without variance are dropped and before
micro-batches are cut, so neither changes a gradient. A masked completion counts in N and has no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from grpo_fast.ops.group_advantage import STD_EPSILON, GroupAdvantage, ScaleRewards, group_advantage
from grpo_fast.ops.loss_spec import LossSpec, RatioLevel, Surrogate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from grpo_fast.config import Config

Normalizer: TypeAlias = Literal["sequence_mean", "sequence_sum", "token_mean", "fixed_length"]
"""Weight of a token of sequence i: 1/(N n_i), 1/N, 1/sum_i n_i, or 1/(N max_completion_length)."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One row of the table."""

    name: str
    """Its name in ``Config.loss_type``."""
    surrogate: Surrogate
    importance_sampling_level: RatioLevel
    normalizer: Normalizer
    paper: str
    """arXiv number of the paper that introduced it."""
    scale_rewards: ScaleRewards | None = None
    """The scale that the method fixes; ``None`` leaves it to the configuration."""
    leave_one_out: bool = False
    """Whether the baseline of a completion is the mean of the group's others."""
    kl_in_reward: bool = False
    """Whether ``beta`` times :func:`sequence_kl` is taken from the rewards, rather than added to the loss."""

    def spec(self, config: Config) -> LossSpec:
        """The loss of this row with the numbers of a configuration.

        Raises:
            ValueError: the configuration sets something that the row has no use for, or lacks something it needs.
        """
        if self.surrogate == "cispo" and config.epsilon_high is None:
            raise ValueError("cispo needs epsilon_high, the absolute cap of the ratio (MiniMax-M1 and ScaleRL use 5.0)")
        return LossSpec(
            surrogate=self.surrogate,
            importance_sampling_level=self.importance_sampling_level,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            delta=config.delta,
            beta=0.0 if self.kl_in_reward else config.beta,
            use_bias_correction_kl=config.use_bias_correction_kl,
            entropy_coef=config.entropy_coef,
            sapo_temperature_pos=config.sapo_temperature_pos,
            sapo_temperature_neg=config.sapo_temperature_neg,
            vespo_k_pos=config.vespo_k_pos,
            vespo_lambda_pos=config.vespo_lambda_pos,
            vespo_k_neg=config.vespo_k_neg,
            vespo_lambda_neg=config.vespo_lambda_neg,
            off_policy_mask_threshold=config.off_policy_mask_threshold,
        )

    def advantages(self, rewards: torch.Tensor, *, scale_rewards: ScaleRewards) -> GroupAdvantage:
        """Advantages of a step.

        Args:
            rewards: float [P, G], NaN where there is none; with ``kl_in_reward`` and a KL weight, after its penalty.
            scale_rewards: the configuration's; overruled where the method fixes its own.

        Returns:
            See :func:`~grpo_fast.ops.group_advantage.group_advantage`.
        """
        scale = scale_rewards if self.scale_rewards is None else self.scale_rewards
        return group_advantage(rewards, scale_rewards=scale, leave_one_out=self.leave_one_out)

    def loss_weights(
        self,
        completion_lengths: torch.Tensor,
        *,
        max_completion_length: int,
        num_sequences: int | None = None,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """Weights of the loss of each token of a sequence, chosen so that parts of a step add up to the step.

        Args:
            completion_lengths: int [N], tokens of each sequence that are in the loss; 0 for a masked one.
            max_completion_length: the limit at which completions are cut.
            num_sequences: sequences of the step, where ``completion_lengths`` is one rank's part; N by default.
            num_items_in_batch: tokens in the loss of the whole step, likewise; their sum by default.

        Returns:
            float32 [N]; 0 for sequences without tokens.

        Raises:
            ValueError: a negative length, or a length over ``max_completion_length``.
        """
        lengths = completion_lengths.double()
        if ((lengths < 0) | (lengths > max_completion_length)).any():
            raise ValueError(
                f"completion_lengths run from {completion_lengths.min().item()} to {completion_lengths.max().item()}; "
                f"they must lie between 0 and max_completion_length={max_completion_length}"
            )
        sequences = max(1, lengths.shape[0] if num_sequences is None else num_sequences)
        if self.normalizer == "sequence_mean":
            weights = 1.0 / (sequences * lengths.clamp(min=1.0))
        elif self.normalizer == "token_mean":
            tokens = lengths.sum() if num_items_in_batch is None else lengths.new_full((), float(num_items_in_batch))
            weights = 1.0 / tokens.clamp(min=1.0) * torch.ones_like(lengths)
        else:
            tokens_each = max_completion_length if self.normalizer == "fixed_length" else 1
            weights = torch.full_like(lengths, 1.0 / (sequences * tokens_each))
        return weights.masked_fill(lengths == 0, 0.0).float()


def decoupled_advantages(rewards: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Advantages that scale each reward by itself, so that one of small spread counts as much as its weight says.

    With ``A_f`` the advantages of reward f alone (scaled by its group's standard deviation) and ``S = sum_f w_f A_f`` over the
    rewards that a completion has, ``A = (S - mean S) / (std S + 1e-4)`` over all completions of the step.

    Args:
        rewards: float [P, G, F], NaN where there is none.
        weights: F of them.

    Returns:
        float [P, G]; exactly 0 in groups where no reward that counts differs, and for completions without any reward.

    Source:
        GDPO, arXiv 2601.05242; TRL 1.16 ``multi_objective_aggregation="normalize_then_sum"``.
    """
    num_prompts, group_size, num_rewards = rewards.shape
    each = group_advantage(rewards.permute(2, 0, 1).reshape(-1, group_size), scale_rewards="group")
    factors = rewards.new_tensor(weights)
    # not a matrix product, some of which round each half of a sum that cancels in another way
    total = (factors[:, None, None] * each.advantages.view(num_rewards, num_prompts, group_size)).sum(0)
    scored = ~rewards.isnan().all(2)
    known = total[scored]
    if known.numel() < 2:  # nothing differs, and one number has no spread
        return torch.zeros_like(total)
    advantages = (total - known.mean()) / (known.std() + STD_EPSILON)
    tells = ~each.zero_variance.view(num_rewards, num_prompts) & (factors != 0)[:, None]
    return torch.where(scored & tells.any(0)[:, None], advantages, 0.0)


def sequence_kl(
    old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, sequence_index: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """KL of whole completions to the reference by its first-order estimate, which RLOO takes from the rewards.

    Args:
        old_logprobs: float [T], nats under the policy that sampled.
        ref_logprobs: float [T], nats under the reference policy.
        sequence_index: int64 [T], ascending.
        num_sequences: B.

    Returns:
        float [B]: ``sum_t (old_t - ref_t)``; negative values occur.

    Source:
        TRL 1.16 ``RLOOTrainer``; arXiv 2402.14740.
    """
    result = old_logprobs.new_zeros(num_sequences)
    return result.index_add(0, sequence_index, old_logprobs - ref_logprobs)


_ROWS = (
    Objective("grpo", "clip", "token", "sequence_mean", paper="2402.03300"),
    Objective("dr_grpo", "clip", "token", "fixed_length", paper="2503.20783"),
    Objective("bnpo", "clip", "token", "token_mean", paper="2506.02864"),
    Objective("dapo", "clip", "token", "token_mean", paper="2503.14476"),
    Objective("cispo", "cispo", "token", "token_mean", paper="2506.13585"),
    Objective("gspo", "clip", "sequence", "sequence_mean", paper="2507.18071"),
    Objective(
        "rloo",
        "clip",
        "sequence_sum",
        "sequence_mean",
        paper="2402.14740",
        scale_rewards="none",
        leave_one_out=True,
        kl_in_reward=True,
    ),
    Objective("luspo", "clip", "sequence", "sequence_sum", paper="2602.05261"),
    Objective("sapo", "sapo", "token", "sequence_mean", paper="2511.20347"),
    Objective("vespo", "vespo", "token", "token_mean", paper="2602.10693"),
)

OBJECTIVES: Mapping[str, Objective] = MappingProxyType({row.name: row for row in _ROWS})
"""Every objective by its ``loss_type``."""
