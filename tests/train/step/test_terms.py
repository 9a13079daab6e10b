"""What an update adds to the loss, reports, and shares out among ranks."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.compute import ComputeMeter, ModelShape
from grpo_fast.device import EstimatedEnergy
from grpo_fast.metrics import PhaseTimer
from grpo_fast.objective import decoupled_advantages
from grpo_fast.ops import FusedLoss, fused_grpo
from grpo_fast.train import head_part
from grpo_fast.train.step import share_out
from grpo_fast.types import Group
from tests.train.step.bench import Bench, MakeGroup, MakePolicy, relative_error, with_logprobs


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
    with pytest.raises(ValueError, match=r"give a reference policy if, and only if, beta > 0"):
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


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_a_reward_that_is_the_mean_but_for_rounding_teaches_nothing(
    scale_rewards: str, tiny_policy: MakePolicy, make_group: MakeGroup
) -> None:
    rewards = [4 / 9, 8 / 9, 9 / 9, 7 / 9]
    assert functools.reduce(operator.add, rewards) / 4 not in rewards  # Python's own `sum` rounds once, from 3.12 on
    group = make_group(0, rewards)
    assert len(Bench(tiny_policy(), scale_rewards=scale_rewards).update([group]).trained) == 3
    assert group.advantages[3] == 0.0
    near = make_group(0, [*rewards[:3], float(torch.tensor(7 / 9))])
    assert len(Bench(tiny_policy(), scale_rewards=scale_rewards).update([near]).trained) == 4


def test_several_rewards_are_scaled_one_by_one(tiny_policy: MakePolicy, make_group: MakeGroup) -> None:
    groups = [make_group(number, [0.0] * 4) for number in range(2)]
    small, large = [[0.0, 0.001, 0.002, 0.003], [0.0] * 4], [[0.0] * 4, [300.0, 200.0, 100.0, 0.0]]
    for group, *values in zip(groups, small, large, strict=True):
        group.rewards = [list(row) for row in zip(*values, strict=True)]
        group.reward = [sum(row) for row in group.rewards]
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    for weights in ((), (1.0, 0.25)):
        settings = {"reward_funcs": ["a:b", "a:c"], "reward_weights": weights} if weights else {}
        bench = Bench(tiny_policy(), multi_objective_aggregation="normalize_then_sum", **settings)
        assert len(bench.update(groups).trained) == 8
        expected = decoupled_advantages(rewards, weights or (1.0, 1.0))
        assert [group.advantages for group in groups] == expected.tolist()
        assert groups[0].advantages[3] > 0.5 * (weights or (1.0, 1.0))[1] * groups[1].advantages[0]


def test_completions_of_no_token_leave_the_weights(tiny_policy: MakePolicy, make_group: MakeGroup) -> None:
    bench = Bench(tiny_policy(), tiny_policy(), loss_type="rloo", beta=0.1)
    before = [weight.detach().clone() for weight in bench.policy.model.parameters()]
    result = bench.update([make_group(0, [1.0, 0.0, 0.5, 0.0], lengths=[0] * 4)])
    assert result.trained == ()
    assert result.metrics["grad_norm"] == 0.0
    assert all(torch.equal(one, other) for one, other in zip(before, bench.policy.model.parameters(), strict=True))


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


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "gspo"}, {"beta": 0.3}, {"keep_dead_rows_for_metrics": True}, {"entropy_coef": 0.2}],
    ids=str,
)
def test_only_tokens_of_high_entropy_carry_the_policy_loss(
    settings: dict[str, Any], tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    """The quantile is of all tokens of the step, those of groups without variance too, and the KL term; the bonus is not."""
    beta, policy, reference = settings.get("beta", 0.0), tiny_policy(), tiny_policy()
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(0.7)
    bench = Bench(tiny_policy(), reference if beta else None, top_entropy_quantile=0.3, tokens_per_microbatch=24, **settings)
    result = bench.update(groups)
    each = []
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
            first = len(group.prompt.token_ids)
            ours, theirs = (
                one.model(input_ids=tokens[None], use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
                for one in (policy, reference)
            )
            own, ref = (rows.gather(1, tokens[first:, None])[:, 0] for rows in (ours, theirs.detach()))
            each.append((advantage, own, ref, -(ours.exp() * ours).sum(1)))
    entropies = torch.cat([entropy.detach() for *_, entropy in each])
    threshold = torch.quantile(entropies, 0.7)
    live = torch.cat([entropy for advantage, *_, entropy in each if advantage != 0])
    assert torch.quantile(live, 0.7) != threshold
    total, num_kept = len(entropies), (entropies >= threshold).sum()
    loss = torch.zeros(())
    for advantage, own, ref, entropy in each:
        keep = (entropy >= threshold).float()
        loss = loss - settings.get("entropy_coef", 0.0) * (keep * entropy).sum() / num_kept
        ratio = (own - own.detach()).exp()
        if settings.get("loss_type") == "gspo":
            loss = loss - advantage * (own - own.detach()).mean().exp() * keep.sum() / len(own) / len(each)
        else:
            kl = (ref - own).exp() - (ref - own) - 1
            loss = loss + (-advantage * ratio * keep + beta * ratio * kl).sum() / total
    expected = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(policy.model.parameters()))])
    assert relative_error(bench.gradients[0], expected) < 2e-5
    every = Bench(tiny_policy(), reference if beta else None, **settings)
    every.update(groups)
    assert relative_error(every.gradients[0], expected) > 0.05
    if settings == {}:
        assert result.metrics["entropy"] == pytest.approx(live.mean().item(), rel=1e-5)
    if "keep_dead_rows_for_metrics" in settings or "entropy_coef" in settings:
        assert result.metrics["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)


def test_the_pass_for_the_entropies_is_metered(tiny_policy: MakePolicy, groups: list[Group]) -> None:
    flops = []
    for settings in ({}, {"top_entropy_quantile": 0.3}, {"keep_dead_rows_for_metrics": True}):
        bench = Bench(tiny_policy(), **settings)
        result = bench.update(groups)
        meter = ComputeMeter(ModelShape.from_model(bench.policy.model), power=EstimatedEnergy(0.0))
        result.charge(meter, bench.config)
        flops.append(meter.usage(0).flops)
    forward = flops[0] / 3  # a third of a training pass
    assert flops[1] == pytest.approx(flops[0] + forward + (flops[2] - flops[0]), rel=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_weight_of_the_bonus_follows_the_entropy_of_each_update(
    share: float, tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    settings = {"top_entropy_quantile": share, "tokens_per_microbatch": 24, "num_iterations": 2, "entropy_coef": 0.3}
    fixed, none = Bench(tiny_policy(), **settings), Bench(tiny_policy(), **settings | {"entropy_coef": 1e-30})
    adaptive = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.05}
    moved = Bench(tiny_policy(), **settings | adaptive)
    for bench in (fixed, none, moved):
        result = bench.update(groups)
    assert relative_error(moved.gradients[0], none.gradients[0]) < 1e-6, "no entropy is known before the first update"
    assert relative_error(fixed.gradients[0], none.gradients[0]) > 0.01
    assert result.metrics["entropy_coef"] == pytest.approx(0.4)
    begun = Bench(tiny_policy(), **settings | adaptive | {"num_iterations": 1})
    begun.learner.entropy.load_state_dict({"coefficient": 0.3, "entropy": 1.0})
    result = begun.update(groups)
    assert relative_error(begun.gradients[0], fixed.gradients[0]) < 1e-6
    state = begun.learner.entropy.state_dict()
    assert state["coefficient"] == pytest.approx(0.35)
    if share == 1:
        assert state["entropy"] == pytest.approx(result.metrics["entropy"], rel=1e-5)
    else:
        assert state["entropy"] > 1.01 * result.metrics["entropy"], "the mean is of the tokens that the bonus is of"
