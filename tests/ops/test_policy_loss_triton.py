"""The policy loss as an operator of torch: registration, gradient, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from grpo_fast.ops import policy_loss_triton
from grpo_fast.ops.loss_spec import LossBatch, LossSpec
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss
from grpo_fast.ops.policy_loss_triton import _launch_shape, _policy_loss_fwd, aot_calls
from tests.ops.conftest import Launch
from tests.ops.loss_cases import SPECS, case, extended
from tests.ops.test_policy_loss_kernels import moved


def arguments(name: str, device: torch.device, extra: str = "weighted and masked") -> tuple[object, ...]:
    logprobs, entropy, batch = case(torch.float32)
    batch, spec = moved(extended(batch, extra), device), SPECS[name]
    numbers = [1 - spec.epsilon_low, 1 + spec.epsilon_high, 1.5, spec.beta, 1.0, 1.05, -0.01]
    return (
        logprobs.to(device).requires_grad_(),
        entropy.to(device).requires_grad_(),
        *batch[:3],
        batch.old_logprobs,
        batch.ref_logprobs,
        batch.importance_weights,
        batch.token_mask,
        spec.surrogate,
        spec.importance_sampling_level,
        numbers,
        spec.delta is not None,
        spec.use_bias_correction_kl,
    )


@pytest.mark.parametrize("extra", ["plain", "weighted and masked"])
@pytest.mark.parametrize("name", ["clip", "cispo", "gspo kl"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck of torch 2.14
def test_the_operator_is_well_registered(name: str, extra: str, device: torch.device) -> None:
    torch.library.opcheck(_policy_loss_fwd, arguments(name, device, extra))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_entropy_that_the_loss_does_not_use_cannot_ruin_it(level: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32)
    batch, spec = moved(batch, device), LossSpec(importance_sampling_level=level)
    entropy[11] = math.nan
    results = [
        policy_loss(logprobs.to(device), batch, spec=spec, entropy=each, impl="triton") for each in (entropy.to(device), None)
    ]
    assert results[0].loss.isfinite()
    assert torch.equal(results[0].loss, results[1].loss)


@pytest.mark.parametrize("extra", ["plain", "weighted and masked", "on-policy"])
@pytest.mark.parametrize("name", SPECS)
def test_backward_gives_the_coefficients(name: str, extra: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32)
    batch = moved(extended(batch, extra), device)
    leaves = logprobs.to(device).requires_grad_(), entropy.to(device).requires_grad_()
    result = policy_loss(leaves[0], batch, spec=SPECS[name], entropy=leaves[1], impl="triton")
    gradients = torch.autograd.grad(-2.0 * result.loss, leaves, allow_unused=True)
    known = policy_coefficients(logprobs.to(device), batch, spec=SPECS[name], entropy=entropy.to(device), impl="triton")
    assert torch.equal(gradients[0], -2.0 * known.logprobs)
    assert torch.equal(result.loss, known.loss)
    assert torch.equal(result.metrics.values, known.metrics.values)
    assert not result.metrics.values.requires_grad
    if known.entropy is None:
        assert gradients[1] is None or (gradients[1] == 0).all()
    else:
        torch.testing.assert_close(gradients[1], -2.0 * known.entropy)


def test_gradients_have_the_types_of_their_inputs(device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32)
    leaves = [v.to(device, torch.float16).requires_grad_() for v in (logprobs, entropy)]
    policy_loss(leaves[0], moved(batch, device), spec=SPECS["everything"], entropy=leaves[1], impl="triton").loss.backward()
    assert leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float16
    assert (leaves[0].grad != 0).any()
    assert (leaves[1].grad != 0).all()


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32)
    leaf = logprobs.to(device).requires_grad_()
    loss = policy_loss(leaf, moved(batch, device), spec=SPECS["clip"], entropy=entropy.to(device), impl="triton").loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["triton", "torch", "auto"])
@pytest.mark.parametrize("name", ["entropy", "cispo", "sapo", "vespo", "off-policy mask", "everything"])
def test_it_compiles_without_a_graph_break(name: str, impl: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32)
    batch = moved(extended(batch, "masked"), device)

    in_graph = "torch" if impl == "auto" and device.type == "cpu" else impl  # what auto takes there: the extension is opaque

    def step(logprobs: torch.Tensor, entropy: torch.Tensor, batch: LossBatch) -> tuple[torch.Tensor, torch.Tensor]:
        choice = impl if torch.compiler.is_compiling() else in_graph
        result = policy_loss(logprobs, batch, spec=SPECS[name], entropy=entropy, impl=choice)
        return 2 * result.loss, result.metrics.clip_region

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for run in (step, compiled):
        leaves = [v.clone().to(device).requires_grad_() for v in (logprobs, entropy)]
        loss, clipped = run(*leaves, batch)
        results.append((loss.detach(), clipped, *torch.autograd.grad(loss, leaves, allow_unused=True)))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=0, atol=0)


def test_tiles_are_dealt_to_programs() -> None:
    assert _launch_shape(0) == (0, 1)
    assert _launch_shape(1) == (1, 1)
    assert _launch_shape(1024) == (1, 1)
    assert _launch_shape(1025) == (2, 1)
    assert _launch_shape(2**20) == (1024, 1)
    assert _launch_shape(2**20 + 1) == (513, 2)
    for num_tokens in (2**20 + 5, 2**24 - 1, 10**8):
        shape = _launch_shape(num_tokens)
        covered = shape.num_programs * shape.tiles_per_program * 1024
        assert num_tokens <= covered < num_tokens + 1024 * (shape.tiles_per_program + 1)
        assert shape.num_programs <= 1024


def test_calls_to_compile_ahead_launch_on_nothing(launches_of: Callable[..., list[Launch]]) -> None:
    names = ("_policy_loss_token_kernel", "_policy_loss_sequence_kernel", "_policy_loss_sum_kernel")
    launched = launches_of(policy_loss_triton, names)
    for call in aot_calls().values():
        sums, coefficients = call()
        assert (sums.shape, coefficients.shape, sums.device.type) == ((10,), (2**14,), "meta")
    kinds = {(name, flags.get("SURROGATE"), flags.get("TWO_SIDED"), flags.get("MEAN")) for name, _, flags in launched}
    assert ("_policy_loss_token_kernel", "clip", True, None) in kinds
    assert ("_policy_loss_sequence_kernel", "sapo", False, False) in kinds
    assert ("_policy_loss_sequence_kernel", "clip", True, True) in kinds
    assert LossSpec().surrogate == "clip"
