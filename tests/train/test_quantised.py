from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

from grpo_fast.compute import ModelShape
from grpo_fast.config import Config, ConfigError
from grpo_fast.recipes import recipe
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.export import export_merged
from grpo_fast.train.policy import Policy, count_parameters
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.quantised import dequantised, loading_arguments, refuse_ragged_blocks, require_bitsandbytes

FOUR_BIT: dict[str, Any] = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True}
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The numbers of the paper's appendix E."""

LLAMA_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

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
def test_experts_that_stay_as_they_are_are_told(
    wide_config: Callable[..., Config],
    sizes: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load(wide_config(**FOUR_BIT))
    assert not any(record.name.startswith("grpo_fast") for record in caplog.records)
    experts = {"hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes | experts)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(wide_config(model=str(tmp_path), **FOUR_BIT))
    assert "load_in_4bit: 0.1 million weights stay in float32, because bitsandbytes quantises only linear layers" in caplog.text


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
        ConfigError, match=r"q_proj.* has 32 inputs, but bitsandbytes computes only multiples of 64 correctly there"
    ):
        PolicySource(tiny_config(**FOUR_BIT))
    refuse_ragged_blocks(PolicySource(tiny_config()).outline(), torch.device("cuda"))


@needs_bitsandbytes
@pytest.mark.gpu
def test_on_a_gpu_it_computes_in_bfloat16_with_paged_moments(
    wide_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]]
) -> None:
    config = wide_config(**FOUR_BIT, optim="paged_adamw_8bit", device="cuda", gradient_checkpointing=True, learning_rate=1e-2)
    with GRPOTrainer(config, task=letters, reward_funcs=[share_of_vowels]) as trainer:
        steps = list(trainer.steps())
        types = {(".lora_" in name, value.dtype) for name, value in trainer.policy.model.named_parameters()}
    assert types == {(False, torch.uint8), (False, torch.bfloat16), (True, torch.float32)}
    assert all(step.metrics["sampling/kl"] < 5e-3 for step in steps)


@needs_bitsandbytes
def test_it_is_loaded_onto_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, place in ((torch.device("cuda"), torch.device("cuda", 3)), (torch.device("cpu"), torch.device("cpu"))):
        found = loading_arguments(Config.parse(FOUR_BIT), dtype=torch.float32, device=device)
        assert found["device_map"] == {"": place}


def test_only_what_needs_bitsandbytes_hears_of_its_kernels() -> None:
    code = "from grpo_fast.train import GRPOTrainer; import bitsandbytes"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert ran.stderr == ""
    require_bitsandbytes("optim='adamw_8bit'")
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_without_bitsandbytes_the_cure_is_told(wide_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.train.quantised.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes and accelerate; `pip install 'grpo-fast\[quant\]'`"):
        PolicySource(wide_config(**FOUR_BIT))


@needs_bitsandbytes
@pytest.mark.slow
def test_the_embedded_model_learns_over_four_bits(short_embedded_run: Callable[..., float]) -> None:
    assert short_embedded_run(**FOUR_BIT, learning_rate=2e-3) >= 0.95


MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "llama-3.2-3b": (
        LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rope_parameters=LLAMA_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        3_212_749_824,
    ),
    "llama-3.1-8b": (
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rope_parameters=LLAMA_ROPE | {"factor": 8.0},
            tie_word_embeddings=False,
        ),
        8_030_261_248,
    ),
    "qwen2.5-3b": (
        Qwen2Config(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        ),
        3_085_938_688,
    ),
    "qwen2.5-7b": (
        Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
        ),
        7_615_616_512,
    ),
}
"""The architecture behind each recipe, as its publisher configured it, and its number of parameters."""


def save(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, directory: Path, *, weights: bool) -> None:
    config.architectures = ["LlamaForCausalLM" if isinstance(config, LlamaConfig) else "Qwen2ForCausalLM"]
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if weights:
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)


@pytest.mark.parametrize("name", MODELS)
@needs_bitsandbytes
def test_a_recipes_adapters_fit_the_whole_model(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """On sizes alone: 1 to 2 % of the weights, in every layer."""
    config, size = MODELS[name]
    save(copy.deepcopy(config), tokenizer, tmp_path, weights=False)
    model = PolicySource(recipe(name, model=str(tmp_path))).outline()
    assert count_parameters(model) == size
    shape = ModelShape.from_model(model)
    assert 0.01 < shape.lora_params / size < 0.025
    assert sum("lora_A" in parameter for parameter, _ in model.named_parameters()) == 7 * config.num_hidden_layers


@pytest.mark.parametrize("name", MODELS)
@needs_bitsandbytes
def test_a_recipe_trains_its_architecture(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    letters: Task,
    share_of_vowels: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    """Two steps of all that it sets, on two narrow layers with as many query heads a key as the real ones."""
    whole, keys = MODELS[name][0], 2
    queries = keys * whole.num_attention_heads // whole.num_key_value_heads
    narrow = {"vocab_size": len(tokenizer), "hidden_size": 32 * queries, "intermediate_size": 128, "num_hidden_layers": 2}
    narrow |= {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": 32, "initializer_range": 0.1}
    narrow |= {"layer_types": None, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = type(whole)(**whole.to_dict() | narrow)
    save(config, tokenizer, tmp_path / "model", weights=True)
    small = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 2, "warmup_steps": 0}
    small |= {"eval_steps": 0, "baseline_probe": 4, "reward_workers": 0, "sinks": (), "report": False}
    chosen = recipe(name, model=str(tmp_path / "model"), output_dir=tmp_path / "run", **small)
    assert (chosen.forecast, chosen.use_peft, chosen.load_in_4bit, chosen.use_bnb_nested_quant) == ("stop", True, True, True)
    with GRPOTrainer(chosen, task=letters, reward_funcs=[share_of_vowels]) as trainer:
        model = trainer.policy.model
        before = {parameter: value.clone() for parameter, value in model.named_parameters()}
        steps = list(trainer.steps())
        moved = {parameter for parameter, value in model.named_parameters() if not torch.equal(value, before[parameter])}
    assert [step.step for step in steps] == [1, 2]
    assert all(step.forecast is not None and step.metrics["grad_norm"] > 0 for step in steps)
    assert all(step.metrics["sampling/kl"] < 1e-10 for step in steps)
    assert moved == {parameter for parameter in before if "lora_" in parameter}
    assert type(model).__name__ == config.architectures[0]
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == config.tie_word_embeddings
