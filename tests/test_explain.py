from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from grpo_fast.explain import explain, meant


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    level: Literal["low", "high"] = "low"
    deadline_s: float = 1.0
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"levl": "low"}, "unknown configuration key 'levl'; did you mean 'level'?"),
        ({"zzzzzz": 1}, "unknown configuration key 'zzzzzz'"),
        ({"report_to": "wandb"}, "unknown configuration key 'report_to', a TRL name; here it corresponds to sinks"),
        ({"level": "HIGH"}, "level: Input should be 'low' or 'high' (got 'HIGH'); did you mean 'high'?"),
        ({"level": 3}, "level: Input should be 'low' or 'high' (got 3)"),
        ({"deadline_s": "5min"}, "deadline_s: * (got '5min'); give a plain number of seconds"),
        ({"level": None}, "level: * (got None); leave it out for the default"),
        ({"sizes": ["1,2"]}, "sizes.0: * (got '1,2'); separate several values by spaces"),
    ],
)
def test_key_value_and_fix_are_named(values: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**values)  # type: ignore[arg-type]
    [item] = caught.value.errors()
    assert fnmatchcase(explain(item, known=Settings.model_fields), told)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            "peft_config",
            "it is a TRL name, which here corresponds to use_peft with lora_r, lora_alpha and lora_target_modules. ",
        ),
        ("processing_class", "it is a TRL name, which here corresponds to nothing: the tokeniser is the model's. "),
        ("rollout_func", "it is a TRL name; leave it out, it has no counterpart: * (engine=...). "),
        ("level", "it is a setting, Config(level=...). "),
        ("reward_func", "did you mean 'reward_funcs'? "),
        ("zzzzzz", ""),
    ],
)
def test_a_part_that_there_is_not_is_told_what_may_be_meant(part: str, told: str) -> None:
    assert fnmatchcase(meant(part, parts=["reward_funcs", "engine"], settings=Settings.model_fields), told)
