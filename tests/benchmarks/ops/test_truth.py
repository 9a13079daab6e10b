"""The truth is autograd's in float64; mistakes are found, roundings that somebody ships are not mistakes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import truth
from benchmarks.ops.cases import HeadCase, Model
from benchmarks.ops.contenders.contender import HeadResult
from benchmarks.ops.inputs import ENTROPY_COEF, HeadProblem, head_problem, head_rows

CPU = torch.device("cpu")
MODEL = Model("a small head", 48, 1201)


def problem_of(**options) -> HeadProblem:
    case = HeadCase(MODEL, 192, **({"dtype": "float32"} | options))
    return head_problem(case, head_rows(case, CPU))


def written_out(problem: HeadProblem, dtype=torch.float64) -> HeadResult:
    """The loss of the case in plain PyTorch, from its formula."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (problem.hidden, problem.weight))
    log_shares = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)).log_softmax(1)
    logprobs = log_shares.gather(1, problem.targets[:, None])[:, 0]
    entropy = -(log_shares.exp() * log_shares).sum(1)
    batch, spec, case = problem.batch, problem.spec, problem.case
    advantages = batch.advantages.repeat_interleave(case.num_tokens // case.num_sequences)
    if case.objective == "cross_entropy":
        loss = -logprobs.mean()
    else:
        log_ratio = logprobs - batch.old_logprobs
        if case.objective == "sequence":
            log_ratio = log_ratio.view(case.num_sequences, -1).mean(1).repeat_interleave(len(hidden) // case.num_sequences)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - spec.epsilon_low, 1 + spec.epsilon_high)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    if case.entropy:
        loss = loss - ENTROPY_COEF * entropy.mean()
    gradients = torch.autograd.grad(loss, (hidden, weight)[: len(problem.inputs)])
    return HeadResult(loss.detach(), logprobs.detach(), entropy.detach(), gradients)


def on_tensor_cores(one: torch.Tensor, other: torch.Tensor, *, at_a_time: int) -> torch.Tensor:
    """A product as tensor cores make it, each step's sum cut to float32 towards zero."""
    total = torch.zeros(len(one), len(other))
    for start in range(0, one.shape[1], at_a_time):
        part = slice(start, start + at_a_time)
        exact = total.double() + one[:, part].double() @ other[:, part].double().T
        rounded = exact.float()
        beyond = rounded.double().abs() > exact.abs()
        total = torch.where(beyond, torch.nextafter(rounded, torch.zeros(())), rounded)
    return total


@pytest.mark.parametrize("at_a_time", [8, 16])
@pytest.mark.parametrize("depth", [576, 2048])
def test_sums_that_are_cut_are_off_by_more_than_float32_and_less_than_is_allowed(depth: int, at_a_time: int) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(n, depth, generator=generator).bfloat16() for n in (16, 512))
    exact = one.double() @ other.double().T
    cut = (on_tensor_cores(one, other, at_a_time=at_a_time) - exact).abs().max().item()
    rounded = (one.float() @ other.float().T - exact).abs().max().item()
    allowed = truth.accumulation_error(depth, exact.abs().max().item())
    assert allowed / 20 < cut < allowed / 2
    assert cut > 4 * rounded


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dead_share": 0.5},
        {"objective": "sequence"},
        {"objective": "cross_entropy"},
        {"entropy": True},
        {"frozen_head": True},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_truth_is_the_formula_in_float64(options) -> None:
    problem = problem_of(**options)
    found = truth.head_truth(problem)
    errors = found.errors(written_out(problem), problem)
    assert set(errors) > {"logprobs_max_nat", "loss_relative", "dhidden_relative"}
    assert max(errors.values()) < 1e-7  # old log-probabilities and advantages are float32
    assert found.expected.gradients[0].abs().max() > 0


def test_plain_pytorch_in_bfloat16_is_right_and_its_error_is_known() -> None:
    problem = problem_of(dtype="bfloat16")
    found = truth.head_truth(problem)
    errors = found.errors(written_out(problem, torch.bfloat16), problem)
    assert not found.complaints(errors)
    assert 1e-4 < found.plain_errors["logprobs_mean_nat"] < 0.05
    assert 1e-3 < errors["dhidden_relative"] < 0.1


def mistakes(right: HeadResult) -> dict[str, HeadResult]:
    hidden, weight = right.gradients
    return {
        "a row's log-probability": right._replace(logprobs=right.logprobs.clone().index_fill_(0, torch.tensor([7]), -3.0)),
        "no target in d hidden": right._replace(gradients=(hidden * 0.9, weight)),
        "half of d weight": right._replace(gradients=(hidden, weight / 2)),
        "the loss without its mean": right._replace(loss=right.loss * 2),
        "NaN": right._replace(gradients=(hidden, weight * float("nan"))),
        "entropy of another temperature": right._replace(entropy=right.entropy * 1.01),
    }


@pytest.mark.parametrize(
    "name",
    [
        "a row's log-probability",
        "no target in d hidden",
        "half of d weight",
        "the loss without its mean",
        "NaN",
        "entropy of another temperature",
    ],
)
def test_mistakes_are_found(name: str) -> None:
    problem = problem_of()
    found = truth.head_truth(problem)
    assert found.complaints(found.errors(mistakes(written_out(problem))[name], problem))


def test_bfloat16_logits_are_a_mistake_in_float32() -> None:
    problem = problem_of()
    found = truth.head_truth(problem)
    assert found.complaints(found.errors(written_out(problem, torch.bfloat16), problem))


def test_gradients_of_some_rows_and_tokens_are_those_of_the_whole(monkeypatch) -> None:
    problem = problem_of()
    whole = truth.head_truth(problem)
    monkeypatch.setattr(truth, "NUM_ROWS", 20)
    monkeypatch.setattr(truth, "NUM_TOKENS", 40)
    part = truth.head_truth(problem)
    assert len(part.rows) == 20 < len(whole.rows)
    assert 20 < len(part.tokens) <= 40 < len(whole.tokens)
    every = written_out(problem)
    assert max(part.errors(every, problem).values()) < 1e-7
    for gradient, index, expected in zip(every.gradients, (part.rows, part.tokens), part.expected.gradients, strict=True):
        torch.testing.assert_close(gradient[index], expected, rtol=1e-6, atol=1e-12)
