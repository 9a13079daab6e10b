from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_fast.ops.head_pass import RowGradient, row_statistics
from grpo_fast.ops.head_torch import TorchHeadPass
from grpo_fast.ops.lm_head import LMHead

T, H, V = 61, 24, 131


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, LMHead, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    head = LMHead(torch.randn(V, H, generator=generator).to(dtype), torch.randn(V, generator=generator).to(dtype))
    return hidden, head, torch.randint(0, V, (T,), generator=generator)


def run(
    hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, gradient: RowGradient
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    work = TorchHeadPass(hidden, head, targets=targets, wanted=(True, True, True))
    block = work.block(slice(0, len(hidden)), want_entropy=True, want_exp=True)
    statistics = row_statistics(block)
    work.add(block, statistics, gradient)
    return statistics.logprobs, work.gradients()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 20.0}, {"logits_dtype": torch.bfloat16}])
def test_a_row_does_not_depend_on_the_rows_beside_it(options: dict[str, object], threads: int) -> None:
    hidden, head, targets = case()
    head = replace(head, **options)
    g = torch.linspace(0.5, 1.5, T)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logprobs, (dhidden, *_) = run(hidden, head, targets, RowGradient(g))
        for rows in (slice(0, 1), slice(7, 9), slice(20, 37), slice(3, 61)):
            part, (dpart, *_) = run(hidden[rows], head, targets[rows], RowGradient(g[rows]))
            assert torch.equal(part, logprobs[rows])
            assert torch.equal(dpart, dhidden[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_dead_rows_are_left_out(share: float) -> None:
    hidden, head, targets = case(torch.float64)
    g = torch.linspace(0.5, 1.5, T, dtype=torch.float64)
    g[torch.randperm(T, generator=torch.Generator().manual_seed(0))[round(T * share) :]] = 0
    _, (dhidden, dweight, dbias) = run(hidden, head, targets, RowGradient(g))
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    log_p = (leaves[0] @ leaves[1].T + leaves[2]).log_softmax(1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((g * log_p).sum(), leaves)
    for found, wanted in zip((dhidden, dweight, dbias), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    assert (dhidden[g == 0] == 0).all()


def test_live_rows_are_bitwise_the_same_beside_dead_ones() -> None:
    hidden, head, targets = case()
    g = torch.ones(T)
    whole = run(hidden, head, targets, RowGradient(g))[1][0]
    g[::2] = 0
    found = run(hidden, head, targets, RowGradient(g))[1][0]
    assert torch.equal(found[1::2], whole[1::2])


def test_a_dead_row_that_is_not_finite_reaches_no_gradient() -> None:
    hidden, head, targets = case()
    hidden[5] = math.nan
    g = torch.ones(T)
    g[5] = 0
    logprobs, gradients = run(hidden, head, targets, RowGradient(g))
    assert logprobs[5].isnan()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][5] == 0).all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("token", "slope"), [(0, 10.0), (1, -10.0)])
def test_a_dead_row_in_which_one_logit_overflows_reaches_no_gradient(token: int, slope: float, entropy: bool) -> None:
    """Its target's, whose S_o is 0, or that of another token, downwards, whose S_o is finite: its entropy is NaN."""
    hidden, head, targets = case()
    hidden[5] = 0
    hidden[5, 0] = 3e38
    head.weight[:, 0] = 0
    head.weight[(targets[5] + token) % V, 0] = slope
    g = torch.ones(T)
    g[5] = 0
    _, gradients = run(hidden, head, targets, RowGradient(g, g.clone() if entropy else None))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_live_row_that_is_not_finite_stays_in_its_row_of_the_hidden_gradient() -> None:
    hidden, head, targets = case()
    hidden[5, 2] = math.inf
    _, (dhidden, dweight, _) = run(hidden, head, targets, RowGradient(torch.ones(T)))
    assert dhidden[5].isnan().all()
    assert dhidden[torch.arange(T) != 5].isfinite().all()
    assert dweight.isnan().any()


def test_memory_is_one_chunk_and_the_gradients() -> None:
    hidden, head, targets = case()
    head = replace(head, chunk_bytes=16 * V * 4)
    work = TorchHeadPass(hidden, head, targets=targets, wanted=(True, True, False))
    assert work.max_rows == 16
    addresses = {work.block(slice(start, start + 16), want_entropy=True, want_exp=True).exp.data_ptr() for start in (0, 16, 32)}
    assert len(addresses) == 1


def test_rounded_logits_are_those_of_an_engine_in_bfloat16() -> None:
    hidden, head, targets = case()
    head = replace(head, bias=None, logits_dtype=torch.bfloat16)
    logprobs, _ = run(hidden, replace(head, bias=torch.zeros(V)), targets, RowGradient(torch.ones(T)))
    expected = (hidden @ head.weight.T).bfloat16().float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    exact = (hidden @ head.weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert (logprobs - exact).abs().max() > 1e-3
