from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cyclopts import Parameter

from grpo_fast.config import Config, ConfigError
from grpo_fast.recipes import recipe

EVERYTHING_SET: dict[str, Any] = {
    "model": 'a "quoted" \\ name',
    "revision": "main",
    "eval_split": "test",
    "use_peft": True,
    "lora_target_modules": ("q_proj", "v_proj"),
    "system_prompt": "Think.\nThen answer: ü ∑",
    "max_prompt_length": 7,
    "reward_funcs": ("accuracy", "my.module:score"),
    "reward_weights": (1.0, 0.1),
    "reward_range": (-0.5, 1.1),
    "temperature": 0.1 + 0.2,
    "stop": ("</answer>", "\n\n"),
    "learning_rate": 1e-6 / 3,
    "epsilon_high": 0.28,
    "max_tokens": 1e18,
    "max_flops": 2.5e20,
    "output_dir": Path("runs/some where"),
    "sinks": (),
}


def test_defaults_are_a_configuration() -> None:
    assert Config() == Config.parse({})
    assert Config().output_dir == Path("runs/grpo")


def test_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown configuration key 'learning_rat'; did you mean 'learning_rate'\?"):
        Config.parse({"learning_rat": 1e-3})


def test_unknown_key_far_from_any_other_has_no_guess() -> None:
    with pytest.raises(ConfigError, match=r"^unknown configuration key 'zzzzzz'$"):
        Config.parse({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_generations", "many"),
        ("num_generations", 2.5),
        ("reward_range", (0.0,)),
        ("sinks", ("teletype",)),
        ("loss_type", "ppo"),
        ("shuffle", "perhaps"),
        ("stop", 3),
    ],
)
def test_bad_type_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse({key: value})
    assert str(caught.value).startswith(key)
    shown = value[0] if isinstance(value, tuple) and isinstance(value[0], str) else value
    assert f"(got {shown!r})" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_generations", 1),
        ("lora_r", 0),
        ("prompts_per_step", 0),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.0),
        ("beta", -0.1),
        ("delta", 1.0),
        ("learning_rate", 0.0),
        ("adam_beta2", 1.0),
        ("max_steps", 0),
        ("max_tokens", 0.0),
        ("forecast_confidence", 0.5),
        ("forecast_confidence", 1.0),
        ("seed", -1),
        ("reward_timeout_s", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("max_money", float("inf")),
        ("reward_range", (0.0, float("inf"))),
    ],
)
def test_value_out_of_range_names_the_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        Config.parse({key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward_funcs": ("accuracy", "format"), "reward_weights": (1.0,)}, r"reward_weights has 1 values for 2 reward_funcs"),
        ({"loss_type": "cispo"}, r"cispo.* needs epsilon_high"),
        ({"reward_range": (1.0, 0.0)}, r"reward_range=\(1.0, 0.0\) must be \(lowest, highest\)"),
        ({"reward_range": (1.0, 1.0)}, r"must be \(lowest, highest\)"),
        ({"rollout": "vllm-http"}, r"if, and only if, rollout='vllm-http'; start a server with `grpo-fast serve`"),
        ({"vllm_pause_mode": "keep", "max_staleness": 1}, r"vllm_pause_mode='keep' with max_staleness=1 and rollout='tra"),
        (
            {"vllm_pause_mode": "keep", "rollout": "vllm", "max_staleness": 1, "use_peft": True},
            "vllm_pause_mode='keep' with use_peft: running requests would finish with the old adapter",
        ),
        ({"vllm_pause_mode": "keep", "rollout": "vllm"}, r"vllm_pause_mode='keep' with max_staleness=0 and rollout='vllm'"),
        ({"vllm_server_urls": ("http://127.0.0.1:8000",)}, r"rollout='transformers' with vllm_server_urls="),
        (
            {"vllm_importance_sampling_correction": True, "bypass_old_logprobs": True},
            r"bypass_old_logprobs=True.* the ratio is taken to the sampler already",
        ),
        ({"vllm_importance_sampling_clip_min": 3.0}, r"clip_min=3 must be below vllm_importance_sampling_clip_max=3"),
        ({"lora_r": 8}, r"lora_r=8 without use_peft; set use_peft too"),
        ({"lora_target_modules": ("q_proj",)}, r"lora_target_modules=\('q_proj',\) without use_peft"),
        (
            {"optim": "adamw_8bit", "offload_optimizer": True},
            r"optim='adamw_8bit' with offload_optimizer: only optim='adamw_torch_fused' supports that",
        ),
        ({"optim": "adamw_8bit", "weights_dtype": "bfloat16"}, r"optim='adamw_8bit' with weights_dtype='bfloat16'"),
        ({"weights_dtype": "bfloat16", "dtype": "float32"}, r"set dtype='bfloat16', or leave weights_dtype out"),
        ({"weights_dtype": "bfloat16", "use_peft": True}, r"adapters are float32, and frozen weights have the type dtype"),
        ({"load_in_4bit": True}, r"load_in_4bit=True without use_peft; set use_peft too"),
        ({"use_peft": True, "use_bnb_nested_quant": True}, r"use_bnb_nested_quant=True without load_in_4bit"),
        ({"use_peft": True, "lora_target_modules": ()}, r"give names of modules, or 'all-linear' alone"),
        ({"use_peft": True, "lora_target_modules": ("all-linear", "q_proj")}, r"or 'all-linear' alone"),
        ({"share_prompts": True, "padding_free": False}, r"share_prompts=True with padding_free=False"),
        ({"warmup_steps": 11, "max_steps": 10}, r"warmup_steps=11 exceeds max_steps=10"),
    ],
)
def test_fields_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse(values)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse({"learning_rat": 1, "beta": -1.0})
    assert "learning_rat" in str(caught.value)
    assert "beta" in str(caught.value)


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [(0.9, 0, 0.0), (1.0, 5, 0.0), (1.0, 0, 0.1)])
def test_any_cut_of_the_support_is_noticed(top_p: float, top_k: int, min_p: float) -> None:
    assert Config(top_p=top_p, top_k=top_k, min_p=min_p).truncates_support
    assert not Config().truncates_support


