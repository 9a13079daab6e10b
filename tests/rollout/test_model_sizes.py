from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout.model_sizes import differences, model_sizes, served_sizes

MODEL = str(embedded_model_dir())


def test_a_server_of_the_same_model_does_not_differ() -> None:
    sizes = model_sizes(AutoConfig.from_pretrained(MODEL))
    assert sizes["num_hidden_layers"] > 0
    assert served_sizes({"model": MODEL, "revision": None, "hf_overrides": {}, "hf_config_path": None}) == sizes
    assert differences(sizes, sizes) == ""


def test_every_size_that_differs_is_named(tmp_path: Path) -> None:
    policy = LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=100)
    LlamaConfig(num_hidden_layers=3, hidden_size=64, vocab_size=101).save_pretrained(tmp_path)
    found = differences(served_sizes({"model": str(tmp_path)}), model_sizes(policy))
    assert found == "num_hidden_layers 3 and not 2, vocab_size 101 and not 100"


def test_another_window_of_attention_is_named_though_weights_fit(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100}
    MistralConfig(**small, sliding_window=4096).save_pretrained(tmp_path)
    served = served_sizes({"model": str(tmp_path)})
    assert differences(served, model_sizes(MistralConfig(**small, sliding_window=None))) == "sliding_window 4096 and not 0"
    assert differences(served, model_sizes(MistralConfig(**small, sliding_window=4096))) == ""


@pytest.mark.parametrize(
    "settings", [{"model": "no/such-model"}, {"model": MODEL, "hf_overrides": {"vocab_size": 3}}, {"model": "/no/such/place"}]
)
def test_what_cannot_be_known_is_no_difference(settings: dict[str, Any]) -> None:
    assert served_sizes(settings) == {}


def test_only_what_both_tell_is_compared() -> None:
    assert differences({"hidden_size": 3}, {"vocab_size": 4}) == ""
