from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from grpo_fast import GRPOTrainer
from grpo_fast.config import Config, ConfigError
from grpo_fast.train.parts import Replacements
from grpo_fast.trl_names import _USUAL, HERE, NOT_HERE, here, value_here

PAGE = Path(__file__).parents[1] / "docs" / "from-trl.md"


def test_a_setting_of_trl_is_told_by_its_name_here() -> None:
    with pytest.raises(ConfigError, match=r"unknown configuration key 'report_to', a TRL name; here it corresponds to sinks"):
        Config.parse({"report_to": "wandb"})


def test_the_names_are_trls_and_not_ours() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    theirs = {
        field.name for kind in (trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments) for field in dataclasses.fields(kind)
    }
    theirs |= set(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    theirs |= {"logging_dir", "warmup_ratio"}  # of transformers before 5
    assert set(HERE) | set(NOT_HERE) <= theirs
    assert not set(HERE) & set(NOT_HERE)
    assert not (set(HERE) | set(NOT_HERE)) & set(Config.model_fields)


def test_no_setting_of_trl_is_unknown() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    theirs = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    theirs |= (
        set(inspect.signature(trl.GRPOTrainer.__init__).parameters) - {"self"} - set(inspect.signature(GRPOTrainer).parameters)
    )
    theirs -= set(Replacements.__annotations__)
    unknown = sorted(theirs - set(Config.model_fields) - set(HERE) - set(NOT_HERE))
    assert not unknown, f"neither the configuration nor trl_names.py knows {unknown}"


def test_a_setting_without_a_counterpart_is_told_why() -> None:
    with pytest.raises(
        ConfigError, match=r"'tf32', a TRL name; leave it out, it has no counterpart: torch and its environment"
    ):
        Config.parse({"tf32": True})


def test_usual_names_are_told_without_a_word_of_trl() -> None:
    assert here("lr") == "; here it corresponds to learning_rate"
    assert here("report_to") == ", a TRL name; here it corresponds to sinks"
    assert here("learning_rate") == here("nonsense") == ""
    assert not set(_USUAL) & (set(Config.model_fields) | set(HERE))
    with pytest.raises(ConfigError, match=r"unknown configuration key 'lora_rank'; here it corresponds to lora_r$"):
        Config.parse({"lora_rank": 8})


def test_servers_are_waited_for_as_long_as_trl_waits() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    [theirs] = [field for field in dataclasses.fields(trl.GRPOConfig) if field.name == "vllm_server_timeout"]
    assert Config.model_fields["vllm_server_timeout"].default == theirs.default


@pytest.mark.parametrize("name", [*HERE, *NOT_HERE])
def test_the_page_on_trl_has_them_all(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOT_HERE)
def test_the_page_says_why_in_the_words_of_the_error(name: str) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert re.search(rf"`{name}`(, `\w+`)*: {re.escape(NOT_HERE[name])}\.", text)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"scale_rewards": True}, r"\(got True\); give 'group'$"),
        ({"scale_rewards": False}, r"\(got False\); give 'none'$"),
        ({"top_k": -1}, r"\(got -1\); 0 keeps all tokens$"),
        ({"max_steps": -1}, r"\(got -1\); give the steps: prompts over prompts_per_step make an epoch$"),
        ({"sinks": "none"}, r"\(got 'none'\); give none: sinks=\[\]"),
        ({"fsdp": ""}, r"\(got ''\); leave it out, or give 'no_shard'$"),
        ({"eval_steps": 0.1}, r"\(got 0\.1\); give a number of steps"),
        ({"save_steps": 0.5}, r"\(got 0\.5\); give a number of steps"),
        ({"min_p": None}, r"\(got None\); leave it out for the default$"),
    ],
)
def test_a_value_of_trl_is_told_by_what_it_is_here(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Config.parse(values)


def test_values_that_are_wrong_everywhere_get_no_such_hint() -> None:
    assert value_here("top_k", -2) == value_here("scale_rewards", 1) == value_here("learning_rate", -1) == ""
    assert value_here("save_steps", 1.5) == value_here("eval_steps", 0) == ""
