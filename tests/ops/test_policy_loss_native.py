"""The compiled loss against the reference in float64: every loss, level, mask and metric, forward and gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_fast.ops import native
from grpo_fast.ops.loss_spec import LossBatch, LossSpec, PolicyMetrics
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss, policy_loss_reference
from tests.ops.loss_cases import EXTRAS, SPECS, case, extended

pytestmark = pytest.mark.usefixtures("native_library")

LENGTHS = {"short": (4, 1, 0, 6, 3, 0), "ragged": (700, 0, 1, 2049, 1023, 5, 1, 1, 0, 9000, 17), "long": (20_001,)}


def double(batch: LossBatch) -> LossBatch:
    return LossBatch._make(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in batch)


def both(
    logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None, scale: float = 1.0
) -> list[tuple[torch.Tensor, ...]]:
    """Loss, metrics and gradients: of the extension, of the float32 reference and of the float64 one."""
    results = []
    for dtype, impl in ((torch.float32, "native"), (torch.float32, "torch"), (torch.float64, "torch")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (logprobs, entropy) if x is not None]
        each = batch if dtype == torch.float32 else double(batch)
        found = policy_loss(leaves[0], each, spec=spec, entropy=leaves[1] if entropy is not None else None, impl=impl)
        gradients = torch.autograd.grad(found.loss * scale, leaves, allow_unused=True, materialize_grads=True)
        results.append(tuple(x.detach().double() for x in (found.loss, found.metrics.values, *gradients)))
    return results


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", SPECS)
def test_it_keeps_to_the_error_budget(name: str, extra: str, lengths: str) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=LENGTHS[lengths], spread=0.4 if lengths == "short" else 0.2)
    batch = extended(batch, extra)
    spec = replace(SPECS[name], importance_sampling_level="sequence") if lengths != "short" and name == "rloo" else SPECS[name]
    found, plain, truth = both(logprobs, batch, spec, entropy)
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        half_ulp = torch.finfo(torch.float32).eps / 2 * exact.abs().amax()
        assert (ours - exact).abs().amax() <= 4 * (theirs - exact).abs().amax() + 4 * half_ulp
    counts = slice(0, 4)
    assert torch.equal(found[1][counts], plain[1][counts])
    if extra != "on-policy" and lengths == "ragged" and spec.importance_sampling_level == "token":
        assert (found[1][3] > 10) == (spec.surrogate in {"clip", "cispo"})  # ratios are clipped


@pytest.mark.parametrize("name", SPECS)
def test_coefficients_are_the_gradient_of_the_loss(name: str) -> None:
    logprobs, entropy, batch = case(torch.float32)
    for extra in EXTRAS:
        each = extended(batch, extra)
        found = policy_coefficients(logprobs, each, spec=SPECS[name], entropy=entropy, impl="native")
        leaves = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
        loss = policy_loss(leaves[0], each, spec=SPECS[name], entropy=leaves[1], impl="native")
        gradients = torch.autograd.grad(loss.loss, leaves, allow_unused=True)
        assert torch.equal(found.loss, loss.loss)
        assert torch.equal(found.logprobs, gradients[0])
        assert torch.equal(found.metrics.values, loss.metrics.values)
        assert (found.entropy is None) == (SPECS[name].entropy_coef == 0)
        if found.entropy is not None:
            assert torch.equal(found.entropy, gradients[1])
        assert not any(x.requires_grad for x in (found.loss, found.logprobs, loss.metrics.values))


def test_the_gradient_follows_what_the_loss_is_multiplied_with() -> None:
    logprobs, entropy, batch = case(torch.float32)
    for scale in (1.0, -2.5):
        found, _, truth = both(logprobs, batch, SPECS["entropy"], entropy, scale)
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=1e-7)


def test_a_graph_that_is_kept_gives_its_gradient_again() -> None:
    logprobs, _, batch = case(torch.float32)
    leaf = logprobs.clone().requires_grad_()
    loss = policy_loss(leaf, batch, spec=SPECS["clip"], impl="native").loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    expected = first.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(leaf.grad, 2 * expected)
    assert torch.equal(first, expected)


@pytest.mark.parametrize("name", ["clip", "cispo", "sapo", "vespo", "gspo", "kl", "raw kl", "gspo kl"])
def test_nan_and_overflow_are_where_the_reference_has_them(name: str) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=(40, 30, 20, 10, 25, 1))
    for at, value in ((3, math.nan), (45, 200.0), (95, 89.5), (104, -math.inf), (110, 88.5)):
        wild = logprobs.clone()
        wild[at] = value
        found, plain = (
            policy_coefficients(wild, batch, spec=SPECS[name], entropy=entropy, impl=impl) for impl in ("native", "torch")
        )
        for ours, theirs in (
            (found.loss, plain.loss),
            (found.logprobs, plain.logprobs),
            (found.metrics.values, plain.metrics.values),
        ):
            assert torch.equal(ours.isnan(), theirs.isnan()), (at, value)
            assert torch.equal(ours.isinf(), theirs.isinf()), (at, value)


def test_masked_tokens_may_hold_anything() -> None:
    logprobs, entropy, batch = case(torch.float32)
    batch = extended(batch, "weighted and masked")
    for name, spec in SPECS.items():
        expected = policy_coefficients(logprobs, batch, spec=spec, entropy=entropy, impl="native")
        fields = ("old_logprobs", "ref_logprobs", "importance_weights")
        ruined = batch._replace(**{field: torch.where(batch.token_mask, getattr(batch, field), math.nan) for field in fields})
        values = [torch.where(batch.token_mask, x, math.inf) for x in (logprobs, entropy)]
        found = policy_coefficients(values[0], ruined, spec=spec, entropy=values[1], impl="native")
        assert torch.equal(found.loss, expected.loss), name
        assert torch.equal(found.logprobs, expected.logprobs), name
        assert torch.equal(found.metrics.values, expected.metrics.values), name


@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_a_differentiable_zero(name: str) -> None:
    logprobs, entropy, batch = case(torch.float32)
    empty = logprobs[:0].clone().requires_grad_()
    result = policy_loss(empty, batch.tokens(0, 0), spec=SPECS[name], entropy=entropy[:0], impl="native")
    result.loss.backward()
    assert result.loss == 0
    assert empty.grad.shape == (0,)
    assert (result.metrics.ratio_min, result.metrics.ratio_max) == (math.inf, -math.inf)
    masked = batch._replace(token_mask=torch.zeros(len(logprobs), dtype=torch.bool))
    found = policy_coefficients(logprobs, masked, spec=SPECS[name], entropy=entropy, impl="native")
    assert found.loss == 0
    assert (found.logprobs == 0).all()
    assert found.metrics.num_ratios == 0
    assert found.metrics.ratio_min == math.inf


@pytest.mark.parametrize("name", ["clip", "gspo kl"])
def test_threads_and_repeats_change_no_bit(name: str) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=(9000, 1, 20_000, 700, 0, 30_000))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            each = policy_coefficients(logprobs, batch, spec=SPECS[name], entropy=entropy, impl="native")
            found.append(torch.cat([each.loss[None], each.metrics.values, each.logprobs]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_other_types_and_strides_are_read() -> None:
    logprobs, entropy, batch = case(torch.float32)
    expected = policy_coefficients(logprobs.bfloat16().float(), batch, spec=SPECS["kl"], entropy=entropy, impl="native")
    strided = {
        name: torch.stack([getattr(batch, name)] * 2, 1)[:, 0] for name in ("old_logprobs", "ref_logprobs", "advantages")
    }
    other = batch._replace(sequence_index=batch.sequence_index.int(), loss_weights=batch.loss_weights.double(), **strided)
    leaf = logprobs.bfloat16().requires_grad_()
    found = policy_loss(leaf, other, spec=SPECS["kl"], entropy=entropy, impl="native")
    found.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    assert leaf.grad.dtype == torch.bfloat16
    assert torch.equal(leaf.grad, expected.logprobs.bfloat16())


def test_float64_stays_with_pytorch() -> None:
    logprobs, _, batch = case()
    with pytest.raises(ValueError, match="computes the loss in float32 and the input is float64"):
        policy_loss(logprobs, batch, spec=SPECS["clip"], impl="native")
    assert torch.equal(
        policy_loss(logprobs, batch, spec=SPECS["clip"]).loss, policy_loss_reference(logprobs, batch, spec=SPECS["clip"]).loss
    )


def test_what_does_not_fit_is_refused() -> None:
    logprobs, entropy, batch = case(torch.float32)

    def call(index: torch.Tensor, mask: torch.Tensor | None, surrogate: str, level: str, numbers: int = 7) -> None:
        given = (logprobs, entropy, index, batch.advantages, batch.loss_weights, None, None, None, mask)
        native.call("policy_loss", *given, surrogate, level, [1.0] * numbers, False, False)

    index = batch.sequence_index
    for arguments, reason in (
        ((index[1:], None, "clip", "token"), "sequence_index must be a vector of 14"),
        ((index.float(), None, "clip", "token"), "int64 or int32"),
        ((index, index, "clip", "token"), "token_mask must be boolean"),
        ((index, index[1:] > 0, "clip", "token"), "token_mask must be a vector of 14"),
        ((index, None, "ppo", "token"), "surrogate=ppo"),
        ((index, None, "cispo", "sequence"), "cispo weighs single tokens"),
        ((index, None, "clip", "token", 6), "numbers has 6 values"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call(*arguments)


def test_an_index_that_was_not_checked_reads_nothing_beyond_its_sequences() -> None:
    logprobs, entropy, batch = case(torch.float32)
    index = torch.tensor([5, 900, -3, 2**40, 0, 1, 2, 3, 4, 5, -(2**40), 0, 7, 1])
    for level in ("token", "sequence"):
        given = (logprobs, entropy, index, batch.advantages, batch.loss_weights, batch.old_logprobs, None, None, None)
        sums, coefficients = native.call(
            "policy_loss", *given, "clip", level, [0.8, 1.2, 9.0, 0.0, 1.0, 1.0, 0.0], False, False
        )
        assert sums.shape == (1 + len(PolicyMetrics.NAMES),)
        assert coefficients.shape == (14,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_index_ascends_or_not(dtype: torch.dtype) -> None:
    index = torch.arange(200_000).div(7, rounding_mode="floor").to(dtype)
    assert native.call("ascends", index)
    assert native.call("ascends", index[:0])
    for at in (1, 32_768, 65_536, 199_999):
        broken = index.clone()
        broken[at:] -= index[at] - index[at - 1] + 1
        assert not native.call("ascends", broken), at
