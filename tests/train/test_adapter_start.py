from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.adapter_start import find_start
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.export import export_merged
from grpo_fast.train.plan import PlanInputs, make_plan
from grpo_fast.train.policy import BasePolicy, Policy
from grpo_fast.train.policy_source import PolicySource

# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[4, 5, 6, 7]])
BATCH = build_batch([TrainingSequence((4, 5, 6), (7, 8, 9, 10), (-1.0,) * 4, 1.0, in_loss=True)], [1.0], torch.device("cpu"))


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    """Adapters as peft leaves them, in no type, rank, scale or modules of ours, without a tokeniser."""
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"
    )
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def change(directory: Path, **settings: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = policy.model(IDS).logits
    return found


def adapters(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in policy.model.named_parameters() if ".lora_" in name}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_policy_begins_from_what_peft_saved(saved: Path, tiny_model: Path, tiny_config: Callable[..., Config]) -> None:
    policy = PolicySource(tiny_config(model=str(saved), use_peft=True)).load()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = base(IDS).logits
    theirs = peft.PeftModel.from_pretrained(base, str(saved)).eval()
    with torch.no_grad():
        assert torch.equal(logits(policy), theirs(IDS).logits)
    assert not torch.allclose(logits(policy), before, atol=1e-2)
    trained = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert trained == set(adapters(policy))
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "v_proj"}
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in policy.model.modules())


def test_the_adapters_settings_are_those_of_the_run(saved: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(model=str(saved), use_peft=True)
    own = {"lora_r": 4, "lora_alpha": 8, "use_rslora": True, "lora_target_modules": ("q_proj", "v_proj")}
    assert PolicySource(config).config == config.replace(**own)
    same = config.replace(**own | {"lora_target_modules": ("v_proj", "q_proj")})
    assert PolicySource(same).config.lora_r == 4
    outline = PolicySource(config).outline()
    assert sum(weight.numel() for weight in outline.parameters() if weight.requires_grad) == 2 * 4 * (32 + 64 + 32 + 32)
    assert make_plan(config, PlanInputs()).facts.facts.lora


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lora_r": 8}, "settings of their own: lora_r=8 is 4 there; leave it out"),
        (
            {"lora_alpha": 64, "lora_target_modules": ("q_proj",)},
            r"lora_alpha=64 is 8 there, lora_target_modules=\('q_proj',\)",
        ),
        (
            {"use_peft": False},
            "holds adapters alone: set use_peft to train them on, or merge them first, by peft's merge_and_unload",
        ),
        ({"revision": "main"}, "only hub models have revisions"),
        ({"base_model": "/nowhere/at/all"}, "cannot load base model '/nowhere/at/all': there is no such directory"),
    ],
)
def test_what_contradicts_the_adapters_is_told(
    given: dict[str, Any], told: str, saved: Path, tiny_config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=told):
        PolicySource(tiny_config(**{"model": str(saved), "use_peft": True} | given))


