r"""AdamW for weights that torch's own would round away or leave no room for.

Both classes compute, in float32,

.. math:: w \leftarrow (1 - \eta \lambda) w - \eta \hat m / (\sqrt{\hat v} + \epsilon)

and differ in where the float32 numbers are. A bfloat16 weight has 8 bits of mantissa: an update below 1/512 of it, and at the
learning rates of RL most are, vanishes when it is rounded to the nearest. :class:`StochasticAdamW` rounds up or down with
probabilities that keep the mean, and needs 12 bytes a weight (weight and gradient in bfloat16, moments in float32) where
float32 needs 16. :class:`OffloadedAdamW` keeps moments and a float32 copy of the weights in host memory, where the update is
made: 4 bytes a weight are left on the device with bfloat16 weights, 8 with float32 ones.

Source: Loshchilov and Hutter 2019 (arXiv:1711.05101); stochastic rounding: Zamirai et al. 2020 (arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW over bfloat16 weights, with float32 moments and stochastic rounding.

    The draws follow from seed, step and position of the weight alone, so a resumed run rounds as the straight one.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of both moments.
        eps: floor of the denominator.
        seed: decides the rounding.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, seed: int) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the weights, one after the other: a float32 copy of more than one never lives."""
        del closure
        number = 0
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group, number)
                number += 1

    def _update(self, weight: torch.Tensor, group: Mapping[str, Any], number: int) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
        state["step"] += 1
        (beta1, beta2), step, gradient = group["betas"], state["step"], weight.grad.float()  # type: ignore[union-attr]
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        value = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
        [draw] = np.random.SeedSequence((self._seed, step, number)).generate_state(1, np.uint64)
        generator = torch.Generator(weight.device).manual_seed(int(draw >> 1))
        weight.copy_(round_stochastically(value, generator))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a saved state; torch's own would cast float32 moments to the weights' type."""
        super().load_state_dict(dict(state_dict))
        saved = state_dict["state"]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, state in saved.items():
            weight = weights[number]
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[weight][name] = state[name].to(weight.device, torch.float32, copy=True)


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Float32 to bfloat16: to one of both neighbours, so that the mean is the value; exact ones stay, whatever is drawn.

    Adds 16 random bits to those that bfloat16 cuts off. Infinities stay; a NaN stays one.
    """
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.view(torch.int32).add(noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), bits, values).to(torch.bfloat16)


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW in host memory: moments and a float32 copy of the weights live there, and the update is made there.

    Gradients come over, weights go back. In float32 it gives bit for bit what torch's fused AdamW gives on a CPU.

    Args:
        params: parameters or groups of them, on any device.
        lr: learning rate.
        betas: decay of both moments.
        eps: floor of the denominator.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        groups = [group | {"params": [_master(weight) for weight in group["params"]]} for group in self.param_groups]
        self._masters = torch.optim.AdamW(groups, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Fetches gradients, updates the masters, and writes the weights."""
        del closure
        for own, host in zip(self.param_groups, self._masters.param_groups, strict=True):
            host.update({name: value for name, value in own.items() if name != "params"})
            for weight, master in zip(own["params"], host["params"], strict=True):
                if weight.grad is None:
                    master.grad = None
                elif master.grad is None:
                    master.grad = _pinned(weight.grad.to("cpu", torch.float32, copy=True), weight.device)
                else:
                    master.grad.copy_(weight.grad, non_blocking=True)
        if any(weight.is_cuda for group in self.param_groups for weight in group["params"]):
            torch.cuda.synchronize()
        self._masters.step()
        for own, host in zip(self.param_groups, self._masters.param_groups, strict=True):
            for weight, master in zip(own["params"], host["params"], strict=True):
                weight.copy_(master, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments."""
        masters = [master.detach() for group in self._masters.param_groups for master in group["params"]]
        return {"masters": masters, "optimizer": self._masters.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over masters and moments; the weights are those of the model's own file, which are the masters' rounded."""
        self._masters.load_state_dict(state_dict["optimizer"])
        masters = [master for group in self._masters.param_groups for master in group["params"]]
        for master, saved in zip(masters, state_dict["masters"], strict=True):
            master.copy_(saved)


def _master(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(_pinned(weight.detach().to("cpu", torch.float32, copy=True), weight.device))


def _pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory that the GPU can reach while the host goes on."""
    return host.pin_memory() if device.type == "cuda" else host
