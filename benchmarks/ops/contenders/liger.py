"""liger-kernel: GRPO from given logits, chunked GRPO, per-token scaled cross-entropy, fused linear cross-entropy."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional

from benchmarks.ops.cases import HeadCase
from benchmarks.ops.contenders.contender import Call, Contender, HeadResult, from_logprobs, needs_gpu, only_cross_entropy
from benchmarks.ops.inputs import HeadProblem, LossProblem
from grpo_fast.ops import LossSpec


def _loss_type(spec: LossSpec) -> str:
    return "cispo" if spec.surrogate == "cispo" else "dapo" if spec.importance_sampling_level == "token" else "grpo"


def _given_logits(problem: HeadProblem, option: Any) -> Call:
    function = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    spec, batch = problem.spec, problem.batch
    ids = problem.padded(problem.targets)
    old = None if batch.old_logprobs is None else problem.padded(batch.old_logprobs)
    mask = torch.ones_like(ids)

    def run() -> HeadResult:
        # It wants one more position a sequence than there are tokens.
        logits = functional.linear(functional.pad(problem.padded(problem.hidden), (0, 0, 0, 1)), problem.weight)
        loss, _ = function(
            logits,
            old,
            None,
            ids,
            batch.advantages,
            mask,
            temperature=1.0,
            beta=0.0,
            eps_low=spec.epsilon_low,
            eps_high=spec.epsilon_high,
            inplace=True,
            loss_type=_loss_type(spec),
            importance_sampling_level=spec.importance_sampling_level,
            reduce=True,
        )
        return HeadResult(loss.detach(), gradients=torch.autograd.grad(loss, problem.inputs))

    return run


def _chunked(problem: HeadProblem, option: int) -> Call:
    loss_class = importlib.import_module("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    spec, batch = problem.spec, problem.batch
    ids = problem.padded(problem.targets)
    old = None if batch.old_logprobs is None else problem.padded(batch.old_logprobs)
    mask = torch.ones_like(ids)
    function = loss_class(
        beta=0.0,
        compiled=True,
        use_ref_model=False,
        chunk_size=option,
        epsilon_low=spec.epsilon_low,
        epsilon_high=spec.epsilon_high,
        loss_type=_loss_type(spec),
        importance_sampling_level=spec.importance_sampling_level,
        temperature=1.0,
    )

    def run() -> HeadResult:
        hidden = problem.padded(problem.hidden)
        loss = function(hidden, problem.weight, ids, mask, batch.advantages, old_per_token_logps=old)[0]
        return HeadResult(loss.detach(), gradients=torch.autograd.grad(loss, problem.inputs))

    return run


def _scaled(problem: HeadProblem, option: int) -> Call:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def score(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = function.apply(hidden, weight, targets, 1.0, -100, option, want_entropy)
        return (-found[0], found[1]) if want_entropy else (-found, None)

    return from_logprobs(problem, score)


def _cross_entropy(problem: HeadProblem, option: int) -> Call:
    module = importlib.import_module("liger_kernel.transformers.functional")

    def run() -> HeadResult:
        loss = module.liger_fused_linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, accum_dtype=torch.float32, chunk_mem_const=option
        )
        return HeadResult(loss.detach(), gradients=torch.autograd.grad(loss, problem.inputs))

    return run


def _loss_alone(problem: LossProblem, option: Any) -> Call:
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    function = torch.compile(module.LigerFusedLinearGRPOFunction.ppo_loss_fn, dynamic=False)
    spec, shape = problem.spec, problem.mask.shape
    assert problem.batch.old_logprobs is not None
    old = problem.batch.old_logprobs.view(shape)

    def run() -> torch.Tensor:
        loss, _ = function(
            problem.logprobs.view(shape),
            problem.mask,
            problem.batch.advantages,
            problem.mask,
            old_per_token_logps=old,
            epsilon_low=spec.epsilon_low,
            epsilon_high=spec.epsilon_high,
            beta=0.0,
            loss_type="grpo",
            importance_sampling_level=spec.importance_sampling_level,
        )
        return torch.autograd.grad(loss, problem.logprobs)[0]

    return run


def _no_scores(case: HeadCase, device: torch.device) -> str | None:
    if case.objective == "forward":
        return "it returns a loss, no log-probabilities"
    return "it knows no entropy bonus" if case.entropy else None


def _logits_refuse(case: HeadCase, device: torch.device) -> str | None:
    return _no_scores(case, device) or needs_gpu(case, device)


def _cross_entropy_refuses(case: HeadCase, device: torch.device) -> str | None:
    return only_cross_entropy(case, device) or needs_gpu(case, device)


_LIGER = {"package": "liger-kernel"}
CONTENDERS = (
    Contender(
        "liger scaled cross-entropy",
        "head",
        _scaled,
        "CuTe kernel on sm_90, chunks of 512 rows in torch elsewhere; the faster of one and two row tiles a cluster",
        options=(1, 2),
        **_LIGER,
    ),
    Contender(
        "liger chunked GRPO",
        "head",
        _chunked,
        "compiled, the fastest of 1, 4 and 16 sequences a chunk",
        options=(1, 4, 16),
        refuses=_no_scores,
        core=False,
        **_LIGER,
    ),
    Contender(
        "liger GRPO of logits",
        "head",
        _given_logits,
        "full logits, gradient in place",
        refuses=_logits_refuse,
        core=False,
        **_LIGER,
    ),
    Contender(
        "liger linear cross-entropy",
        "head",
        _cross_entropy,
        "float32 accumulation, the faster of two chunk memories",
        options=(1, 4),
        refuses=_cross_entropy_refuses,
        core=False,
        **_LIGER,
    ),
    Contender("liger", "loss", _loss_alone, "ppo_loss_fn on [B, L], compiled", **_LIGER),
)