@pytest.mark.parametrize("values", [{}, EVERYTHING_SET], ids=["defaults", "everything"])
def test_toml_round_trip_is_exact(values: dict[str, Any], tmp_path: Path) -> None:
    config = Config.parse(values)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(file) == config
    assert Config.from_toml(file).to_toml() == config.to_toml()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        Config.from_toml(tmp_path / "none.toml")


def test_settings_in_a_table_are_told_where_to_stand(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[optimiser]\nlearning_rate = 1e-3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'optimiser': settings stand at the top of the file, in no table \[optimiser\]$"):
        Config.from_toml(file)


@pytest.mark.parametrize("field", ["max_steps", "dataset_size"])
def test_numbers_that_would_fill_memory_before_the_first_step_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: Input should be less than or equal to \d+ \(got 9{{20}}\)$"):
        Config.parse({field: 10**20 - 1})


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps({"max_step": 3}), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        Config.from_toml(file)


def test_replace_checks_and_leaves_the_original() -> None:
    config = Config(max_steps=10)
    assert config.replace(warmup_steps=3).warmup_steps == 3
    assert config.warmup_steps == 0
    with pytest.raises(ConfigError, match="exceeds"):
        config.replace(warmup_steps=11)
    with pytest.raises(ConfigError, match="did you mean 'warmup_steps'"):
        config.replace(warmup_step=1)


def test_settings_have_names() -> None:
    with pytest.raises(ConfigError, match=r"takes settings by name, and got 'runs/x'; as in Config\(output_dir='runs/mine'\)"):
        Config("runs/x")


def test_replace_leaves_unset_what_nobody_has_set() -> None:
    config = Config(max_steps=10).replace(seed=3).replace(warmup_steps=1)
    assert config.model_fields_set == {"max_steps", "seed", "warmup_steps"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1e-3}, "unknown configuration key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"report_to": "wandb"}, "unknown configuration key 'report_to', a TRL name; here it corresponds to sinks"),
        ({"beta": -1.0}, "beta: Input should be greater than or equal to 0 (got -1.0)"),
        ({"loss_type": "gpo"}, "(got 'gpo'); did you mean 'gspo'?"),
        ({"lora_r": 8}, "lora_r=8 without use_peft; set use_peft too"),
    ],
)
def test_every_way_to_make_one_tells_a_mistake_in_the_same_words(values: dict[str, Any], message: str) -> None:
    told = set()
    for make in (Config, lambda **given: Config.parse(given), Config().replace, partial(recipe, "embedded")):
        with pytest.raises(ConfigError) as caught:
            make(**values)
        told.add(str(caught.value))
    [text] = told
    assert text.endswith(message)
    assert "pydantic" not in text


def test_a_copy_is_the_same_configuration() -> None:
    config = Config(seed=3, stop=("x",))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize("name", list(Config.model_fields))
def test_every_field_is_described_and_belongs_to_a_group(name: str) -> None:
    field = Config.model_fields[name]
    assert field.description
    assert field.description.endswith(".")
    groups = [item.group for item in field.metadata if isinstance(item, Parameter)]
    assert len(groups) == 1
    assert groups[0], f"{name} stands in no help group"


def test_configuration_needs_no_torch(imported_by: Callable[[str], set[str]]) -> None:
    assert not {"torch", "transformers", "numpy"} & imported_by("import grpo_fast.config")


def test_a_warm_up_below_one_is_a_share_of_the_steps() -> None:
    assert Config.parse({"warmup_steps": 0.25, "max_steps": 30}).num_warmup_steps == 8
    assert Config.parse({"warmup_steps": 3, "max_steps": 30}).num_warmup_steps == 3
    assert Config.parse({"max_steps": 30}).num_warmup_steps == 0


def test_adapters_take_part_in_the_policys_own_passes_alone() -> None:
    assert Config().scoring_passes == ()
    assert Config(beta=0.1).scoring_passes == (False,)
    assert Config(top_entropy_quantile=0.2).scoring_passes == (True,)
    assert Config(beta=0.1, rollout="vllm").scoring_passes == (False, True)
