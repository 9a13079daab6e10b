"""The numbers that the kernels of the head make, on a GPU or through Triton's interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from grpo_fast.ops import head_triton
from grpo_fast.ops.head_pass import RowGradient, RowStatistics, row_statistics
from grpo_fast.ops.head_shapes import Choice, Tile
from grpo_fast.ops.head_triton import TritonHeadPass
from grpo_fast.ops.jit import interpreted
from grpo_fast.ops.lm_head import LMHead
from grpo_fast.ops.products import mm_into
from grpo_fast.ops.token_logprob import token_logprob_reference

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

TIER_2 = Choice(2, Tile(32, 64, 16, splits=1, num_stages=3, num_warps=4, persistent=True), measured=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7, "logit_scale": 1.2},
    "softcap": {"temperature": 1.2, "softcap": 6.0, "logit_scale": 0.7},
}
CASES = [
    *(((5, 24, 131), name) for name in OPTIONS),
    *(pytest.param((9, 16, 2100), name, marks=[pytest.mark.slow] * (name != "softcap")) for name in OPTIONS),
    *(pytest.param(size, "plain", marks=pytest.mark.slow) for size in ((1, 8, 17), (11, 33, 2048))),
    ((4, 8, 4200), "plain"),
]
"""Under one tile of columns, whole tiles, and tiles with some columns more."""


class Case(NamedTuple):
    hidden: torch.Tensor
    head: LMHead
    targets: torch.Tensor
    gradient: RowGradient


def case(
    device: torch.device, size: tuple[int, int, int], *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Case:
    """Rows, half of which have their likeliest token as target, with gradients of both signs."""
    rows, width, vocabulary = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = draw(rows, width), draw(vocabulary, width), draw(vocabulary)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    likely = (hidden.double() @ weight.double().T + bias.double()).argmax(1)
    targets = torch.where(torch.arange(rows) % 2 == 0, likely, targets)
    slopes = torch.linspace(-1, 1.5, rows), torch.linspace(0.7, -0.5, rows)
    head = LMHead(weight.to(device), bias.to(device), **options)
    return Case(hidden.to(device), head, targets.to(device), RowGradient(*(slope.to(device) for slope in slopes)))


def run(given: Case, *, entropy: bool = True, choice: Choice | None = None) -> tuple[RowStatistics, list[torch.Tensor]]:
    """Statistics of the rows, and the gradients of hidden rows, weight and bias."""
    hidden, head, targets, gradient = given
    wanted = (True, True, head.bias is not None)
    work = TritonHeadPass(hidden, head, targets=targets, wanted=wanted, gated=not entropy, choice=choice)
    block = work.block(slice(0, len(hidden)), want_entropy=True, want_exp=True)
    statistics = row_statistics(block)
    work.add(block, statistics, gradient if entropy else RowGradient(gradient.logprobs))
    return statistics, [value for value in work.gradients() if value is not None]


def outcome(given: Case, *, entropy: bool, choice: Choice | None = None) -> list[torch.Tensor]:
    statistics, gradients = run(given, entropy=entropy, choice=choice)
    assert statistics.entropy is not None
    return [value.double().cpu() for value in (statistics.logprobs, statistics.entropy, *gradients)]


def by_reference(given: Case, *, entropy: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same by autograd through the specification, on the same inputs in another type."""
    hidden, head, targets, gradient = given
    leaves = [None if value is None else value.to(dtype).requires_grad_() for value in (hidden, head.weight, head.bias)]
    raised = replace(head, weight=leaves[1], bias=leaves[2])
    logprobs, entropies = token_logprob_reference(leaves[0], raised, targets=targets)
    value = (logprobs * gradient.logprobs).sum()
    if entropy:
        value = value + (entropies * gradient.entropy).sum()
    gradients = torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])
    return [value.detach().double().cpu() for value in (logprobs, entropies, *gradients)]


