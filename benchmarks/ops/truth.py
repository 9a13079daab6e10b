"""Who is right: float64 on the rounded inputs, and how far off plain PyTorch in the inputs' own type is.

Log-probabilities, entropy and the loss are held against float64 in every row. Gradients are held against it where the whole
would not fit or would take minutes: ``d hidden`` of up to 256 rows spread over all of them, ``d weight`` of up to 512 tokens
(the 256 most frequent ids and others spread over the vocabulary), each summed over all T rows.

An implementation is wrong where an error exceeds three times that of plain PyTorch with logits in the inputs' type, plus 1e-5
(of the entropy, a difference of numbers as large as log V, 1e-4 nat in the mean and 1e-3 in the worst row): wide enough for
every rounding that somebody ships on purpose, far below any mistake. What is wrong gets no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.ops.contenders.contender import HeadResult
from benchmarks.ops.inputs import AdvantageProblem, HeadProblem, LossProblem
from grpo_fast.ops import group_advantage, policy_loss

NUM_ROWS, NUM_TOKENS = 256, 512
ALLOWED_RATIO, ALLOWED_ERROR = 3.0, 1e-5
ALLOWED_ENTROPY = {"entropy_mean_nat": 1e-4, "entropy_max_nat": 1e-3}


def accumulation_error(depth: int, largest: float) -> float:
    """What tensor cores may be off by in a product of 16-bit operands that they sum in float32.

    Products are exact, and are added to the sum a few at a time: eight on sm_80 and on consumer cards, sixteen on sm_90. Each
    time the sum is cut towards zero, not rounded, which takes half an ulp off it on average and always in the same direction,
    so that errors add up where those of roundings cancel: at eight a time

        depth / 8 · 1/2 · 2^-23 · largest.

    float32 as other units compute it knows nothing of this; an implementation is held against both. Half an ulp is what cuts of
    a sum near ``largest`` cost all along; sums that only end there cost less, in models of the hardware a fifth.

    Args:
        depth: H, terms of a sum.
        largest: size of the largest sum.

    Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330 (2021).
    """
    return depth / 16 * 2.0**-23 * largest


class Statistics(NamedTuple):
    """Of every row, each [T]."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    log_total: torch.Tensor


@dataclass
class HeadTruth:
    """What a case's results should be, in float64, and what plain PyTorch makes of it."""

    expected: HeadResult
    """``d hidden`` of ``rows`` and ``d weight`` of ``tokens`` only."""
    rows: torch.Tensor
    tokens: torch.Tensor
    plain_errors: dict[str, float]

    def errors(self, found: HeadResult, problem: HeadProblem) -> dict[str, float]:
        """Errors of an implementation by name; of what it returns."""
        picked = [gradient[index] for gradient, index in zip(found.gradients, self._indices(problem), strict=True)]
        return _errors(found._replace(gradients=tuple(picked)), self.expected, problem)

    def _indices(self, problem: HeadProblem) -> list[torch.Tensor]:
        return [self.rows if x is problem.hidden else self.tokens for x in problem.inputs]

    def complaints(self, errors: dict[str, float]) -> list[str]:
        """What is wrong, in words; nothing where all errors are in bounds."""
        return complaints(errors, self.plain_errors)


def complaints(errors: dict[str, float], plain: dict[str, float]) -> list[str]:
    """Errors beyond what plain PyTorch allows; NaN is beyond."""
    found = []
    for name, error in errors.items():
        limit = ALLOWED_RATIO * plain[name] + ALLOWED_ENTROPY.get(name, ALLOWED_ERROR)
        if not error <= limit:
            found.append(f"{name} is off by {error:.2g}, allowed are {limit:.2g}")
    return found


