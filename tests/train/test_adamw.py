from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from grpo_fast.train.adamw import OffloadedAdamW, StochasticAdamW, round_stochastically

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2**16, shape, dtype=torch.int32, generator=generator())


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, generator=generator(n)).to(dtype)) for n, shape in enumerate([(8, 16), (5,)])]


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator(100 * step + number)).to(parameter.dtype)


def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:1], "weight_decay": 0.5}, {"params": parameters[1:], "weight_decay": 0.0}]


def test_rounding_takes_one_of_both_neighbours_and_is_right_in_the_mean() -> None:
    values = torch.tensor([1.0 + 1 / 512, -3.0 - 1 / 1024, 1e-20, 7.3e10])
    drawn = round_stochastically(values.expand(20_000, 4).contiguous(), noise(20_000, 4)).double()
    for column, value in zip(drawn.T, values.tolist(), strict=True):
        below, above = column.min().item(), column.max().item()
        assert below < value < above
        assert set(column.tolist()) == {below, above}
        assert abs(column.mean().item() - value) < 4 * (above - below) / 2 / 20_000**0.5


def test_what_bfloat16_holds_stays_and_what_is_not_finite_too() -> None:
    exact = torch.randn(1000, generator=generator()).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), noise(1000)), exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    found = round_stochastically(odd, noise(5))
    assert torch.equal(found.float().nan_to_num(7.0), odd.nan_to_num(7.0))
    assert found[2].isnan()


def test_an_update_is_adamws_but_for_the_rounding() -> None:
    """Weights go back to the float64 ones before each step, so that rounding does not add up."""
    found = weights(torch.bfloat16)
    truth = [torch.nn.Parameter(value.detach().double()) for value in found]
    ours = StochasticAdamW(groups(found), **SETTINGS, seed=3)
    theirs = torch.optim.AdamW(groups(truth), **SETTINGS)
    for step in range(1, 6):
        give_gradients(found, step)
        for parameter, other in zip(found, truth, strict=True):
            other.data.copy_(parameter.data)
            other.grad = parameter.grad.double()
        ours.step()
        theirs.step()
        for parameter, other in zip(found, truth, strict=True):
            gap = torch.finfo(torch.bfloat16).eps * other.abs()
            assert ((parameter.double() - other).abs() <= gap + 1e-12).all()
            for name in ("exp_avg", "exp_avg_sq"):
                moment = ours.state[parameter][name]
                assert moment.dtype == torch.float32
                torch.testing.assert_close(moment.double(), theirs.state[other][name], rtol=1e-6, atol=1e-7)


def test_updates_too_small_for_bfloat16_count_in_the_mean() -> None:
    """To the nearest, a weight of 1 never moves by 1e-4 at a time; the guard says so."""
    step, num_steps = 1e-4, 300
    nearest = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    random = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizers = [
        torch.optim.AdamW([nearest], lr=step, weight_decay=0.0),
        StochasticAdamW([random], lr=step, betas=(0.9, 0.999), eps=1e-8, seed=0),
    ]
    for _ in range(num_steps):
        for parameter, optimizer in zip((nearest, random), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert (nearest == 1).all()
    assert random.float().mean().item() == pytest.approx(1 - step * num_steps, abs=5e-4)


def test_the_draws_follow_from_seed_step_and_place() -> None:
    def after(seed: int) -> torch.Tensor:
        found = weights(torch.bfloat16)
        optimizer = StochasticAdamW(groups(found), **SETTINGS, seed=seed)
        give_gradients(found, 1)
        torch.rand(int(torch.randint(9, ())) + 1)  # the global generator is another one
        optimizer.step()
        return found[0].detach()

    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_is_torchs_own_over_float32_copies(dtype: torch.dtype) -> None:
    found = weights(dtype)
    masters = [torch.nn.Parameter(value.detach().float()) for value in found]
    ours, theirs = OffloadedAdamW(groups(found), **SETTINGS), torch.optim.AdamW(groups(masters), **SETTINGS, fused=True)
    for step in range(1, 8):
        give_gradients(found, step)
        for parameter, master in zip(found, masters, strict=True):
            master.grad = parameter.grad.float()
        if step == 5:
            found[1].grad = masters[1].grad = None
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * step
            optimizer.step()
            optimizer.zero_grad()
        for parameter, master in zip(found, masters, strict=True):
            assert torch.equal(parameter, master.to(dtype))


@pytest.mark.parametrize("kind", ["stochastic", "offloaded"])
def test_a_saved_state_goes_on_bit_by_bit(kind: str) -> None:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "offloaded":
            return OffloadedAdamW(groups(parameters), **SETTINGS)
        return StochasticAdamW(groups(parameters), **SETTINGS, seed=3)

    straight, other = weights(torch.bfloat16), weights(torch.bfloat16)
    first, second = make(straight), make(other)
    for step in range(1, 6):
        if step == 4:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            for parameter, value in zip(other, straight, strict=True):
                parameter.data.copy_(value)
        for parameters, optimizer in ((straight, first), (other, second)) if step >= 4 else ((straight, first),):
            give_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(left, right) for left, right in zip(straight, other, strict=True))


def test_a_weight_without_gradient_is_left_alone() -> None:
    for make in (lambda p: StochasticAdamW(p, **SETTINGS, seed=0), lambda p: OffloadedAdamW(p, **SETTINGS)):
        found = weights(torch.bfloat16)
        before = found[1].detach().clone()
        optimizer = make(found)
        give_gradients(found, 1)
        found[1].grad = None
        optimizer.step()
        assert torch.equal(found[1], before)
