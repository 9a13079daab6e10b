from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.ops.lm_head import LMHead
from grpo_fast.ops.token_logprob import token_logprob, token_logprob_reference

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.25},
    "everything": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.5},
}


def case(rows: int = 23, *, dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, 12, generator=generator, dtype=torch.float64)
    shift = torch.randn(37, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 37, (rows,), generator=generator)
    targets[: rows // 2] = (hidden[: rows // 2] @ weight.T).argmax(-1)  # confident tokens beside rare ones
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, shift)]
    return leaves[0], LMHead(leaves[1], leaves[2] if bias else None, **options), targets


def truth(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, row by row, with sums over the vocabulary written out."""
    logprobs, entropies = [], []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        u = head.weight.to(row.dtype).mv(row)
        u = u if head.bias is None else u + head.bias.to(row.dtype)
        u = u * head.logit_scale
        z = (u if head.softcap is None else torch.tanh(u / head.softcap) * head.softcap) / head.temperature
        shifted = z - z.max().detach()
        total = shifted.exp().sum()
        p = shifted.exp() / total
        logprobs.append(shifted[target] - total.log())
        entropies.append(total.log() - (p * shifted).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def outcome(logprobs: torch.Tensor, entropy: torch.Tensor, hidden: torch.Tensor, head: LMHead) -> list[torch.Tensor]:
    """Both outputs, and the gradients of a sum that weighs every row and both outputs differently."""
    rows = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype)
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    grads = torch.autograd.grad((logprobs * rows.sin() + entropy * rows.cos()).sum(), leaves)
    return [logprobs.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize("chunk_rows", [8, 16, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_the_definition(variant: str, bias: bool, chunk_rows: int) -> None:
    hidden, head, targets = case(bias=bias, **VARIANTS[variant])
    head = replace(head, chunk_bytes=chunk_rows * 37 * 8)
    found = outcome(*token_logprob(hidden, head, targets=targets), hidden, head)
    expected = outcome(*truth(hidden, head, targets), hidden, head)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-11)
    if variant in ("plain", "temperature"):
        assert found[0].exp().max() > 0.9
        assert found[0].exp().min() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_keeps_to_the_budget(variant: str, dtype: torch.dtype) -> None:
    hidden, head, targets = case(dtype=dtype, **VARIANTS[variant])
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = replace(
        head, weight=head.weight.detach().double().requires_grad_(), bias=head.bias.detach().double().requires_grad_()
    )
    wanted = outcome(*truth(exact_hidden, exact, targets), exact_hidden, exact)
    reference = outcome(*token_logprob_reference(hidden, head, targets=targets), hidden, head)
    small = replace(head, chunk_bytes=8 * 37 * 4)
    found = outcome(*token_logprob(hidden, small, targets=targets), hidden, small)
    assert found[0].dtype == torch.float32
    assert found[2].dtype == dtype
    for value, base, true in zip(found, reference, wanted, strict=True):
        half_ulp = torch.finfo(value.dtype).eps / 2 * true.abs().max()
        assert (value.double() - true).abs().max() <= 4 * (base.double() - true).abs().max() + half_ulp


def test_gradients_reach_only_what_asks_for_them() -> None:
    hidden, head, targets = case()
    frozen = LMHead(head.weight.detach(), head.bias.detach(), chunk_bytes=8 * 37 * 8)
    logprobs, _ = token_logprob(hidden, frozen, targets=targets)
    logprobs.sum().backward()
    expected = torch.autograd.grad(truth(hidden, frozen, targets)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen.weight.grad is None
    only_weight = LMHead(head.weight, head.bias.detach(), chunk_bytes=8 * 37 * 8)
    token_logprob(hidden.detach(), only_weight, targets=targets)[0].sum().backward()
    assert head.weight.grad.abs().max() > 0
    assert head.bias.grad is None
    with torch.no_grad():
        assert not token_logprob(hidden, head, targets=targets)[0].requires_grad


@pytest.mark.slow
def test_gradcheck_of_the_chunked_path() -> None:
    hidden, head, targets = case(11, temperature=0.8, softcap=5.0)

    def run(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        return token_logprob(h, replace(head, weight=w, bias=b, chunk_bytes=8 * 37 * 8), targets=targets)

    assert torch.autograd.gradcheck(run, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("chunk_rows", [8, 10**6])
def test_a_bias_of_minus_infinity_takes_a_token_out(chunk_rows: int) -> None:
    hidden, head, targets = case(bias=False)
    targets = targets.clamp(max=29)
    bias = torch.zeros(37, dtype=torch.float64)
    bias[30:] = -math.inf
    padded = LMHead(head.weight, bias, temperature=0.5, chunk_bytes=chunk_rows * 37 * 8)
    cut = LMHead(head.weight.detach()[:30].requires_grad_(), temperature=0.5)
    found = outcome(*token_logprob(hidden, padded, targets=targets), hidden, replace(padded, bias=None))
    expected = outcome(*token_logprob(hidden, cut, targets=targets), hidden, cut)
    assert (found[3][30:] == 0).all()
    found[3] = found[3][:30]
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("chunk_rows", [8, 10**6])
def test_extreme_rows(chunk_rows: int) -> None:
    hidden, head, targets = case(dtype=torch.float32, bias=False, chunk_bytes=chunk_rows * 37 * 4)
    with torch.no_grad():
        hidden[0] *= 1e4
        hidden[1] = 0
        hidden[2] = math.nan
    logprobs, entropy = token_logprob(hidden, head, targets=targets)
    assert logprobs[0] == 0
    assert entropy[0] == 0
    assert entropy[1].item() == pytest.approx(math.log(37))
    assert logprobs[1].item() == pytest.approx(-math.log(37))
    assert logprobs[2].isnan()
    assert entropy[2].isnan()
    assert logprobs[3:].isfinite().all()


def test_no_rows() -> None:
    hidden, head, targets = case(0)
    logprobs, entropy = token_logprob(hidden, head, targets=targets)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert (head.weight.grad == 0).all()


@pytest.mark.parametrize("chunk_rows", [8, 10**6])
def test_autocast_does_not_reach_the_logits(chunk_rows: int) -> None:
    hidden, head, targets = case(dtype=torch.float32, chunk_bytes=chunk_rows * 37 * 4)
    plain = outcome(*token_logprob(hidden, head, targets=targets), hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome(*token_logprob(hidden, head, targets=targets), hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_entropy_can_be_left_out_and_repeats_are_bitwise() -> None:
    hidden, head, targets = case(dtype=torch.float32)
    for chunk_rows in (8, 10**6):
        small = replace(head, chunk_bytes=chunk_rows * 37 * 4)
        first, nothing = token_logprob(hidden, small, targets=targets, want_entropy=False)
        second, _ = token_logprob(hidden, small, targets=targets)
        assert nothing is None
        assert torch.equal(first, second)
    logprobs, _ = token_logprob(hidden, replace(head, chunk_bytes=16), targets=targets, want_entropy=False)
    whole, _ = token_logprob(hidden, head, targets=targets, want_entropy=False)
    for leaf, wanted in zip(
        torch.autograd.grad(logprobs.sum(), [hidden, head.weight]),
        torch.autograd.grad(whole.sum(), [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(leaf, wanted)


def test_what_does_not_fit_is_named() -> None:
    hidden, head, targets = case()
    with pytest.raises(ValueError, match=r"hidden has shape \(23, 11\)"):
        token_logprob(hidden[:, 1:], head, targets=targets)
    with pytest.raises(ValueError, match=r"targets has shape \(22,\)"):
        token_logprob(hidden, head, targets=targets[1:])
    for wrong, message in (
        ({"temperature": 0.0}, "temperature=0"),
        ({"softcap": -1.0}, "softcap=-1"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"bias": torch.zeros(36)}, "bias has shape"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(head, **wrong)


@pytest.mark.parametrize("margin", [10.0, 17.0, 25.0, 40.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_confident_and_hopeless_tokens(margin: float, sign: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(37, 12, generator=generator)
    hidden = torch.zeros(4, 12)
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    weight[5, 0] = sign * margin
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    targets = torch.full((4,), 5)
    logprobs, _ = token_logprob(leaves[0], LMHead(leaves[1]), targets=targets)
    found = [logprobs, *torch.autograd.grad(logprobs.sum(), leaves)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # The odds written out, which float64 holds at any margin here: log-softmax would lose them at 40 nats.
    z = exact[0] @ exact[1].T
    odds = (z[:, torch.arange(37) != 5] - z[:, 5:6]).exp().sum(1)
    true = -torch.log1p(odds)
    wanted = [true, *torch.autograd.grad(true.sum(), exact)]
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    reference, _ = token_logprob_reference(leaves[0], LMHead(leaves[1]), targets=targets)
    torch.testing.assert_close(reference, found[0], rtol=1e-5, atol=0)
