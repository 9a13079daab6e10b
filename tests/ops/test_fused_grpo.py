from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.ops.fused_grpo import FusedLoss, _fused_grpo_fwd, fused_grpo, fused_grpo_reference
from grpo_fast.ops.lm_head import LMHead, head_options
from grpo_fast.ops.loss_spec import LossBatch, LossSpec
from grpo_fast.ops.token_logprob import token_logprob

V, H = 31, 10
LENGTHS = [6, 1, 9, 0, 4, 2, 7]
T = sum(LENGTHS)
SPECS = {
    "clip": LossSpec(epsilon_high=0.28),
    "two-sided kl": LossSpec(delta=1.5, beta=0.1),
    "cispo": LossSpec(surrogate="cispo", epsilon_high=1.3),
    "sapo": LossSpec(surrogate="sapo"),
    "gspo": LossSpec(importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.1),
    "gspo kl entropy": LossSpec(
        importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.1, beta=0.1, entropy_coef=0.02
    ),
    "vespo kl": LossSpec(surrogate="vespo", vespo_k_neg=2.5, vespo_lambda_pos=2.0, beta=0.1),
    "off-policy mask": LossSpec(off_policy_mask_threshold=0.05),
    "rloo": LossSpec(importance_sampling_level="sequence_sum"),
    "entropy": LossSpec(entropy_coef=0.05),
}


CPU = torch.device("cpu")
both = pytest.mark.parametrize("impl", ["torch", "triton"])
FEW = ("two-sided kl", "gspo kl entropy", "vespo kl")
"""Objectives for kernels, which know none of them; through the interpreter all would take too long for every day."""


def marked(*values: Any, slow: bool) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] * slow)


each_by_both = pytest.mark.parametrize(
    ("name", "impl"),
    [marked(name, impl, slow=impl == "triton" and name not in FEW) for impl in ("torch", "triton") for name in SPECS],
)


def case(
    *, dtype: torch.dtype = torch.float64, seed: int = 5, device: torch.device = CPU, **options: Any
) -> tuple[torch.Tensor, LMHead, torch.Tensor, LossBatch]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (draw(T, H), draw(V, H), draw(V)))
    head = LMHead(weight, bias, **options)
    targets = torch.randint(0, V, (T,), generator=generator)
    with torch.no_grad():
        batch = LossBatch(torch.zeros(T, dtype=torch.long), torch.zeros(1), torch.zeros(1))
        logprobs = fused_grpo_reference(hidden, head, targets=targets, batch=batch, spec=LossSpec()).logprobs.double()
    index = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old = logprobs + 0.3 * draw(T)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    batch = LossBatch(
        index,
        torch.tensor([1.0, -0.6, 0.0, 0.4, -1.2, 0.8, 1.4], dtype=work),
        torch.tensor([0.1, 0.3, 0.2, 0.5, 0.25, 0.15, 0.05], dtype=work),
        old_logprobs=old.to(work),
        ref_logprobs=(logprobs + 0.3 * draw(T)).to(work),
        num_items_in_batch=50.0,
    )
    if device.type != "cpu":
        hidden, weight, bias = (value.detach().to(device).requires_grad_() for value in (hidden, weight, bias))
        head, targets = replace(head, weight=weight, bias=bias), targets.to(device)
        batch = LossBatch(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in batch))
    return hidden, head, targets, batch


def outcome(result: FusedLoss, hidden: torch.Tensor, head: LMHead) -> list[torch.Tensor]:
    grads = torch.autograd.grad(3.0 * result.loss, [hidden, head.weight, head.bias])
    return [result.loss.detach(), result.logprobs, result.entropy, *grads]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transformed": {"temperature": 0.8, "softcap": 5.0, "logit_scale": 0.7},
}


