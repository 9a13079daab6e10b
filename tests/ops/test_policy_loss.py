from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_fast.ops.loss_spec import LossBatch, LossSpec
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss, policy_loss_reference
from tests.ops.loss_cases import EXTRAS, SPECS, case, extended


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_are_the_gradient_of_the_reference(name: str, extra: str, dtype: torch.dtype) -> None:
    logprobs, entropy, batch = case(dtype)
    batch, spec = extended(batch, extra), SPECS[name]
    found = policy_coefficients(logprobs, batch, spec=spec, entropy=entropy, impl="torch")
    leaves = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
    expected = policy_loss_reference(leaves[0], batch, spec=spec, entropy=leaves[1])
    gradients = torch.autograd.grad(expected.loss, leaves, allow_unused=True)
    tight = {"rtol": 1e-12, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.metrics.values, expected.metrics.values)
    torch.testing.assert_close(found.logprobs, gradients[0], **tight)
    if spec.entropy_coef == 0:
        assert found.entropy is None
    else:
        torch.testing.assert_close(found.entropy, gradients[1], **tight)
    assert not any(value.requires_grad for value in (found.loss, found.logprobs, found.metrics.values))
    assert found.logprobs.dtype == dtype


def test_ties_of_the_clip_share_the_gradient_as_autograd_does() -> None:
    ratios = torch.tensor([0.8, 1.2, 1.0, 1.5, 0.5, 1.4, 1.3], dtype=torch.float64)
    spec = LossSpec(delta=1.4)
    for sign in (1.0, -1.0, 0.0):
        batch = LossBatch(
            torch.zeros(7, dtype=torch.long),
            torch.tensor([sign], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            old_logprobs=torch.zeros(7, dtype=torch.float64),
        )
        for low in (1 - 0.2, 0.5):
            leaf = ratios.log().requires_grad_()
            each = replace(spec, epsilon_low=1 - low, epsilon_high=0.2)
            policy_loss_reference(leaf, batch, spec=each).loss.backward()
            assert torch.equal(policy_coefficients(leaf.detach(), batch, spec=each).logprobs, leaf.grad)


@pytest.mark.parametrize("name", SPECS)
def test_a_masked_token_is_not_there(name: str) -> None:
    logprobs, entropy, batch = case()
    batch = extended(batch, "weighted and masked")
    mask = batch.token_mask
    kept = {"sequence_index", "old_logprobs", "ref_logprobs", "importance_weights", "entropy_weights"}
    compact = batch._replace(token_mask=None, **{field: getattr(batch, field)[mask] for field in kept})
    expected = policy_coefficients(logprobs[mask], compact, spec=SPECS[name], entropy=entropy[mask])
    poison = {field: torch.where(mask, getattr(batch, field), math.nan) for field in kept - {"sequence_index"}}
    for each in (batch, batch._replace(**poison)):
        ruined = each is not batch
        lp, h = (torch.where(mask, v, math.nan) if ruined else v for v in (logprobs, entropy))
        found = policy_coefficients(lp, each, spec=SPECS[name], entropy=h)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.metrics.values, expected.metrics.values)
        torch.testing.assert_close(found.logprobs[mask], expected.logprobs)
        assert (found.logprobs[~mask] == 0).all()
        if found.entropy is not None:
            assert (found.entropy[~mask] == 0).all()
            torch.testing.assert_close(found.entropy[mask], expected.entropy)
        leaf = lp.clone().requires_grad_()
        policy_loss(leaf, each, spec=SPECS[name], entropy=h).loss.backward()
        torch.testing.assert_close(leaf.grad, found.logprobs, rtol=1e-12, atol=1e-15)
    assert 0 < mask.sum() < len(mask)


def test_importance_weights_reach_the_surrogate_alone() -> None:
    logprobs, entropy, batch = case()
    for name in ("clip", "cispo", "sapo", "gspo", "rloo", "vespo"):
        spec = replace(SPECS[name], beta=0.3, entropy_coef=0.01)
        plain = policy_coefficients(logprobs, batch, spec=spec, entropy=entropy)
        rest = policy_coefficients(logprobs, batch._replace(advantages=batch.advantages * 0), spec=spec, entropy=entropy)
        weights = torch.full((14,), 0.7, dtype=torch.float64)
        weighted = policy_coefficients(logprobs, batch._replace(importance_weights=weights), spec=spec, entropy=entropy)
        torch.testing.assert_close(weighted.loss, rest.loss + 0.7 * (plain.loss - rest.loss))
        torch.testing.assert_close(weighted.logprobs, rest.logprobs + 0.7 * (plain.logprobs - rest.logprobs))
        torch.testing.assert_close(weighted.metrics.values, plain.metrics.values)


CONSTANT = ("cispo", "vespo", "vespo kl")
"""Their ratios, or weights, are constants by definition."""


@pytest.mark.parametrize("name", [name for name in SPECS if name not in CONSTANT])
def test_gradients_are_those_of_the_loss(name: str) -> None:
    logprobs, entropy, batch = case()
    inputs = (logprobs.requires_grad_(), entropy.requires_grad_())
    assert torch.autograd.gradcheck(lambda lp, h: policy_loss(lp, batch, spec=SPECS[name], entropy=h).loss, inputs)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_the_ratio_is_one_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    logprobs, entropy, batch = case(dtype)
    spec = SPECS[name]
    off = batch._replace(old_logprobs=logprobs.clone())
    on = batch._replace(old_logprobs=None)
    results = []
    for each in (on, off):
        leaf = logprobs.clone().requires_grad_()
        result = policy_loss(leaf, each, spec=spec, entropy=entropy)
        result.loss.backward()
        results.append((result.loss.detach(), leaf.grad))
        assert result.metrics.ratio_min == result.metrics.ratio_max == 1.0
        assert result.metrics.ratio_sum == result.metrics.num_ratios
        assert result.metrics.clip_region == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][1][batch.advantages[batch.sequence_index] != 0] != 0).all()


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logprobs, _, batch = case()
    for name in ("clip", "two-sided", "cispo", "sapo", "gspo", "vespo"):
        leaf = logprobs.clone().requires_grad_()
        policy_loss(leaf, batch._replace(old_logprobs=None), spec=SPECS[name]).loss.backward()
        expected = -(batch.loss_weights * batch.advantages)[batch.sequence_index]
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-14, atol=0)


