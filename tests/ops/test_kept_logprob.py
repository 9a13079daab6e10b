from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from grpo_fast.ops import LMHead, token_logprob
from grpo_fast.ops.kept_logprob import Kept, kept_chunk_bytes, kept_logprob, kept_logprob_reference

T, H, V = 150, 12, 400
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and temperature": {"bias": True, "temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 1.5, "temperature": 1.3},
    "bfloat16 logits": {"logits_dtype": torch.bfloat16, "bias": True},
}


def problem(widths: tuple[int, int], dtype: torch.dtype = torch.float64, **options: Any) -> tuple[torch.Tensor, LMHead, Kept]:
    """Rows whose supports have between so many tokens, drawn anew for each row."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(widths[0], widths[1] + 1, (T,), generator=generator)
    token_ids = torch.cat([torch.randperm(V, generator=generator)[: int(size)] for size in sizes])
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    if options.get("bias"):
        options["bias"] = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, LMHead(weight, **options), Kept(token_ids, sizes)


def gradients(found: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor, head: LMHead) -> list[torch.Tensor]:
    """Of a loss in which each row's log-probability and entropy have a weight of their own."""
    weights = torch.linspace(-1, 2, 2 * T, dtype=torch.float64).view(2, T)
    loss = (found[0].double() * weights[0] + found[1].double() * weights[1]).sum()
    inputs = [hidden, head.weight, head.bias] if head.bias is not None else [hidden, head.weight]
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("widths", [(1, 1), (20, 20), (1, 9), (1, V), (V, V)], ids=str)
def test_values_and_gradients_are_those_of_masked_full_logits(widths: tuple[int, int], name: str) -> None:
    hidden, head, kept = problem(widths, **HEADS[name])
    found, expected = kept_logprob(hidden, head, kept=kept), kept_logprob_reference(hidden, head, kept=kept)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("widths", [(1, 9), (V, V)], ids=str)
def test_operands_may_be_rounded(widths: tuple[int, int]) -> None:
    hidden, head, kept = problem(widths, temperature=0.9)
    head = replace(head, operand_dtype=torch.bfloat16)
    found, expected = kept_logprob(hidden, head, kept=kept), kept_logprob_reference(hidden, head, kept=kept)
    exact = kept_logprob_reference(hidden, replace(head, operand_dtype=None), kept=kept)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert (found[1] - exact[1]).abs().max() > 1e-4, "the guard: rounding shows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, head, kept = problem((1, 40), dtype, temperature=0.9)
    exact = hidden.detach().double().requires_grad_(), replace(head, weight=head.weight.detach().double().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kept_logprob(hidden, head, kept=kept)
    expected = kept_logprob_reference(*exact, kept=kept)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(gradients(found, hidden, head), gradients(expected, *exact), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_the_whole_vocabulary_is_the_full_log_probability() -> None:
    hidden, head, kept = problem((V, V))
    targets = kept.token_ids.view(T, V)[:, 0]
    found, expected = kept_logprob(hidden, head, kept=kept), token_logprob(hidden, head, targets=targets)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    hidden, head, kept = problem((20, 20))
    assert (kept_logprob(hidden, head, kept=kept)[0] > token_logprob(hidden, head, targets=kept.token_ids[::20])[0]).all()


def test_a_frozen_head_gets_no_gradient_and_only_named_rows_get_one() -> None:
    hidden, head, kept = problem((1, 3))
    frozen = replace(head, weight=head.weight.detach())
    kept_logprob(hidden, frozen, kept=kept)[0].sum().backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None
    kept_logprob(hidden, head, kept=kept)[0].square().sum().backward()
    assert head.weight.grad is not None
    reached = head.weight.grad.abs().sum(1) > 0
    assert set(reached.nonzero()[:, 0].tolist()) <= set(kept.token_ids.tolist())
    assert reached.any()


def test_a_confident_token_keeps_its_tail() -> None:
    weight = torch.tensor([[30.0], [0.0], [-5.0]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    kept = Kept(torch.tensor([0, 1, 2]), torch.tensor([3]))
    logprob, _ = kept_logprob(hidden, LMHead(weight), kept=kept)
    tail = torch.tensor([-30.0, -35.0]).double().exp().sum().item()
    assert logprob.item() == pytest.approx(-tail, rel=1e-5, abs=0.0)
    logprob.sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(tail, rel=1e-5, abs=0.0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_that_the_bias_takes_out_have_no_probability(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, head, kept = problem((9, 9), dtype, bias=True, softcap=softcap)
    assert head.bias is not None
    drawn, other = int(kept.token_ids[0]), int(kept.token_ids[10])
    with torch.no_grad():
        head.bias[[drawn, other]] = -torch.inf
    found, expected = kept_logprob(hidden, head, kept=kept), kept_logprob_reference(hidden, head, kept=kept)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    of_hidden, of_weight, of_bias = zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True)
    finite = head.bias.isfinite()
    for ours, theirs in (of_hidden, of_weight, [side[finite] for side in of_bias]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if softcap is None:
        assert found[0][0] < -1e30
        assert found[1][0] > 0.1, "the others share the row"


def test_a_repeated_call_is_bitwise_the_same_and_nothing_of_no_rows() -> None:
    hidden, head, kept = problem((1, 30), torch.float32)
    calls = [kept_logprob(hidden, head, kept=kept) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*calls, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*(gradients(call, hidden, head) for call in calls), strict=True))
    none = Kept(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    logprobs, entropy = kept_logprob(hidden[:0], head, kept=none)
    (logprobs.sum() + entropy.sum()).backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([2, 2], r"sum to len\(token_ids\)=3; .* they sum to 4"),
        ([3, 0], r"the smallest is 0"),
        ([3], r"sizes has shape \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: list[int], message: str) -> None:
    hidden, weight = torch.zeros(2, 4), torch.zeros(9, 4)
    with pytest.raises(ValueError, match=message):
        kept_logprob(hidden, LMHead(weight), kept=Kept(torch.tensor([1, 2, 3]), torch.tensor(sizes)))


@pytest.mark.parametrize(("num_kept", "trained"), [(10, True), (10, False), (300, True)])
def test_a_chunk_takes_the_memory_that_is_foretold(num_kept: int, trained: bool) -> None:
    """Beside the gradients of rows and head; supports that share no token, and one too wide to copy the head's rows."""
    rows, hidden_size, vocabulary = 96, 128, 6000
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator, requires_grad=True)
    head = LMHead(torch.randn(vocabulary, hidden_size, generator=generator, requires_grad=trained))
    ids = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(1 + rows * num_kept // vocabulary)])
    first = torch.arange(rows)[:, None] * num_kept + torch.arange(num_kept)
    kept = Kept(ids[:vocabulary][first % vocabulary].flatten(), torch.full((rows,), num_kept))
    loss = kept_logprob(hidden, head, kept=kept)[0].sum()
    # torch 2.11 warns of events that it does not accumulate
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        loss.backward()
    found = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())))
    gradients = 4 * hidden_size * (rows + vocabulary * trained)
    foretold = kept_chunk_bytes(vocabulary, hidden_size, num_kept=num_kept, kind="cpu", copied=False, trained=trained)
    assert peak - gradients == pytest.approx(foretold, rel=0.15)
