"""PyTorch itself: full logits, compiled full logits, its own linear cross-entropy, and the bare products under all of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional

from benchmarks.ops.cases import HeadCase, LossCase
from benchmarks.ops.contenders.contender import Call, Contender, from_logprobs
from benchmarks.ops.inputs import AdvantageProblem, HeadProblem, LossProblem

_FLOOR_BYTES = 2**31


def full_logits(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a model's forward and a log-softmax do: logits in the inputs' type, the rest in float32."""
    log_shares = torch.nn.functional.log_softmax(torch.nn.functional.linear(hidden, weight).float(), dim=-1)
    logprobs = log_shares.gather(1, targets[:, None])[:, 0]
    return logprobs, -(log_shares.exp() * log_shares).sum(1) if want_entropy else None


def _eager(problem: HeadProblem, option: Any) -> Call:
    return from_logprobs(problem, full_logits)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def _fresh(function: Any) -> Any:
    """Compiled anew for a case: after eight shapes or modes of a function, torch would run it uncompiled and only warn."""
    torch.compiler.reset()
    return _compiled(function)


def _compile(problem: HeadProblem, option: Any) -> Call:
    return from_logprobs(problem, _fresh(full_logits))


def _own_cross_entropy(problem: HeadProblem, option: int) -> Call:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=option)

    def score(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, None]:
        return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None

    return from_logprobs(problem, score)


def _no_entropy(case: HeadCase, device: torch.device) -> str | None:
    return "it makes no entropy" if case.entropy else None


def _bare_products(problem: HeadProblem, option: Any) -> Call:
    """The products that a case cannot do without, every row alive, in chunks only where logits would exceed 2 GiB."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    step = max(1, min(len(hidden), _FLOOR_BYTES // (weight.shape[0] * weight.element_size())))
    logits = torch.empty(step, len(weight), dtype=weight.dtype, device=weight.device)
    parts = [slice(start, min(start + step, len(hidden))) for start in range(0, len(hidden), step)]
    objective, trained = problem.case.objective, problem.weight.requires_grad

    def run() -> None:
        dhidden = torch.empty_like(hidden) if objective != "forward" else None
        dweight = torch.empty_like(weight) if trained else None
        for number, part in enumerate(parts):
            block = logits[: part.stop - part.start]
            torch.mm(hidden[part], weight.T, out=block)
            if dhidden is not None:
                torch.mm(block, weight, out=dhidden[part])
            if dweight is not None:
                dweight.addmm_(block.T, hidden[part], beta=float(number > 0))

    return run


def plain_advantages(rewards: torch.Tensor, scale: bool) -> torch.Tensor:
    """TRL's formula for full groups."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale else centred


def _eager_advantages(problem: AdvantageProblem, option: Any) -> Call:
    return lambda: plain_advantages(problem.rewards, problem.case.scale_rewards == "group")


def _compiled_advantages(problem: AdvantageProblem, option: Any) -> Call:
    function = _fresh(plain_advantages)
    return lambda: function(problem.rewards, problem.case.scale_rewards == "group")


def padded_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, bounds: tuple[float, float], by_sequence: bool
) -> torch.Tensor:
    """The clipped loss on [B, L] without padding, mean over tokens."""
    log_ratio = logprobs - old
    if by_sequence:
        log_ratio = log_ratio.mean(1, keepdim=True)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(*bounds) * advantages)
    return per_token.expand_as(logprobs).mean()


def _padded_loss(problem: LossProblem, function: Any) -> Call:
    case: LossCase = problem.case
    shape, spec = (case.num_sequences, -1), problem.spec
    assert problem.batch.old_logprobs is not None
    old = problem.batch.old_logprobs.view(shape)
    bounds = (1 - spec.epsilon_low, 1 + spec.epsilon_high)

    def run() -> torch.Tensor:
        logprobs = problem.logprobs.view(shape)
        loss = function(logprobs, old, problem.batch.advantages, bounds, case.objective == "sequence")
        return torch.autograd.grad(loss, problem.logprobs)[0]

    return run


CONTENDERS = (
    Contender("bare products", "head", _bare_products, "torch.mm and addmm_ on the case's sizes, all rows", role="floor"),
    Contender("torch eager", "head", _eager, "full logits, float32 log-softmax, autograd"),
    Contender(
        "torch.compile", "head", _compile, "full logits, float32 log-softmax, compiled without dynamic shapes", core=False
    ),
    Contender(
        "torch linear_cross_entropy",
        "head",
        _own_cross_entropy,
        "reduction='none', the fastest of three chunk sizes",
        options=(512, 2048, 8192),
        refuses=_no_entropy,
        core=False,
    ),
    Contender("torch eager", "advantage", _eager_advantages, "mean, std, divide"),
    Contender("torch.compile", "advantage", _compiled_advantages, "the same, compiled"),
    Contender(
        "torch eager", "loss", lambda problem, _: _padded_loss(problem, padded_loss), "TRL's formula on [B, L], autograd"
    ),
    Contender("torch.compile", "loss", lambda problem, _: _padded_loss(problem, _fresh(padded_loss)), "the same, compiled"),
)
