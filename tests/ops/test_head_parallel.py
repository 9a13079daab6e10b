"""The op over a group of one rank; over several it is held against the whole head in ``tests/train/distributed``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_fast.ops import LMHead
from grpo_fast.ops.head_parallel import parallel_token_logprob
from grpo_fast.ops.token_logprob import token_logprob_reference

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "temperature": 0.8},
    "scale": {"logit_scale": 0.25},
    "operands": {"operand_dtype": torch.bfloat16},
    "chunks": {"chunk_bytes": 8 * 23 * 8},
}


pytestmark = pytest.mark.usefixtures("group_of_one")


def inputs(dtype: torch.dtype = torch.float64, *, biased: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((31, 6), (23, 6), (23,)) if biased else ((31, 6), (23, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


TARGETS = torch.arange(31) % 23


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_group_of_one_gives_the_reference_and_its_gradients(name: str, biased: bool) -> None:
    mine, true = inputs(biased=biased), inputs(biased=biased)
    found = parallel_token_logprob(mine[0], LMHead(*mine[1:], **OPTIONS[name]), targets=TARGETS, first_token=0)
    expected = token_logprob_reference(true[0], LMHead(*true[1:], **OPTIONS[name]), targets=TARGETS)
    weights = torch.linspace(-1, 1, 31, dtype=torch.float64)
    for values in (found, expected):
        (weights * values[0] + weights.flip(0) * values[1]).sum().backward()
    for one, other in zip(found, expected, strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(mine, true, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_a_confident_token_keeps_its_tail() -> None:
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[30.0], [0.0]], requires_grad=True)
    logprob, entropy = parallel_token_logprob(hidden, LMHead(weight), targets=torch.tensor([0]), first_token=0)
    logprob.sum().backward()
    tail = float(torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert logprob.item() == pytest.approx(-tail, rel=1e-6)
    assert entropy.item() == pytest.approx(31 * tail, rel=1e-5)
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([tail, -tail], rel=1e-6)


def test_a_token_that_the_bias_takes_out_counts_for_nothing() -> None:
    hidden, weight, bias = inputs(torch.float32)
    with torch.no_grad():
        bias[7] = -torch.inf
    logprob, entropy = parallel_token_logprob(hidden, LMHead(weight, bias), targets=torch.zeros_like(TARGETS), first_token=0)
    (logprob.sum() + entropy.sum()).backward()
    assert all(value.isfinite().all() for value in (logprob, entropy, weight.grad))  # type: ignore[union-attr]
    assert weight.grad is not None
    assert (weight.grad[7] == 0).all()


@pytest.mark.parametrize("token", [-1, 23])
def test_a_target_that_no_rank_has_is_nan(token: int) -> None:
    hidden, weight = inputs(biased=False)
    whole = parallel_token_logprob(hidden, LMHead(weight), targets=TARGETS, first_token=0)
    targets = TARGETS.clone()
    targets[3] = token
    found = parallel_token_logprob(hidden, LMHead(weight), targets=targets, first_token=0)
    for values, right in zip(found, whole, strict=True):
        assert values.isnan().nonzero().flatten().tolist() == [3]
        assert torch.equal(values[targets == TARGETS], right[targets == TARGETS])


def test_no_rows_give_nothing() -> None:
    hidden, weight, bias = inputs()
    logprob, entropy = parallel_token_logprob(hidden[:0], LMHead(weight, bias), targets=TARGETS[:0], first_token=0)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,)
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden": torch.ones(31, 5)}, r"\(31, 5\)"),
        ({"targets": TARGETS[:3]}, r"\(3,\)"),
        ({"first_token": -1}, "first_token=-1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], told: str) -> None:
    hidden, weight, _ = inputs()
    given = {"hidden": hidden, "head": LMHead(weight), "targets": TARGETS, "first_token": 0} | changes
    with pytest.raises(ValueError, match=told):
        parallel_token_logprob(given.pop("hidden"), given.pop("head"), **given)