@pytest.mark.parametrize("chunk_rows", [8, 16, 1000])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_one_pass_equals_the_two_ops(name: str, options: str, on_policy: bool, chunk_rows: int) -> None:
    hidden, head, targets, batch = case(**OPTIONS[options])
    if on_policy:
        batch = batch._replace(old_logprobs=None)
    given = {"targets": targets, "batch": batch, "spec": SPECS[name]}
    expected = fused_grpo_reference(hidden, head, **given)
    small = replace(head, chunk_bytes=chunk_rows * V * 8)
    found = fused_grpo(hidden, small, **given)
    for value, wanted in zip(outcome(found, hidden, head), outcome(expected, hidden, head), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
    for key, value in found.metrics.named().items():
        torch.testing.assert_close(value, getattr(expected.metrics, key), rtol=1e-10, atol=1e-12)
        assert not value.requires_grad
    if on_policy:
        assert found.metrics.ratio_min == found.metrics.ratio_max == 1.0
    elif name not in ("sapo", "cispo", "vespo kl"):
        assert 0 < found.metrics.clip_region < found.metrics.num_ratios


@pytest.mark.parametrize("name", ["entropy", "gspo kl entropy"])
def test_one_pass_weighs_the_entropies_of_tokens(name: str) -> None:
    hidden, head, targets, batch = case()
    weights = (torch.arange(T) % 3 != 0).double()
    given = {"targets": targets, "batch": batch._replace(entropy_weights=weights), "spec": SPECS[name]}
    expected = outcome(fused_grpo_reference(hidden, head, **given), hidden, head)
    found = outcome(fused_grpo(hidden, replace(head, chunk_bytes=8 * V * 8), **given), hidden, head)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
    every = outcome(fused_grpo(hidden, head, **given | {"batch": batch}), hidden, head)
    assert not torch.allclose(every[3], expected[3], rtol=1e-3)


TYPES = [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)]
BUDGETED = [
    marked(name, impl, dtype, slow=impl == "triton" and (name, dtype) != (FEW[0], torch.float32))
    for impl, dtype in TYPES
    for name in (SPECS if impl == "torch" else FEW)
]


@pytest.mark.parametrize(("name", "impl", "dtype"), BUDGETED)
def test_error_keeps_to_the_budget(name: str, impl: str, dtype: torch.dtype, device: torch.device) -> None:
    # The worst of nine draws: the error of one sum is chance.
    where = device if impl == "triton" else CPU
    draws = [case(dtype=dtype, temperature=0.9, seed=seed, device=where) for seed in range(5, 14)]
    for worst in zip(*(budget_errors(name, impl, draw) for draw in draws), strict=True):
        found, reference, half_ulp = (max(values) for values in zip(*worst, strict=True))
        assert found <= 4 * reference + half_ulp


def budget_errors(
    name: str, impl: str, given: tuple[torch.Tensor, LMHead, torch.Tensor, LossBatch]
) -> list[tuple[float, float, float]]:
    """Of each output and gradient: error of the op, error of the reference, half an ulp of the largest value."""
    hidden, head, targets, batch = given
    dtype = hidden.dtype
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = replace(
        head, weight=head.weight.detach().double().requires_grad_(), bias=head.bias.detach().double().requires_grad_()
    )
    given = {"targets": targets, "batch": batch, "spec": SPECS[name]}
    wanted = outcome(fused_grpo_reference(exact_hidden, exact, **given), exact_hidden, exact)
    reference = outcome(fused_grpo_reference(hidden, head, **given), hidden, head)
    small = replace(head, chunk_bytes=16 * V * 4)
    found = outcome(fused_grpo(hidden, small, **given, impl=impl), hidden, small)
    assert found[3].dtype == found[4].dtype == found[5].dtype == dtype
    return [
        (
            (value.double() - true).abs().max().item(),
            (base.double() - true).abs().max().item(),
            torch.finfo(value.dtype).eps / 2 * true.abs().max().item(),
        )
        for value, base, true in zip(found, reference, wanted, strict=True)
    ]


