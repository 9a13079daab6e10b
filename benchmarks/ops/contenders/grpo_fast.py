"""This project's ops, through their public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops.cases import HeadCase
from benchmarks.ops.contenders.contender import Call, Contender, HeadResult, from_logprobs
from benchmarks.ops.inputs import AdvantageProblem, HeadProblem, LossProblem
from grpo_fast.ops import LMHead, fused_grpo, group_advantage, jit, policy_coefficients, policy_loss, token_logprob
from grpo_fast.ops.loss_spec import TOKEN_FIELDS


def _head(impl: Any, *, drop_dead_rows: bool) -> Callable[[HeadProblem, Any], Call]:
    def prepare(problem: HeadProblem, option: Any) -> Call:
        if problem.case.objective == "forward":

            def score(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool) -> Any:
                return token_logprob(hidden, LMHead(weight), targets=targets, want_entropy=want_entropy, impl=impl)

            return from_logprobs(problem, score)
        live = problem.live if drop_dead_rows else None

        def run() -> HeadResult:
            hidden, targets, batch = problem.hidden, problem.targets, problem.batch
            if live is not None:
                hidden, targets = hidden[live], targets[live]
                given = {name: getattr(batch, name) for name in TOKEN_FIELDS}
                batch = batch._replace(**{name: x[live] for name, x in given.items() if x is not None})
            found = fused_grpo(hidden, LMHead(problem.weight), targets=targets, batch=batch, spec=problem.spec, impl=impl)
            gradients = torch.autograd.grad(found.loss, problem.inputs)
            if live is not None:  # the other rows have no log-probabilities: they never were anywhere
                return HeadResult(found.loss.detach(), gradients=gradients)
            return HeadResult(found.loss.detach(), found.logprobs, found.entropy, gradients)

        return run

    return prepare


def _dead_rows_needed(case: HeadCase, device: torch.device) -> str | None:
    return None if case.dead_share and case.objective != "forward" else "every row is alive"


def _gpu_only(case: Any, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it is what impl='auto' runs here"


def _needs_kernels(case: Any, device: torch.device) -> str | None:
    return jit.obstacle(torch.empty(0, device=device))


def _advantages(impl: Any) -> Callable[[AdvantageProblem, Any], Call]:
    def prepare(problem: AdvantageProblem, option: Any) -> Call:
        scale = problem.case.scale_rewards
        return lambda: group_advantage(problem.rewards, scale_rewards=scale, impl=impl).advantages

    return prepare


def _loss(impl: Any) -> Callable[[LossProblem, Any], Call]:
    def prepare(problem: LossProblem, option: Any) -> Call:
        def run() -> torch.Tensor:
            loss = policy_loss(problem.logprobs, problem.batch, spec=problem.spec, impl=impl).loss
            return torch.autograd.grad(loss, problem.logprobs)[0]

        return run

    return prepare


def _coefficients(problem: LossProblem, option: Any) -> Call:
    return lambda: policy_coefficients(problem.logprobs.detach(), problem.batch, spec=problem.spec).logprobs


_OURS = {"package": "grpo-fast", "role": "ours"}
_LIVE = "fused_grpo on the rows that carry gradient, as the trainer calls it; token_logprob where no gradient is wanted"
CONTENDERS = (
    Contender("grpo_fast", "head", _head("auto", drop_dead_rows=True), f"impl='auto': {_LIVE}", **_OURS),
    Contender(
        "grpo_fast, every row",
        "head",
        _head("auto", drop_dead_rows=False),
        "impl='auto', dead rows given too: their log-probabilities and entropy are made, their gradients skipped",
        refuses=_dead_rows_needed,
        **_OURS,
    ),
    Contender(
        "grpo_fast, torch",
        "head",
        _head("torch", drop_dead_rows=True),
        f"impl='torch': {_LIVE}",
        refuses=_gpu_only,
        core=False,
        **_OURS,
    ),
    Contender(
        "grpo_fast, triton",
        "head",
        _head("triton", drop_dead_rows=True),
        f"impl='triton': {_LIVE}",
        refuses=_needs_kernels,
        core=False,
        **_OURS,
    ),
    Contender("grpo_fast", "advantage", _advantages("auto"), "impl='auto'", **_OURS),
    Contender("grpo_fast, triton", "advantage", _advantages("triton"), "impl='triton'", refuses=_needs_kernels, **_OURS),
    Contender("grpo_fast", "loss", _loss("auto"), "with backward, impl='auto'", **_OURS),
    Contender(
        "grpo_fast, triton",
        "loss",
        _loss("triton"),
        "with backward, impl='triton'",
        refuses=_needs_kernels,
        **_OURS,
    ),
    Contender("grpo_fast, coefficients", "loss", _coefficients, "policy_coefficients: no autograd, impl='auto'", **_OURS),
)
