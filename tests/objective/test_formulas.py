"""Every objective against formulas written another way."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from grpo_fast.config import Config
from grpo_fast.objective import OBJECTIVES, decoupled_advantages, sequence_kl
from grpo_fast.ops.loss_spec import LossBatch
from grpo_fast.ops.policy_loss import policy_loss
from grpo_fast.ops.row_plan import live_sequences
from grpo_fast.ops.sequence_weights import off_policy_mask
from tests.objective.settings import LIMIT, settings

NAMES = sorted(OBJECTIVES)
LENGTHS = [9, 1, 5, 3, 7, 2, 4, 0, 6, 8, 3, 5]
NAN = float("nan")
REWARDS = [[1.0, 0.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, NAN, 1.0, 0.75]]


@dataclass
class Step:
    """A step of 12 sequences: ragged, one masked, one group without variance, ratios on both sides of the clip range."""

    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    entropy: torch.Tensor
    index: torch.Tensor
    advantages: torch.Tensor
    lengths: torch.Tensor

    def batch(self, config: Config, *, on_policy: bool = False) -> LossBatch:
        weights = OBJECTIVES[config.loss_type].loss_weights(self.lengths, max_completion_length=LIMIT)
        return LossBatch(
            self.index,
            self.advantages,
            weights,
            old_logprobs=None if on_policy else self.old,
            ref_logprobs=self.ref,
            num_items_in_batch=float(self.lengths.sum()),
        )


def make_step(name: str, *, dtype: torch.dtype = torch.float64) -> Step:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS)
    index = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)
    tokens = len(index)
    old = -torch.rand(tokens, generator=generator, dtype=torch.float64) * 3 - 0.1
    shift = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)[index] * 0.25
    logprobs = old + shift + 0.3 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    ref = old + 0.4 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    entropy = torch.rand(tokens, generator=generator, dtype=torch.float64) * 2
    advantages = OBJECTIVES[name].advantages(torch.tensor(REWARDS, dtype=torch.float64), scale_rewards="group").advantages
    values = (logprobs, old, ref, entropy)
    return Step(*(v.to(dtype) for v in values), index, advantages.flatten().to(dtype), lengths)


def oracle_surrogate(r: torch.Tensor, logp: torch.Tensor, advantage: float, config: Config) -> torch.Tensor:
    """What one token adds, by cases on plain numbers rather than by minima of tensors."""
    if config.loss_type == "vespo":
        return -advantage * logp
    if config.loss_type == "cispo":
        return -min(r.item(), config.epsilon_high) * advantage * logp
    if config.loss_type == "sapo":
        tau = config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg
        return -(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * advantage
    upper = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    bounded = r if config.delta is None or r.item() < config.delta else torch.full((), config.delta, dtype=torch.float64)
    if advantage > 0 and bounded.item() > upper:
        return torch.full((), -advantage * upper, dtype=torch.float64)
    if advantage < 0 and bounded.item() < 1 - config.epsilon:
        return torch.full((), -advantage * (1 - config.epsilon), dtype=torch.float64)
    return -advantage * bounded


def oracle_factor(log_ratios: list[float], advantage: float, config: Config) -> float:
    """What the surrogate of a whole sequence is multiplied with."""
    factor = 1.0
    if config.loss_type == "vespo":
        ratio = math.exp(sum(log_ratios))
        k, decay = (
            (config.vespo_k_pos, config.vespo_lambda_pos) if advantage >= 0 else (config.vespo_k_neg, config.vespo_lambda_neg)
        )
        factor = ratio**k * math.exp(decay * (1 - ratio))
    threshold = config.off_policy_mask_threshold
    if threshold is not None and advantage < 0 and -sum(log_ratios) / len(log_ratios) > threshold:
        factor = 0.0
    return factor


def oracle(step: Step, config: Config, *, on_policy: bool = False) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and its gradients in logprobs and entropy, by loops over sequences, in float64 autograd."""
    name = config.loss_type
    logp = step.logprobs.double().clone().requires_grad_()
    entropies = step.entropy.double().clone().requires_grad_()
    total_tokens, count = sum(LENGTHS), len(LENGTHS)
    start, total = 0, torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        rows = range(start, start + length)
        start += length
        if length == 0:
            continue
        advantage = float(step.advantages[i])
        old = {t: logp[t].detach() if on_policy else step.old[t].double() for t in rows}
        if name in ("gspo", "luspo", "rloo"):
            exponent = sum(logp[t] - old[t] for t in rows)
            shared = torch.exp(exponent if name == "rloo" else exponent / length)
            ratios = dict.fromkeys(rows, shared)
        else:
            ratios = {t: torch.exp(logp[t] - old[t]) for t in rows}
        inner = torch.zeros((), dtype=torch.float64)
        factor = oracle_factor([float(logp[t].detach() - old[t]) for t in rows], advantage, config)
        for t in rows:
            term = factor * oracle_surrogate(ratios[t], logp[t], advantage, config)
            if config.beta and name != "rloo":
                gap = step.ref[t].double() - logp[t]
                term = term + config.beta * (torch.exp(gap) - gap - 1) * ratios[t]
            inner = inner + term
        divisor = {
            "grpo": count * length,
            "gspo": count * length,
            "sapo": count * length,
            "rloo": count * length,
            "dr_grpo": count * LIMIT,
            "luspo": count,
        }.get(name, total_tokens)
        total = total + inner / divisor
    total = total - config.entropy_coef * entropies.sum() / total_tokens
    grad, entropy_grad = torch.autograd.grad(total, [logp, entropies], allow_unused=True)
    return total.item(), grad, torch.zeros_like(entropies) if entropy_grad is None else entropy_grad


