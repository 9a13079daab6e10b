from __future__ import annotations

import math

import pytest
import torch

from grpo_fast.ops.loss_spec import LossBatch, LossSpec
from grpo_fast.ops.policy_loss import policy_coefficients
from grpo_fast.ops.sequence_weights import (
    gamma_weights,
    off_policy_mask,
    sampler_log_ratios,
    segment_sum,
    sequence_lengths,
    weighted,
)

LENGTHS = [3, 2, 0, 4, 1]
STARTS = [0, 3, 5, 5, 9]
ADVANTAGES = [0.5, -0.5, 1.0, -1.5, 0.0]
VESPO = LossSpec(surrogate="vespo", vespo_k_pos=1.5, vespo_lambda_pos=2.5, vespo_k_neg=3.5, vespo_lambda_neg=0.5)


def case() -> tuple[torch.Tensor, LossBatch]:
    generator = torch.Generator().manual_seed(1)
    old, move, sampler = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(3))
    return old + 0.5 * move, LossBatch(
        torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS)),
        torch.tensor(ADVANTAGES, dtype=torch.float64),
        torch.ones(5, dtype=torch.float64),
        old_logprobs=old,
        sampling_logprobs=old + 0.3 * sampler,
        sampler_log_ratios=torch.tensor([0.2, -0.3, 0.0, 0.1, -40.0], dtype=torch.float64),
    )


def rows_of(i: int) -> range:
    return range(STARTS[i], STARTS[i] + LENGTHS[i])


def phi(logprobs: torch.Tensor, batch: LossBatch, *, corrected: bool = True) -> list[float]:
    """Written without logarithms where that can be: powers and products of plain numbers."""
    found = []
    for i, advantage in enumerate(ADVANTAGES):
        ratio = math.prod(math.exp(min(20.0, max(-20.0, float(logprobs[t] - batch.old_logprobs[t])))) for t in rows_of(i)) * (
            math.exp(batch.sampler_log_ratios[i]) if corrected else 1.0
        )
        ratio = min(math.exp(20.0), max(1e-8, ratio))
        k, decay = (1.5, 2.5) if advantage >= 0 else (3.5, 0.5)
        found.append(ratio**k * math.exp(decay * (1 - ratio)))
    return found


def test_gamma_weights_equal_an_independent_formula() -> None:
    logprobs, batch = case()
    found = gamma_weights(logprobs, batch, VESPO)
    assert found.tolist() == pytest.approx(phi(logprobs, batch), rel=1e-12)
    assert found[2] == 1.0, "a sequence without tokens"
    assert found[4] < 1e-10, "the least ratio"
    assert found[:2].sub(1).abs().min() > 0.05
    without = gamma_weights(logprobs, batch._replace(sampler_log_ratios=None), VESPO)
    assert without.tolist() == pytest.approx(phi(logprobs, batch, corrected=False), rel=1e-12)
    on_policy = gamma_weights(logprobs, batch._replace(old_logprobs=None, sampler_log_ratios=None), VESPO)
    assert on_policy.tolist() == [1.0] * 5


def test_gamma_weights_of_extreme_ratios_are_finite() -> None:
    logprobs, batch = case()
    for far in (-500.0, 500.0):
        moved = batch._replace(old_logprobs=logprobs - far, sampler_log_ratios=None)
        assert gamma_weights(logprobs, moved, VESPO)[[0, 1, 3, 4]].max() < 1e-3


def test_a_sequence_far_from_its_sampler_is_left_out_where_its_advantage_is_negative() -> None:
    logprobs, batch = case()
    gaps = [sum(float(batch.sampling_logprobs[t] - logprobs[t]) for t in rows_of(i)) / max(1, LENGTHS[i]) for i in range(5)]
    between = (gaps[1] + gaps[3]) / 2
    for threshold in (between, max(gaps) + 1, min(gaps) - 1):
        mask = off_policy_mask(logprobs, batch, LossSpec(off_policy_mask_threshold=threshold))
        assert mask.tolist() == [a >= 0 or gap <= threshold for a, gap in zip(ADVANTAGES, gaps, strict=True)]
    assert max(gaps[0], gaps[4]) > between, "a sequence beyond the threshold stays where its advantage is not negative"