def test_gradients_reach_only_what_asks_for_them() -> None:
    hidden, head, targets, batch = case()
    given = {"targets": targets, "batch": batch, "spec": SPECS["clip"]}
    expected = outcome(fused_grpo_reference(hidden, head, **given), hidden, head)
    small = {"chunk_bytes": 8 * V * 8}
    frozen = LMHead(head.weight.detach(), head.bias.detach(), **small)
    fused_grpo(hidden, frozen, **given).loss.backward()
    torch.testing.assert_close(3 * hidden.grad, expected[3])
    fused_grpo(hidden.detach(), LMHead(head.weight, head.bias.detach(), **small), **given).loss.backward()
    torch.testing.assert_close(3 * head.weight.grad, expected[4])
    assert head.bias.grad is None
    without = LMHead(head.weight.detach(), None, **small)
    assert fused_grpo(hidden, without, **given).loss.requires_grad
    for chunk_rows in (8, 1000):
        sized = replace(head, chunk_bytes=chunk_rows * V * 8)
        with torch.no_grad():
            quiet = fused_grpo(hidden, sized, **given)
        assert not quiet.loss.requires_grad
        torch.testing.assert_close(quiet.loss, expected[0])
        assert not fused_grpo(hidden.detach(), replace(frozen, chunk_bytes=sized.chunk_bytes), **given).loss.requires_grad


def test_backward_twice_gives_the_same_again() -> None:
    hidden, head, targets, batch = case(chunk_bytes=8 * V * 8)
    loss = fused_grpo(hidden, head, targets=targets, batch=batch, spec=SPECS["clip"]).loss
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    second = torch.autograd.grad(loss * -2, [hidden, head.weight])
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, -2 * one)


