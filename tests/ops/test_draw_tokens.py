from __future__ import annotations

import math

import pytest
import torch

from grpo_fast.ops import decoder_layer
from grpo_fast.ops.draw_tokens import draw_tokens, runs_on

pytestmark = pytest.mark.skipif(bool(decoder_layer.problem()), reason=decoder_layer.problem())


def case(num_rows: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(num_rows, size, generator=generator)
    return logits, torch.rand(num_rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (3, 15), (300, 60), (40, 4096), (9, 4097), (8, 49152), (2, 151_936)])
def test_tokens_and_logprobs_equal_float64(num_rows: int, size: int, temperature: float) -> None:
    logits, draws = case(num_rows, size)
    tokens, logprobs = draw_tokens(logits, draws, temperature)
    exact = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    upto = exact.exp().cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    below = upto - exact.exp().gather(-1, tokens[:, None])[:, 0]
    assert ((below <= draws + 1e-7) & (draws < upto + 1e-7)).all()


def test_every_token_comes_up_as_often_as_it_should() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -1.0, 2.0]]).repeat(10_000, 1)
    tokens, _ = draw_tokens(logits, torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1], 1.0)
    shares = torch.bincount(tokens, minlength=5) / 10_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=2e-4)
    assert shares[1] == 0


@pytest.mark.parametrize("size", [5, 5000])
def test_the_ends_of_the_draws_give_tokens_that_weigh_something(size: int) -> None:
    logits = torch.full((2, size), -math.inf)
    logits[:, [2, size - 2]] = torch.tensor([1.0, 3.0])
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [2, size - 2]


def test_no_number_of_threads_changes_a_row() -> None:
    logits, draws = case(7, 50_000)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(draw_tokens(logits, draws, 0.9))
    finally:
        torch.set_num_threads(threads)
    found.append(tuple(torch.cat(each) for each in zip(*(draw_tokens(*row, 0.9) for row in rows(logits, draws)), strict=True)))
    for other in found[1:]:
        assert all(torch.equal(each, first) for each, first in zip(other, found[0], strict=True))


def rows(logits: torch.Tensor, draws: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(logits.split(1), draws.split(1), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_no_logprob(value: float) -> None:
    logits, draws = case(3, 5000)
    expected = draw_tokens(logits, draws, 1.0)[1]
    logits[1, 4500] = value
    logprobs = draw_tokens(logits, draws, 1.0)[1]
    assert logprobs[1].isnan()
    assert torch.equal(logprobs[[0, 2]], expected[[0, 2]])


def test_what_it_does_not_take_is_known_and_named() -> None:
    logits, draws = case(3, 8)
    assert runs_on(logits)
    for other in (logits.double(), logits.bfloat16(), logits.t(), logits.to("meta"), logits[:0]):
        assert not runs_on(other)
    with pytest.raises(RuntimeError, match="logits must be float32 and contiguous"):
        draw_tokens(logits.t(), torch.rand(8).double(), 1.0)
    with pytest.raises(RuntimeError, match="draws must be float64"):
        draw_tokens(logits, draws.float(), 1.0)
    with pytest.raises(RuntimeError, match="a vector of 3"):
        draw_tokens(logits, draws[:2], 1.0)
    with pytest.raises(RuntimeError, match="temperature=0 must be above 0"):
        draw_tokens(logits, draws, 0.0)
    assert [each.shape for each in draw_tokens(logits[:0], draws[:0], 1.0)] == [(0,), (0,)]