def test_without_a_sampler_the_mask_takes_the_old_policy() -> None:
    logprobs, batch = case()
    batch = batch._replace(sampling_logprobs=None)
    spec = LossSpec(off_policy_mask_threshold=0.05)
    given = off_policy_mask(logprobs, batch._replace(sampling_logprobs=batch.old_logprobs), spec)
    assert torch.equal(off_policy_mask(logprobs, batch, spec), given)
    assert not given.all()
    assert off_policy_mask(logprobs, batch._replace(old_logprobs=None), spec).all()


def test_masked_tokens_count_in_neither() -> None:
    logprobs, batch = case()
    keep = torch.tensor([True, False, True, True, True, False, True, True, False, True])
    spoiled = batch._replace(
        token_mask=keep,
        old_logprobs=torch.where(keep, batch.old_logprobs, math.nan),
        sampling_logprobs=torch.where(keep, batch.sampling_logprobs, math.nan),
    )
    fields = ("sequence_index", "old_logprobs", "sampling_logprobs")
    compact = batch._replace(**{name: getattr(batch, name)[keep] for name in fields})
    torch.testing.assert_close(gamma_weights(logprobs, spoiled, VESPO), gamma_weights(logprobs[keep], compact, VESPO))
    for threshold in (-0.2, 0.0, 0.2):
        spec = LossSpec(off_policy_mask_threshold=threshold)
        assert torch.equal(off_policy_mask(logprobs, spoiled, spec), off_policy_mask(logprobs[keep], compact, spec))


def test_weights_are_factors_of_the_importance_weights() -> None:
    logprobs, batch = case()
    known = torch.linspace(0, 2, 10, dtype=torch.float64)
    spec = LossSpec(surrogate="vespo", off_policy_mask_threshold=0.0)
    phi, mask = gamma_weights(logprobs, batch, spec), off_policy_mask(logprobs, batch, spec)
    expected = known * (phi * mask)[batch.sequence_index]
    found = weighted(logprobs, batch._replace(importance_weights=known), spec)
    torch.testing.assert_close(found.importance_weights, expected)
    assert 0 < (expected == 0).sum() < 10
    assert weighted(logprobs, batch, LossSpec()) is batch
    half = weighted(logprobs.bfloat16(), batch, spec).importance_weights
    assert half.dtype == torch.float32


def test_ratios_of_tokens_multiply_to_those_of_their_sequences() -> None:
    weights = torch.tensor([0.5, 3.0, 0.0, 1e30, 2.0], dtype=torch.float64)
    found = sampler_log_ratios(weights, torch.tensor([0, 0, 2, 2, 3]), num_sequences=5)
    assert found.exp().tolist() == pytest.approx([1.5, 1.0, 1e-8 * math.exp(20), 2.0, 1.0])


def test_a_nan_is_seen() -> None:
    logprobs, batch = case()
    old = batch.old_logprobs.clone()
    old[6] = math.nan
    found = policy_coefficients(logprobs, batch._replace(old_logprobs=old), spec=VESPO)
    assert found.loss.isnan()
    assert found.logprobs.isnan().tolist() == [index == 3 for index in batch.sequence_index.tolist()]


def test_lengths_and_sums_of_an_ascending_index() -> None:
    lengths = sequence_lengths(torch.tensor([1, 1, 3]), num_sequences=5)
    assert lengths.tolist() == [0, 2, 0, 1, 0]
    assert segment_sum(torch.tensor([1.0, 2.0, 4.0]), lengths).tolist() == [0.0, 3.0, 0.0, 4.0, 0.0]
    assert sequence_lengths(torch.tensor([], dtype=torch.long), num_sequences=2).tolist() == [0, 0]
