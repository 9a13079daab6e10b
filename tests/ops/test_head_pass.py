from __future__ import annotations

import math

import pytest
import torch

from grpo_fast.ops.head_pass import Block, RowGradient, row_scales, row_statistics


def block_of(z: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor) -> Block:
    """What an implementation makes of logits [C, V], straight from the definition."""
    shifted = z - reference[:, None]
    exp = shifted.exp().scatter(1, targets[:, None], 0.0)
    return Block(
        slice(0, len(z)),
        exp,
        reference,
        z.gather(1, targets[:, None])[:, 0],
        exp.sum(1),
        (exp * shifted).sum(1),
    )


def rows(margins: list[float], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose target stands ``margin`` nats over every other."""
    z = torch.linspace(0, 0.5, 7, dtype=dtype).repeat(len(margins), 1)
    z[:, 3] = 0.5 + torch.tensor(margins, dtype=dtype)
    return z, torch.full((len(margins),), 3)


@pytest.mark.parametrize("reference", ["target", "largest", "far"])
def test_statistics_do_not_depend_on_the_reference(reference: str) -> None:
    z, targets = rows([0.0, 3.0, -2.0, -30.0])
    ref = {"target": z[:, 3], "largest": z.amax(1), "far": z.amax(1) + 15}[reference]
    found = row_statistics(block_of(z, targets, ref))
    log_p = z.log_softmax(1)
    torch.testing.assert_close(found.logprobs, log_p[:, 3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 4.0, 15.0])
def test_a_peak_serves_the_entropy_of_an_unlikely_target(gap: float) -> None:
    z, targets = rows([-gap], torch.float32)
    exact, _ = rows([-gap])
    log_p = exact.log_softmax(1)
    wanted = -(log_p.exp() * log_p).sum(1)
    peak = z.amax(1)
    block = block_of(z, targets, z[:, 3])
    against_peak = block._replace(weighted=(block.exp * (z - peak[:, None])).sum(1), peak=peak)
    found = row_statistics(against_peak)
    assert (found.entropy.double() - wanted).abs() < 3e-7
    assert torch.equal(found.logprobs, row_statistics(block).logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_tokens_keep_their_tail(dtype: torch.dtype) -> None:
    margins = [10.0, 17.0, 25.0, 40.0, 80.0]
    z, targets = rows(margins, dtype)
    block = block_of(z, targets, z[:, 3])
    found = row_statistics(block)
    others = torch.linspace(0, 0.5, 7, dtype=torch.float64)[torch.arange(7) != 3].exp().sum().log().item()
    for row, margin in enumerate(margins):
        odds = math.exp(others - 0.5 - margin)
        assert found.logprobs[row].item() == pytest.approx(-math.log1p(odds), rel=1e-5)
        one = RowGradient(torch.ones(len(z), dtype=dtype))
        scales = row_scales(block, found, one, slope=1.0, bound=None)
        assert scales.target[row].item() == pytest.approx(odds / (1 + odds), rel=1e-5)
        assert (scales.patch / -scales.others.reciprocal())[row].item() == pytest.approx(scales.target[row].item(), rel=1e-5)


@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_scales_make_the_gradient_of_the_logits(entropy: bool, softcap: float | None) -> None:
    z, targets = rows([1.0, -1.5, 4.0])
    u = (z if softcap is None else softcap * torch.atanh(z / softcap)).requires_grad_()
    capped = u if softcap is None else softcap * torch.tanh(u / softcap)
    g, c = torch.tensor([0.3, -1.1, 0.0], dtype=z.dtype), torch.tensor([0.2, 0.0, -0.7], dtype=z.dtype)
    log_p = capped.log_softmax(1)
    value = (g * log_p[:, 3]).sum()
    if entropy:
        value = value - (c[:, None] * log_p.exp() * log_p).sum()
    expected = torch.autograd.grad(value, u)[0]
    block = block_of(z, targets, z.amax(1))
    found = row_statistics(block)
    gradient = RowGradient(g, c if entropy else None)
    scales = row_scales(block, found, gradient, slope=1.0, bound=softcap)
    inner = block.exp.clone()
    if entropy:
        log = (block.exp.clamp(min=1e-300).log() - found.log_total[:, None]) + found.entropy[:, None]
        inner = inner * (g[:, None] + c[:, None] * log)
    if softcap is not None:
        inner = inner * (1 - (z / softcap).square())
    dz = -scales.others[:, None] * inner.scatter(1, targets[:, None], scales.patch[:, None])
    torch.testing.assert_close(dz, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(scales.target, expected[:, 3], rtol=1e-11, atol=1e-13)
    if softcap is None:
        torch.testing.assert_close(dz.sum(1), torch.zeros(3, dtype=z.dtype), rtol=0, atol=1e-14)


def test_live_rows() -> None:
    gradient = RowGradient(torch.tensor([0.0, 1.0, math.nan, 0.0]))
    assert gradient.live().tolist() == [False, True, True, False]
    both = RowGradient(gradient.logprobs, torch.tensor([0.1, 0.0, 0.0, 0.0]))
    assert both.live().tolist() == [True, True, True, False]
    assert both.rows(1, 3).entropy.tolist() == [0.0, 0.0]
    assert gradient.rows(1, 3).entropy is None