VARIANTS = {
    "plain": {},
    "kl": {"beta": 0.04},
    "entropy": {"entropy_coef": 0.01},
    "kl and entropy": {"beta": 0.2, "entropy_coef": 0.02},
    "off-policy mask and kl": {"off_policy_mask_threshold": 0.04, "beta": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_equal_an_independent_formula(name: str, on_policy: bool, variant: str) -> None:
    config = settings(name, **VARIANTS[variant])
    step = make_step(name)
    logprobs = step.logprobs.clone().requires_grad_()
    entropy = step.entropy.clone().requires_grad_()
    result = policy_loss(logprobs, step.batch(config, on_policy=on_policy), spec=OBJECTIVES[name].spec(config), entropy=entropy)
    result.loss.backward()
    loss, grad, entropy_grad = oracle(step, config, on_policy=on_policy)
    # Loss weights are float32 by contract, so 6e-8 relative is theirs.
    assert result.loss.item() == pytest.approx(loss, rel=2e-7, abs=2e-8)
    torch.testing.assert_close(logprobs.grad, grad, rtol=2e-7, atol=1e-10)
    found = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    torch.testing.assert_close(found, entropy_grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_are_telling(name: str) -> None:
    step = make_step(name)
    config = settings(name)
    metrics = policy_loss(step.logprobs, step.batch(config), spec=OBJECTIVES[name].spec(config)).metrics
    if name not in ("sapo", "vespo"):
        assert metrics.clip_high > 0
    if name not in ("sapo", "cispo", "vespo"):
        assert metrics.clip_low > 0
        assert metrics.clip_region < metrics.num_ratios
    assert metrics.ratio_min < 0.8
    assert metrics.ratio_max > 1.2
    assert (step.advantages[4:8] == 0).all()
    assert step.advantages[9] == 0
    assert {1, 0} <= set(LENGTHS)
    assert (step.advantages > 0).any()
    assert (step.advantages < 0).any()
    masked = settings(name, **VARIANTS["off-policy mask and kl"])
    kept = off_policy_mask(step.logprobs, step.batch(config), OBJECTIVES[name].spec(masked))
    assert 0 < (~kept).sum() < ((step.advantages < 0) & (step.lengths > 0)).sum()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("cispo", "sapo", "vespo")])
def test_delta_bounds_the_ratio_of_negative_advantages(name: str) -> None:
    config = settings(name, delta=1.4)
    step = make_step(name)
    logprobs = step.logprobs.clone().requires_grad_()
    result = policy_loss(logprobs, step.batch(config), spec=OBJECTIVES[name].spec(config))
    result.loss.backward()
    loss, grad, _ = oracle(step, config)
    unbounded, _, _ = oracle(step, settings(name))
    assert abs(loss - unbounded) > 1e-4
    assert result.loss.item() == pytest.approx(loss, rel=2e-7)
    torch.testing.assert_close(logprobs.grad, grad, rtol=2e-7, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_close_as_float32_gets(name: str) -> None:
    config = settings(name, beta=0.04)
    step = make_step(name, dtype=torch.float32)
    logprobs = step.logprobs.clone().requires_grad_()
    result = policy_loss(logprobs, step.batch(config), spec=OBJECTIVES[name].spec(config))
    result.loss.backward()
    loss, grad, _ = oracle(step, config)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(logprobs.grad.double(), grad, rtol=1e-5, atol=2e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [[6, 12], [1, 2, 5, 12], list(range(1, 13))])
def test_micro_batches_add_up_to_the_step(name: str, cuts: list[int]) -> None:
    config = settings(name, beta=0.04, entropy_coef=0.01)
    spec = OBJECTIVES[name].spec(config)
    step = make_step(name, dtype=torch.float32)
    whole = step.logprobs.clone().requires_grad_()
    batch = step.batch(config)
    one = policy_loss(whole, batch, spec=spec, entropy=step.entropy)
    one.loss.backward()
    parted = step.logprobs.clone().requires_grad_()
    total, first = torch.zeros(()), 0
    for last in cuts:
        rows = (batch.sequence_index >= first) & (batch.sequence_index < last)
        part = batch._replace(
            sequence_index=batch.sequence_index[rows] - first,
            advantages=batch.advantages[first:last],
            loss_weights=batch.loss_weights[first:last],
            old_logprobs=batch.old_logprobs[rows],
            ref_logprobs=batch.ref_logprobs[rows],
        )
        loss = policy_loss(parted[rows], part, spec=spec, entropy=step.entropy[rows]).loss
        loss.backward()
        total, first = total + loss.detach(), last
    assert total.item() == pytest.approx(one.loss.item(), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(parted.grad, whole.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_dead_sequences_can_be_left_out(name: str) -> None:
    config = settings(name)
    spec = OBJECTIVES[name].spec(config)
    step = make_step(name, dtype=torch.float32)
    batch = step.batch(config)
    whole = step.logprobs.clone().requires_grad_()
    policy_loss(whole, batch, spec=spec).loss.backward()
    live = live_sequences(LENGTHS, step.advantages.tolist(), beta=spec.beta, entropy_coef=spec.entropy_coef)
    assert 0 < sum(live) < len(LENGTHS) - 3
    keep = torch.tensor(live)
    rows = keep[batch.sequence_index]
    parted = step.logprobs.clone().requires_grad_()
    compact = batch._replace(
        sequence_index=(keep.cumsum(0) - 1)[batch.sequence_index][rows],
        advantages=batch.advantages[keep],
        loss_weights=batch.loss_weights[keep],
        old_logprobs=batch.old_logprobs[rows],
        ref_logprobs=None,
    )
    policy_loss(parted[rows], compact, spec=spec).loss.backward()
    assert torch.equal(parted.grad, whole.grad)
    assert (whole.grad[~rows] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_normaliser_of_the_whole_step(name: str) -> None:
    lengths = torch.tensor([4, 0, 2, 8])
    expected = {
        "sequence_mean": [1 / 16, 0, 1 / 8, 1 / 32],
        "token_mean": [1 / 14, 0, 1 / 14, 1 / 14],
        "fixed_length": [1 / 40, 0, 1 / 40, 1 / 40],
        "sequence_sum": [1 / 4, 0, 1 / 4, 1 / 4],
    }[OBJECTIVES[name].normalizer]
    weights = OBJECTIVES[name].loss_weights(lengths, max_completion_length=10)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected))
    ranks = [
        OBJECTIVES[name].loss_weights(part, max_completion_length=10, num_sequences=4, num_items_in_batch=14)
        for part in lengths.split(2)
    ]
    assert torch.equal(torch.cat(ranks), weights)
    assert OBJECTIVES[name].loss_weights(lengths * 0, max_completion_length=10).tolist() == [0.0] * 4
    assert OBJECTIVES[name].loss_weights(lengths[:0], max_completion_length=10).shape == (0,)


@pytest.mark.parametrize("lengths", [[3, 11], [-1, 4]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="max_completion_length=10"):
        OBJECTIVES["dapo"].loss_weights(torch.tensor(lengths), max_completion_length=10)


def test_spec_takes_the_configuration() -> None:
    config = settings("dapo", epsilon=0.1, epsilon_high=None, beta=0.3, entropy_coef=0.2)
    spec = OBJECTIVES["dapo"].spec(config)
    assert (spec.epsilon_low, spec.epsilon_high, spec.beta, spec.entropy_coef) == (0.1, 0.1, 0.3, 0.2)
    assert spec.use_bias_correction_kl
    assert OBJECTIVES["cispo"].spec(settings("cispo", epsilon_high=5.0)).epsilon_high == 5.0
    assert OBJECTIVES["rloo"].spec(settings("rloo", beta=0.3)).beta == 0.0
    with pytest.raises(ValueError, match="epsilon_high"):
        OBJECTIVES["cispo"].spec(settings("dapo", epsilon_high=None))
    with pytest.raises(ValueError, match=r"delta=2\.0"):
        OBJECTIVES["sapo"].spec(settings("sapo", delta=2.0))


def test_only_rloo_fixes_how_rewards_are_scaled() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    for name, objective in OBJECTIVES.items():
        scaled = objective.advantages(rewards, scale_rewards="group").advantages
        plain = objective.advantages(rewards, scale_rewards="none").advantages
        assert torch.equal(scaled, plain) == (name == "rloo")
    torch.testing.assert_close(plain, torch.tensor([[0.0, -1.0, -1.0, 2.0]]))
    loo = OBJECTIVES["rloo"].advantages(rewards, scale_rewards="group").advantages
    torch.testing.assert_close(loo, torch.tensor([[0.0, -4 / 3, -4 / 3, 8 / 3]]))


def test_rewards_that_are_scaled_one_by_one_equal_an_independent_formula() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 4, 3)) * [1.0, 100.0, 1e-3]
    rewards[0, 1] = np.nan  # no reward at all
    rewards[1, :, 2] = np.nan
    rewards[2, :3, 0] = np.nan  # one value, which cannot differ
    rewards[3, :, 1] = 7.0
    weights = np.array([1.0, -0.5, 2.0])
    summed = np.zeros((5, 4))
    for prompt, function in itertools.product(range(5), range(3)):
        values = rewards[prompt, :, function]
        known = values[~np.isnan(values)]
        if len(known) > 1:
            scaled = (values - known.mean()) / (known.std(ddof=1) + 1e-4)
            summed[prompt] += weights[function] * np.nan_to_num(scaled)
    scored = ~np.isnan(rewards).all(2)
    expected = np.where(scored, (summed - summed[scored].mean()) / (summed[scored].std(ddof=1) + 1e-4), 0.0)
    found = decoupled_advantages(torch.tensor(rewards), weights.tolist())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 0.0], [0.3, 0.3, 0.0]])
