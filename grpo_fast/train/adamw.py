r"""AdamW for bfloat16 weights, whose small updates torch's own would round away, and for state in host memory.

Both classes compute, in float32,

.. math:: w \leftarrow (1 - \eta \lambda) w - \eta \hat m / (\sqrt{\hat v} + \epsilon)

and differ in where the float32 numbers are. A bfloat16 weight has 8 bits of mantissa: an update below 1/512 of it, and at the
learning rates of RL most are, vanishes when it is rounded to the nearest. :class:`StochasticAdamW` rounds up or down with
probabilities that keep the mean, and needs 12 bytes a weight (weight and gradient in bfloat16, moments in float32) where
float32 needs 16. :class:`OffloadedAdamW` keeps moments and a float32 copy of the weights in host memory, where the update is
made: 4 bytes a weight are left on the device with bfloat16 weights, 8 with float32 ones.

Of a weight that is a shard, each rank updates its own part: state is sharded as the weight is, and the rounding is that of the
whole weight, whatever the number of ranks.

Source: Loshchilov and Hutter 2019 (arXiv:1711.05101); stochastic rounding: Zamirai et al. 2020 (arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from grpo_fast.train.host_memory import HostBlocks, by_itself

_BLOCK = 2**20
"""Numbers of a weight that are rounded by one generator's draws."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW over bfloat16 weights, with float32 moments and stochastic rounding.

    The draws follow from seed, step and position of the number alone, so a resumed run rounds as the straight one.

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
            state |= {name: torch.zeros_like(weight, dtype=torch.float32) for name in _MOMENTS}
        state["step"] += 1
        (beta1, beta2), step, gradient = group["betas"], state["step"], _own(weight.grad).float()
        first = _own(state["exp_avg"]).lerp_(gradient, 1 - beta1)
        second = _own(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        own = _own(weight)
        value = own.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
        place = _place(weight) if own.numel() else 0
        for start in range(place - place % _BLOCK, place + own.numel(), _BLOCK):
            noise = self._noise(min(_BLOCK, weight.numel() - start), own.device, (step, number, start // _BLOCK))
            low, high = max(start - place, 0), min(start - place + _BLOCK, own.numel())
            drawn = noise[low + place - start : high + place - start]
            own.view(-1)[low:high] = round_stochastically(value.view(-1)[low:high], drawn)

    def _noise(self, count: int, device: torch.device, key: tuple[int, ...]) -> torch.Tensor:
        [draw] = np.random.SeedSequence((self._seed, *key)).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(draw) >> 1)
        return torch.randint(0, 2**16, (count,), dtype=torch.int32, device=device, generator=generator)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a saved state; torch's own would cast float32 moments to the weights' type."""
        super().load_state_dict(dict(state_dict))
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for weight, state in zip(weights, _saved_states(state_dict), strict=True):
            for name in _MOMENTS if state else ():
                self.state[weight][name] = state[name].to(weight.device, torch.float32, copy=True)


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Float32 to bfloat16: to one of both neighbours, so that the mean is the value; exact ones stay, whatever is drawn.

    Adds 16 random bits to those that bfloat16 cuts off. Infinities stay; a NaN stays one.

    Args:
        values: float32, of any shape.
        noise: int32 of the same shape, drawn evenly from 0 to 2^16 - 1.
    """
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
        self._memory = HostBlocks(pinned=self._on_gpu)
        groups = [
            group | {"params": [torch.nn.Parameter(self._hosted(weight)) for weight in group["params"]]}
            for group in self.param_groups
        ]
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
                    master.grad = self._hosted(weight.grad)
                else:
                    master.grad.copy_(_own(weight.grad), non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize()
        self._masters.step()
        for weight, master in self._pairs():
            _own(weight).copy_(master, non_blocking=True)
            if master in self._masters.state and not self.state[weight]:
                self._show(weight, master)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over masters and moments, and makes the weights of the masters; one that has none begins anew."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})  # it would cast to the weights' type
        for (weight, master), saved in zip(self._pairs(), _saved_states(state_dict), strict=True):
            self._masters.state.pop(master, None)
            master.copy_(_own(saved["master"] if saved else weight))
            _own(weight).copy_(master)
            if saved:
                moments = {name: _own(saved[name]).to("cpu", torch.float32, copy=True) for name in ("step", *_MOMENTS)}
                self._masters.state[master] = moments
                self._show(weight, master)

    @property
    def _on_gpu(self) -> bool:
        return any(weight.is_cuda for group in self.param_groups for weight in group["params"])

    def _hosted(self, tensor: torch.Tensor) -> torch.Tensor:
        """A float32 copy in the host's memory."""
        own = _own(tensor.detach())
        return self._memory.empty(own.shape, torch.float32).copy_(own)

    def _pairs(self) -> list[tuple[torch.Tensor, torch.nn.Parameter]]:
        groups = zip(self.param_groups, self._masters.param_groups, strict=True)
        return [pair for own, host in groups for pair in zip(own["params"], host["params"], strict=True)]

    def _show(self, weight: torch.Tensor, master: torch.nn.Parameter) -> None:
        """Master and moments as this optimiser's own state, in the same memory: what checkpoints read."""
        state = self._masters.state[master]
        shown = {"master": by_itself(master.detach())} | {name: state[name] for name in _MOMENTS}
        self.state[weight] = {"step": state["step"]} | {name: _as_part_of(weight, value) for name, value in shown.items()}


def _saved_states(state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The saved state of each weight, in their order; its key is a number, or a name after resharding."""
    return [state_dict["state"].get(place, {}) for group in state_dict["param_groups"] for place in group["params"]]


def _own(tensor: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_part_of(weight: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A rank's own numbers as a shard, where the weight is one."""
    if not isinstance(weight, DTensor):
        return own
    return DTensor.from_local(
        own, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _place(weight: torch.Tensor) -> int:
    """Offset of this rank's numbers in the whole weight, read row after row."""
    if not isinstance(weight, DTensor):
        return 0
    _, first = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return first[0] * (weight.numel() // weight.shape[0])