def test_metrics_count_tokens_at_token_level() -> None:
    ratios = torch.tensor([0.5, 0.9, 1.5, 1.5, 0.5, 1.1, 1.25])
    batch = LossBatch(
        torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([1.0, -1.0]), torch.ones(2), old_logprobs=torch.zeros(7)
    )
    entropy = torch.arange(7.0)
    metrics = policy_loss(ratios.log(), batch, spec=LossSpec(epsilon_high=0.2), entropy=entropy).metrics
    found = {name: round(value.item(), 5) for name, value in metrics.named().items()}
    assert found == {
        "num_tokens": 7.0,
        "num_ratios": 7.0,
        "clip_low": 1.0,
        "clip_high": 1.0,
        "clip_region": 2.0,
        "kl_sum": 0.0,
        "entropy_sum": 21.0,
        "ratio_sum": 7.25,
        "ratio_min": 0.5,
        "ratio_max": 1.5,
    }


def test_metrics_count_sequences_at_sequence_level() -> None:
    logprobs = torch.tensor([1.5, 0.5, 4.0]).log()
    batch = LossBatch(torch.tensor([0, 0, 2]), torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4), old_logprobs=torch.zeros(3))
    metrics = policy_loss(logprobs, batch, spec=LossSpec(importance_sampling_level="sequence")).metrics
    assert metrics.num_ratios == 2
    assert metrics.num_tokens == 3
    assert metrics.clip_region == 0
    assert metrics.ratio_min.item() == pytest.approx(math.sqrt(0.75))
    assert metrics.ratio_max.item() == pytest.approx(4.0)


@pytest.mark.parametrize("name", SPECS)
def test_metrics_of_parts_combine_to_those_of_the_whole(name: str) -> None:
    logprobs, entropy, batch = case()
    whole = policy_loss(logprobs, batch, spec=SPECS[name], entropy=entropy).metrics
    cut = 5
    first = policy_loss(logprobs[:cut], batch.tokens(0, cut), spec=SPECS[name], entropy=entropy[:cut])
    second = policy_loss(logprobs[cut:], batch.tokens(cut, 14), spec=SPECS[name], entropy=entropy[cut:])
    for key, value in first.metrics.combine(second.metrics).named().items():
        torch.testing.assert_close(value, getattr(whole, key), rtol=1e-12, atol=1e-12)
        assert not value.requires_grad
        assert value.ndim == 0


@pytest.mark.parametrize("name", SPECS)
def test_nothing_gives_a_differentiable_zero(name: str) -> None:
    logprobs, entropy, batch = case()
    empty = logprobs[:0].clone().requires_grad_()
    result = policy_loss(empty, batch.tokens(0, 0), spec=SPECS[name], entropy=entropy[:0])
    result.loss.backward()
    assert result.loss == 0
    assert empty.grad.shape == (0,)
    assert result.metrics.num_ratios == 0
    assert result.metrics.ratio_min == math.inf
    masked = logprobs.clone().requires_grad_()
    all_masked = batch._replace(advantages=batch.advantages * 0)
    result = policy_loss(masked, all_masked, spec=LossSpec(importance_sampling_level=SPECS[name].importance_sampling_level))
    result.loss.backward()
    assert result.loss == 0
    assert (masked.grad == 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_a_nan_is_seen(name: str) -> None:
    logprobs, entropy, batch = case()
    logprobs[11] = math.nan
    assert batch.advantages[batch.sequence_index[11]] == 0
    assert policy_loss(logprobs, batch, spec=SPECS[name], entropy=entropy).loss.isnan()


def test_half_precision_inputs_are_computed_in_float32() -> None:
    logprobs, _, batch = case(torch.float32)
    half = logprobs.bfloat16()
    loss = policy_loss(half, batch, spec=SPECS["clip"]).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, policy_loss(half.float(), batch, spec=SPECS["clip"]).loss)


def test_a_repeated_call_is_bitwise_the_same() -> None:
    logprobs, entropy, batch = case(torch.float32)
    losses = [policy_loss(logprobs, batch, spec=SPECS["gspo kl"], entropy=entropy).loss for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


def test_missing_inputs_are_named() -> None:
    logprobs, entropy, batch = case()
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(logprobs, batch._replace(ref_logprobs=None), spec=SPECS["kl"])
    with pytest.raises(ValueError, match="entropy="):
        policy_loss(logprobs, batch, spec=SPECS["entropy"])
    with pytest.raises(ValueError, match="num_items_in_batch"):
        policy_loss(logprobs, batch._replace(num_items_in_batch=None), spec=SPECS["entropy"], entropy=entropy)
    with pytest.raises(ValueError, match="old_logprobs requires a gradient"):
        policy_loss(logprobs, batch._replace(old_logprobs=logprobs.clone().requires_grad_()), spec=SPECS["clip"])
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(13,\)"):
        policy_loss(logprobs, batch._replace(old_logprobs=batch.old_logprobs[1:]), spec=SPECS["clip"])
    with pytest.raises(ValueError, match=r"loss_weights \(5,\)"):
        policy_loss(logprobs, batch._replace(loss_weights=batch.loss_weights[1:]), spec=SPECS["clip"])
