from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.optim import (
    build_optimizer,
    check_optimizer,
    load_state,
    set_learning_rate,
)


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model, Config(learning_rate=0.1, weight_decay=0.5))
    optimizer.step()
    values = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert values == {"0.weight": [pytest.approx(0.95)], "0.bias": [1.0], "1.weight": [1.0], "1.bias": [1.0]}


def test_frozen_weights_are_left_out_and_settings_arrive() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    model[0].weight.requires_grad_(False)
    config = Config(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [parameter for group in optimizer.param_groups for parameter in group["params"]] == [model[1].weight]
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["lr"] == 0.1


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(torch.nn.Linear(4, 4), Config())
    assert len(optimizer.param_groups) == 2
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


OTHERS: dict[str, dict[str, Any]] = {
    "8 bits": {"optim": "adamw_8bit"},
    "offloaded": {"offload_optimizer": True},
    "bfloat16, rounded at random": {"weights_dtype": "bfloat16", "dtype": "bfloat16"},
    "bfloat16, offloaded": {"weights_dtype": "bfloat16", "dtype": "bfloat16", "offload_optimizer": True},
}


def needs_what_it_takes(settings: dict[str, Any]) -> None:
    if "optim" in settings and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_resumed_with_any_optimiser_is_the_straight_one(
    kind: str,
    wide_config: Callable[..., Config],
    letters: Task,
    share_of_vowels: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    needs_what_it_takes(OTHERS[kind])
    given: dict[str, Any] = {"task": letters, "reward_funcs": [share_of_vowels]}

    def config(name: str) -> Config:
        return wide_config(output_dir=tmp_path / name, weight_decay=0.1, **OTHERS[kind])

    with GRPOTrainer(config("straight"), **given) as trainer:
        before = {name: value.clone() for name, value in trainer.policy.model.named_parameters()}
        trainer.train()
        straight = dict(trainer.policy.model.named_parameters())
        assert not any(torch.equal(straight[name], before[name]) for name in before if "norm" not in name)
        assert {str(value.dtype) for value in straight.values()} == {f"torch.{trainer.config.weights_dtype}"}
    with GRPOTrainer(config("broken"), **given) as trainer:
        for step in trainer.steps():
            if step.step == 4:
                break
    with GRPOTrainer.resume(tmp_path / "broken", **given) as trainer:
        trainer.train()
        for name, value in trainer.policy.model.named_parameters():
            assert torch.equal(value, straight[name]), name
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("straight", "broken")
    ]
    assert [[row[name] for name in ("reward", "loss", "grad_norm")] for row in rows[0]] == [
        [row[name] for name in ("reward", "loss", "grad_norm")] for row in rows[1]
    ]


def test_moments_of_eight_bits_are_a_quarter(wide_config: Callable[..., Config]) -> None:
    needs_what_it_takes({"optim": "adamw_8bit"})
    model = torch.nn.Linear(64, 128, bias=False)
    optimizer = build_optimizer(model, Config(optim="adamw_8bit"))
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    moments = [value for value in optimizer.state[model.weight].values() if torch.is_tensor(value) and value.numel() == 8192]
    assert [value.dtype for value in moments] == [torch.uint8] * 2


def after_a_step(optim: str, device: torch.device) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = torch.nn.Linear(512, 256, bias=False, device=device)
    optimizer = build_optimizer(model, Config.parse({"optim": optim, "learning_rate": 0.1}))
    model.weight.grad = torch.randn(256, 512, generator=torch.Generator().manual_seed(2)).to(device)
    optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
def test_paged_moments_are_loaded_into_paged_memory(
    optim: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_what_it_takes({"optim": optim})
    straight, first = after_a_step(optim, device)
    moments = [first.state[straight.weight][name] for name in ("state1", "state2")]
    for moment in moments if device.type == "cpu" else ():
        moment.is_paged = True  # as those in paged memory are; a file keeps it
    torch.save(first.state_dict(), tmp_path / "saved.pt")
    for moment in moments if device.type == "cpu" else ():
        del moment.is_paged
    model, optimizer = after_a_step(optim, device)
    buffers: list[torch.Tensor] = []
    paged: Any = optimizer
    make = paged.get_state_buffer
    monkeypatch.setattr(paged, "get_state_buffer", lambda *a, **k: buffers.append(make(*a, **k)) or buffers[-1])
    load_state(optimizer, torch.load(tmp_path / "saved.pt", map_location="cpu", weights_only=True))

    state, true = optimizer.state[model.weight], first.state[straight.weight]
    assert [state["state1"] is buffers[0], state["state2"] is buffers[1]] == [True, True]
    assert state.keys() == true.keys()
    assert all(getattr(buffer, "is_paged", False) == (device.type == "cuda") for buffer in buffers)
    for name, value in true.items():
        assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name
    for other, steps in ((straight, first), (model, optimizer)):
        other.weight.grad = torch.ones_like(other.weight)
        steps.step()
    assert torch.equal(model.weight, straight.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_an_optimiser_lacks_is_told_before_anything_is_loaded(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_optimizer(Config())
    monkeypatch.setattr("grpo_fast.train.quantised.find_spec", lambda name: object())
    told = r"optim='paged_adamw_8bit' pages between GPU and host, but this run is on a CPU; use 'adamw_8bit'"
    with pytest.raises(ConfigError, match=told):
        GRPOTrainer(tiny_config(model="nowhere", optim="paged_adamw_8bit"))
    with pytest.raises(ConfigError, match=r"use 'adamw_torch_fused'"):
        check_optimizer(Config(optim="paged_adamw_32bit"))
    with pytest.raises(ConfigError, match=r"weights_dtype='bfloat16' on this CPU.* set dtype='bfloat16' too"):
        GRPOTrainer(tiny_config(weights_dtype="bfloat16"))
    monkeypatch.setattr("grpo_fast.train.quantised.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optim='adamw_8bit' needs bitsandbytes"):
        GRPOTrainer(tiny_config(model="nowhere", optim="adamw_8bit"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8 bits", "bfloat16, rounded at random"])
def test_the_embedded_model_learns_all_the_same(kind: str, short_embedded_run: Callable[..., float]) -> None:
    needs_what_it_takes(OTHERS[kind])
    assert short_embedded_run(**OTHERS[kind], learning_rate=6e-4) >= 0.95