def cut_off(given: Case, *, entropy: bool) -> list[float]:
    """What the gradients of float16 inputs may be off by because a GPU multiplies them in TensorFloat-32, by output.

    It has ten bits after the first, all that a float16 has. Of E, and in the weight's gradient of the scaled rows too, the
    others are cut off: up to 2^-10 of each term. In the interpreter nothing is.
    """
    if interpreted() or given.hidden.dtype != torch.float16:
        return [0.0] * 5
    hidden, weight = given.hidden.double(), given.head.weight.double()
    vocabulary = replace(given.head, weight=torch.eye(len(weight), dtype=torch.float64, device=weight.device))
    logits = Case(hidden @ weight.T, vocabulary, given.targets, given.gradient)
    slopes = by_reference(logits, entropy=entropy, dtype=torch.float64)[2].abs()
    sums = (slopes @ weight.abs().cpu(), 2 * slopes.T @ hidden.abs().cpu())
    return [0.0, 0.0, *(2.0**-10 * each.max().item() for each in sums), 0.0]


def assert_within_budget(given: list[Case], *, entropy: bool, choice: Choice | None = None) -> None:
    """Four times the error of the float32 specification plus half an ulp, of the worst of some draws."""
    more = (max(values) for values in zip(*(cut_off(each, entropy=entropy) for each in given), strict=True))
    outputs = zip(*(zip(*three(each, entropy=entropy, choice=choice), strict=True) for each in given), strict=True)
    for output, cut in zip(outputs, more, strict=False):
        errors = [((found - exact).abs().max(), (base - exact).abs().max()) for found, base, exact in output]
        found, base = (max(values).item() for values in zip(*errors, strict=True))
        largest = max(exact.abs().max().item() for _, _, exact in output)
        assert found <= 4 * base + torch.finfo(given[0].hidden.dtype).eps / 2 * largest + cut
        assert largest > 1e-3