def head_truth(problem: HeadProblem) -> HeadTruth:
    """Works out both for a case."""
    rows, hidden, weight = problem.rows, problem.hidden.detach(), problem.weight.detach()
    spread = torch.linspace(0, len(hidden) - 1, min(len(hidden), NUM_ROWS), device=hidden.device)
    picked_rows = spread.round().long().unique()
    tail = torch.linspace(0, len(weight) - 1, min(len(weight), NUM_TOKENS // 2), device=weight.device).round().long()
    tokens = torch.cat([torch.arange(min(len(weight), NUM_TOKENS // 2), device=weight.device), tail]).unique()
    exact = _result(problem, Statistics(rows.logprobs, rows.entropy, rows.log_total), picked_rows, tokens, torch.float64)
    plain = _result(problem, _plain_statistics(problem), picked_rows, tokens, hidden.dtype)
    errors = _errors(plain, exact, problem)
    if "loss_relative" in errors:  # errors of tokens may cancel in one number, by luck
        errors["loss_relative"] = max(errors["loss_relative"], errors["logprobs_mean_nat"])
    return HeadTruth(exact, picked_rows, tokens, errors)


@torch.no_grad()
def _plain_statistics(problem: HeadProblem) -> Statistics:
    """Logits in the inputs' type and PyTorch's log-softmax of them in float32, which on a CPU has roundings of its own."""
    found = []
    for block in problem.rows.blocks():
        logits = (problem.hidden[block] @ problem.weight.T).float()
        log_shares = torch.log_softmax(logits, 1)
        target = problem.targets[block, None]
        logprobs = log_shares.gather(1, target)[:, 0]
        log_total = logits.gather(1, target)[:, 0] - logprobs
        found.append((logprobs, -(log_shares.exp() * log_shares).sum(1), log_total))
    return Statistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _result(
    problem: HeadProblem, statistics: Statistics, rows: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype
) -> HeadResult:
    """Loss, and gradients of some rows and some tokens, with products in ``dtype``."""
    if not problem.inputs:
        return HeadResult(None, statistics.logprobs, statistics.entropy)
    logprobs, entropy = (x.detach().requires_grad_() for x in statistics[:2])
    loss = policy_loss(logprobs, problem.batch, spec=problem.spec, entropy=entropy, impl="torch").loss
    slope, entropy_slope = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    assert slope is not None
    with torch.no_grad():
        hidden, weight = problem.hidden.to(dtype), problem.weight.to(dtype)
        every = torch.arange(len(weight), device=weight.device)
        gradients = [
            _logit_gradient(problem, statistics, (slope, entropy_slope), rows, hidden[rows] @ weight.T, every).to(dtype)
            @ weight
        ]
        if problem.weight.requires_grad:
            index = torch.arange(len(hidden), device=hidden.device)
            some = _logit_gradient(problem, statistics, (slope, entropy_slope), index, hidden @ weight[tokens].T, tokens)
            gradients.append(some.to(dtype).T @ hidden)
    return HeadResult(loss.detach(), statistics.logprobs, statistics.entropy, tuple(gradients))


def _logit_gradient(
    problem: HeadProblem,
    statistics: Statistics,
    slopes: tuple[torch.Tensor, torch.Tensor | None],
    rows: torch.Tensor,
    logits: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    log_shares = logits.to(statistics.log_total.dtype) - statistics.log_total[rows, None]
    shares = log_shares.exp()
    chosen = problem.targets[rows, None] == tokens
    gradient = slopes[0][rows, None] * (chosen.to(shares.dtype) - shares)
    if slopes[1] is not None:
        gradient -= slopes[1][rows, None] * shares * (log_shares + statistics.entropy[rows, None])
    return gradient


def _errors(found: HeadResult, expected: HeadResult, problem: HeadProblem) -> dict[str, float]:
    errors: dict[str, float] = {}
    for name in ("logprobs", "entropy"):
        one, other = getattr(found, name), getattr(expected, name)
        if one is not None:
            difference = (one.double() - other).abs()
            errors |= {f"{name}_mean_nat": difference.mean().item(), f"{name}_max_nat": difference.max().item()}
    if found.loss is not None and expected.loss is not None:
        size = (problem.batch.loss_weights * problem.batch.advantages.abs()).sum().item() * problem.padded(
            problem.targets
        ).shape[1]
        errors["loss_relative"] = abs(found.loss.item() - expected.loss.item()) / size
    names = ["dhidden" if x is problem.hidden else "dweight" for x in problem.inputs]
    for name, one, other in zip(names, found.gradients, expected.gradients, strict=True):
        errors[f"{name}_relative"] = ((one.double() - other).norm() / other.norm()).item()
    return errors


def plain_errors(expected: torch.Tensor) -> dict[str, float]:
    """Of elementwise results whose truth is known: rounding to float32, once."""
    return {"relative": ((expected.float().double() - expected).norm() / expected.norm()).item()}


def advantage_truth(problem: AdvantageProblem) -> torch.Tensor:
    """Advantages in float64."""
    return group_advantage(problem.rewards.double(), scale_rewards=problem.case.scale_rewards, impl="torch").advantages


def loss_truth(problem: LossProblem) -> torch.Tensor:
    """Gradient of the loss in float64."""
    logprobs = problem.logprobs.detach().double().requires_grad_()
    loss = policy_loss(logprobs, problem.batch, spec=problem.spec, impl="torch").loss
    return torch.autograd.grad(loss, logprobs)[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all elements together."""
    return ((found.double().flatten() - expected.flatten()).norm() / expected.norm()).item()
