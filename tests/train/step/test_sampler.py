"""Completions that another sampler made, or that were sampled from a cut support."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.compute import ComputeMeter, ModelShape
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import EstimatedEnergy
from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.policy import Policy
from grpo_fast.types import Group
from tests.train.step.bench import Bench, MakePolicy, relative_error, truth, with_logprobs


def test_mismatch_with_the_sampler_is_measured(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    same = [with_logprobs(group, tiny_policy(), temperature=0.7) for group in groups]
    metrics = Bench(tiny_policy(), temperature=0.7, tokens_per_microbatch=24).update(same).metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)

    shifted = [
        Group(
            group.prompt,
            [replace(c, logprobs=tuple(value - 0.5 for value in c.logprobs)) for c in group.completions],
            group.rewards,
            group.reward,
        )
        for group in same
    ]
    metrics = Bench(tiny_policy(), temperature=0.7, tokens_per_microbatch=24).update(shifted).metrics
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5, abs=1e-5)
    for name in ("min", "mean", "max"):
        assert metrics[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(math.exp(0.5), rel=1e-5)
    assert metrics["clip_ratio/region_mean"] == 0.0, "with the whole softmax the ratio is against the policy itself"


def cut_support(group: Group, policy: Policy, config: Config) -> Group:
    """The group as the policy would have sampled it from its ``top_k`` likeliest tokens and the one that was drawn."""
    completions = []
    for completion in group.completions:
        tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
        with torch.no_grad():
            logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0] / config.temperature
        logits, drawn = logits[len(group.prompt.token_ids) - 1 : -1], list(completion.token_ids)
        supports = [
            sorted({token, *row.topk(config.top_k - 1).indices.tolist()}) for token, row in zip(drawn, logits, strict=True)
        ]
        logprobs = [
            (row[token] - row[support].logsumexp(0)).item() - 0.1
            for token, row, support in zip(drawn, logits, supports, strict=True)
        ]
        completions.append(replace(completion, logprobs=tuple(logprobs), kept=KeptTokens.of(drawn, supports)))
    return Group(group.prompt, completions, group.rewards, group.reward)


@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "share_prompts": True, "attn_implementation": "sdpa"}])
def test_over_a_cut_support_all_is_that_of_masked_full_logits(
    layout: dict[str, Any], tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    """Loss, gradient, KL, entropy and mismatch, in float64, nothing left out."""
    settings = {"top_k": 5, "temperature": 0.8, "beta": 0.3, "entropy_coef": 0.02, "loss_type": "dapo"}
    policy, reference = (Policy(tiny_policy().model, tiny_policy().tokenizer, padding_free=bool(layout)) for _ in range(2))
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(0.7)
    bench = Bench(policy, reference, **settings, **layout, tokens_per_microbatch=24)
    cut = [cut_support(group, policy, bench.config) for group in groups]
    exact, other = (each.model.double() for each in (tiny_policy(), deepcopy(reference)))
    total = sum(len(completion.token_ids) for group in cut for completion in group.completions)
    loss, kls, entropies = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for group in cut:
        rewards = torch.tensor(group.reward, dtype=torch.float64)
        known = rewards[~rewards.isnan()]
        advantages = ((rewards - known.mean()) / (known.std() + 1e-4)).nan_to_num(0.0)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            assert completion.kept is not None
            tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
            mask = torch.full((len(completion.token_ids), exact.config.vocab_size), -math.inf).double()
            for row, support in zip(mask, completion.kept.to_lists(), strict=True):
                row[support] = 0.0
            first = len(group.prompt.token_ids)
            ours, theirs = (
                (model(input_ids=tokens[None], use_cache=False).logits[0, first - 1 : -1] / 0.8 + mask).log_softmax(-1)
                for model in (exact, other)
            )
            logprobs, ref = (each.gather(1, tokens[first:, None])[:, 0] for each in (ours, theirs.detach()))
            kl = (ref - logprobs).exp() - (ref - logprobs) - 1
            entropy = -(ours.exp() * ours.masked_fill(mask < 0, 0.0)).sum(1)
            ratio = (logprobs - logprobs.detach()).exp()
            loss = loss + (-ratio * advantage + 0.3 * ratio * kl - 0.02 * entropy).sum() / total
            kls, entropies = kls + kl.sum().item(), entropies + entropy.sum().item()
    gradient = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(exact.parameters()))])
    result = bench.update(cut)
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    cut_meter, whole_meter = (ComputeMeter(ModelShape.from_model(exact), power=EstimatedEnergy(0.0)) for _ in range(2))
    result.charge(cut_meter, bench.config)
    replace(result, trained=tuple(replace(each, kept=None) for each in result.trained)).charge(whole_meter, bench.config)
    rows = sum(len(each.completion_ids) for each in result.trained)
    num_kept = sum(int(each.kept.sizes.sum()) for each in result.trained if each.kept is not None)
    saved = (rows * exact.config.vocab_size - num_kept) * exact.config.hidden_size
    passes = len(bench.config.scoring_passes) + 3
    assert whole_meter.usage(0).flops - cut_meter.usage(0).flops == 2 * passes * saved > 0
    assert relative_error(bench.gradients[0], gradient) < 1e-5
    assert result.metrics["kl"] == pytest.approx(kls / total, rel=1e-4)
    assert result.metrics["entropy"] == pytest.approx(entropies / total, rel=1e-5)
    assert result.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1, abs=1e-5)


def test_a_cut_support_that_the_engine_does_not_tell_is_refused(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    with pytest.raises(ConfigError, match=r"top_k=5.* the engine did not report which"):
        Bench(tiny_policy(), top_k=5).update(groups)


def test_importance_weights_correct_for_another_sampler(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    """With a ratio a token, kept under 3, the gradient is that of the weighted surrogate; the clip's ratio stays exactly 1."""
    settings = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate"}
    bench, plain = Bench(tiny_policy(), **settings), Bench(tiny_policy())
    found, other = (one.update(groups).metrics for one in (bench, plain))
    sampler = tiny_policy()
    total = sum(len(c.token_ids) for group in groups for c in group.completions)
    loss = torch.zeros(())
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            if advantage == 0.0:
                continue
            one = TrainingSequence(group.prompt.token_ids, completion.token_ids, completion.logprobs, advantage, in_loss=True)
            batch = build_batch([one], [1.0], torch.device("cpu"))
            logits = sampler.model(input_ids=batch.input_ids, use_cache=False).logits[0]
            first = len(group.prompt.token_ids)
            logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, batch.targets[:, None])[:, 0]
            weight = (logprobs.detach() - batch.sampling_logprobs).exp().clamp(max=3.0)
            loss = loss - (weight * advantage * (logprobs - logprobs.detach()).exp()).sum() / total
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in sampler.model.parameters()])
    assert relative_error(bench.gradients[0], gradient) < 1e-5
    assert relative_error(plain.gradients[0], gradient) > 0.05
    assert found["clip_ratio/region_mean"] == other["clip_ratio/region_mean"] == 0.0
    assert found["sampling/importance_weight/masked_fraction"] == 0.0
    assert "sampling/importance_weight/mean" not in other


