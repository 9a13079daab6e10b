"""The update of one step: from scored groups to new weights.

Every normaliser is computed over the whole step before anything is dropped or cut, so neither leaving out sequences that carry
no gradient nor the number of micro-batches changes a gradient.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from grpo_fast.config import Config, ConfigError
from grpo_fast.metrics import MetricSums, PhaseTimer
from grpo_fast.objective import OBJECTIVES, decoupled_advantages, sequence_kl
from grpo_fast.ops import (
    LossBatch,
    RowPlan,
    live_sequences,
    plan_microbatches,
    plan_rows,
)
from grpo_fast.ops.sequence_weights import sampler_log_ratios
from grpo_fast.train.batch import TrainingSequence, build_batch, flatten_groups, shared_prompts
from grpo_fast.train.distributed import ALONE, World
from grpo_fast.train.entropy_control import EntropyControl
from grpo_fast.train.entropy_mask import entropy_threshold
from grpo_fast.train.head_part import head_logprobs, head_loss, head_scores
from grpo_fast.train.mismatch import add_mismatch, add_weights, effective_sample_size, importance_weights
from grpo_fast.train.optim import set_learning_rate
from grpo_fast.train.packed_model import attention_of, takes_shared_prompts
from grpo_fast.train.policy import Policy, Scorer
from grpo_fast.train.policy_metrics import add_policy_metrics, add_sequence_metrics
from grpo_fast.train.results import UpdateResult
from grpo_fast.types import Group, TokenBatch, TrainingError

_T = TypeVar("_T")
_ROUNDING = 2.0**-40
"""Of sums of float64 numbers, by far; what float32 rewards differ by is more."""
_SAME_ENTROPY = 1e-5
"""Nats by which rounding may part tokens of one entropy, as where completions begin alike: all of them are kept, or none."""


class NonFiniteGradientError(TrainingError):
    """The gradient is not finite; the weights were left as they were."""


@dataclass(slots=True)
class _Part:
    """A micro-batch of a step, and what is known of its tokens, [T] each, as the step goes on."""

    batch: TokenBatch
    sequences: tuple[TrainingSequence, ...]
    carries_gradient: bool
    reference: torch.Tensor | None = None
    """Log-probabilities of the reference policy."""
    old: torch.Tensor | None = None
    """Log-probabilities of the old policy; ``None``: the policy's own at this moment, a ratio of exactly 1."""
    importance: torch.Tensor | None = None
    """Importance weights against the sampler."""
    entropy: torch.Tensor | None = None
    """Under the policy before the update, where it decides which tokens carry the policy loss."""
    high_entropy: torch.Tensor | None = None
    """1 for the tokens that it chose, 0 for the others."""
    sampler_log_ratios: torch.Tensor | None = None
    """Of each sequence [B] the logarithm of its importance ratio against the sampler, which VESPO takes in place of weights."""
    is_filler: bool = False
    """Whether it has no weight and only keeps this rank in step with the others, which exchange shards with it."""


