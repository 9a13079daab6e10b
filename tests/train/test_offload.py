"""Activations in the host's memory: the same bits come back, on time, and nothing lies on the device meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.offload import HostActivations
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


class Layers(torch.nn.Module):
    """A stack in which every layer is checkpointed, and which notes its layers' inputs."""

    def __init__(self, device: torch.device, *, count: int = 5, width: int = 128) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(count)).to(device)
        self.inputs: list[weakref.ref[torch.Tensor]] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * 2.0
        for layer in self.layers:
            self.inputs.append(weakref.ref(hidden))
            hidden = checkpoint(lambda x, layer=layer: layer(x).tanh(), hidden, use_reentrant=False)
        return hidden


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_gradients_are_the_same_bits_and_no_input_stays(device: torch.device) -> None:
    torch.manual_seed(0)
    model, kept = Layers(device), HostActivations(device)
    hidden = torch.randn(256, 128, device=device, requires_grad=True)

    def gradients(*, offloaded: bool) -> list[torch.Tensor]:
        model.inputs.clear()
        if offloaded:
            with kept.keep():
                loss = model(hidden).square().sum()
        else:
            loss = model(hidden).square().sum()
        gc.collect()
        alive = [reference() is not None for reference in model.inputs]
        assert not any(alive) if offloaded else all(alive)
        return list(torch.autograd.grad(loss, [hidden, *model.parameters()]))

    for found, expected in zip(gradients(offloaded=True), gradients(offloaded=False), strict=True):
        assert torch.equal(found, expected)
    assert kept._last is None, "what waited is let go"


@pytest.mark.gpu
def test_of_many_layers_the_inputs_of_few_lie_on_a_gpu_that_is_behind_the_host() -> None:
    device = torch.device("cuda")
    model, kept = Layers(device, count=24, width=1024), HostActivations(device)
    hidden = torch.randn(2**14, 1024, device=device, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with kept.keep():
        loss = model(hidden).sum()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 12 * hidden.nbytes


def test_each_is_fetched_while_the_one_after_it_is_in_use() -> None:
    kept = HostActivations(torch.device("cpu"))
    with kept.keep():
        puts = [kept._put(torch.full((256, 128), float(number)).requires_grad_() * 1.0) for number in range(3)]
    assert all(not isinstance(put, torch.Tensor) for put in puts)
    first, second, third = puts
    assert kept._get(third)[0, 0] == 2.0
    assert second.back is not None
    assert first.back is None
    assert kept._get(second)[0, 0] == 1.0
    assert second.back is None, "given away, and not held"
    assert kept._get(second)[0, 0] == 1.0, "as often as it is asked for"


def test_leaves_and_small_tensors_stay() -> None:
    kept = HostActivations(torch.device("cpu"))
    weight, small = torch.randn(256, 128, requires_grad=True), torch.randn(2, 2, requires_grad=True) * 1.0
    with kept.keep():
        assert kept._put(weight) is weight
        assert kept._put(small) is small


def gradient(policy: Policy) -> torch.Tensor:
    tokens = tuple(4 + number % 12 for number in range(400))
    sequence = TrainingSequence(tokens[:5], tokens[5:], (-1.0,) * 395, 1.0, in_loss=True)
    batch = build_batch([sequence], [1.0], policy.device, layout=policy.layout)
    policy.scored_hidden_states(batch).square().sum().backward()
    return torch.cat([weight.grad.flatten() for weight in policy.model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_policy_has_the_gradients_of_full_checkpointing(
    device: torch.device, adapters: bool, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(gradient_checkpointing=True, device=device.type, dtype="float32", use_peft=adapters)
    source = PolicySource(config)
    full, offloaded = source.load(), source.load()
    offloaded._waiting = HostActivations(device)
    put: list[Any] = []
    keep = offloaded._waiting._put
    monkeypatch.setattr(offloaded._waiting, "_put", lambda tensor: put.append(keep(tensor)) or put[-1])
    monkeypatch.setattr("grpo_fast.train.offload._LEAST_BYTES", 2**10)
    assert torch.equal(gradient(full), gradient(offloaded))
    assert sum(not isinstance(kept, torch.Tensor) for kept in put) >= 2, "a layer's input each"


def test_on_a_cpu_it_is_refused_before_anything_is_read(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(gradient_checkpointing=True, gradient_checkpointing_mode="offload", device="cpu")
    with pytest.raises(ConfigError, match="'offload' on a CPU, where activations are in host memory already; use 'full'"):
        PolicySource(config)