def three(given: Case, *, entropy: bool, choice: Choice | None) -> tuple[list[torch.Tensor], ...]:
    return (
        outcome(given, entropy=entropy, choice=choice),
        by_reference(given, entropy=entropy, dtype=torch.float32),
        by_reference(given, entropy=entropy, dtype=torch.float64),
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
def test_errors_keep_to_the_budget(
    size: tuple[int, int, int], dtype: torch.dtype, options: str, entropy: bool, device: torch.device
) -> None:
    # The error of one row is chance.
    draws = [case(device, size, dtype=dtype, seed=seed, **OPTIONS[options]) for seed in range(max(4, 40 // size[0]))]
    assert_within_budget(draws, entropy=entropy)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("size", "options"), [((5, 24, 131), name) for name in OPTIONS] + [((1, 8, 17), "plain")], ids=str)
def test_errors_of_tier_2_keep_to_the_same_budget(
    size: tuple[int, int, int], options: str, entropy: bool, device: torch.device
) -> None:
    draws = [case(device, size, dtype=torch.float16, seed=seed, **OPTIONS[options]) for seed in range(4)]
    assert_within_budget(draws, entropy=entropy, choice=TIER_2)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_budget_knows_what_tensorfloat_32_cuts_off(
    entropy: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operands are cut here as a GPU may cut them: by nothing else would a first run on one be told of it."""

    def ten_bits(values: torch.Tensor) -> torch.Tensor:
        return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    def cutting(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor, add: bool = False) -> None:
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            left, right = ten_bits(left), ten_bits(right)
        mm_into(left, right, out=out, add=add)

    draws = [case(device, (5, 24, 131), dtype=torch.float16, seed=seed) for seed in range(4)]
    monkeypatch.setattr(head_triton, "mm_into", cutting)
    if interpreted():
        with pytest.raises(AssertionError):
            assert_within_budget(draws, entropy=entropy)
    monkeypatch.setitem(globals(), "interpreted", lambda: False)
    assert_within_budget(draws, entropy=entropy)


@pytest.mark.slow
def test_a_large_odd_vocabulary(device: torch.device) -> None:
    assert_within_budget([case(device, (4, 6, 151_936 + 3))], entropy=True)


@pytest.mark.parametrize("margin", [10.0, 17.0, 25.0, 40.0])
def test_confident_tokens_keep_their_tail(margin: float, device: torch.device) -> None:
    weight = torch.linspace(0, 0.5, 19)[:, None]
    weight[7] = 0.5 + margin
    gradient = RowGradient(torch.ones(1, device=device))
    given = Case(torch.ones(1, 1, device=device), LMHead(weight.to(device)), torch.tensor([7], device=device), gradient)
    found, exact = outcome(given, entropy=False), by_reference(given, entropy=False, dtype=torch.float64)
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    assert found[0] < 0
    torch.testing.assert_close(found[3], exact[3], rtol=2e-5, atol=0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("gap", [10.0, 15.0, 17.0, 70.0, 500.0])
def test_a_target_far_below_the_others(gap: float, device: torch.device) -> None:
    given = case(device, (6, 8, 300))
    shift = given.head.bias.clone()
    shift[given.targets[2]] -= gap
    low = given._replace(head=replace(given.head, bias=shift))
    for entropy in (False, True):
        found, exact = (outcome(low, entropy=entropy), by_reference(low, entropy=entropy, dtype=torch.float64))
        for value, wanted in zip(found, exact, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=2e-5)
    assert exact[0][2] < -gap + 20


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_a_bias_of_minus_infinity_takes_a_token_out(softcap: float | None, device: torch.device) -> None:
    given = case(device, (6, 8, 40), softcap=softcap)
    shift = given.head.bias.clone()
    shift[[3, 11]] = -math.inf
    targets = torch.where((given.targets == 3) | (given.targets == 11), 5, given.targets)
    out = given._replace(head=replace(given.head, bias=shift), targets=targets)
    found, exact = outcome(out, entropy=True), by_reference(out, entropy=True, dtype=torch.float64)
    for value, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    if softcap is None:
        assert (found[3][[3, 11]] == 0).all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_an_impossible_target_has_no_probability_and_harms_no_other_row(device: torch.device) -> None:
    given = case(device, (4, 8, 40))
    shift = given.head.bias.clone()
    shift[given.targets[1]] = -math.inf
    statistics, _ = run(given._replace(head=replace(given.head, bias=shift)))
    assert statistics.logprobs[1] < -1e30
    assert statistics.logprobs[[0, 2, 3]].min() > -50


@pytest.mark.parametrize("with_bias", [False, True])
def test_rounded_logits_are_those_of_an_engine_in_bfloat16(with_bias: bool, device: torch.device) -> None:
    given = case(device, (7, 24, 300), logits_dtype=torch.bfloat16)
    head = given.head if with_bias else replace(given.head, bias=None)
    statistics, _ = run(given._replace(head=head), entropy=False)
    logits = given.hidden @ head.weight.T + (head.bias if with_bias else 0)
    columns = given.targets[:, None]
    expected = logits.bfloat16().float().log_softmax(1).gather(1, columns)[:, 0]
    torch.testing.assert_close(statistics.logprobs, expected, rtol=0, atol=2e-5)
    assert (statistics.logprobs - logits.log_softmax(1).gather(1, columns)[:, 0]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_dead_row_that_is_not_finite_reaches_no_gradient(value: float, entropy: bool, device: torch.device) -> None:
    given = case(device, (9, 8, 300))
    given.hidden[5] = value
    for slope in given.gradient:
        slope[5] = 0
    statistics, gradients = run(given, entropy=entropy)
    assert statistics.logprobs[5].isnan()
    rest = torch.arange(9, device=device) != 5
    assert statistics.logprobs[rest].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][5] == 0).all()
    kept = Case(given.hidden[rest], given.head, given.targets[rest], RowGradient(*(slope[rest] for slope in given.gradient)))
    for found, wanted in zip(gradients[1:], run(kept, entropy=entropy)[1][1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("token", "slope"), [(0, 10.0), (1, -10.0)])
def test_a_dead_row_in_which_one_logit_overflows_reaches_no_gradient(
    token: int, slope: float, entropy: bool, device: torch.device
) -> None:
    """Its target's, whose S_o is 0, or that of another token, downwards, whose S_o is finite: its entropy is NaN."""
    given = case(device, (9, 8, 300))
    given.hidden[5] = 0
    given.hidden[5, 0] = 3e38
    given.head.weight[:, 0] = 0
    given.head.weight[(given.targets[5] + token) % 300, 0] = slope
    for gradient in given.gradient:
        gradient[5] = 0
    _, gradients = run(given, entropy=entropy)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][5] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_a_live_row_that_is_not_finite_stays_in_its_row_of_the_hidden_gradient(device: torch.device) -> None:
    given = case(device, (9, 8, 300))
    given.hidden[5, 2] = math.inf
    statistics, (dhidden, dweight, _) = run(given)
    rest = torch.arange(9, device=device) != 5
    assert statistics.logprobs[5].isnan()
    assert dhidden[5].isnan().all()
    assert dhidden[rest].isfinite().all()
    assert dweight.isnan().any()


@pytest.mark.parametrize("target", [-1, -100, 300, 2**40])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row(target: int, device: torch.device) -> None:
    given = case(device, (6, 8, 300))
    whole = run(given)
    given.targets[2] = target
    given.gradient.logprobs[2] = given.gradient.entropy[2] = 0
    statistics, gradients = run(given)
    rest = torch.arange(6, device=device) != 2
    assert statistics.logprobs[2].isnan()
    assert torch.equal(statistics.logprobs[rest], whole[0].logprobs[rest])
    assert torch.equal(gradients[0][rest], whole[1][0][rest])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device) -> None:
    """Logits are sums that are exact in any order, as cuBLAS may take another for another number of rows."""
    given = case(device, (29, 24, 300))
    hidden, weight = (torch.round(8 * values) / 8 for values in (given.hidden, given.head.weight))
    given = given._replace(hidden=hidden, head=replace(given.head, weight=weight))
    statistics, (dhidden, *_) = run(given)
    for rows in (slice(0, 1), slice(7, 9), slice(11, 28), slice(3, 29)):
        part = RowGradient(*(slope[rows] for slope in given.gradient))
        found, (dpart, *_) = run(Case(given.hidden[rows], given.head, given.targets[rows], part))
        assert torch.equal(found.logprobs, statistics.logprobs[rows])
        assert torch.equal(found.entropy, statistics.entropy[rows])
        if interpreted():
            assert torch.equal(dpart, dhidden[rows])
        torch.testing.assert_close(dpart, dhidden[rows], rtol=1e-5, atol=1e-6)


def test_live_rows_are_bitwise_the_same_beside_dead_ones(device: torch.device) -> None:
    given = case(device, (17, 24, 300))
    whole = run(given)[1][0]
    for slope in given.gradient:
        slope[::2] = 0
    found = run(given)[1][0]
    assert torch.equal(found[1::2], whole[1::2])
    assert (found[::2] == 0).all()


def test_a_repeated_call_is_bitwise_the_same(device: torch.device) -> None:
    given = case(device, (17, 24, 2100), softcap=8.0)
    (first, firsts), (second, seconds) = run(given), run(given)
    assert torch.equal(first.logprobs, second.logprobs)
    assert torch.equal(first.entropy, second.entropy)
    assert all(torch.equal(one, two) for one, two in zip(firsts, seconds, strict=True))


def test_gradients_of_logits_add_up_to_nothing(device: torch.device) -> None:
    given = case(device, (17, 24, 2100))
    _, (_, _, dbias) = run(given)
    assert abs(dbias.double().sum().item()) < 1e-5
    assert dbias.abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_errors_keep_to_the_budget(options: str, entropy: bool) -> None:
    size = (300, 896, 32_001)
    draws = [case(torch.device("cuda"), size, dtype=torch.bfloat16, seed=seed, **OPTIONS[options]) for seed in range(4)]
    scaled = [each._replace(hidden=each.hidden / 8) for each in draws]
    assert_within_budget(scaled, entropy=entropy)
