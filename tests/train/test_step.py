from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast import GRPOTrainer, recipe
from grpo_fast.config import Config, ConfigError
from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.metrics import PhaseTimer
from grpo_fast.objective import OBJECTIVES
from grpo_fast.ops import FusedLoss, LMHead, fused_grpo
from grpo_fast.ops.fused_grpo import fused_grpo_reference
from grpo_fast.train import head_part
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import Policy
from grpo_fast.train.step import (
    Learner,
    NonFiniteGradientError,
    UpdateResult,
    share_out,
)
from grpo_fast.types import Group

MakeGroup = Callable[..., Group]
MakePolicy = Callable[..., Policy]


class Bench:
    """A learner whose gradients are written down just before the optimiser uses them."""

    def __init__(self, policy: Policy, reference: Policy | None = None, **settings: Any) -> None:
        self.config = Config.parse({"max_completion_length": 8, "adam_epsilon": 1e-4, "max_grad_norm": 0.0, **settings})
        self.policy = policy
        self.optimizer = build_optimizer(policy.model, self.config)
        self.learner = Learner(self.config, policy, self.optimizer, reference=reference)
        self.gradients: list[torch.Tensor] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self._flat("grad")))

    def update(self, groups: Sequence[Group], learning_rate: float = 1e-3) -> UpdateResult:
        return self.learner.update(groups, learning_rate=learning_rate, timer=PhaseTimer())

    def weights(self) -> torch.Tensor:
        return self._flat("data")

    def _flat(self, name: str) -> torch.Tensor:
        return torch.cat([getattr(p, name).flatten().clone() for p in self.policy.model.parameters()])


@pytest.fixture
def groups(make_group: MakeGroup) -> list[Group]:
    """Two live groups, between them one without variance, and one completion without a reward."""
    return [make_group(0, [1.0, 0.0, 0.5, 0.0]), make_group(1, [1.0] * 4), make_group(2, [0.0, math.nan, 1.0, 0.25])]


