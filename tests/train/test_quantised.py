from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_fast.compute import ModelShape
from grpo_fast.config import Config, ConfigError
from grpo_fast.recipes import recipe
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.export import export_merged
from grpo_fast.train.policy import Policy, PolicySource, count_parameters
from grpo_fast.train.quantised import dequantised, refuse_ragged_blocks

FOUR_BIT: dict[str, Any] = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True}
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The numbers of the paper's appendix E."""

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def load(config: Config) -> Policy:
    return PolicySource(config).load()


def raw(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.model.named_parameters() if ".lora_" not in name}


@needs_bitsandbytes
@pytest.mark.parametrize("nested", [False, True])
def test_the_base_is_in_four_bits_but_for_head_embedding_and_norms(nested: bool, wide_config: Callable[..., Config]) -> None:
    """Against the paper's formula: each block of 64 is its largest magnitude times the nearest of sixteen numbers."""
    config = wide_config(**FOUR_BIT | {"use_bnb_nested_quant": nested})
    policy, plain = load(config), load(wide_config())
    layers = dict(dequantised(policy.model))
    assert len(layers) == 14
    assert {name for name, value in raw(policy).items() if value.dtype == torch.uint8} == {f"{name}.weight" for name in layers}
    assert policy.head(1.0).weight.dtype == torch.float32
    numbers = torch.tensor(NF4)
    for name, found in layers.items():
        blocks = plain.model.get_parameter(f"{name.removesuffix('.base_layer')}.weight").detach().view(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = numbers[(blocks[..., None] / scales[..., None] - numbers).abs().argmin(-1)] * scales
        off = (found.view(-1, 64) - nearest).abs() / scales
        assert off.max() < (0.05 if nested else 1e-6)
    shape, whole = ModelShape.from_model(policy.model), ModelShape.from_model(plain.model)
    assert (shape.body_params, shape.head_params) == (whole.body_params, whole.head_params)
    assert count_parameters(policy.model) == count_parameters(plain.model)


@needs_bitsandbytes
def test_a_pass_without_gradient_computes_the_same_and_leaves_the_weights(wide_config: Callable[..., Config]) -> None:
    policy = load(wide_config(**FOUR_BIT))
    before, ids = raw(policy), torch.tensor([[4, 5, 6, 7]])
    expected = policy.model(ids).logits
    with torch.no_grad():
        policy.model.eval()
        assert torch.equal(policy.model(ids).logits, expected)
    after = raw(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_bitsandbytes
def test_a_resumed_run_over_four_bits_is_the_straight_one(
    wide_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"task": letters, "reward_funcs": [share_of_vowels]}
    settings = FOUR_BIT | {"learning_rate": 1e-2, "beta": 0.1}
    with GRPOTrainer(wide_config(output_dir=tmp_path / "straight", **settings), **given) as trainer:
        base = raw(trainer.policy)
        trainer.train()
        assert all(torch.equal(value, base[name]) for name, value in raw(trainer.policy).items())
    with GRPOTrainer(wide_config(output_dir=tmp_path / "broken", **settings), **given) as trainer:
        for step in trainer.steps():
            if step.step == 4:
                break
    with GRPOTrainer.resume(tmp_path / "broken", **given) as trainer:
        trainer.train()
    straight, broken = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("straight", "broken")
    )
    same = ("reward", "loss", "kl", "grad_norm", "entropy", "sampling/kl", "flops")
    assert [[row[name] for name in same] for row in broken] == [[row[name] for name in same] for row in straight]
    assert all(row["sampling/kl"] < 1e-10 for row in straight), "what was sampled from is what is trained"
    assert straight[-1]["kl"] > 1e-4


@needs_bitsandbytes
def test_the_exported_model_is_what_was_trained_over_four_bits(
    wide_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]], tmp_path: Path
) -> None:
    config, ids = wide_config(**FOUR_BIT, learning_rate=1e-2), torch.tensor([[4, 5, 6, 7]])
    with GRPOTrainer(config, task=letters, reward_funcs=[share_of_vowels]) as trainer, torch.no_grad():
        trainer.train()
        expected = trainer.policy.model(ids).logits
    export_merged(config.output_dir / "checkpoint-6", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)


@needs_bitsandbytes
def test_rows_that_cut_a_block_are_refused_on_a_cpu(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(
        ConfigError, match=r"q_proj.* has 32 inputs, and bitsandbytes computes only multiples of 64 right there"
    ):
        PolicySource(tiny_config(**FOUR_BIT))
    refuse_ragged_blocks(PolicySource(tiny_config()).outline(), torch.device("cuda"))


def test_without_bitsandbytes_the_cure_is_told(wide_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.train.quantised.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes and accelerate; `pip install 'grpo-fast\[quant\]'`"):
        PolicySource(wide_config(**FOUR_BIT))


@needs_bitsandbytes
@pytest.mark.slow
def test_the_embedded_model_learns_over_four_bits(tmp_path: Path) -> None:
    config = recipe(
        "embedded",
        output_dir=tmp_path / "run",
        **FOUR_BIT,
        learning_rate=1e-3,
        max_steps=60,
        eval_steps=60,
        baseline_probe=0,
        forecast="off",
        reward_workers=0,
        sinks=(),
        report=False,
    )
    with GRPOTrainer(config) as trainer:
        for _ in trainer.steps():
            pass
        assert trainer.evaluate() >= 0.98