def test_a_masked_sequence_leaves_the_gradient(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    settings = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": 1e-9}
    bench = Bench(tiny_policy(), **settings)
    metrics = bench.update(groups).metrics
    assert metrics["sampling/importance_weight/masked_fraction"] == 1.0
    assert bench.gradients[0].abs().max() == 0.0


def each_in_the_loss(policy: Policy, groups: list[Group]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """Advantage, log-probabilities and those of the sampler of each completion that has an advantage, one by one."""
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            if advantage == 0.0 or not completion.token_ids:
                continue
            tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
            logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0]
            first = len(group.prompt.token_ids)
            logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
            yield advantage, logprobs, torch.tensor(completion.logprobs)


def gradient_of(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(policy.model.parameters()))])


def test_completions_far_from_their_sampler_are_left_out(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    plain = Bench(tiny_policy())
    plain.update(groups)
    policy = tiny_policy()
    each = list(each_in_the_loss(policy, groups))
    gaps = sorted((theirs - ours).mean().item() for advantage, ours, theirs in each if advantage < 0)
    threshold = sum(gaps[-2:]) / 2
    assert threshold > 0
    bench = Bench(tiny_policy(), off_policy_mask_threshold=threshold, tokens_per_microbatch=24)
    metrics = bench.update(groups).metrics
    total = sum(len(c.token_ids) for group in groups for c in group.completions)
    loss = sum(
        -advantage * (ours - ours.detach()).exp().sum() / total
        for advantage, ours, theirs in each
        if advantage > 0 or (theirs - ours).mean() <= threshold
    )
    expected = gradient_of(policy, loss)
    assert relative_error(bench.gradients[0], expected) < 1e-5
    assert relative_error(plain.gradients[0], expected) > 0.05
    assert metrics["sampling/off_policy_mask/masked_fraction"] == pytest.approx(1 / len(each))


@pytest.mark.parametrize("iterations", [1, 2])
def test_vespo_weighs_completions_by_their_ratio_to_the_sampler(
    iterations: int, tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    settings = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate"}
    settings |= {"loss_type": "vespo", "vespo_k_neg": 0.5, "vespo_lambda_neg": 0.1, "vespo_lambda_pos": 0.1}
    bench = Bench(tiny_policy(), num_iterations=iterations, tokens_per_microbatch=24, **settings)
    policy, total = tiny_policy(), sum(len(c.token_ids) for group in groups for c in group.completions)
    steps = [policy.model.state_dict()]
    bench.optimizer.register_step_post_hook(lambda *_: steps.append(deepcopy(bench.policy.model.state_dict())))
    metrics = bench.update(groups).metrics
    old = [ours.detach() for _, ours, _ in each_in_the_loss(policy, groups)]
    policy.model.load_state_dict(steps[iterations - 1])
    loss, weights = torch.zeros(()), []
    for before, (advantage, ours, theirs) in zip(old, each_in_the_loss(policy, groups), strict=True):
        ratio = (ours.detach() - before).exp().prod().item() * (before - theirs).exp().clamp(max=3.0).prod().item()
        k, decay = (2.0, 0.1) if advantage > 0 else (0.5, 0.1)
        weights.append(ratio**k * math.exp(decay * (1 - ratio)))
        loss = loss - weights[-1] * advantage * ours.sum() / total
    assert relative_error(bench.gradients[-1], gradient_of(policy, loss)) < 1e-4
    assert max(weights) > 1.5 * min(weights)
    if iterations == 1:
        assert metrics["vespo/phi_seq_mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)
    assert "clip_ratio/low_mean" not in metrics


def test_bypass_takes_the_ratio_to_the_sampler(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    bench = Bench(tiny_policy(), bypass_old_logprobs=True, temperature=0.8, epsilon_high=0.3)
    loss, gradient = truth(tiny_policy(), groups, bench.config)
    assert bench.update(groups).metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(bench.gradients[0], gradient) < 1e-5


def test_only_engines_of_their_own_are_corrected_unless_asked() -> None:
    assert not Config().corrects_sampler
    assert Config(repetition_penalty=1.1).corrects_sampler
    assert Config(rollout="vllm").corrects_sampler
    assert not Config(rollout="vllm", bypass_old_logprobs=True).corrects_sampler
    assert not Config(rollout="vllm", vllm_importance_sampling_correction=False).corrects_sampler
