from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.policy_source import PolicySource, pick_device


def test_the_embedded_model_loads() -> None:
    source = PolicySource(Config(max_completion_length=16))
    assert not source.chat
    assert source.max_prompt_length == source.context_length - 16
    policy = source.load()
    assert policy.autocast_dtype is None
    assert policy.device.type == "cpu"
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load model '.*/nowhere'.*Give a directory with config\.json"):
        PolicySource(Config(model=str(tmp_path / "nowhere")))


def test_directory_without_weights_is_named(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    source = PolicySource(Config(model=str(tmp_path), max_completion_length=8))
    with pytest.raises(ConfigError, match="cannot load model"):
        source.load()


def test_damaged_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    source = PolicySource(Config(model=str(tmp_path), max_completion_length=8))
    with pytest.raises(ConfigError, match="cannot load model"):
        source.load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"device='cuda' but torch sees no GPU; run `grpo-fast doctor`"):
        PolicySource(Config(device="cuda"))
    assert pick_device("auto") == torch.device("cpu")


def test_completion_that_leaves_no_room_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_completion_length=64 leaves no room .* context of 64 tokens"):
        PolicySource(Config(model=str(tiny_model), max_completion_length=64))
    source = PolicySource(Config(model=str(tiny_model), max_completion_length=60, max_prompt_length=10))
    assert source.max_prompt_length == 4
    assert PolicySource(Config(model=str(tiny_model), max_completion_length=60, max_prompt_length=2)).max_prompt_length == 2


def test_an_outline_has_the_model_s_sizes_and_no_weights(tiny_config: Callable[..., Config]) -> None:
    source = PolicySource(tiny_config())
    outline, model = source.outline(), source.load().model
    assert {name: weight.shape for name, weight in outline.named_parameters()} == {
        name: weight.shape for name, weight in model.named_parameters()
    }
    assert all(weight.is_meta for weight in outline.parameters())
