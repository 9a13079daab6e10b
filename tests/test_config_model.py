from __future__ import annotations

from grpo_fast.config import Config
from grpo_fast.config_model import ModelSettings, group


def test_they_are_the_first_fields_of_a_configuration() -> None:
    assert list(Config.model_fields)[: len(ModelSettings.model_fields)] == list(ModelSettings.model_fields)
    assert Config(model="embedded", lora_r=8, use_peft=True).lora_r == 8


def test_groups_stand_in_the_order_of_the_help() -> None:
    places = [group(name).group[0].sort_key for name in ("Model", "LoRA", "Data", "Objective", "Run")]
    assert places == sorted(places)