def test_rewards_that_cancel_teach_where_they_are_scaled_one_by_one(weights: list[float]) -> None:
    cancelling, flat, uncounted = (
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]],
        [[1.0, 2.0, 0.0]] * 3,
        [[1.0, 2.0, 0.0]] * 2,
    )
    rewards = torch.tensor([cancelling, flat, [*uncounted, [1.0, 2.0, 5.0]]])
    assert torch.equal(decoupled_advantages(rewards, weights), torch.zeros(3, 3)), (
        "equal weights: one gains what the other loses"
    )
    unequal = decoupled_advantages(rewards, [1.0, 0.5, 0.0])
    assert unequal[0].sign().tolist() == [1.0, 0.0, -1.0]
    assert torch.equal(unequal[1:], torch.zeros(2, 3)), "exactly: such rows never enter the model"


@pytest.mark.parametrize("known", [0, 1])
def test_a_step_of_fewer_than_two_scored_completions_has_no_advantages_scaled_one_by_one(known: int) -> None:
    rewards = torch.full((2, 3, 2), math.nan)
    rewards[1, 2, :known] = 5.0
    assert torch.equal(decoupled_advantages(rewards, [1.0, 0.5]), torch.zeros(2, 3))


def test_sequence_kl_sums_over_each_completion() -> None:
    index = torch.tensor([0, 0, 2])
    kl = sequence_kl(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -1.5, -1.0]), sequence_index=index, num_sequences=3)
    assert kl.tolist() == [0.5, 0.0, -2.0]
