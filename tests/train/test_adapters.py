from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, Qwen3MoeConfig

from grpo_fast.compute import ModelShape
from grpo_fast.config import Config, ConfigError
from grpo_fast.metrics import PhaseTimer
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.adapters import Adapters
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import BasePolicy, Policy, count_parameters
from grpo_fast.train.policy_source import PolicySource, outline_of
from grpo_fast.train.step import Learner, TrainingSequence, build_batch
from grpo_fast.types import Group, TokenBatch

MOE: dict[str, Any] = {
    "vocab_size": 28,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def batch() -> TokenBatch:
    sequences = [TrainingSequence((4, 5, 6), (7, 8, 9, 10), (-1.0,) * 4, 1.0, in_loss=True)]
    return build_batch(sequences, [1.0], torch.device("cpu"))


def load(config: Config) -> Policy:
    return PolicySource(config).load()


def stir(policy: Policy) -> None:
    """Gives the adapters something to do: they start as no change at all."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def weights(policy: Policy, *, adapters: bool) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.model.named_parameters() if (".lora_" in name) == adapters}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_linear_layer_but_the_head_gets_an_adapter_and_nothing_else_trains(tiny_config: Callable[..., Config]) -> None:
    policy = load(tiny_config(use_peft=True, lora_r=4))
    trained = {name for name, value in policy.model.named_parameters() if value.requires_grad}
    assert trained == {name for name in trained if ".lora_" in name}
    assert {name.split(".")[-4] for name in trained} == set(LAYERS)
    assert len(trained) == 2 * 2 * len(LAYERS)  # A and B in each of two layers
    plain = load(tiny_config())
    assert count_parameters(policy.model) == sum(value.numel() for value in plain.model.parameters())
    shape, base = ModelShape.from_model(policy.model), ModelShape.from_model(plain.model)
    assert (shape.body_params, shape.head_params) == (base.body_params, base.head_params)
    assert shape.lora_params == sum(policy.model.get_parameter(name).numel() for name in trained)


def test_adapters_start_as_no_change_and_from_the_runs_seed(tiny_config: Callable[..., Config]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (load(tiny_config(use_peft=True, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(weights(first, adapters=True), weights(again, adapters=True))
    assert not equal(weights(first, adapters=True), weights(other, adapters=True))
    with torch.no_grad():
        assert torch.equal(first.scored_hidden_states(batch()), load(tiny_config()).scored_hidden_states(batch()))


@pytest.mark.parametrize(("settings", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 4}, 1.0)])
def test_the_update_is_scaled_as_peft_says(settings: dict[str, Any], scale: float, tiny_config: Callable[..., Config]) -> None:
    policy = load(tiny_config(**{"use_peft": True, "lora_r": 4, "lora_alpha": 8} | settings))
    layer = policy.model.model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": scale}
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in policy.model.modules())


def test_named_modules_alone_get_adapters(tiny_config: Callable[..., Config]) -> None:
    policy = load(tiny_config(use_peft=True, lora_target_modules=("q_proj", "down_proj")))
    assert {name.split(".")[-4] for name in weights(policy, adapters=True)} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("q_prj",), r"lora_target_modules=\['q_prj'\]: .*not found in the base model"),
        (
            ("q_prj", "v_proj", "1.mlp.up_proj", "2.mlp.up_proj"),
            r"no layer is called q_prj or 2\.mlp\.up_proj\. Linear layers are down_proj, gate_proj, k_proj, lm_head, ",
        ),
        (("q_proj", "lm_head"), r"puts an adapter on the head of LlamaForCausalLM"),
        (("embed_tokens",), r"puts an adapter on the embedding of LlamaForCausalLM"),
    ],
)
def test_bad_targets_are_told_before_weights_are_read(
    targets: tuple[str, ...], told: str, tiny_config: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> None:
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=told):
        PolicySource(tiny_config(model=str(tmp_path), use_peft=True, lora_target_modules=targets))


def test_without_peft_the_cure_is_told(tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.train.adapters.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"use_peft=True needs peft; `pip install 'grpo-fast\[lora\]'`"):
        PolicySource(tiny_config(use_peft=True))


def test_the_reference_is_the_same_module_with_its_adapters_off(tiny_config: Callable[..., Config]) -> None:
    policy, plain = load(tiny_config(use_peft=True)), load(tiny_config())
    stir(policy)
    assert policy.adapters is not None
    reference = BasePolicy(policy, policy.adapters)
    with torch.no_grad():
        expected, adapted = plain.scored_hidden_states(batch()), policy.scored_hidden_states(batch())
        assert torch.equal(reference.scored_hidden_states(batch()), expected)
        assert not torch.allclose(adapted, expected, atol=1e-3)
        assert torch.equal(policy.scored_hidden_states(batch()), adapted), "they are on again"
    assert reference.head(0.5).weight is policy.head(0.5).weight
    assert all(value.requires_grad for name, value in policy.model.named_parameters() if ".lora_" in name)


def test_adapters_come_back_on_after_an_error(tiny_config: Callable[..., Config]) -> None:
    policy = load(tiny_config(use_peft=True))
    assert policy.adapters is not None
    with pytest.raises(KeyError), policy.adapters.off():
        raise KeyError
    assert not policy.model.model.layers[0].mlp.up_proj.disable_adapters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_head_gets_no_gradient_and_the_adapters_theirs(
    checkpointing: bool, tiny_config: Callable[..., Config], make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are those of merged weights, by the chain rule: dB = s dW A^T, dA = s B^T dW."""
    fused_module: Any = import_module("grpo_fast.ops.fused_grpo")
    config = tiny_config(use_peft=True, lora_r=4, lora_alpha=8, gradient_checkpointing=checkpointing)
    policy = load(config)
    stir(policy)
    merged = load(tiny_config())
    with torch.no_grad():
        for name, module in policy.model.named_modules():
            if hasattr(module, "base_layer"):
                factors = module.lora_A["default"].weight, module.lora_B["default"].weight
                merged.model.get_parameter(f"{name}.weight").add_(2.0 * factors[1] @ factors[0])
    wanted: list[list[bool]] = []
    usual = fused_module._fused_grpo_fwd

    def watched(*arguments: Any) -> Any:
        wanted.append(arguments[-2])
        return usual(*arguments)

    monkeypatch.setattr(fused_module, "_fused_grpo_fwd", watched)
    groups = [make_group(number, [0.0, 1.0, 0.5]) for number in range(2)]
    found, expected = (gradients_of_a_step(which, config, groups) for which in (policy, merged))
    assert wanted == [[True, False, False], [True, True, False]]
    assert found.keys() == {name for name, _ in policy.model.named_parameters() if ".lora_" in name}
    for name, module in policy.model.named_modules():
        if hasattr(module, "base_layer"):
            a, b, dw = module.lora_A["default"].weight, module.lora_B["default"].weight, expected[f"{name}.weight"]
            assert dw.abs().max() > 1e-6
            torch.testing.assert_close(found[f"{name}.lora_B.default.weight"], 2.0 * dw @ a.T, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(found[f"{name}.lora_A.default.weight"], 2.0 * b.T @ dw, rtol=1e-4, atol=1e-7)


def gradients_of_a_step(policy: Policy, config: Config, groups: list[Group]) -> dict[str, torch.Tensor]:
    optimizer = build_optimizer(policy.model, config)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        found.update({name: value.grad.clone() for name, value in policy.model.named_parameters() if value.grad is not None})

    optimizer.register_step_pre_hook(keep)
    learner = Learner(config.replace(max_grad_norm=0.0), policy, optimizer, reference=None)
    learner.update(groups, learning_rate=0.0, timer=PhaseTimer())
    return found


def test_a_frozen_base_takes_the_type_of_computation(
    tiny_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]]
) -> None:
    config = tiny_config(use_peft=True, dtype="bfloat16", beta=0.1, learning_rate=1e-2)
    with GRPOTrainer(config, task=letters, reward_funcs=[share_of_vowels]) as trainer:
        policy = trainer.policy
        base, adapters = weights(policy, adapters=False), weights(policy, adapters=True)
        steps = list(trainer.steps())
        assert equal(weights(policy, adapters=False), base)
        assert all(not torch.equal(value, adapters[name]) for name, value in weights(policy, adapters=True).items())
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    assert all(step.metrics["sampling/kl"] < 5e-3 for step in steps)
    assert steps[0].metrics["kl"] < 1e-6 < steps[-1].metrics["kl"]
    assert {value.dtype for value in load(tiny_config(dtype="bfloat16")).model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_checkpoint_is_the_adapters_in_pefts_format(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config(use_peft=True, lora_r=4, revision=None)
    policy, again = load(config), load(config)
    stir(policy)
    policy.save(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"] == config.model
    again.load_weights(tmp_path)
    assert equal(weights(again, adapters=True), weights(policy, adapters=True))
    base = AutoModelForCausalLM.from_pretrained(config.model)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    with torch.no_grad():
        ids = torch.tensor([[4, 5, 6, 7]])
        assert torch.equal(theirs(ids).logits, policy.model(ids).logits)


def test_adapters_of_other_settings_are_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    load(tiny_config(use_peft=True, lora_target_modules=("q_proj",))).save(tmp_path)
    with pytest.raises(ValueError, match="does not fit the model's adapters: 24 are missing and 0 unknown"):
        load(tiny_config(use_peft=True)).load_weights(tmp_path)


def test_merging_leaves_a_plain_model_that_computes_the_same(tiny_config: Callable[..., Config]) -> None:
    policy = load(tiny_config(use_peft=True))
    stir(policy)
    assert policy.adapters is not None
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        expected = policy.model(ids).logits
        merged = policy.adapters.merge()
        assert torch.allclose(merged(ids).logits, expected, atol=1e-6)
    assert merged.state_dict().keys() == load(tiny_config()).model.state_dict().keys()


def trace(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("time", "seconds", "energy", "money", "budget", "mfu")
    return [{name: value for name, value in row.items() if not any(word in name for word in clock)} for row in rows]


def test_a_resumed_run_is_the_straight_one(
    tiny_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]], tmp_path: Path
) -> None:
    """With a reference, whose adapters are off, and updates enough for the two to part."""
    settings = {"use_peft": True, "beta": 0.1, "learning_rate": 1e-2, "reward_workers": 0}
    given: dict[str, Any] = {"task": letters, "reward_funcs": [share_of_vowels]}
    with GRPOTrainer(tiny_config(output_dir=tmp_path / "straight", **settings), **given) as trainer:
        base = weights(trainer.policy, adapters=False)
        trainer.train()
        assert equal(weights(trainer.policy, adapters=False), base), "the base never moves"
        straight = weights(trainer.policy, adapters=True)
    config = tiny_config(output_dir=tmp_path / "broken", **settings)
    with GRPOTrainer(config, **given) as trainer:
        for step in trainer.steps():
            if step.step == 4:
                break
    with GRPOTrainer.resume(tmp_path / "broken", **given) as trainer:
        trainer.train()
        assert equal(weights(trainer.policy, adapters=True), straight)
    found = trace(tmp_path / "straight")
    assert trace(tmp_path / "broken") == found
    assert found[-1]["kl"] > 1e-4
    assert all(row["sampling/kl"] < 1e-10 for row in found), "what was sampled from is what is trained"
    assert json.loads((tmp_path / "straight" / "facts.json").read_text(encoding="utf-8"))["lora"] is True
    files = {file.name: file.stat().st_size for file in (tmp_path / "straight" / "checkpoint-6").iterdir()}
    assert "model.safetensors" not in files


def test_adapters_know_no_model_without_peft_layers(tiny_config: Callable[..., Config]) -> None:
    """On sizes alone, too: a plan reads them from a model that has no weights."""
    outline = PolicySource(tiny_config(use_peft=True, lora_r=2)).outline()
    assert all(value.is_meta for value in outline.parameters())
    assert ModelShape.from_model(outline).lora_params > 0
    assert isinstance(Adapters(PolicySource(tiny_config()).outline(), tiny_config(use_peft=True)), Adapters)


@pytest.mark.slow
def test_the_embedded_model_learns_by_adapters_alone(short_embedded_run: Callable[..., float]) -> None:
    assert short_embedded_run(use_peft=True, learning_rate=2e-3) >= 0.95


@pytest.mark.parametrize(
    ("model", "adapted"),
    [
        (Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=32), {"gate", "experts", *LAYERS[:4]}),
        (GPT2Config(vocab_size=28, n_embd=32, n_layer=1, n_head=2), {"c_attn", "c_proj", "c_fc"}),
    ],
    ids=["experts", "layers of GPT-2"],
)
def test_layers_of_other_kinds_get_adapters_and_nothing_is_told(model: PretrainedConfig, adapted: set[str]) -> None:
    outline = outline_of(model, Config(use_peft=True, lora_r=4))
    trained = {name for name, weight in outline.named_parameters() if weight.requires_grad}
    layers = {name.partition(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2] for name in trained}
    assert layers == adapted