def test_another_base_than_that_of_the_run_that_trained_them_is_told(
    saved: Path, tiny_config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(model=str(saved), use_peft=True)
    for then in (False, True):
        (saved.parent / "config.toml").write_text(config.replace(load_in_4bit=then).to_toml(), encoding="utf-8")
        PolicySource(config)
    told = f"the adapters in {saved} were trained with load_in_4bit=True, and this run has load_in_4bit=False: it begins over "
    assert [record.getMessage() for record in caplog.records] == [f"{told}other base weights than they were made for"]


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ".*q_proj"},
        {"a_setting_to_come": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_that_are_more_than_rank_scale_and_modules_are_refused(
    settings: dict[str, Any], saved: Path, tiny_config: Callable[..., Config]
) -> None:
    change(saved, **settings)
    with pytest.raises(ConfigError, match=f"cannot begin from the adapters in .*{next(iter(settings))}="):
        PolicySource(tiny_config(model=str(saved), use_peft=True))


def test_damage_is_told_before_the_base_is_read(
    saved: Path, tiny_model: Path, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny_config(model=str(saved), base_model=str(bare), use_peft=True)
    PolicySource(config)  # the weights of the base are not there, and are not missed yet
    weights = load_file(saved / "adapter_model.safetensors")
    name = next(iter(weights))
    for damaged, told in (
        ({each: value for each, value in weights.items() if each != name}, "1 are missing and 0 unknown"),
        (weights | {name: weights[name][:2]}, f"{name} is .* there and .* here"),
        (weights | {"lm_head.weight": torch.zeros(2)}, "0 are missing and 1 unknown, such as lm_head.weight"),
    ):
        save_file({each: value.contiguous() for each, value in damaged.items()}, saved / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=f"cannot begin from the adapters in .*{told}"):
            PolicySource(config)
    (saved / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="cannot begin from the adapters in"):
        PolicySource(config)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"there is no adapter_model\.safetensors beside adapter_config\.json"):
        PolicySource(config)
    (saved / "adapter_config.json").write_text("[]", encoding="utf-8")
    save_file(weights, saved / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        PolicySource(config)


def test_a_base_that_has_moved_is_named(
    saved: Path, tiny_model: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = logits(PolicySource(tiny_config(model=str(saved), use_peft=True)).load())
    config = tiny_config(model=str(saved), use_peft=True)
    for base, told in (
        ("/nowhere/at/all", "cannot load base model .*; base_model says where it is now"),
        (None, "does not say over which model they were trained; set base_model"),
    ):
        change(saved, base_model_name_or_path=base)
        with pytest.raises(ConfigError, match=told):
            PolicySource(config)
    monkeypatch.chdir(tiny_model.parent)
    there = config.replace(base_model=tiny_model.name)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(PolicySource(there).load()), expected)
    with pytest.raises(ConfigError, match=r"base_model='embedded' with model=.*, which holds no adapters; leave it out"):
        PolicySource(tiny_config(use_peft=True, base_model="embedded"))
    with pytest.raises(ConfigError, match="base_model='embedded' without use_peft; set use_peft too"):
        tiny_config(model=str(saved), base_model="embedded")


def test_the_reference_is_the_start_and_not_the_base(saved: Path, tiny_config: Callable[..., Config]) -> None:
    """As in TRL, whose reference of a model with adapters is a frozen copy of them."""
    policy = PolicySource(tiny_config(model=str(saved), use_peft=True)).load()
    assert policy.adapters is not None
    reference = BasePolicy(policy, policy.adapters)
    with torch.no_grad():
        start = policy.scored_hidden_states(BATCH)
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
        moved, after = policy.scored_hidden_states(BATCH), adapters(policy)
        assert torch.equal(reference.scored_hidden_states(BATCH), start)
        assert not torch.allclose(moved, start, atol=1e-2)
        assert torch.equal(policy.scored_hidden_states(BATCH), moved), "the adapters are the policy's own again"
    assert equal(adapters(policy), after)
    with pytest.raises(KeyError), policy.adapters.holding(reference._start or {}):
        raise KeyError
    assert equal(adapters(policy), after)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_goes_on_from_saved_adapters_and_is_resumed_and_exported(
    checkpointing: bool,
    saved: Path,
    tiny_config: Callable[..., Config],
    letters: Task,
    share_of_vowels: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    settings = {"model": str(saved), "use_peft": True, "beta": 0.1, "learning_rate": 1e-2, "save_total_limit": 5}
    settings |= {"gradient_checkpointing": checkpointing}
    given: dict[str, Any] = {"task": letters, "reward_funcs": [share_of_vowels]}
    with GRPOTrainer(tiny_config(output_dir=tmp_path / "straight", **settings), **given) as trainer:
        start = adapters(trainer.policy)
        steps = list(trainer.steps())
        straight, expected = adapters(trainer.policy), logits(trainer.policy)
        known = Config.from_toml(tmp_path / "straight" / "config.toml")
        for config in (trainer.config, known):
            assert (config.lora_r, config.lora_alpha, config.use_rslora) == (4, 8, True), "the adapters' own are recorded"
            assert config.lora_target_modules == ("q_proj", "v_proj")
    assert equal(start, adapters(PolicySource(tiny_config(model=str(saved), use_peft=True)).load()))
    assert not equal(start, straight)
    assert steps[0].metrics["kl"] < 1e-6
    assert steps[-1].metrics["kl"] > 1e-3
    assert all(step.metrics["sampling/kl"] < 1e-10 for step in steps), "what was sampled from is what is trained"
    with GRPOTrainer(tiny_config(output_dir=tmp_path / "broken", **settings), **given) as trainer:
        for step in trainer.steps():
            if step.step == 4:
                break
    with GRPOTrainer.resume(tmp_path / "broken", **given) as trainer:
        rest = list(trainer.steps())
        assert equal(adapters(trainer.policy), straight)
    assert rest[-1].metrics["kl"] == steps[-1].metrics["kl"], "its reference is the start, not the checkpoint"
    export_merged(tmp_path / "straight" / "checkpoint-6", tmp_path / "whole")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(IDS).logits
    assert torch.allclose(merged, expected, atol=1e-5)


def test_a_checkpoint_of_a_run_with_adapters_is_a_start(
    tiny_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]], tmp_path: Path
) -> None:
    config = tiny_config(use_peft=True, lora_r=2, learning_rate=1e-2)
    with GRPOTrainer(config, task=letters, reward_funcs=[share_of_vowels]) as trainer:
        trainer.train()
        expected, trained = logits(trainer.policy), adapters(trainer.policy)
    start = config.output_dir / "checkpoint-6"
    with pytest.raises(ConfigError, match=f"set use_peft .* by `grpo-fast export {start} --output DIRECTORY`"):
        PolicySource(tiny_config(model=str(start)))
    found = PolicySource(tiny_config(model=str(start), use_peft=True)).load()
    assert equal(adapters(found), trained)
    assert torch.equal(logits(found), expected)
    found.save(tmp_path / "again")
    third = PolicySource(tiny_config(model=str(tmp_path / "again"), use_peft=True))
    assert torch.equal(logits(third.load()), expected)
    assert third.config.lora_r == 2


def test_adapters_of_the_hub(
    saved: Path, tiny_model: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its cache, which is all that is read where the hub is not asked."""
    expected = logits(PolicySource(tiny_config(model=str(saved), use_peft=True)).load())
    change(saved, base_model_name_or_path="some/base", revision="old")
    for name, source, commit in (("some--adapters", saved, "12"), ("some--base", tiny_model, "34")):
        home = tmp_path / "hub" / f"models--{name}"
        shutil.copytree(source, home / "snapshots" / commit)
        (home / "refs").mkdir()
        (home / "refs" / ("old" if source == tiny_model else "main")).write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = PolicySource(tiny_config(model="some/adapters", use_peft=True))
    assert (source.config.lora_r, source.config.revision) == (4, "old")
    assert torch.equal(logits(source.load()), expected)
    whole = tiny_config(model="some/base", revision="old", use_peft=True)
    assert find_start(whole, "some/base", local_files_only=True) is None
    assert PolicySource(whole).config is whole