class Learner:
    """Owns the optimiser and turns groups with rewards into weight updates."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        *,
        reference: Scorer | None,
        world: World = ALONE,
    ) -> None:
        if (config.beta > 0) != (reference is not None):
            raise ValueError(f"beta={config.beta} and reference={reference}: give a reference policy if, and only if, beta > 0")
        can_share = takes_shared_prompts(policy.model)
        if config.share_prompts and not can_share:
            raise ConfigError(
                f"share_prompts=True needs packed sequences with attn_implementation='sdpa' or 'eager', but here they are "
                f"{policy.layout} with {attention_of(policy.model, config.attn_implementation)!r}; set share_prompts=False"
            )
        self._shares_prompts = can_share and policy.device.type == "cpu"
        if config.share_prompts is not None:
            self._shares_prompts = config.share_prompts
        self._config = config
        self._token_budget = config.microbatch_tokens(policy.device.type)
        self._policy = policy
        self._optimizer = optimizer
        self._reference = reference
        self._world = world
        self._objective = OBJECTIVES[config.loss_type]
        self._spec = self._objective.spec(config)
        self._num_items_in_batch = 0.0
        self.entropy = EntropyControl(config)
        """The weight of the entropy bonus."""

    def update(self, groups: Sequence[Group], *, learning_rate: float, timer: PhaseTimer) -> UpdateResult:
        """Gives the groups of a step their advantages and takes ``num_iterations`` optimiser steps on them.

        Raises:
            NonFiniteGradientError: before the weights are touched.
        """
        config = self._config
        with timer.phase("score"), self._whole_heads():
            self._assign_advantages(groups)
            sequences = flatten_groups(groups, mask_truncated=config.mask_truncated_completions)
            _check_kept(sequences, config)
            plans = self._plan(sequences)
            parts = self._micro_batches(sequences, plans)
            sums = MetricSums()
            for part in parts:
                part_sums = MetricSums() if part.is_filler else sums
                part.reference = self._reference_logprobs(part.batch) if self._spec.beta else None
                if config.bypass_old_logprobs:
                    part.old = part.batch.sampling_logprobs
                if config.top_entropy_quantile < 1 or (config.corrects_sampler and part.carries_gradient):
                    self._score(part, part_sums)
            if config.top_entropy_quantile < 1:
                self._keep_high_entropy(parts)
        with timer.phase("train"):
            set_learning_rate(self._optimizer, learning_rate)
            if not config.keep_dead_rows_for_metrics:
                parts = [part for part in parts if part.carries_gradient]
            for iteration in range(config.num_iterations):
                self._iterate(parts, sums, is_first=iteration == 0)
            found = sums.compute(self._world.gather)
            metrics = {name: value for name, value in found.items() if not name.startswith("_")} | effective_sample_size(found)
        if config.use_adaptive_entropy:
            metrics["entropy_coef"] = self.entropy.coefficient
        metrics["loss"] = metrics.get("loss", 0.0) / config.num_iterations
        return self._result(metrics, sequences, plans)

    def _result(
        self, metrics: dict[str, float], sequences: Sequence[TrainingSequence], plans: Sequence[RowPlan]
    ) -> UpdateResult:
        """What was found, and what all ranks together have computed for it."""
        cuts = [list(itertools.chain.from_iterable(_cuts(plans, gradient=gradient))) for gradient in (True, False)]
        trained, measured = (tuple(sequences[i] for rows in cut for i in rows) for cut in cuts)
        saved = shared_prompts(sequences).copies_saved if self._shares_prompts else lambda _: []
        shared, measured_shared = (tuple(length for rows in cut for length in saved(rows)) for cut in cuts)
        num_trained = sum(sequence.num_scored for sequence in trained)
        num_sampled = sum(sequence.num_scored for sequence in sequences)
        return UpdateResult(metrics, trained, num_sampled - num_trained, measured, shared, measured_shared)

    def _assign_advantages(self, groups: Sequence[Group]) -> None:
        for group, row in zip(groups, self._advantages(groups).tolist(), strict=True):
            group.advantages = row

    def _advantages(self, groups: Sequence[Group]) -> torch.Tensor:
        """float64 [P, G]; exactly 0 where a reward is its group's mean up to rounding, which no order of a sum shall decide."""
        if self._config.multi_objective_aggregation == "normalize_then_sum":
            each = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
            return decoupled_advantages(each, self._config.reward_weights or [1.0] * each.shape[2])
        rewards = torch.tensor([group.reward for group in groups], dtype=torch.float64)
        if self._objective.kl_in_reward and self._config.beta > 0:
            rewards -= self._config.beta * self._kl_of_completions(groups).view_as(rewards)
        found = self._objective.advantages(rewards, scale_rewards=self._config.scale_rewards)
        mean = found.mean[:, None]
        return found.advantages.masked_fill((rewards - mean).abs() <= _ROUNDING * mean.abs(), 0.0)

    def _kl_of_completions(self, groups: Sequence[Group]) -> torch.Tensor:
        """float64 [N] on the CPU: first-order KL of each whole completion to the reference."""
        sequences = flatten_groups(groups, mask_truncated=False)
        lengths = [len(s) for s in sequences]
        owners, budget = share_out(lengths, self._world.size), self._token_budget
        plans = [
            plan_microbatches(
                lengths, live=[owner == rank for owner in owners], token_budget=budget, layout=self._policy.layout
            )
            for rank in range(self._world.size)
        ]
        result = torch.zeros(len(sequences), dtype=torch.float64)
        for rows in plans[self._world.rank]:
            chosen = [sequences[i] for i in rows]
            batch = build_batch(chosen, [0.0] * len(rows), self._policy.device, layout=self._policy.layout)
            reference = self._reference_logprobs(batch)
            assert reference is not None
            kl = sequence_kl(
                batch.sampling_logprobs, reference, sequence_index=batch.sequence_index, num_sequences=batch.num_sequences
            )
            result[rows] = kl.double().cpu()
        for batch in self._fillers(sequences, plans):
            self._reference_logprobs(batch)
        self._world.sum([result])
        return result

    def _plan(self, sequences: list[TrainingSequence]) -> list[RowPlan]:
        """The sequences that each rank computes."""
        config = self._config
        in_loss = [s.num_in_loss for s in sequences]
        live = live_sequences(
            in_loss, [s.advantage for s in sequences], beta=self._spec.beta, entropy_coef=float(config.rewards_entropy)
        )
        scores_all = config.keep_dead_rows_for_metrics or config.top_entropy_quantile < 1
        kept = [alive or (scores_all and n > 0) for alive, n in zip(live, in_loss, strict=True)]
        owners = share_out([len(s) * keep for s, keep in zip(sequences, kept, strict=True)], self._world.size)
        return [
            plan_rows(
                [len(s) for s in sequences],
                [n * (owner == rank) for n, owner in zip(in_loss, owners, strict=True)],
                live=[alive and owner == rank for alive, owner in zip(live, owners, strict=True)],
                token_budget=self._token_budget,
                layout=shared_prompts(sequences) if self._shares_prompts else self._policy.layout,
                keep_dead_rows_for_metrics=scores_all,
            )
            for rank in range(self._world.size)
        ]

    def _micro_batches(self, sequences: list[TrainingSequence], plans: list[RowPlan]) -> list[_Part]:
        in_loss = [s.num_in_loss for s in sequences]
        weights = self._objective.loss_weights(
            torch.tensor(in_loss), max_completion_length=self._config.max_completion_length
        ).tolist()
        self._num_items_in_batch = float(sum(in_loss))
        parts = []
        for gradient in (True, False):
            cuts = _cuts(plans, gradient=gradient)
            for rows in cuts[self._world.rank]:
                chosen = tuple(sequences[i] for i in rows)
                batch = build_batch(
                    chosen,
                    [weights[i] for i in rows],
                    self._policy.device,
                    layout=self._policy.layout,
                    shares_prompts=self._shares_prompts,
                )
                parts.append(_Part(batch, chosen, gradient))
            parts += [_Part(batch, (), gradient, is_filler=True) for batch in self._fillers(sequences, cuts)]
        return parts

    def _fillers(self, sequences: Sequence[TrainingSequence], cuts: Sequence[Sequence[Any]]) -> list[TokenBatch]:
        """Batches of no weight, until this rank has as many micro-batches as any: shards are gathered by all at once."""
        if not self._policy.sums_gradients:
            return []
        missing = max(map(len, cuts)) - len(cuts[self._world.rank])
        filler = build_batch([min(sequences, key=len)], [0.0], self._policy.device, layout=self._policy.layout)
        return [filler] * missing

    @contextlib.contextmanager
    def _whole_heads(self) -> Iterator[None]:
        """Heads of the policy and the reference, where they score."""
        with contextlib.ExitStack() as stack:
            if self._config.corrects_sampler or self._config.top_entropy_quantile < 1:
                stack.enter_context(self._policy.whole_head(trains=False))
            if self._reference is not None:
                stack.enter_context(self._reference.whole_head(trains=False))
            yield

    def _iterate(self, parts: Sequence[_Part], sums: MetricSums, *, is_first: bool) -> None:
        """One optimiser step on all micro-batches."""
        follows_entropy = self._config.use_adaptive_entropy
        self._spec = replace(self._spec, entropy_coef=self.entropy.in_force)
        seen = torch.zeros(2, dtype=torch.float64, device=self._policy.device)
        with self._policy.whole_head(trains=True):
            for part in parts:
                part_sums = MetricSums() if part.is_filler else sums
                logprobs, entropies = self._accumulate(part, part_sums)
                if follows_entropy and not part.is_filler:
                    keep = torch.ones_like(entropies) if part.high_entropy is None else part.high_entropy
                    seen += torch.stack([(keep * entropies).sum(), keep.sum()])
                if is_first:
                    add_mismatch(part_sums, logprobs - part.batch.sampling_logprobs)
                    part.old = logprobs if part.old is None else part.old
        self._apply_gradient(sums)
        if follows_entropy:
            self._world.sum([seen])
            self.entropy.observe(*seen.tolist())

    def _accumulate(self, part: _Part, sums: MetricSums) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a micro-batch's gradient and metrics; returns its log-probabilities and entropies, each [T]."""
        batch = part.batch
        known = LossBatch(
            sequence_index=batch.sequence_index,
            advantages=batch.advantages,
            loss_weights=batch.loss_weights,
            old_logprobs=part.old,
            ref_logprobs=part.reference,
            importance_weights=part.importance,
            num_items_in_batch=math.inf if part.is_filler else self._num_items_in_batch,  # no weight reaches the entropy bonus
            sampling_logprobs=batch.sampling_logprobs,
            sampler_log_ratios=part.sampler_log_ratios,
            entropy_weights=part.high_entropy,
        )
        with torch.set_grad_enabled(part.carries_gradient):
            result = head_loss(
                self._policy.scored_hidden_states(batch),
                self._policy.head(self._config.temperature),
                targets=batch.targets,
                batch=known,
                spec=self._spec,
                kept=batch.kept,
            )
        if part.carries_gradient:
            result.loss.backward()
        sums.add("loss", result.loss)
        add_policy_metrics(sums, result.metrics, surrogate=self._spec.surrogate)
        add_sequence_metrics(sums, result.logprobs, known, self._spec)
        return result.logprobs, result.entropy

    def _score(self, part: _Part, sums: MetricSums) -> None:
        """What the policy says of the tokens before the update, in one pass."""
        if self._config.top_entropy_quantile < 1:
            logprobs, part.entropy = self._scored(head_scores, self._policy, part.batch)
        else:
            logprobs = self._scored(head_logprobs, self._policy, part.batch)
        if self._config.corrects_sampler and part.carries_gradient:
            self._correct(part, logprobs, sums)

    def _keep_high_entropy(self, parts: Sequence[_Part]) -> None:
        """Leaves policy loss and entropy bonus to the tokens of the step, on all ranks, whose entropy is highest."""
        own = [part.entropy.double().cpu().numpy() for part in parts if part.entropy is not None and not part.is_filler]
        every = list(itertools.chain.from_iterable(self._world.gather(lambda: own)))
        least = entropy_threshold(every, self._config.top_entropy_quantile) - _SAME_ENTROPY
        for part in parts:
            assert part.entropy is not None
            keep = part.high_entropy = (part.entropy.double() >= least).float()
            part.importance = keep if part.importance is None else part.importance * keep
        self._num_items_in_batch = float(sum((values >= least).sum() for values in every))

    def _correct(self, part: _Part, logprobs: torch.Tensor, sums: MetricSums) -> None:
        """Corrects for the sampler: by weights of tokens, or, for VESPO, by ratios of sequences."""
        config, batch = self._config, part.batch
        weights = importance_weights(
            logprobs - batch.sampling_logprobs,
            batch.sequence_index,
            num_sequences=len(batch.advantages),
            mode=config.vllm_importance_sampling_mode,
            bounds=(config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max),
        )
        add_weights(sums, weights)
        if self._spec.surrogate == "vespo":
            part.sampler_log_ratios = sampler_log_ratios(weights, batch.sequence_index, num_sequences=len(batch.advantages))
        else:
            part.importance = weights

    def _reference_logprobs(self, batch: TokenBatch) -> torch.Tensor | None:
        return None if self._reference is None else self._scored(head_logprobs, self._reference, batch)

    @torch.no_grad()
    def _scored(self, score: Callable[..., _T], policy: Scorer, batch: TokenBatch) -> _T:
        """What ``score`` finds of a batch's tokens under a policy."""
        hidden = policy.scored_hidden_states(batch)
        return score(hidden, policy.head(self._config.temperature), targets=batch.targets, kept=batch.kept)

    def _apply_gradient(self, sums: MetricSums) -> None:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # no sequence carried a gradient: zero, as it would have been, not absent
                parameter.grad = torch.zeros_like(parameter)
        if not self._policy.sums_gradients:
            self._world.sum(parameter.grad for parameter in parameters)
        together = True if self._policy.sums_gradients else None  # torch would take shards one by one
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm or float("inf"), foreach=together)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            self._optimizer.zero_grad()
            raise NonFiniteGradientError(
                f"the gradient norm is {norm.item()}; this update was not made. Look at the last rewards and at the "
                f"learning rate ({self._config.learning_rate:g}); non-finite weights or logits are the usual cause."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        sums.add("grad_norm", norm.to(self._policy.device), reduction="max")  # shards may lie in the host's memory


def _cuts(plans: Sequence[RowPlan], *, gradient: bool) -> list[list[tuple[int, ...]]]:
    """Of each rank the sequences of every micro-batch that carries a gradient, or of every other one."""
    return [[batch.sequences for batch in plan.micro_batches if batch.carries_gradient == gradient] for plan in plans]


def _check_kept(sequences: Sequence[TrainingSequence], config: Config) -> None:
    """Checks that the policy can be normalised over the tokens that sampling kept."""
    if config.truncates_support and any(sequence.kept is None for sequence in sequences):
        raise ConfigError(
            f"{config.support_text} restrict sampling to some tokens, but the engine did not report which "
            "(Completion.kept); use top_p=1, top_k=0, min_p=0, or an engine that reports them"
        )


def share_out(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Which rank computes each sequence: neighbours stay together, and every rank gets about as much.

    Args:
        costs: [N], 0 for what is not computed.
        num_ranks: how many.

    Returns:
        [N] ranks, ascending: a sequence belongs to the rank in whose part of the total its middle lies.
    """
    total = max(1, sum(costs))
    ends = itertools.accumulate(costs)
    return [min(num_ranks - 1, (2 * end - cost) * num_ranks // (2 * total)) for end, cost in zip(ends, costs, strict=True)]