def truth(policy: Policy, groups: Sequence[Group], config: Config) -> tuple[float, torch.Tensor]:
    """Loss and gradient of ``dapo`` against the sampler's log-probabilities, in float64, from full logits, nothing left out."""
    model = policy.model.double()
    total = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rewards = torch.tensor(group.reward, dtype=torch.float64)
        known = rewards[~rewards.isnan()]
        advantages = ((rewards - known.mean()) / (known.std() + 1e-4)).nan_to_num(0.0)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
            logits = model(input_ids=tokens[None], use_cache=False).logits[0] / config.temperature
            first = len(group.prompt.token_ids)
            logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
            ratio = (logprobs - torch.tensor(completion.logprobs, dtype=torch.float64)).exp()
            clipped = ratio.clamp(1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon))
            loss = loss - torch.minimum(ratio * advantage, clipped * advantage).sum() / total
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    model.float()
    return loss.item(), torch.cat([value.flatten() for value in gradient])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_loss_and_gradient_are_those_of_full_logits_in_float64(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    bench = Bench(tiny_policy(), bypass_old_logprobs=True, temperature=0.8, epsilon_high=0.3, tokens_per_microbatch=24)
    loss, gradient = truth(tiny_policy(), groups, bench.config)
    result = bench.update(groups)
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(bench.gradients[0], gradient) < 1e-5
    assert result.metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    # the guard: the clip is at work, and leaving something out would show
    assert 0 < result.metrics["clip_ratio/region_mean"] < 1
    _, other = truth(tiny_policy(), groups[:2], bench.config)
    assert relative_error(bench.gradients[0], other) > 0.1


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_microbatches_change_nothing(loss_type: str, tiny_policy: MakePolicy, groups: list[Group]) -> None:
    settings = {"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else 0.3, "entropy_coef": 0.01}
    whole = Bench(tiny_policy(), **settings)
    expected = whole.update(groups).metrics
    for size in (1, 24, 40):
        parts = Bench(tiny_policy(), **settings, tokens_per_microbatch=size)
        found = parts.update(groups).metrics
        assert relative_error(parts.gradients[0], whole.gradients[0]) < 2e-6
        assert (parts.weights() - whole.weights()).abs().max() < 1e-6
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("budget", [16, 1000])
def test_packing_changes_no_gradient(tiny_policy: MakePolicy, groups: list[Group], budget: int) -> None:
    padded = tiny_policy()
    packed = Policy(deepcopy(padded.model), padded.tokenizer, padding_free=True)
    settings = {"tokens_per_microbatch": budget, "beta": 0.1, "share_prompts": False}
    benches = [Bench(policy, tiny_policy(), **settings) for policy in (padded, packed)]
    results = [bench.update(groups) for bench in benches]
    assert packed.layout == "packed"
    assert torch.allclose(benches[0].gradients[0], benches[1].gradients[0], rtol=1e-4, atol=1e-7)
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("budget", [16, 1000])
def test_sharing_prompts_changes_no_gradient(tiny_policy: MakePolicy, groups: list[Group], budget: int) -> None:
    padded = tiny_policy()
    packed = Policy(deepcopy(padded.model), padded.tokenizer, padding_free=True)
    benches = [
        Bench(policy, tokens_per_microbatch=budget, num_iterations=2)  # packed ones are shared unless told otherwise
        for policy in (padded, packed)
    ]
    plain, shared = (bench.update(groups) for bench in benches)
    for one, other in zip(benches[0].gradients, benches[1].gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert plain.metrics == pytest.approx(shared.metrics, rel=1e-3, abs=1e-6)
    assert plain.shared_prompts == ()
    assert shared.shared_prompts == (3,) * (5 if budget == 1000 else len(shared.shared_prompts))
    assert len(shared.shared_prompts) >= 3


def test_prompts_are_not_shared_where_attention_cannot_be_told(tiny_policy: MakePolicy) -> None:
    with pytest.raises(ConfigError, match="share_prompts=True needs sequences packed"):
        Bench(tiny_policy(), share_prompts=True)


def test_sequences_without_gradient_are_left_out_and_nothing_changes(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    bench = Bench(tiny_policy())
    result = bench.update(groups)
    # a bonus too small to show makes every sequence live
    everything = Bench(tiny_policy(), entropy_coef=1e-30)
    full = everything.update(groups)
    assert (len(result.trained), len(full.trained)) == (7, 12)
    dead = sum(len(c.token_ids) for c in [*groups[1].completions, groups[2].completions[1]])
    assert (result.num_dropped_tokens, full.num_dropped_tokens) == (dead, 0)
    assert result.metrics["loss"] == pytest.approx(full.metrics["loss"], abs=1e-7)
    assert relative_error(bench.gradients[0], everything.gradients[0]) < 2e-6
    assert (bench.weights() - everything.weights()).abs().max() < 1e-6


def test_on_policy_the_ratio_is_exactly_one(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    metrics = Bench(tiny_policy(), epsilon=1e-7).update(groups).metrics
    assert [metrics[f"clip_ratio/{name}_mean"] for name in ("low", "high", "region")] == [0.0, 0.0, 0.0]
    total = sum(len(c.token_ids) for group in groups for c in group.completions)
    weighted = sum(len(c.token_ids) * a for group in groups for c, a in zip(group.completions, group.advantages, strict=True))
    assert metrics["loss"] == pytest.approx(-weighted / total, rel=1e-5)


def test_a_second_iteration_meets_the_clip(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    one = Bench(tiny_policy()).update(groups, learning_rate=0.05).metrics
    bench = Bench(tiny_policy(), num_iterations=2)
    two = bench.update(groups, learning_rate=0.05).metrics
    assert len(bench.gradients) == 2
    assert one["clip_ratio/region_mean"] == 0.0
    assert 0 < two["clip_ratio/region_mean"] <= 0.5, "half of the ratios are those of the first iteration"


def test_iterations_improve_on_the_same_completions(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    losses = [Bench(tiny_policy(), num_iterations=n).update(groups, learning_rate=1e-4).metrics["loss"] for n in (1, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[2] > 1e-4


def test_completions_that_were_cut_stay_out_of_the_loss(tiny_policy: MakePolicy, make_group: MakeGroup) -> None:
    cut = make_group(0, [1.0, 0.0, 0.5, 0.2], truncated=True)
    masked = Bench(tiny_policy(), mask_truncated_completions=True)
    result = masked.update([cut])
    assert [len(sequence.completion_ids) for sequence in result.trained] == [3, 1]
    assert result.num_dropped_tokens == 6
    whole = make_group(0, [1.0, 0.0, 0.5, 0.2])
    bench = Bench(tiny_policy(), mask_truncated_completions=True)
    assert len(bench.update([whole]).trained) == 4
    assert relative_error(masked.gradients[0], bench.gradients[0]) > 0.1
    assert cut.advantages == whole.advantages, "their rewards count in the group's statistics"
    # alone they carry the whole loss, over the tokens that are left
    total = 3 * cut.advantages[2] + 1 * cut.advantages[0]
    assert result.metrics["loss"] == pytest.approx(-total / 4, rel=1e-5)


def test_a_step_without_gradient_leaves_only_momentum(tiny_policy: MakePolicy, make_group: MakeGroup) -> None:
    bench = Bench(tiny_policy(), weight_decay=0.1)
    bench.update([make_group(0, [1.0, 0.0, 0.5, 0.0])])
    before = [parameter.detach().clone().requires_grad_() for parameter in bench.policy.model.parameters()]
    twins = torch.optim.AdamW(
        [
            {"params": [p for p in before if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in before if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
        eps=1e-4,
        fused=True,
    )
    twins.load_state_dict(deepcopy(bench.optimizer.state_dict()))
    for parameter in before:
        parameter.grad = torch.zeros_like(parameter)
    twins.step()

    result = bench.update([make_group(1, [0.5] * 4), make_group(2, [math.nan] * 4)])
    assert result.trained == ()
    assert result.num_dropped_tokens == sum(1 + (i + g) % 5 for i in (1, 2) for g in range(4))
    assert result.metrics == {"loss": 0.0, "grad_norm": 0.0}
    assert torch.count_nonzero(bench.gradients[1]) == 0
    assert torch.equal(bench.weights(), torch.cat([parameter.detach().flatten() for parameter in before]))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 100.0])
def test_gradient_norm_is_clipped_and_told_unclipped(
    max_grad_norm: float, tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    free = Bench(tiny_policy())
    free.update(groups)
    norm = free.gradients[0].norm().item()
    bench = Bench(tiny_policy(), max_grad_norm=max_grad_norm)
    assert bench.update(groups).metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    expected = min(norm, max_grad_norm) if max_grad_norm else norm
    assert bench.gradients[0].norm().item() == pytest.approx(expected, rel=1e-4)
    assert norm > 0.01


def test_a_gradient_that_is_not_finite_ends_it_before_the_weights_change(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    bench = Bench(tiny_policy(), bypass_old_logprobs=True)
    bench.update(groups)
    before, state = bench.weights(), [value["exp_avg"].clone() for value in bench.optimizer.state.values()]
    spoilt = groups[0].completions[1]  # its advantage is negative: no clip bounds the ratio
    groups[0].completions[1] = replace(spoilt, logprobs=(-1000.0,) * len(spoilt.token_ids))
    with pytest.raises(NonFiniteGradientError, match=r"the gradient norm is (nan|inf); this update was not made"):
        bench.update(groups)
    assert torch.equal(bench.weights(), before)
    after = [value["exp_avg"] for value in bench.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    assert len(bench.gradients) == 1
    groups[0].completions[1] = spoilt
    bench.update(groups)  # nothing of the failed update is left in the gradients
    assert bench.gradients[1].isfinite().all()


def test_learning_rate_is_the_one_given(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    bench = Bench(tiny_policy())
    before = bench.weights()
    bench.update(groups, learning_rate=1e-20)
    assert torch.equal(bench.weights(), before)
    assert {group["lr"] for group in bench.optimizer.param_groups} == {1e-20}


def with_logprobs(group: Group, policy: Policy, *, temperature: float) -> Group:
    """The group as the policy itself would have sampled it."""
    completions = []
    for completion in group.completions:
        tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
        with torch.no_grad():
            logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0] / temperature
        first = len(group.prompt.token_ids)
        logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
        completions.append(replace(completion, logprobs=tuple(logprobs.tolist())))
    return Group(group.prompt, completions, group.rewards, group.reward)


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
    assert relative_error(bench.gradients[0], gradient) < 1e-5
    assert result.metrics["kl"] == pytest.approx(kls / total, rel=1e-4)
    assert result.metrics["entropy"] == pytest.approx(entropies / total, rel=1e-5)
    assert result.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1, abs=1e-5)


def test_a_cut_support_that_the_engine_does_not_tell_is_refused(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    with pytest.raises(ConfigError, match=r"top_k=5.* the engine did not say what it kept"):
        Bench(tiny_policy(), top_k=5).update(groups)


def test_entropy_is_the_mean_over_trained_tokens(tiny_policy: MakePolicy, make_group: MakeGroup) -> None:
    group = make_group(0, [1.0, 0.0, 0.5, 0.0])
    metrics = Bench(tiny_policy(), tokens_per_microbatch=12).update([group]).metrics
    policy, found = tiny_policy(), []
    for completion in group.completions:
        tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
        with torch.no_grad():
            logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0].double()
        found.append(torch.distributions.Categorical(logits=logits[2:-1]).entropy())
    assert metrics["entropy"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)


def test_kl_to_the_reference_holds_the_policy_back(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    def far(learning_rate: float, **settings: Any) -> tuple[Bench, dict[str, float]]:
        reference = tiny_policy() if settings else None
        bench = Bench(tiny_policy(), reference, **settings)
        with torch.no_grad():
            torch.manual_seed(1)
            for parameter in bench.policy.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return bench, bench.update(groups, learning_rate=learning_rate).metrics

    free, metrics = far(1e-3)
    assert metrics["kl"] == 0.0
    held, metrics = far(1e-3, beta=1.0)
    assert metrics["kl"] > 0.01
    assert relative_error(held.gradients[0], free.gradients[0]) > 0.05
    assert held.update(groups).metrics["kl"] < metrics["kl"] * 1.5
    start = Bench(tiny_policy(), tiny_policy(), beta=1.0).update(groups)
    assert start.metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert len(start.trained) == 12, "the KL term reaches groups without variance"


@pytest.mark.parametrize(("beta", "given"), [(0.1, False), (0.0, True)])
def test_a_reference_is_needed_exactly_with_a_kl_term(beta: float, given: bool, tiny_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match=r"a reference policy is needed exactly when beta > 0"):
        Bench(tiny_policy(), tiny_policy() if given else None, beta=beta)


def test_rloo_takes_the_kl_from_the_rewards(tiny_policy: MakePolicy, make_group: MakeGroup) -> None:
    group = with_logprobs(make_group(0, [1.0, 0.0, 0.5, 0.0]), tiny_policy(), temperature=1.0)
    Bench(tiny_policy(), tiny_policy(), loss_type="rloo", beta=0.1).update([group])
    same = list(group.advantages)
    rewards = torch.tensor(group.reward)
    expected = rewards - (rewards.sum() - rewards) / 3
    assert same == pytest.approx(expected.tolist(), abs=1e-5)

    lifted = [replace(c, logprobs=tuple(v + 1.0 for v in c.logprobs)) for c in group.completions]
    moved = Group(group.prompt, lifted, group.rewards, group.reward)
    Bench(tiny_policy(), tiny_policy(), loss_type="rloo", beta=0.1, tokens_per_microbatch=12).update([moved])
    rewards = rewards - 0.1 * torch.tensor([float(len(c.token_ids)) for c in lifted])
    expected = rewards - (rewards.sum() - rewards) / 3
    assert moved.advantages == pytest.approx(expected.tolist(), abs=1e-5)
    assert moved.advantages != pytest.approx(same, abs=0.05)


def test_phases_are_charged(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    timer = PhaseTimer()
    bench = Bench(tiny_policy(), tiny_policy(), beta=0.1)
    bench.learner.update(groups, learning_rate=1e-3, timer=timer)
    seconds = timer.lap()
    assert min(seconds["train"], seconds["score"]) > 0
    assert seconds["rollout"] == seconds["reward"] == 0


def test_rows_without_gradient_can_be_kept_for_the_metrics(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    usual, kept = Bench(tiny_policy()), Bench(tiny_policy(), keep_dead_rows_for_metrics=True)
    every = Bench(tiny_policy(), entropy_coef=1e-30)  # reaches every token and changes no gradient
    results = [bench.update(groups) for bench in (usual, kept, every)]
    assert torch.equal(usual.gradients[0], kept.gradients[0])
    assert torch.equal(usual.weights(), kept.weights())
    assert results[0].trained == results[1].trained
    assert results[0].num_dropped_tokens == results[1].num_dropped_tokens > 0
    assert results[0].measured == results[2].measured == ()
    measured = sum(len(sequence.completion_ids) for sequence in results[1].measured)
    assert measured == results[1].num_dropped_tokens
    assert results[1].metrics["entropy"] == pytest.approx(results[2].metrics["entropy"], rel=1e-6)
    assert results[1].metrics["entropy"] != pytest.approx(results[0].metrics["entropy"], rel=1e-4)
    assert results[1].metrics["loss"] == pytest.approx(results[0].metrics["loss"], rel=1e-6)


def test_the_loss_is_made_in_one_pass_by_default(
    tiny_policy: MakePolicy, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def listening(*given: Any, **options: Any) -> FusedLoss:
        calls.append(options)
        return fused_grpo(*given, **options)

    monkeypatch.setattr(head_part, "fused_grpo", listening)
    bench = Bench(tiny_policy(), tokens_per_microbatch=24)
    bench.update(groups)
    assert len(calls) > 1
    assert all("impl" not in options for options in calls)


def embedded_curve(
    loss: Callable[..., FusedLoss], folder: Path, *, seed: int = 0, num_steps: int = 200
) -> list[dict[str, float]]:
    """Metrics of the first steps of 200 of the embedded recipe with some loss."""
    settings = {"output_dir": folder, "sinks": (), "forecast": "off", "report": False, "eval_steps": 1000}
    with (
        pytest.MonkeyPatch.context() as patch,
        GRPOTrainer(recipe("embedded", seed=seed, max_steps=200, **settings)) as trainer,
    ):
        patch.setattr(head_part, "fused_grpo", loss)
        return [dict(step.metrics) for step in islice(trainer.steps(), num_steps)]


def in_bfloat16(hidden: torch.Tensor, head: LMHead, **options: Any) -> FusedLoss:
    """The reference on logits that were rounded."""
    return fused_grpo_reference(hidden, replace(head, logits_dtype=torch.bfloat16), **options)


def largest_gap(one: list[dict[str, float]], two: list[dict[str, float]], name: str) -> float:
    """Between the means of twenty steps of two curves; a step whose groups all agree trains on nothing and has no entropy."""
    known = [
        [[step[name] for step in curve[start : start + 20] if name in step] for start in range(0, len(one), 20)]
        for curve in (one, two)
    ]
    means = [
        (statistics.mean(first), statistics.mean(second)) for first, second in zip(*known, strict=True) if first and second
    ]
    assert len(means) >= 5
    return max(abs(first - second) for first, second in means)


def follow_each_other(one: list[dict[str, float]], two: list[dict[str, float]]) -> bool:
    """Whether the same completions were sampled, and loss and gradient norm agree to rounding."""
    return all(
        first["reward"] == second["reward"]
        and first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-7)
        and first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)
        for first, second in zip(one, two, strict=True)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_two_hundred_steps_learn_what_the_reference_learns(tmp_path: Path) -> None:
    """Errors too small to be seen in one step can drift; a run of another seed says how far apart equal runs may be."""
    found = embedded_curve(fused_grpo, tmp_path / "fused")
    expected = embedded_curve(fused_grpo_reference, tmp_path / "reference")
    other = embedded_curve(fused_grpo_reference, tmp_path / "other", seed=1)
    assert follow_each_other(found[:20], expected[:20])
    for name in ("reward", "entropy"):
        assert largest_gap(found, expected, name) <= largest_gap(other, expected, name)
    assert statistics.mean(step["reward"] for step in expected[-20:]) > 0.9
    # the guard: rounded logits, an error of the size that public kernels have, would have been told
    rounded = embedded_curve(in_bfloat16, tmp_path / "rounded", num_steps=20)
    assert not follow_each_other(rounded, expected[:20])


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


def test_bypass_takes_the_ratio_to_the_sampler(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    bench = Bench(tiny_policy(), bypass_old_logprobs=True, temperature=0.8, epsilon_high=0.3)
    loss, gradient = truth(tiny_policy(), groups, bench.config)
    assert bench.update(groups).metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(bench.gradients[0], gradient) < 1e-5


def test_only_engines_of_their_own_are_corrected_unless_asked() -> None:
    assert not Config().corrects_sampler
    assert Config(rollout="vllm").corrects_sampler
    assert not Config(rollout="vllm", bypass_old_logprobs=True).corrects_sampler
    assert not Config(rollout="vllm", vllm_importance_sampling_correction=False).corrects_sampler


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_sequences_are_shared_out_evenly_and_in_order(num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(num_ranks)
    costs = (torch.randint(0, 50, (40,), generator=generator) * (torch.rand(40, generator=generator) < 0.8)).tolist()
    ranks = share_out(costs, num_ranks)
    assert ranks == sorted(ranks)
    loads = [sum(cost for cost, owner in zip(costs, ranks, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert sum(loads) == sum(costs)
    assert all(abs(load - sum(costs) / num_ranks) <= max(costs) for load in loads)


def test_a_step_without_work_is_shared_out_too() -> None:
    assert share_out([0, 0, 0], 4) == [0, 0, 0]
    assert share_out([], 2) == []