@each_by_both
def test_logprobs_serve_as_the_old_ones_of_the_next_iteration(name: str, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)
    first = fused_grpo(hidden, head, targets=targets, batch=batch._replace(old_logprobs=None), spec=SPECS[name], impl=impl)
    assert not first.logprobs.requires_grad
    again = fused_grpo(
        hidden, head, targets=targets, batch=batch._replace(old_logprobs=first.logprobs), spec=SPECS[name], impl=impl
    )
    assert again.metrics.ratio_min == again.metrics.ratio_max == 1.0
    one, two = outcome(first, hidden, head), outcome(again, hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@each_by_both
@pytest.mark.parametrize("chunk_rows", [8, 1000])
def test_logprobs_are_bitwise_those_of_token_logprob(name: str, chunk_rows: int, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=chunk_rows * V * 4)
    found = fused_grpo(hidden, head, targets=targets, batch=batch, spec=SPECS[name], impl=impl)
    other = replace(head, chunk_bytes=16 * V * 4)
    logprobs, entropy = token_logprob(hidden, other, targets=targets, impl=impl)
    assert torch.equal(found.logprobs, logprobs)
    assert torch.equal(found.entropy, entropy)


def test_many_logits_in_one_block_equal_the_two_ops() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(300, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(1000, 8, generator=generator, dtype=torch.float64).requires_grad_()
    head = LMHead(weight, torch.zeros(1000, dtype=torch.float64).requires_grad_())
    targets = torch.randint(0, 1000, (300,), generator=generator)
    batch = LossBatch(torch.arange(3).repeat_interleave(100), torch.tensor([1.0, -1.0, 0.5]), torch.full((3,), 1 / 300))
    given = {"targets": targets, "batch": batch, "spec": LossSpec()}
    expected = outcome(fused_grpo_reference(hidden, head, **given), hidden, head)
    for value, wanted in zip(outcome(fused_grpo(hidden, head, **given), hidden, head), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


@each_by_both
def test_no_rows_give_a_differentiable_zero(name: str, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device)
    result = fused_grpo(hidden[:0], head, targets=targets[:0], batch=batch.tokens(0, 0), spec=SPECS[name], impl=impl)
    result.loss.backward()
    assert result.loss == 0
    assert (hidden.grad == 0).all()
    assert (head.weight.grad == 0).all()
    assert (head.bias.grad == 0).all()
    assert result.logprobs.shape == result.entropy.shape == (0,)
    assert result.metrics.num_tokens == 0


@each_by_both
def test_rows_without_weight_give_zero_gradients(name: str, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)
    dead = batch._replace(advantages=batch.advantages * 0, loss_weights=batch.loss_weights * 0)
    spec = replace(SPECS[name], entropy_coef=0.0)
    loss, *_, dh, dw, db = outcome(fused_grpo(hidden, head, targets=targets, batch=dead, spec=spec, impl=impl), hidden, head)
    assert loss == 0
    assert all((grad == 0).all() for grad in (dh, dw, db))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@each_by_both
@pytest.mark.parametrize("chunk_rows", [8, 1000])
def test_a_nan_row_is_seen_in_the_loss(name: str, chunk_rows: int, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=chunk_rows * V * 4)
    row = LENGTHS[0] + LENGTHS[1]
    assert batch.advantages[batch.sequence_index[row]] == 0
    with torch.no_grad():
        hidden[row] = math.nan
    result = fused_grpo(hidden, head, targets=targets, batch=batch, spec=SPECS[name], impl=impl)
    assert result.loss.isnan()
    assert result.logprobs[row].isnan()
    assert result.logprobs[row + 1 :].isfinite().all()


@both
def test_autocast_does_not_reach_it(impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)
    given = {"targets": targets, "batch": batch, "spec": SPECS["entropy"]}
    plain = outcome(fused_grpo(hidden, head, **given, impl=impl), hidden, head)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = outcome(fused_grpo(hidden, head, **given, impl=impl), hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_dead_sequences_can_be_left_out() -> None:
    hidden, head, targets, batch = case(chunk_bytes=8 * V * 8)
    spec = LossSpec()
    whole = outcome(fused_grpo(hidden, head, targets=targets, batch=batch, spec=spec), hidden, head)
    rows = batch.advantages[batch.sequence_index] != 0
    assert 0 < rows.sum() < T
    compact = batch._replace(
        sequence_index=batch.sequence_index[rows], old_logprobs=batch.old_logprobs[rows], ref_logprobs=None
    )
    parted = outcome(fused_grpo(hidden[rows], head, targets=targets[rows], batch=compact, spec=spec), hidden, head)
    assert parted[0].item() == pytest.approx(whole[0].item(), rel=1e-12)
    for value, wanted in zip(parted[3:], whole[3:], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)


def test_what_does_not_fit_is_named() -> None:
    hidden, head, targets, batch = case(chunk_bytes=8 * V * 8)
    with pytest.raises(ValueError, match=r"sequence_index has shape \(28,\)"):
        fused_grpo(hidden, head, targets=targets, batch=batch.tokens(1, T), spec=LossSpec())
    wrong = batch._replace(sequence_index=batch.sequence_index + 3)
    with pytest.raises(ValueError, match="must ascend and stay under B"):
        fused_grpo(hidden, head, targets=targets, batch=wrong, spec=SPECS["gspo"])
    with pytest.raises(ValueError, match="ref_logprobs"):
        fused_grpo(hidden, head, targets=targets, batch=batch._replace(ref_logprobs=None), spec=SPECS["two-sided kl"])
    asked = batch._replace(advantages=batch.advantages.clone().requires_grad_())
    with pytest.raises(ValueError, match="advantages requires a gradient"):
        fused_grpo(hidden, head, targets=targets, batch=asked, spec=LossSpec())


def operator_arguments(
    name: str, impl: str, device: torch.device, wanted: list[bool], dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    hidden, head, targets, batch = case(dtype=dtype, device=device, chunk_bytes=8 * V * 4)
    spec = SPECS[name]
    numbers = [spec.epsilon_low, spec.epsilon_high, spec.beta, spec.entropy_coef, 1.0, 1.05, 2.0, 3.0, 3.0, 2.0]
    leaves = [value.detach() for value in (hidden, head.weight, head.bias)]
    loss = (spec.surrogate, spec.importance_sampling_level, numbers, spec.delta, None, spec.use_bias_correction_kl)
    tensors = [*batch[:5], *batch[6:]]
    return *leaves, targets, *head_options(head), tensors, batch.num_items_in_batch, *loss, wanted, impl


ALL = [True, True, True]


@pytest.mark.parametrize(
    ("name", "wanted", "impl"),
    [
        marked(name, wanted, impl, slow=impl == "triton" and (name, wanted) != (FEW[1], ALL))
        for name in ("clip", FEW[1])
        for wanted in (ALL, [True, False, False], [False, False, False])
        for impl in ("torch", "triton")
    ],
    ids=str,
)
def test_the_operator_is_well_registered(name: str, wanted: list[bool], impl: str, device: torch.device) -> None:
    torch.library.opcheck(_fused_grpo_fwd, operator_arguments(name, impl, device, wanted))


@pytest.mark.parametrize(("impl", "dtype"), [("torch", torch.bfloat16), ("triton", torch.float16)])
@pytest.mark.parametrize("wanted", [ALL, [False, True, False]], ids=str)
def test_a_compiler_is_told_the_types_of_short_gradients(
    wanted: list[bool], impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = operator_arguments("clip", impl, device if impl == "triton" else CPU, wanted, dtype)
    torch.library.opcheck(_fused_grpo_fwd, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_compiler_is_told_the_strides_of_gradients(impl: str, device: torch.device) -> None:
    hidden, *rest = operator_arguments("clip", impl, device if impl == "triton" else CPU, ALL)
    torch.library.opcheck(_fused_grpo_fwd, (hidden.T.contiguous().T, *rest), test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracing
@pytest.mark.parametrize(
    ("name", "impl"),
    [
        marked(name, impl, slow=(name, impl) == ("clip", "triton"))
        for name in ("clip", FEW[1])
        for impl in ("torch", "triton", "auto")
    ],
)
def test_it_compiles_without_a_graph_break(name: str, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, batch: LossBatch) -> tuple[torch.Tensor, ...]:
        inner = LMHead(weight, bias, chunk_bytes=head.chunk_bytes)
        result = fused_grpo(2 * hidden, inner, targets=targets, batch=batch, spec=SPECS[name], impl=impl)
        return 3 * result.loss, result.metrics.clip_region, result.logprobs

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [hidden, head.weight, head.bias]
        loss, clipped, logprobs = run(*leaves, batch)
        results.append([loss.detach(), clipped, logprobs, *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [marked(name, slow=name not in FEW) for name in SPECS])
def test_a_frozen_head_gives_the_same_hidden_gradient(name: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)
    given = {"targets": targets, "batch": batch, "spec": SPECS[name], "impl": "triton"}
    whole = torch.autograd.grad(fused_grpo(hidden, head, **given).loss, hidden)[0]
    frozen = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
    alone = torch.autograd.grad(fused_grpo(hidden, frozen, **given).loss, hidden)[0]
    assert torch.equal(alone, whole)


@each_by_both
def test_a_masked_batch_gives_zeros_whatever_it_holds(name: str, impl: str, device: torch.device) -> None:
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)
    with torch.no_grad():
        hidden[3] = math.nan
    masked = batch._replace(token_mask=torch.zeros(T, dtype=torch.bool, device=device))
    result = fused_grpo(hidden, head, targets=targets, batch=masked, spec=SPECS[name], impl=impl)
    loss, _, _, *gradients = outcome(result, hidden, head)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.gpu
def test_token_level_never_waits_for_the_device() -> None:
    device = torch.device("cuda")
    hidden, head, targets, batch = case(dtype=torch.float32, device=device, chunk_bytes=8 * V * 4)
    given = {"targets": targets, "batch": batch, "spec": SPECS["two-sided kl"]}
    fused_grpo(hidden, head, **given).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_grpo(hidden, head, **given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
