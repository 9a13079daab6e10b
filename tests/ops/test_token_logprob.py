from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.ops.lm_head import LMHead, head_options
from grpo_fast.ops.token_logprob import _token_logprob_bwd, _token_logprob_fwd, token_logprob, token_logprob_reference

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.25},
    "everything": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.5},
}


CPU = torch.device("cpu")
both = pytest.mark.parametrize("impl", ["torch", "triton"])


def case(
    rows: int = 23,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    device: torch.device = CPU,
    **options: Any,
) -> Any:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, 12, generator=generator, dtype=torch.float64)
    shift = torch.randn(37, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 37, (rows,), generator=generator)
    targets[: rows // 2] = (hidden[: rows // 2] @ weight.T).argmax(-1)  # confident tokens beside rare ones
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (hidden, weight, shift)]
    return leaves[0], LMHead(leaves[1], leaves[2] if bias else None, **options), targets.to(device)


def truth(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, row by row, with sums over the vocabulary written out."""
    logprobs, entropies = [], []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        u = head.operand(head.weight.to(row.dtype)).mv(head.operand(row))
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
    rows = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype, device=logprobs.device)
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


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_keeps_to_the_budget(variant: str, impl: str, dtype: torch.dtype, device: torch.device) -> None:
    hidden, head, targets = case(dtype=dtype, device=device, **VARIANTS[variant])
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = replace(
        head, weight=head.weight.detach().double().requires_grad_(), bias=head.bias.detach().double().requires_grad_()
    )
    wanted = outcome(*truth(exact_hidden, exact, targets), exact_hidden, exact)
    reference = outcome(*token_logprob_reference(hidden, head, targets=targets), hidden, head)
    small = replace(head, chunk_bytes=8 * 37 * 4)
    found = outcome(*token_logprob(hidden, small, targets=targets, impl=impl), hidden, small)
    assert found[0].dtype == torch.float32
    assert found[2].dtype == dtype
    for value, base, true in zip(found, reference, wanted, strict=True):
        half_ulp = torch.finfo(value.dtype).eps / 2 * true.abs().max()
        assert (value.double() - true).abs().max() <= 4 * (base.double() - true).abs().max() + half_ulp


@pytest.mark.parametrize("chunk_rows", [8, 10**6])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_operands_that_are_rounded_change_nothing_else(variant: str, chunk_rows: int) -> None:
    hidden, head, targets = case(**VARIANTS[variant])
    head = replace(head, operand_dtype=torch.bfloat16, chunk_bytes=chunk_rows * 37 * 8)
    found = outcome(*token_logprob(hidden, head, targets=targets), hidden, head)
    expected = outcome(*truth(hidden, head, targets), hidden, head)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-11)
    exact = outcome(*truth(hidden, replace(head, operand_dtype=None), targets), hidden, head)
    assert (exact[0] - found[0]).abs().max() > 1e-4, "the guard: rounding shows"


@both
def test_rounded_operands_give_gradients_of_the_weights_own_type(impl: str, device: torch.device) -> None:
    hidden, head, targets = case(dtype=torch.float32, device=device)
    head = replace(head, operand_dtype=torch.bfloat16)
    found = outcome(*token_logprob(hidden, head, targets=targets, impl=impl), hidden, head)
    wide = hidden.detach().double().requires_grad_()
    leaves = [part.detach().double().requires_grad_() for part in (head.weight, head.bias)]
    exact = replace(head, weight=leaves[0], bias=leaves[1])
    wanted = outcome(*truth(wide, exact, targets), wide, exact)
    bounds = [2e-6, 2e-6, *([2e-6 if impl == "torch" else 8e-3] * 3)]  # kernels keep exponentials in bfloat16
    for value, true, bound in zip(found, wanted, bounds, strict=True):
        assert value.dtype == torch.float32
        assert (value.double() - true).norm() <= bound * true.norm()
    assert not torch.equal(found[3], found[3].bfloat16().float()), "d weight is not rounded"


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


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@both
@pytest.mark.parametrize("chunk_rows", [8, 10**6])
def test_extreme_rows(chunk_rows: int, impl: str, device: torch.device) -> None:
    hidden, head, targets = case(dtype=torch.float32, bias=False, device=device, chunk_bytes=chunk_rows * 37 * 4)
    with torch.no_grad():
        hidden[0] *= 1e4
        hidden[1] = 0
        hidden[2] = math.nan
    logprobs, entropy = token_logprob(hidden, head, targets=targets, impl=impl)
    assert logprobs[0] == 0
    assert entropy[0] == 0
    assert entropy[1].item() == pytest.approx(math.log(37))
    assert logprobs[1].item() == pytest.approx(-math.log(37))
    assert logprobs[2].isnan()
    assert entropy[2].isnan()
    assert logprobs[3:].isfinite().all()


@both
def test_no_rows(impl: str, device: torch.device) -> None:
    hidden, head, targets = case(0, dtype=torch.float32, device=device)
    logprobs, entropy = token_logprob(hidden, head, targets=targets, impl=impl)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert (head.weight.grad == 0).all()


@both
@pytest.mark.parametrize("chunk_rows", [8, 10**6])
def test_autocast_does_not_reach_the_logits(chunk_rows: int, impl: str, device: torch.device) -> None:
    hidden, head, targets = case(dtype=torch.float32, device=device, chunk_bytes=chunk_rows * 37 * 4)
    plain = outcome(*token_logprob(hidden, head, targets=targets, impl=impl), hidden, head)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = outcome(*token_logprob(hidden, head, targets=targets, impl=impl), hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@both
def test_entropy_can_be_left_out_and_repeats_are_bitwise(impl: str, device: torch.device) -> None:
    hidden, head, targets = case(dtype=torch.float32, device=device)
    for chunk_rows in (8, 10**6):
        small = replace(head, chunk_bytes=chunk_rows * 37 * 4)
        first, nothing = token_logprob(hidden, small, targets=targets, want_entropy=False, impl=impl)
        second, _ = token_logprob(hidden, small, targets=targets, impl=impl)
        assert nothing is None
        assert torch.equal(first, second)
    logprobs, _ = token_logprob(hidden, replace(head, chunk_bytes=16), targets=targets, want_entropy=False, impl=impl)
    whole, _ = token_logprob(hidden, head, targets=targets, want_entropy=False, impl=impl)
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
    with pytest.raises(TypeError, match=r"targets is torch\.int32; give int64"):
        token_logprob(hidden, head, targets=targets.int())
    for wrong, message in (
        ({"temperature": 0.0}, "temperature=0"),
        ({"softcap": -1.0}, "softcap=-1"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"bias": torch.zeros(36)}, "bias has shape"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(head, **wrong)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@both
@pytest.mark.parametrize("margin", [10.0, 17.0, 25.0, 40.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_confident_and_hopeless_tokens(margin: float, sign: int, impl: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(37, 12, generator=generator)
    hidden = torch.zeros(4, 12)
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    weight[5, 0] = sign * margin
    leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
    targets = torch.full((4,), 5, device=device)
    logprobs, _ = token_logprob(leaves[0], LMHead(leaves[1]), targets=targets, impl=impl)
    found = [logprobs, *torch.autograd.grad(logprobs.sum(), leaves)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # The odds written out, which float64 holds at any margin here: log-softmax would lose them at 40 nats.
    z = exact[0] @ exact[1].T
    odds = (z[:, torch.arange(37, device=device) != 5] - z[:, 5:6]).exp().sum(1)
    true = -torch.log1p(odds)
    wanted = [true, *torch.autograd.grad(true.sum(), exact)]
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    reference, _ = token_logprob_reference(leaves[0], LMHead(leaves[1]), targets=targets)
    torch.testing.assert_close(reference, found[0], rtol=1e-5, atol=0)


def arguments(impl: str, device: torch.device, *, want_entropy: bool = True, bias: bool = True) -> tuple[Any, ...]:
    hidden, head, targets = case(11, dtype=torch.float32, bias=bias, device=device, chunk_bytes=8 * 37 * 4, softcap=4.0)
    return hidden, head.weight, head.bias, targets, *head_options(head), want_entropy, impl


@pytest.mark.parametrize(
    ("impl", "want_entropy", "bias"),
    [("torch", want_entropy, bias) for want_entropy in (False, True) for bias in (False, True)]
    # traced through the interpreter one after another: all but one are not for every day
    + [pytest.param("triton", *flags, marks=pytest.mark.slow) for flags in ((False, False), (False, True), (True, False))]
    + [("triton", True, True)],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck of torch 2.14
def test_the_operators_are_well_registered(impl: str, want_entropy: bool, bias: bool, device: torch.device) -> None:
    given = arguments(impl, device, want_entropy=want_entropy, bias=bias)
    torch.library.opcheck(_token_logprob_fwd, given)
    rows = [value.detach() if isinstance(value, torch.Tensor) else value for value in given[:-2]]
    slopes = torch.linspace(-1, 1, 11, device=device)
    for wanted in ([True, True, bias], [True, False, False]):
        torch.library.opcheck(_token_logprob_bwd, (slopes, slopes if want_entropy else None, *rows, wanted, impl))


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("want_entropy", [False, True])
def test_it_compiles_without_a_graph_break(impl: str, want_entropy: bool, device: torch.device) -> None:
    hidden, head, targets = case(dtype=torch.float32, device=device, chunk_bytes=8 * 37 * 4, temperature=0.8)

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        inner = LMHead(weight, bias, temperature=head.temperature, chunk_bytes=head.chunk_bytes)
        logprobs, entropy = token_logprob(2 * hidden, inner, targets=targets, want_entropy=want_entropy, impl=impl)
        return logprobs.exp().sum() + (entropy.square().sum() if want_entropy else 0)

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [hidden, head.weight, head.bias]
        value = run(*leaves, targets)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@both
def test_an_entropy_that_is_only_reported_costs_no_gradient(impl: str, device: torch.device) -> None:
    hidden, head, targets = case(dtype=torch.float32, device=device)
    with_entropy, _ = token_logprob(hidden, head, targets=targets, impl=impl)
    without, _ = token_logprob(hidden, head, targets=targets, want_entropy=False, impl=impl)
    found, wanted = (torch.autograd.grad(value.sum(), [hidden, head.weight]) for value in (with_entropy, without))
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    _, entropy = token_logprob(hidden, head, targets=targets, impl=impl)
    zeros = torch.zeros_like(entropy)
    logprobs, again = token_logprob(hidden, head, targets=targets, impl=impl)
    alone = torch.autograd.grad(entropy.sum(), hidden)[0]
    both_given = torch.autograd.grad((logprobs * zeros + again).sum(), hidden)[0]
    assert torch.equal(alone, both_given)
    assert alone.abs().max() > 0
