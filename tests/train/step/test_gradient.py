"""The gradient of an update, however it is cut, and what becomes of it."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from grpo_fast.config import ConfigError
from grpo_fast.metrics import MetricSums
from grpo_fast.objective import OBJECTIVES
from grpo_fast.train.batch import build_batch, flatten_groups
from grpo_fast.train.policy import Policy
from grpo_fast.train.step import NonFiniteGradientError, _Part
from grpo_fast.types import Episode, Group
from tests.train.step.bench import Bench, MakeGroup, MakePolicy, relative_error, truth


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


def answered(group: Group) -> Group:
    """The group as if an environment had said every third token, the second of each completion first."""
    completions = []
    for completion in group.completions:
        sampled = tuple(place % 3 != 1 for place in range(len(completion.token_ids)))
        logprobs = tuple(value * said for value, said in zip(completion.logprobs, sampled, strict=True))
        completions.append(replace(completion, logprobs=logprobs, episode=Episode(sampled, (), 2)))
    return replace(group, completions=completions)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_what_an_environment_said_is_read_and_never_trained_on(
    layout: str, tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    groups = [answered(group) for group in groups]
    policy = tiny_policy()
    if layout != "padded":
        policy = Policy(policy.model, policy.tokenizer, padding_free=True)
    settings = {"bypass_old_logprobs": True, "epsilon_high": 0.3, "tokens_per_microbatch": 40}
    bench = Bench(policy, share_prompts=layout == "shared", **settings)
    loss, gradient = truth(tiny_policy(), groups, bench.config)
    result = bench.update(groups)
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(bench.gradients[0], gradient) < 1e-5
    trained = sum(sequence.num_scored for sequence in result.trained)
    sampled = sum(completion.num_sampled for group in groups for completion in group.completions)
    assert trained + result.num_dropped_tokens == sampled
    # the guard: leaving the environment's words out of the context, or taking them into the loss, would show
    everything = [replace(g, completions=[replace(c, episode=None) for c in g.completions]) for g in groups]
    assert relative_error(bench.gradients[0], truth(tiny_policy(), everything, bench.config)[1]) > 0.1


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


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_a_batch_that_only_keeps_a_rank_in_step_gives_no_gradient(
    loss_type: str, tiny_policy: MakePolicy, groups: list[Group]
) -> None:
    bench = Bench(tiny_policy(), loss_type=loss_type, epsilon_high=5.0, entropy_coef=0.1)
    sequences = flatten_groups(groups, mask_truncated=False)
    batch = build_batch(sequences, [0.0] * len(sequences), bench.policy.device)
    bench.learner._num_items_in_batch = 30.0
    gradients = []
    for is_filler in (True, False):
        bench.learner._accumulate(_Part(batch, (), carries_gradient=True, is_filler=is_filler), MetricSums())
        gradients.append(bench._flat("grad"))
    assert not gradients[0].any()
    assert gradients[1].any(), "the guard"


@pytest.mark.parametrize(("settings", "expected"), [({}, 2), ({"tokens_per_microbatch": 4096}, 1)], ids=["default", "given"])
def test_on_a_cpu_passes_take_2048_tokens(
    settings: dict[str, int],
    expected: int,
    tiny_policy: MakePolicy,
    make_group: MakeGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, sizes = tiny_policy(), []
    run = policy.scored_hidden_states
    monkeypatch.setattr(policy, "scored_hidden_states", lambda batch: sizes.append(batch.input_ids.numel()) or run(batch))
    Bench(policy, max_completion_length=60, **settings).update(
        [make_group(i, [1.0, 0.0] * 4, lengths=[50] * 8) for i in range(6)]
    )
    assert sum(sizes) == 6 * 8 * 53
    assert len(sizes) == expected


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
    with pytest.raises(ConfigError, match="share_prompts=True needs packed sequences"):
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
